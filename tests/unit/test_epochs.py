"""The plan of steps: exact repeats per epoch, the same whatever runs it, and a cursor that is the step."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling.epochs import StepPlan, plan_steps
from modeling.errors import CheckpointError
from modeling.frames import FrameChoices, occurrence_lengths
from modeling.packing import balance
from modeling.ragged import Ragged

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


@pytest.mark.parametrize("repeat", ["sampled", "official_prefix"])
def test_a_mixture_with_factors_of_three_tenths_one_and_two_and_a_half(repeat):
    """Exact counts over ten epochs; and each step trains the same samples at any number of workers."""
    factors = {"thirds": 0.3, "once": 1.0, "twice and a half": 2.5}
    group, sizes = np.repeat([0, 1, 2], [50, 40, 30]), [50, 40, 30]
    arguments = index(120) | {"repeats": np.repeat(list(factors.values()), sizes), "groups": group}
    plan = plan_steps(**arguments, global_batch=4, seed=5, epochs=10, repeat=repeat)
    trained = np.concatenate([np.concatenate(plan.step(step)) for step in range(plan.steps)])
    assert sorted(trained) == list(range(len(plan.sample)))
    assert np.bincount(group[plan.sample[trained]]).tolist() == [150, 400, 750]
    for epoch in range(10):
        counts = np.bincount(plan.sample[plan.epoch == epoch], minlength=120)
        assert [counts[group == g].sum() for g in range(3)] == [15, 40, 75]
        assert [set(counts[group == g]) for g in range(3)] == [{0, 1}, {1}, {2, 3}]
    counts = np.bincount(plan.sample, minlength=120)
    if repeat == "sampled":  # every sample has its turn
        assert 0 < counts[group == 0].max() < 10 and set(counts[group == 1]) == {10}
        assert counts[group == 0].std() > 0 and counts[group == 2].min() > 20 and counts[group == 2].max() < 30
    else:
        assert counts[:50].tolist() == [10] * 15 + [0] * 35
        assert counts[90:].tolist() == [30] * 15 + [20] * 15
    for world in (1, 2, 3, 8):
        consumed = []
        for step in range(plan.steps):
            packs = plan.step(step)
            ranks = balance([float(arguments["tokens"][plan.sample[pack]].sum()) for pack in packs], world)
            consumed.append(sorted(int(o) for rank in ranks for i in rank for o in packs[i]))
        assert consumed == [sorted(int(o) for pack in plan.step(step) for o in pack) for step in range(plan.steps)]


LEAST, MOST = 8, 32


def videos(n: int = 100) -> dict:
    """Every other sample is a video, of which the fourth and each fourth after it fits only up to 20 frames."""
    arguments = index(n) | {"max_tokens": 500, "max_tiles": 48}
    counts = [0 if i % 2 else (20 if i % 4 else MOST) - LEAST + 1 for i in range(n)]
    tokens = Ragged.of(
        np.concatenate([10 * (LEAST + np.arange(count)) + i % 100 for i, count in enumerate(counts)]), counts
    )
    choices = FrameChoices(tokens, np.array([LEAST if count else 0 for count in counts], np.int16))
    for i, count in enumerate(counts):
        if count:
            arguments["tokens"][i], arguments["tiles"][i] = tokens[i][-1], LEAST + count - 1
    return arguments | {"choices": choices}


def test_frames_are_drawn_evenly_and_packs_hold_what_was_drawn():
    arguments = videos()
    plan = plan_steps(**arguments, global_batch=4, seed=1, epochs=200)
    assert plan.frames is not None and plan.frames.dtype == np.int16 and len(plan.frames) == len(plan.sample)
    assert not plan.frames[plan.sample % 2 == 1].any()
    for remainder, most in ((0, MOST), (2, 20)):
        counts = np.bincount(plan.frames[plan.sample % 4 == remainder], minlength=MOST + 1)
        choices = most - LEAST + 1
        expected = 25 * 200 / choices
        assert not counts[:LEAST].any() and not counts[most + 1 :].any()
        assert (np.abs(counts[LEAST : most + 1] - expected) < 5 * expected**0.5).all()
    tokens, tiles = occurrence_lengths(
        arguments["tokens"], arguments["tiles"], arguments["choices"], plan.sample, plan.frames
    )
    video = plan.frames > 0
    assert (tokens[video] == 10 * plan.frames[video] + plan.sample[video] % 100).all()
    assert (tiles[video] == plan.frames[video]).all()
    assert plan.packs.sums(tokens[plan.packs.values]).max() <= 500
    assert plan.packs.sums(tiles[plan.packs.values]).max() <= 48
    largest = plan_steps(**(arguments | {"choices": None}), global_batch=4, seed=1, epochs=200)
    assert len(plan.packs) < len(largest.packs), "shorter videos leave room"


def test_frames_are_a_function_of_the_seed_and_of_the_occurrence():
    def drawn(seed=1, epochs=3, **more):
        plan = plan_steps(
            **(videos() | {"repeats": np.full(100, 2.0)} | more), global_batch=4, seed=seed, epochs=epochs
        )
        assert plan.frames is not None
        keys = zip(plan.epoch.tolist(), plan.sample.tolist(), plan.copy.tolist())
        return {key: count for key, count in zip(keys, plan.frames.tolist()) if count}

    first = drawn()
    assert first == drawn() and first != drawn(seed=2)
    assert drawn(epochs=5).items() >= first.items()
    assert drawn(repeats=np.full(100, 3.0)).items() > first.items(), "copies that were there before are as before"
    assert drawn(max_tokens=1000, policy="official_first_fit") == first
    for one, other in (((0, 0, 0), (0, 0, 1)), ((0, 0, 0), (1, 0, 0)), ((0, 0, 0), (0, 4, 0))):
        same = [first[tuple(np.add(one, key))] == first[tuple(np.add(other, key))] for key in
                [(0, 4 * i, 0) for i in range(24)]]  # fmt: skip
        assert sum(same) < 12


@settings(max_examples=20, deadline=None)
@given(steps=st.integers(1, 60), more=st.integers(1, 40))
def test_a_longer_plan_of_videos_begins_with_the_shorter(steps, more):
    short, long = (plan_steps(**videos(40), global_batch=3, seed=3, steps=n) for n in (steps, steps + more))
    for step in range(steps):
        for one, two in zip(short.step(step), long.step(step), strict=True):
            for name in ("sample", "epoch", "copy", "frames"):
                assert getattr(short, name)[one].tolist() == getattr(long, name)[two].tolist()


def test_steps_are_balanced_by_what_was_drawn():
    plan = plan_steps(**videos(400), global_batch=8, seed=0, epochs=4, costs=lambda tokens, tiles: tokens + 9.0 * tiles)
    assert plan.frames is not None
    arguments = videos(400)
    tokens, tiles = occurrence_lengths(
        arguments["tokens"], arguments["tiles"], arguments["choices"], plan.sample, plan.frames
    )
    cost = plan.packs.sums((tokens + 9.0 * tiles)[plan.packs.values])
    full = cost[: len(cost) // 8 * 8].reshape(-1, 8)
    shuffled = np.random.default_rng(0).permutation(cost)[: full.size].reshape(-1, 8)
    assert (full.max(1) / full.mean(1)).mean() < 1 + ((shuffled.max(1) / shuffled.mean(1)).mean() - 1) / 2


def test_a_plan_of_videos_is_saved_and_one_without_has_nothing_more(tmp_path):
    plan = plan_steps(**videos(), global_batch=4, seed=0, steps=20)
    plan.save(tmp_path / "plan")
    loaded = StepPlan.load(tmp_path / "plan")
    assert loaded.frames is not None and plan.frames is not None
    assert loaded.digest() == plan.digest() and loaded.frames.tolist() == plan.frames.tolist()
    stored = dict(np.load(tmp_path / "plan"))
    stored["frames"][np.flatnonzero(stored["frames"])[0]] += 1
    with open(tmp_path / "plan", "wb") as file:
        np.savez(file, **stored)
    with pytest.raises(CheckpointError, match="damaged"):
        StepPlan.load(tmp_path / "plan")
    none = FrameChoices(Ragged.of(np.empty(0, np.int32), [0] * 200), np.zeros(200, np.int16))
    without, before = (plan_steps(**index(), global_batch=4, seed=0, steps=20, choices=c) for c in (none, None))
    assert without.frames is None and without.digest() == before.digest()


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
        ({"choices": FrameChoices(Ragged.of(np.arange(3), [3]), np.ones(1))}, "one entry per sample"),
        (
            {"choices": FrameChoices(Ragged.of(np.ones(200), [1] * 200), np.ones(1)), "costs": np.ones(200)},
            "function",
        ),
    ],
)
def test_nonsense_is_refused(changed, reason):
    with pytest.raises(ValueError, match=reason):
        plan_steps(**(index() | {"global_batch": 4, "seed": 0, "steps": 5} | changed))
