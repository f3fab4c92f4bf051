"""The plan of packs: every sample once, within both budgets, full, and without an order of size."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling import packing
from modeling.packing import balance, plan_packs

POLICIES = ["best_fit", "official_first_fit"]
SAMPLES = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 12)), max_size=120)


def mixture(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and tiles as the recipe's: four of five samples have pictures, 256 tokens a tile."""
    rng = np.random.default_rng(seed)
    tiles = np.where(rng.random(n) < 0.8, rng.choice([1, 3, 5, 7, 7, 9, 13, 13, 25], n), 0)
    return 256 * tiles + np.minimum(rng.lognormal(5.5, 0.8, n).astype(int) + 30, 3000), tiles


@pytest.mark.parametrize("policy", POLICIES)
@given(samples=SAMPLES, seed=st.integers(0, 5), window=st.integers(1, 50), shuffle=st.booleans())
def test_every_sample_once_within_both_budgets(policy, samples, seed, window, shuffle):
    tokens, tiles = (np.array([sample[i] for sample in samples], np.int64) for i in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW", window)
        patch.setattr(packing, "CARRIED", 3)
        packs = plan_packs(tokens, tiles, 100, 12, seed, policy, buffer_size=4, shuffle=shuffle)
        again = plan_packs(tokens, tiles, 100, 12, seed, policy, buffer_size=4, shuffle=shuffle)
    assert sorted(int(sample) for pack in packs for sample in pack) == list(range(len(samples)))
    assert all(len(pack) and tokens[pack].sum() <= 100 and tiles[pack].sum() <= 12 for pack in packs)
    assert [pack.tolist() for pack in packs] == [pack.tolist() for pack in again]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_seed_decides_the_order(policy):
    tokens, tiles = mixture(500)
    plans = [[pack.tolist() for pack in plan_packs(tokens, tiles, 16384, 48, seed, policy)] for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("tokens", "tiles", "name"), [([5, 11, 3], [0, 0, 0], "tokens"), ([1, 1], [0, 5], "tiles")])
def test_a_sample_over_a_budget_is_named(policy, tokens, tiles, name):
    with pytest.raises(ValueError, match=f"sample 1 has .* {name}"):
        plan_packs(tokens, tiles, 10, 4, policy=policy)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="sample 1 has negative"):
        plan_packs([1, -1], [0, 0], 10, 4)
    with pytest.raises(ValueError, match="differ in length"):
        plan_packs([1, 1], [0], 10, 4)
    with pytest.raises(ValueError, match="policy"):
        plan_packs([1], [0], 10, 4, policy="worst_fit")  # type: ignore
    assert len(plan_packs([], [], 10, 4)) == 0


def test_a_budget_may_be_filled_exactly():
    assert len(plan_packs([50, 50, 30], [2, 2, 0], 100, 4)) == 2
    assert len(plan_packs([10] * 10, [1] * 10, 100, 5)) == 2


@pytest.mark.parametrize("seed", range(3))
def test_best_fit_needs_no_more_packs_than_the_official_packer(seed):
    tokens, tiles = mixture(6000, seed)
    best, official = (len(plan_packs(tokens, tiles, 16384, 48, seed, policy)) for policy in POLICIES)
    bound = max(tokens.sum() / 16384, tiles.sum() / 48)
    assert best <= official
    assert best <= 1.01 * bound


def test_text_fills_what_pictures_leave():
    # Twelve picture samples use all tiles and half of the tokens of three packs; text fits exactly beside them.
    tokens, tiles = [125] * 12 + [50] * 30, [4] * 12 + [0] * 30
    assert len(plan_packs(tokens, tiles, 1000, 16)) == 3


def test_no_order_of_size_remains():
    tokens, tiles = mixture(8000)
    packs = plan_packs(tokens, tiles, 16384, 48)
    largest = np.array([tiles[pack].max() for pack in packs])
    position = np.arange(len(packs))
    assert abs(np.corrcoef(position, largest)[0, 1]) < 0.1
    halves = np.array_split(largest, 2)
    assert abs(halves[0].mean() - halves[1].mean()) < 0.1 * largest.mean()


def test_official_first_fit_follows_the_official_search():
    def plan(tokens, tiles, buffer_size=20):
        packs = plan_packs(tokens, tiles, 100, 10, policy="official_first_fit", buffer_size=buffer_size, shuffle=False)
        return [pack.tolist() for pack in packs]

    # The open pack with most tiles comes first, although the other is the tighter fit in tokens.
    assert plan([60, 50, 40], [1, 6, 1]) == [[1, 2], [0]]
    # Among equal tiles the older one, which is then the younger; a full budget is yielded at once, tokens or tiles.
    assert plan([50, 60, 40], [6, 6, 0]) == [[1], [0, 2]]
    assert plan([50, 60, 10, 50], [6, 6, 4, 0]) == [[0, 2], [1], [3]]
    assert plan([50, 60, 50], [5, 6, 0]) == [[0, 2], [1]]
    # Over capacity the pack with most tiles goes.
    assert plan([60, 70, 80], [6, 8, 7], buffer_size=2) == [[1], [2], [0]]


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 9))
def test_balance_gives_to_whoever_has_least(costs, world):
    """By the definition: the costliest left to the least loaded rank that has room."""
    most, ranks = -(-len(costs) // world), [[] for _ in range(world)]
    for position in sorted(range(len(costs)), key=lambda position: (-costs[position], position)):
        room = [rank for rank in ranks if len(rank) < most]
        min(room, key=lambda rank: sum(costs[i] for i in rank)).append(position)
    assert balance(costs, world) == ranks


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 9))
def test_balance_deals_every_position_once(costs, world):
    ranks = balance(costs, world)
    assert sorted(position for rank in ranks for position in rank) == list(range(len(costs)))
    assert len(ranks) == world and all(len(rank) <= -(-len(costs) // world) for rank in ranks)
    assert ranks == balance(costs, world)


def test_balance_evens_out_costs():
    assert balance([8, 7, 6, 5, 4, 3, 2, 1], 2) == [[0, 3, 4, 7], [1, 2, 5, 6]]
    assert balance([1, 1, 1, 1, 1], 2) == [[0, 2, 4], [1, 3]]
    assert balance([9, 1, 1, 1], 2) == [[0, 3], [1, 2]]
    assert balance([3], 3) == [[0], [], []]
    with pytest.raises(ValueError):
        balance([1], 0)
