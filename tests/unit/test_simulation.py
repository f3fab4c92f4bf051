"""Thousands of interleavings of drivers, ranks, retention and gc; and that each protection in the code is needed.

benchmarks/simulate.py runs many more seeds than there is time for here.
"""

import pytest
from simulation import World, told
from simulation_checks import INVARIANTS
from simulation_mutations import MUTATIONS, first_failure

SEEDS = range(250)  # at most, until a mutation is found; benchmarks/simulate.py runs thousands
WITHOUT_HARM = range(180)


def test_nothing_is_lost_in_any_interleaving():
    seen = sum((run(seed).counts for seed in WITHOUT_HARM), start=World(0).counts)
    assert seen["operations"] > 100 * len(WITHOUT_HARM)
    for what in (
        "kills",
        "stops",
        "ambiguous",
        "zombies",
        "takeovers",
        "fenced",
        "commits",
        "damaged",
        "removed by gc",
    ):
        assert seen[what] >= 20, f"{what}: {seen}"


def run(seed: int) -> World:
    world = World(seed).run()
    assert not world.violations, told(world)
    return world


def test_a_seed_is_one_interleaving():
    for seed in range(5):
        one, other = World(seed).run(), World(seed).run()
        assert one.trace == other.trace and one.counts == other.counts
    assert one.trace != World(5).run().trace


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_without_this_an_invariant_breaks(mutation):
    world = first_failure(SEEDS, mutation)
    assert world is not None, f"{len(SEEDS)} seeds and nobody misses {mutation.what}"
    print(f"{mutation.what}: found by seed {world.seed}")
    assert world.violations[0].split(":")[0] in INVARIANTS
    assert not World(world.seed).run().violations, "the seed fails without the mutation too"
    text = told(world)
    assert text.startswith(f"seed {world.seed}: ") and len(text.splitlines()) > 10, "a trace to read"
