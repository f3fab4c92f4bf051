"""pass@k, majority, weighted vote and best-of-k: the expectation over all ways to draw k from the pool."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling.errors import DataError, UserError
from stages.evaluate.voting import (
    Pool,
    Sample,
    best_at,
    majority_at,
    pass_at,
    softmax_weights,
    weighted_at,
    winner,
)

RIGHT = {"4", "四"}


def pool_of(*rows, scores=None, tokens=None):
    """One row of answers for each question; RIGHT are right."""
    samples = [
        [
            Sample(a, tokens[i][j] if tokens else 10, -1.0, {"s": scores[i][j]} if scores else {})
            for j, a in enumerate(row)
        ]
        for i, row in enumerate(rows)
    ]
    return Pool.of(samples, [[a in RIGHT for a in row] for row in rows])


answers = st.lists(st.sampled_from(["4", "四", "5", "6", None]), min_size=1, max_size=6)


@settings(max_examples=40)  # 720 orders in each
@given(answers)
def test_every_method_is_the_mean_over_all_draws(row):
    ks = range(1, len(row) + 1)
    scores = [[float((7 * j) % 3) for j in range(len(row))]]  # with ties
    pool = pool_of(row, scores=scores)
    passed, voted, best = pass_at(pool, ks), majority_at(pool, ks), best_at(pool, pool.scores["s"], ks)
    for k in ks:
        draws = list(itertools.permutations(range(len(row)), k))
        assert passed[0, k - 1] == pytest.approx(np.mean([any(row[j] in RIGHT for j in d) for d in draws]))
        assert voted[0, k - 1] == pytest.approx(np.mean([winner([row[j] for j in d]) in RIGHT for d in draws]))
        chosen = [max((j for j in d if row[j] is not None), key=lambda j: scores[0][j], default=None) for d in draws]
        assert best[0, k - 1] == pytest.approx(np.mean([j is not None and row[j] in RIGHT for j in chosen]))


def test_pass_at_k_is_the_closed_form_of_chen_et_al():
    """1 - C(n-c, k) / C(n, k), and their stable product, also where binomials overflow a float."""
    n, right = 200, np.arange(201)
    pool = pool_of(*(["4"] * c + ["5"] * (n - c) for c in right))
    for k, found in zip((1, 10, 100, 200), pass_at(pool, (1, 10, 100, 200)).T, strict=True):
        closed = [1 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)]
        product = [1.0 if n - c < k else 1 - np.prod(1 - k / np.arange(n - c + 1, n + 1)) for c in range(n + 1)]
        assert found == pytest.approx(closed) and found == pytest.approx(product)
    assert pass_at(pool_of(["4"] * 2 + ["5"] * 3), [2])[0, 0] == pytest.approx(0.7)  # by hand: 1 - 3/10


def test_the_vote_goes_to_the_first_to_reach_the_count_and_never_to_what_cannot_be_read():
    assert winner(["5", "4", "4", "5"]) == "4"
    assert winner(["5", "4", "5", "4"]) == "5"
    assert winner([None, None, None, "7"]) == "7"
    assert winner([None, None]) is None and winner([]) is None
    assert winner(["四", "五", "四"]) == "四"
    assert winner(["a", "b", "b"], [0.9, 0.4, 0.4]) == "a"
    assert winner(["a", "b", "b"], [0.7, 0.4, 0.4]) == "b"


def test_a_vote_on_raw_responses_gives_another_winner_than_one_on_answers():
    raw = ["It is 5.", "It is 5.", "So \\boxed{4}", "2 + 2 = 4, thus \\boxed{4}", "答案是 \\boxed{4}"]
    assert winner(raw) == "It is 5."
    assert winner(["5", "5", "4", "4", "4"]) == "4"


def test_majority_by_hand():
    """Pool 4 4 5: of two, {4,4} is right, {4,5} in half of its orders; of one, 2/3; of three, always."""
    assert majority_at(pool_of(["4", "4", "5"]), [1, 2, 3])[0] == pytest.approx([2 / 3, 1 / 3 + 2 / 3 / 2, 1])


def test_random_orders_come_near_the_exact_sum_and_depend_on_the_seed_alone():
    rng = np.random.default_rng(5)
    pool = pool_of(*rng.choice(["4", "四", "5", "6", "7", "8"], (60, 20)).tolist())
    ks = [1, 2, 5, 20]
    exact = majority_at(pool, ks)
    drawn = majority_at(pool, ks, orders=400, seed=3)
    assert (drawn == majority_at(pool, ks, orders=400, seed=3)).all()
    assert (drawn != majority_at(pool, ks, orders=400, seed=4)).any()
    assert np.abs(drawn - exact).max() < 5 * 0.5 / math.sqrt(400)  # five standard errors
    assert np.abs(drawn - exact)[:, 0].max() > 0  # and they are random orders, not the sum
    assert weighted_at(pool, np.full(pool.codes.shape, 0.3), ks, orders=400, seed=3) == pytest.approx(drawn)


def test_large_pools_are_resampled_by_themselves():
    pool = pool_of(["4", "5"] * 40, ["4"] * 80)
    found = majority_at(pool, [1, 9], seed=1)
    assert found[1].tolist() == [1, 1] and found[0] == pytest.approx([0.5, 0.5], abs=0.16)
    assert majority_at(pool, [1, 9], orders=0)[0] == pytest.approx([0.5, 0.5])


def test_a_weighted_vote_lets_one_sure_sample_beat_two_unsure_ones():
    pool = pool_of(["4", "5", "5"], ["5", "4", None], scores=[[3.0, 0.0, 0.0], [0.0, -1.0, 9.0]])
    assert majority_at(pool, [3])[:, 0].tolist() == [0, 0.5]
    weights = softmax_weights(pool, pool.scores["s"])
    assert weights.max(1).tolist() == [1, 1]  # the unparsable one's score sets no scale
    assert weights[0] == pytest.approx([1, math.exp(-3), math.exp(-3)])
    assert weighted_at(pool, weights, [3])[:, 0].tolist() == [1, 0]
    # a score so low that its weight is 0 in a float changes nothing
    assert weighted_at(pool, softmax_weights(pool, pool.scores["s"], 1e-3), [3])[:, 0].tolist() == [1, 0]
    assert weighted_at(pool, np.zeros((2, 3)), [3]).tolist() == [[0], [0]]


def test_best_of_k_is_between_chance_and_the_scorer_and_never_takes_what_cannot_be_read():
    pool = pool_of(["5", "4", None, "5"], scores=[[0.1, 0.8, 0.9, 0.2]])
    assert best_at(pool, pool.scores["s"], [1, 4])[0] == pytest.approx([0.25, 1])
    assert best_at(pool, np.zeros((1, 4)), [4])[0] == pytest.approx([1 / 3])  # no information: a random parsable one
    assert best_at(pool_of([None, None]), np.zeros((1, 2)), [2])[0] == pytest.approx([0])
    assert best_at(pool, -pool.scores["s"], [4])[0] == pytest.approx([0])


def test_cost_and_likelihood_count_every_token():
    pool = pool_of(["4", None], tokens=[[10, 30]])
    assert pool.cost([1, 2]).tolist() == [[20, 40]]
    assert pool.likelihood()[0] == pytest.approx([-0.1, -1 / 30])


def test_pools_of_two_checkpoints_share_their_answers():
    joined = Pool.joined([pool_of(["5", "4"], [None, "6"]), pool_of(["4"], ["6"], scores=[[1.0], [1.0]])])
    assert joined.texts(0) == ["5", "4", "4"] and joined.codes.tolist() == [[0, 1, 1], [-1, 0, 0]]
    assert joined.right.tolist() == [[False, True, True], [False, False, False]] and not joined.scores


def test_what_cannot_be_scored_is_said():
    with pytest.raises(DataError, match="question 1: 1 samples, but 2"):
        pool_of(["4", "5"], ["4"])
    with pytest.raises(DataError, match="without samples"):
        Pool.of([], np.zeros((0, 0), bool))
    with pytest.raises(DataError, match="different questions"):
        Pool.joined([pool_of(["4"]), pool_of(["4"], ["5"])])
    with pytest.raises(DataError, match="not every sample has the scores"):
        Pool.of([[Sample("4", 1, 0.0, {"s": 1.0}), Sample("4", 1)]], [[True, True]])
    with pytest.raises(ValueError, match="marked right"):
        Pool.of([[Sample(None, 1)]], [[True]])
    with pytest.raises(ValueError, match="both right and wrong"):
        Pool.of([[Sample("4", 1), Sample("4", 1)]], [[True, False]])
    pool = pool_of(["4", "5"])
    for method in (pass_at, majority_at, lambda p, ks: best_at(p, np.zeros((1, 2)), ks)):
        for k in (0, 3):
            with pytest.raises(UserError, match=f"@{k} from a pool of 2"):
                method(pool, [k])
    with pytest.raises(ValueError, match="at least 0"):
        weighted_at(pool, np.array([[1.0, -1.0]]), [1])
    with pytest.raises(ValueError, match="finite"):
        best_at(pool, np.array([[1.0, np.nan]]), [1])
