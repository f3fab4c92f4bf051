"""Curves and comparisons of one task, from written pools."""

import numpy as np
import pytest

from stages.evaluate.match import vote_key
from stages.evaluate.pools import methods, points, pools_of, study


def row(answer, score=0.0, tokens=10):
    return {"answer": answer, "tokens": tokens, "logprob": -1.0, "scores": {"judge": score, "likelihood": -score}}


def keys(_, answer):
    return vote_key(answer, "number")


def worth(reference):
    return lambda i, answer: float(vote_key(answer, "number") == vote_key(reference[i], "number"))


def test_votes_are_counted_on_what_answers_mean_not_on_how_they_are_written():
    """As written "7" wins with 2 of 5; as numbers 12 wins with 3: "12", "12.0" and "24/2"."""
    written = ["12", "12.0", "24/2", "7", "7"]
    assert max(set(written), key=written.count) == "7"
    (pool,) = pools_of([[[row(answer) for answer in written]]], keys, worth(["12"]))
    ks, found = methods([pool], {}, 0.95, "stays")
    majority = next(method for method in found if method.name == "majority")
    assert majority.right[0, ks.index(5)] == 1.0


def test_each_method_counts_what_it_says():
    """One question, right twice in four; the judge likes a right one best. By hand: pass@2 = 1 - C(2,2)/C(4,2) = 5/6;
    majority@4: "5" twice against "6" and "9" once; best of 4 by the judge is right, by likelihood (its negative) not.
    """
    rows = [[[row("5", 0.9), row("6", 0.1), row("5", 0.5), row("9", 0.3)]]]
    (pool,) = pools_of(rows, keys, worth(["5"]))
    ks, found = methods([pool], {"judge": "verifier"}, 0.95, "stays")
    at = {method.name: dict(zip(ks, method.right[0])) for method in found}
    assert ks == [1, 2, 4]
    assert at["pass"][2] == pytest.approx(5 / 6) and at["majority"][1] == pytest.approx(0.5)
    assert at["majority"][4] == 1 and at["best of, judge"][4] == 1 and at["best of, likelihood"][4] == 0
    # weights of the right answer 1.4, of the others .1 and .3
    assert at["weighted, judge"][4] == 1
    dynamic = next(method for method in found if method.name == "dynamic")
    assert dynamic.samples[0, 2] <= 4 and (dynamic.tokens == 10 * dynamic.samples).all()


def test_what_cannot_be_read_costs_and_never_wins():
    (pool,) = pools_of([[[row(None), row(None), row("5")]]], keys, worth(["5"]))
    ks, found = methods([pool], {}, 0.95, "stays")
    majority = next(method for method in found if method.name == "majority")
    assert majority.right[0].tolist() == pytest.approx([1 / 3, 2 / 3, 1.0]) and majority.tokens[0, 2] == 30
    assert ks == [1, 2, 3]


def test_several_checkpoints_vote_together_and_the_first_reading_of_an_answer_is_the_one_that_is_valued():
    one = [[row("5"), row("6")], [row("1"), row("1")]]
    other = [[row("5.0"), row("6.0")], [row("2"), row("2")]]
    pools = pools_of([one, other], keys, worth(["5", "2"]))
    assert [pool.right.tolist() for pool in pools] == [[[True, False], [False, False]], [[True, False], [True, True]]]
    ks, found = methods(pools, {}, 0.95, "stays")
    assert ks[-1] == 4
    majority = next(method for method in found if method.name == "majority")
    assert majority.right[:, -1].tolist() == pytest.approx([0.5, 0.5])  # ties: each wins half of the orders


def test_a_study_of_several_seeds_compares_question_by_question():
    rng = np.random.default_rng(0)
    seeds = []
    for _ in range(3):
        rows = [[row("5" if rng.random() < 0.7 else str(rng.integers(10, 90))) for _ in range(8)] for _ in range(60)]
        seeds.append(pools_of([rows], keys, worth(["5"] * 60)))
    curves, comparisons = study(seeds, {}, 0.95, "stays")
    by_name = {curve["method"]: curve for curve in curves}
    majority = by_name["majority"]
    assert majority["k"] == [1, 2, 4, 8] and majority["low"][0] < majority["accuracy"][0] < majority["high"][0]
    vote = next(one for one in comparisons if (one["a"], one["b"]) == ("majority@8", "one sample"))
    assert vote["low"] > 0 and vote["questions"] == 60
    assert vote["difference"] == pytest.approx(majority["accuracy"][3] - majority["accuracy"][0])
    dynamic = next(one for one in comparisons if one["a"] == "dynamic@8")
    assert dynamic["samples_a"] < 5.6 and dynamic["samples_b"] == 8 and abs(dynamic["difference"]) < 0.02
    assert study(seeds, {}, 0.95, "stays") == (curves, comparisons)


@pytest.mark.parametrize(("n", "wanted"), [(1, [1]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])])
def test_points_of_a_curve(n, wanted):
    assert points(n) == wanted
