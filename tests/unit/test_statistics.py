"""Intervals hold the truth as often as they say, tests find what is there and no more, curves carry their bands."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.evaluate.statistics import compare, curve, interval, mcnemar, sign_flips, wilson


def covered(seeds, spread, runs=400, questions=200):
    """Share of 95 % intervals that hold the true accuracy, 0.625; questions differ, and so do seeds by `spread`."""
    rng, hits = np.random.default_rng(7), 0
    for run in range(runs):
        chance = rng.uniform(0.3, 0.95, questions) + rng.normal(0, spread, (seeds, 1))
        found = interval(rng.random(chance.shape) < chance, seed=run, draws=500)
        hits += found.low <= 0.625 <= found.high
    return hits / runs


@pytest.mark.parametrize(
    ("seeds", "spread", "low", "high"),
    # 0.95 with one seed, 0.93 to 0.99 with several, each with three standard errors of 400 runs
    [(1, 0, 0.917, 0.983), (2, 0.05, 0.9, 1), (3, 0, 0.9, 1), (3, 0.05, 0.9, 1), (5, 0.05, 0.9, 1)],
)
def test_intervals_hold_the_truth_at_the_nominal_rate(seeds, spread, low, high):
    rate = covered(seeds, spread)
    print(f"seed 7: {rate:.3f} of 400 intervals, {seeds} trainings of standard deviation {spread}")
    assert low <= rate <= high


def test_one_seed_says_nothing_of_another_training():
    """Why claims need several: the interval of one training is too narrow for the next one."""
    assert covered(1, 0.05, runs=200) < 0.85


def test_an_interval_is_that_of_the_normal_where_there_is_enough():
    values = np.arange(1000) < 700
    found = interval(values)
    half = 1.96 * np.sqrt(0.7 * 0.3 / 1000)
    assert found.mean == 0.7 and found.low == pytest.approx(0.7 - half, abs=0.004)
    assert found.high == pytest.approx(0.7 + half, abs=0.004)
    assert found == interval(values) and found != interval(values, seed=1)


def test_where_all_came_out_alike_the_interval_still_has_a_width():
    right, wrong = interval(np.ones(20)), interval(np.zeros(20))
    assert (right.low, right.high) == (wilson(20, 20)[0], 1) and (wrong.low, wrong.high) == (0, wilson(0, 20)[1])
    assert interval(np.ones((3, 20))) == right
    assert interval(np.full(20, 1 - 1e-15)).low == right.low  # an expectation, summed


def test_intervals_stay_shares():
    found = interval([[1, 1, 1, 0], [1, 0, 0, 0]])
    assert 0 <= found.low < 0.5 < found.high <= 1


def test_mcnemar_is_the_exact_binomial():
    """9 against 2: p = 0.06543, the example of exact2x2 (Fay 2010, mcnemar.exact)."""
    assert mcnemar(9, 2) == mcnemar(2, 9) == pytest.approx(0.06543, abs=1e-5)
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1 and mcnemar(0, 6) == pytest.approx(2 / 64)


@given(st.lists(st.sampled_from([-0.5, -0.25, 0.0, 0.25, 1.0]), min_size=1, max_size=7))
def test_random_signs_come_near_all_signs(gaps):
    signed = [abs(np.dot(signs, gaps)) for signs in itertools.product((-1, 1), repeat=len(gaps))]
    exact = np.mean(np.array(signed) >= abs(sum(gaps)) - 1e-9)
    assert sign_flips(np.array(gaps), draws=4000) == pytest.approx(exact, abs=0.04)  # five standard errors


def test_a_pairing_finds_what_separate_intervals_hide():
    """b is right wherever a is, and on 12 questions more of 400: intervals overlap, the paired test does not doubt."""
    rng = np.random.default_rng(0)
    a = rng.random(400) < 0.6
    b = a.copy()
    b[np.flatnonzero(~a)[:12]] = True
    assert interval(a).high > interval(b).low
    found = compare(b, a)
    assert found.settled and found.difference == pytest.approx(0.03) and found.low > 0
    assert (found.better, found.worse, found.test, found.questions) == (12, 0, "mcnemar", 400)
    assert found.p == pytest.approx(2 / 2**12)
    back = compare(a, b)
    assert (back.difference, back.p) == (-found.difference, found.p) and back.settled


def test_equal_methods_are_found_different_as_seldom_as_promised():
    rng, rejected, left_out = np.random.default_rng(3), 0, 0
    for run in range(300):
        chance = rng.random(150)
        found = compare(rng.random(150) < chance, rng.random(150) < chance, seed=run, draws=500)
        rejected, left_out = rejected + (found.p <= 0.05), left_out + found.settled
    print(f"seed 3: p ≤ 0.05 in {rejected / 300:.3f}, interval without 0 in {left_out / 300:.3f} of 300 equal pairs")
    assert rejected / 300 <= 0.088 and left_out / 300 <= 0.088  # 0.05 and three standard errors


def test_expectations_are_compared_by_sign_flips_and_agreement_is_no_difference():
    rng = np.random.default_rng(1)
    a = rng.random(200)
    found = compare(np.minimum(a + rng.random(200) * 0.1, 1), a, draws=999)
    assert found.test == "sign flips" and found.p == pytest.approx(1 / 1000) and found.settled
    same = compare(a, a + 1e-15)
    assert same.p == 1 and not same.settled and (same.better, same.worse) == (0, 0)


def test_a_gain_that_not_every_seed_shows_is_not_settled():
    rng = np.random.default_rng(2)
    base = np.full((3, 500), 0.5)
    steady = (rng.random((3, 500)) < base + 0.2).astype(float)
    wavering = (rng.random((3, 500)) < base + np.array([[0.55], [0.05], [-0.05]])).astype(float)
    plain = (rng.random((3, 500)) < base).astype(float)
    assert compare(steady, plain).settled
    assert not compare(wavering, plain).settled and compare(wavering.mean(0), plain.mean(0)).settled


def test_a_curve_carries_accuracy_cost_and_band_at_every_point():
    right = np.array([[0, 1, 1], [0, 0, 1], [1, 1, 1], [0, 0, 1]] * 20, dtype=float)
    tokens = np.outer(np.arange(80), [1, 2, 4])
    found = curve("majority", right, [1, 2, 4], tokens)
    assert found.samples == [1, 2, 4] and found.tokens == pytest.approx([39.5, 79, 158])
    assert found.accuracy == [0.25, 0.5, 1]
    assert all(low < mean <= high for low, mean, high in zip(found.low, found.accuracy, found.high))
    single = interval(right[:, 1])
    assert (found.low[1], found.high[1]) == (single.low, single.high)  # the same resampled questions
    assert (found.low[2], found.high[2]) == (wilson(80, 80)[0], 1)
    over_seeds = curve("majority", np.stack([right, right, right]), [1, 2, 4], tokens).json()
    assert over_seeds["accuracy"] == found.accuracy and over_seeds["low"] == pytest.approx(found.low, abs=0.03)


def test_a_whole_benchmark_takes_seconds():
    start = time.process_time()
    curve("pass", np.random.default_rng(0).random((1000, 64)), np.arange(1, 65), 100 * np.arange(1, 65))
    assert time.process_time() - start < 10


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="same questions"):
        compare(np.ones(3), np.ones(4))
    for empty in (np.ones(0), np.ones((2, 3, 4))):
        with pytest.raises(ValueError, match="one for each question"):
            interval(empty)
