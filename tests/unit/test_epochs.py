"""The plan of steps: exact repeats per epoch, the same whatever runs it, and a cursor that is the step."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling.epochs import StepPlan, plan_steps
from modeling.errors import CheckpointError

BUDGETS = {"max_tokens": 100, "max_tiles": 12}
FACTORS = [0, 0.3, 0.5, 1, 1.5, 2, 2.25, 4]


def index(n: int = 200, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {"tokens": rng.integers(5, 60, n), "tiles": rng.integers(0, 5, n), "repeats": np.ones(n)} | BUDGETS


@settings(max_examples=60, deadline=None)
@given(
    factors=st.lists(st.sampled_from(FACTORS), min_size=1, max_size=40),
    global_batch=st.integers(1, 9),
    seed=st.integers(0, 3),
    policy=st.sampled_from(["best_fit", "official_first_fit"]),
    repeat=st.sampled_from(["sampled", "official_prefix"]),
)
def test_every_epoch_has_exactly_its_repeats(factors, global_batch, seed, policy, repeat):
    factors = np.array([*factors, 1.0])
    rng = np.random.default_rng(seed)
    tokens, tiles = rng.integers(1, 60, len(factors)), rng.integers(0, 6, len(factors))
    arguments = dict(global_batch=global_batch, seed=seed, policy=policy, repeat=repeat, epochs=2, **BUDGETS)
    plan = plan_steps(tokens, tiles, factors, **arguments)
    trained = [int(row) for step in range(plan.steps) for pack in plan.step(step) for row in pack]
    assert sorted(trained) == list(range(len(plan.sample)))
    for pack in plan.packs:
        assert tokens[plan.sample[pack]].sum() <= 100 and tiles[plan.sample[pack]].sum() <= 12
    for epoch in range(2):
        counts = np.bincount(plan.sample[plan.epoch == epoch], minlength=len(factors))
        for factor in set(factors.tolist()):
            members, extra = factors == factor, factor % 1
            assert set(counts[members] - int(factor)) <= {0, 1}
            share = extra * members.sum()
            expected = int(share + 0.5) if repeat == "sampled" else int(share)
            assert (counts[members] - int(factor)).sum() == expected
        copies = Counter(zip(plan.sample[plan.epoch == epoch].tolist(), plan.copy[plan.epoch == epoch].tolist()))
        assert set(copies) == {(sample, copy) for sample, count in enumerate(counts) for copy in range(count)}
        assert set(copies.values()) == {1}
    assert plan.digest() == plan_steps(tokens, tiles, factors, **arguments).digest()


@settings(max_examples=30, deadline=None)
@given(steps=st.integers(1, 40), more=st.integers(0, 40), global_batch=st.integers(1, 7))
def test_a_longer_plan_begins_with_the_shorter(steps, more, global_batch):
    def triples(plan):
        return [
            [[(plan.sample[o], plan.epoch[o], plan.copy[o]) for o in pack] for pack in plan.step(step)]
            for step in range(steps)
        ]

    short, long = (plan_steps(**index(30), global_batch=global_batch, seed=3, steps=n) for n in (steps, steps + more))
    assert (short.steps, long.steps) == (steps, steps + more)
    assert triples(short) == triples(long)
    assert all(len(short.step(step)) == global_batch for step in range(steps))
    with pytest.raises(IndexError):
        short.step(steps)


@pytest.mark.parametrize(
    ("policy", "digest"),
    [
        ("best_fit", "fd77c9a285a73c301f84be166b23d124ab116909e95050e41999f4637c63d340"),
        ("official_first_fit", "dcfc1bddf83f216458c0a860a0858ee3e5137d1cef7b7366bd082bc3bb1c0e07"),
    ],
)
def test_the_plan_is_the_same_everywhere_and_ever(policy, digest):
    """Computed once, before plans became flat. Where it changes, what stages train changes: raise their version."""
    rng, n = np.random.default_rng(7), 3000
    tokens, tiles = rng.integers(5, 60, n), rng.integers(0, 5, n)
    plan = plan_steps(
        tokens, tiles, rng.choice([0.3, 1, 1.5, 2], n), groups=rng.integers(0, 4, n), costs=tokens + 64.0 * tiles,
        global_batch=7, seed=3, steps=70, policy=policy, **BUDGETS,
    )  # fmt: skip
    assert plan.digest() == digest


def test_a_plan_holds_no_object_per_pack():
    plan = plan_steps(**index(3000), global_batch=4, seed=0, epochs=2)
    arrays = (plan.packs.values, plan.sample, plan.epoch, plan.copy)
    assert all(array.dtype == np.int32 and len(array) == 6000 for array in arrays)
    assert isinstance(plan.step(0), list) and all(isinstance(pack, np.ndarray) for pack in plan.step(0))


def test_steps_run_through_as_many_epochs_as_they_need():
    plan = plan_steps(**index(60), global_batch=4, seed=0, steps=50)
    packed = [plan.epoch[pack] for pack in plan.packs]
    assert all(len(set(epochs)) == 1 for epochs in packed)  # no pack mixes epochs
    order = [int(epochs[0]) for epochs in packed]
    assert order == sorted(order) and order[-1] >= 3
    trained = Counter(int(o) for pack in plan.packs for o in pack)
    complete = np.flatnonzero(plan.epoch < order[-1])
    assert all(trained[int(o)] == 1 for o in complete) and max(trained.values()) == 1
    firsts = [plan.sample[pack].tolist() for pack in plan.packs if plan.epoch[pack[0]] == 0]
    seconds = [plan.sample[pack].tolist() for pack in plan.packs if plan.epoch[pack[0]] == 1]
    assert firsts != seconds


def test_fractions_of_an_epoch_and_the_short_last_step():
    whole = plan_steps(**index(), global_batch=4, seed=0, epochs=1)
    half = plan_steps(**index(), global_batch=4, seed=0, epochs=0.5)
    more = plan_steps(**index(), global_batch=4, seed=0, epochs=1.5)
    assert abs(len(half.packs) - len(whole.packs) / 2) <= 1
    assert len(more.packs) > len(whole.packs)
    for plan in (whole, half, more):
        assert plan.steps == -(-len(plan.packs) // 4)
        assert all(len(plan.step(step)) == 4 for step in range(plan.steps - 1))
        assert sum(len(plan.step(step)) for step in range(plan.steps)) == len(plan.packs)


def test_sampled_fractions_change_with_the_epoch_and_a_prefix_does_not():
    arguments = index() | {"repeats": np.full(200, 0.5), "global_batch": 4, "seed": 0, "epochs": 2}

    def drawn(repeat):
        plan = plan_steps(**arguments, repeat=repeat)
        return [set(plan.sample[plan.epoch == epoch].tolist()) for epoch in range(2)]

    first, second = drawn("sampled")
    assert len(first) == len(second) == 100 and first != second
    assert drawn("official_prefix") == [set(range(100))] * 2


def test_fractions_are_taken_of_each_dataset():
    arguments = index(40) | {"repeats": np.full(40, 0.5), "groups": np.arange(40) // 10, "global_batch": 4, "seed": 1}
    plan = plan_steps(**arguments, epochs=1)
    assert np.bincount(plan.sample // 10).tolist() == [5, 5, 5, 5]
    prefix = plan_steps(**arguments, epochs=1, repeat="official_prefix")
    assert sorted(prefix.sample.tolist()) == [base + i for base in (0, 10, 20, 30) for i in range(5)]


def test_packs_of_like_cost_share_a_step():
    arguments = index(3000) | {"global_batch": 8, "seed": 0, "epochs": 2}
    costs = np.random.default_rng(1).pareto(2, 3000)
    plan = plan_steps(**arguments, costs=costs)
    cost = np.array([costs[plan.sample[pack]].sum() for pack in plan.packs])
    full = cost[: len(cost) // 8 * 8].reshape(-1, 8)
    shuffled = np.random.default_rng(0).permutation(cost)[: full.size].reshape(-1, 8)

    def waste(steps):
        return (steps.max(axis=1) / steps.mean(axis=1)).mean()

    assert waste(full) < 1 + (waste(shuffled) - 1) / 2
    means = full.mean(axis=1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3  # dear and cheap steps follow in no order
    assert not all(a >= b for a, b in pairwise(means))


def test_saved_and_loaded(tmp_path):
    plan = plan_steps(**index(), global_batch=4, seed=0, steps=20)
    plan.save(tmp_path / "plan")
    loaded = StepPlan.load(tmp_path / "plan")
    assert loaded.digest() == plan.digest()
    assert [pack.tolist() for pack in loaded.packs] == [pack.tolist() for pack in plan.packs]
    for name in ("sample", "epoch", "copy"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(plan, name))
    assert (loaded.global_batch, loaded.steps) == (4, 20)
    other = plan_steps(**index(), global_batch=4, seed=1, steps=20)
    assert other.digest() != plan.digest()


def test_a_damaged_plan_is_refused(tmp_path):
    plan = plan_steps(**index(), global_batch=4, seed=0, steps=5)
    path = tmp_path / "plan"
    plan.save(path)
    whole = path.read_bytes()
    np.savez(path.with_suffix(".npz"), other=np.zeros(3))
    forged = {name: np.load(path)[name] for name in np.load(path).files}
    forged["sample"] = forged["sample"][::-1]
    np.savez(tmp_path / "forged.npz", **forged)
    for damaged in (whole[: len(whole) // 2], b"", b"not a plan", path.with_suffix(".npz").read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            StepPlan.load(path)
    with pytest.raises(CheckpointError, match="damaged"):
        StepPlan.load(tmp_path / "forged.npz")
    with pytest.raises(FileNotFoundError):
        StepPlan.load(tmp_path / "absent")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"steps": None}, "either steps or epochs"),
        ({"epochs": 1}, "either steps or epochs"),
        ({"steps": 0}, "positive"),
        ({"global_batch": 0}, "positive"),
        ({"repeats": np.full(200, -1.0)}, "repeat factor"),
        ({"repeats": np.full(200, np.nan)}, "repeat factor"),
        ({"repeats": np.zeros(200)}, "no sample"),
        ({"repeats": np.ones(5)}, "one entry per sample"),
        ({"costs": np.ones(5)}, "one entry per sample"),
        ({"repeat": "some"}, "repeat must be"),
        ({"max_tokens": 10}, "more than a pack may hold"),
    ],
)
def test_nonsense_is_refused(changed, reason):
    with pytest.raises(ValueError, match=reason):
        plan_steps(**(index() | {"global_batch": 4, "seed": 0, "steps": 5} | changed))
