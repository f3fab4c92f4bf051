"""The dynamic ensemble: stops when the vote is settled, and gives the full vote's answer for fewer samples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling.errors import UserError
from stages.evaluate.ensemble import Rule, cascade, doubt_modal, doubt_stays, replay, turns
from stages.evaluate.statistics import compare
from stages.evaluate.voting import Pool, Sample, majority_at, winner

SEED = 11


def simulated(questions, n, alphas, seed=SEED, shares=None):
    """A pool of known answer distributions, Dirichlet(alphas) for each question; answer 0 is right."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(alphas, questions) if shares is None else shares
    drawn = (rng.random((questions, n, 1)) > shares.cumsum(1)[:, None, :-1]).sum(2)
    lost = rng.random((questions, n)) < 0.04
    samples = [
        [Sample(None if gone else f"答{code}", 20 + int(code)) for code, gone in zip(*row, strict=True)]
        for row in zip(drawn, lost, strict=True)
    ]
    return Pool.of(samples, (drawn == 0) & ~lost)


def test_the_modal_doubt_is_the_integral_of_adaptive_consistency():
    """∫₀^½ xᵃ(1-x)ᵇ / ∫₀¹ of the same: (Aggarwal et al. 2023), here by the midpoint rule."""
    x = (np.arange(200_000) + 0.5) / 200_000
    for a, b in [(0, 0), (1, 0), (3, 0), (4, 0), (5, 2), (20, 12), (3, 3)]:
        density = x**a * (1 - x) ** b
        assert doubt_modal(a, b) == pytest.approx(density[x < 0.5].sum() / density.sum(), abs=1e-6)
    assert (doubt_modal(3, 0), doubt_modal(4, 0)) == (1 / 16, 1 / 32)  # so at 0.95 four alike are enough, three not


def test_the_doubt_that_a_leader_stays_is_that_of_a_simulated_vote():
    rng = np.random.default_rng(SEED)
    for a, b, r in [(3, 0, 5), (2, 1, 5), (6, 3, 7), (1, 0, 1)]:
        overtaken = b + (x := rng.binomial(r, 1 - rng.beta(a + 1, b + 1, 200_000))) >= a + r - x
        assert doubt_stays(a, b, r) == pytest.approx(overtaken.mean(), abs=0.005)  # four standard errors


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20))
def test_what_cannot_change_leaves_no_doubt_and_what_can_leaves_some(a, b, r):
    a, b = max(a, b), min(a, b)
    assert (doubt_stays(a, b, r) == 0) == (a > b + r)
    assert 0 <= doubt_stays(a, b, r) <= 1 and doubt_stays(a + 1, b, r) <= doubt_stays(a, b, r)
    assert doubt_stays(a, b, 4000) == pytest.approx(doubt_modal(a, b), abs=0.01)


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=12), st.sampled_from(["stays", "modal"]))
def test_at_full_sureness_a_stopped_vote_is_the_full_vote(answers, posterior):
    rule = Rule(len(answers), 1.0, posterior)
    stop = next(i for i in range(1, len(answers) + 1) if rule.done(answers[:i]))
    assert winner(answers[:stop]) == winner(answers)


def test_a_live_loop_stops_where_the_rule_says():
    answers = ["7"] * 8
    assert [Rule(8).done(answers[:i]) for i in range(1, 5)] == [False, False, True, True]
    assert [Rule(40, posterior="modal").done(answers[:i]) for i in range(1, 6)] == [False, False, False, True, True]
    assert not Rule(8).done([]) and not Rule(8).done([None] * 7) and Rule(8).done([None] * 8)
    assert not Rule(16).done(["7", "7", "8", "7", "8", "7"])


def test_a_replay_draws_as_a_live_loop_would():
    """One order, question by question, with the rule applied to the answers as they come."""
    pool = simulated(80, 10, [1, 0.5, 0.5])
    rule = Rule(10)
    found = replay([pool], rule, seed=4, orders=1)
    order = np.random.default_rng(4).random(pool.codes.shape).argsort(1)
    for i in range(80):
        answers = [pool.texts(i)[j] for j in order[i]]
        stop = next(k for k in range(1, 11) if rule.done(answers[:k]))
        answer = winner(answers[:stop])
        assert found.samples[0, i] == stop and found.tokens[0, i] == pool.tokens[i, order[i, :stop]].sum()
        assert (pool.answers[i][found.code[0, i]] if found.code[0, i] >= 0 else None) == answer
        assert found.right[0, i] == (answer == "答0") and found.agrees[0, i] == (answer == winner(answers))
        assert found.full_right[0, i] == (winner(answers) == "答0")
    assert (found.full_tokens[0] == pool.tokens.sum(1)).all()


MIXED, HARD = [1.6] + [0.2] * 4, [1.5] + [0.35] * 4


@pytest.mark.parametrize(("difficulty", "maximum", "same"), [
    (MIXED, 8, 0.98), (MIXED, 16, 0.98), (MIXED, 40, 0.98), (HARD, 8, 0.98), (HARD, 40, 0.95),
])  # fmt: skip
def test_the_full_answer_for_fewer_samples(difficulty, maximum, same):
    """The answer of the full vote in 98 % of the questions, and never less often than the threshold asks."""
    pool = simulated(2000, maximum, difficulty, seed=maximum)
    for posterior in ("stays", "modal"):
        found = replay([pool], Rule(maximum, posterior=posterior), orders=8)
        gap = compare(found.right.mean(0), found.full_right.mean(0), draws=500)
        share, tokens = found.samples.mean() / maximum, found.tokens.sum() / found.full_tokens.sum()
        equal = majority_at(pool, [round(found.samples.mean())], orders=32).mean()
        print(
            f"seed {maximum}, one sample right in {pool.right.mean():.2f}, maximum {maximum}, {posterior}: "
            f"{share:.2f} of the samples, {tokens:.2f} of the tokens, same answer "
            f"{found.agrees.mean():.4f}, accuracy {found.right.mean():.4f}, full vote {found.full_right.mean():.4f} "
            f"(difference {gap.low:+.4f} to {gap.high:+.4f}), vote of as many samples for all {equal:.4f}"
        )
        assert found.samples.max() <= maximum and found.samples.min() >= 1
        assert found.agrees.mean() >= same and share < 0.85
        assert abs(gap.difference) < 0.005
        assert found.right.mean() > equal - 0.002  # samples spent where they matter do no worse than evenly spent ones


def test_a_lower_threshold_costs_less_and_agrees_less():
    pool = simulated(1000, 16, HARD)
    found = [replay([pool], Rule(16, t), orders=4) for t in (0.8, 0.9, 0.99, 1.0)]
    assert [f.samples.mean() for f in found] == sorted(f.samples.mean() for f in found)
    assert [f.agrees.mean() for f in found] == sorted(f.agrees.mean() for f in found)
    assert found[-1].agrees.all() and found[0].agrees.mean() < 1


def test_plans_share_out_the_draws():
    assert turns([2, 1], 6) == [0, 1, 0, 0, 1, 0] and turns([1], 3) == [0, 0, 0]
    assert turns([1, 1, 1], 5) == [0, 1, 2, 0, 1] and turns([0, 1], 2) == [1, 1]
    assert cascade([2, 3]) == [0, 0, 1, 1, 1]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any), st.integers(1, 40))
def test_turns_never_stray_from_the_shares(shares, maximum):
    plan = turns(shares, maximum)
    for draws in range(1, maximum + 1):
        for i, share in enumerate(shares):
            assert abs(plan[:draws].count(i) - draws * share / sum(shares)) < len(shares)
    assert all(share or i not in plan for i, share in enumerate(shares))


def test_two_checkpoints_vote_together():
    """A small checkpoint errs towards 1, a large one towards 2: together they are right more often than either."""
    rng = np.random.default_rng(SEED)
    right = rng.uniform(0.3, 0.55, 600)
    rest = 1 - right
    small = simulated(600, 12, None, 1, np.stack([right, rest * 0.9, rest * 0.1], 1))
    large = simulated(600, 12, None, 2, np.stack([right, rest * 0.1, rest * 0.9], 1))
    alone = [replay([pool], Rule(12), orders=4).right.mean() for pool in (small, large)]
    both = replay([small, large], Rule(12), orders=4)
    assert both.right.mean() > max(alone) + 0.1
    assert (both.drawn.sum(2) == both.samples).all() and np.abs(both.drawn[..., 0] - both.drawn[..., 1]).max() <= 1


def test_a_cascade_asks_the_second_checkpoint_only_where_the_first_is_unsure():
    sure, unsure = [0.98, 0.01, 0.01], [0.4, 0.35, 0.25]
    small = simulated(400, 6, None, 1, np.array([sure, unsure] * 200))
    large = simulated(400, 10, None, 2, np.array([[0.9, 0.05, 0.05]] * 400))
    found = replay([small, large], Rule(16), plan=cascade([6, 10]), orders=4)
    asked = (found.drawn[..., 1] > 0).mean(0)
    assert asked[::2].mean() < 0.1 < 0.6 < asked[1::2].mean()
    assert (found.drawn[..., 0] <= 6).all()


def test_the_seed_decides_the_replay():
    pool = simulated(50, 8, HARD)
    first, again, other = (replay([pool], Rule(8), seed=s, orders=3) for s in (0, 0, 1))
    assert (first.samples == again.samples).all() and (first.code == again.code).all()
    assert (first.samples != other.samples).any()


def test_questions_nobody_could_answer_cost_the_maximum_and_are_wrong():
    pool = Pool.of([[Sample(None, 5)] * 4], [[False] * 4])
    found = replay([pool], Rule(4), orders=2)
    assert found.samples.tolist() == [[4], [4]] and found.tokens.tolist() == [[20], [20]]
    assert not found.right.any() and (found.code == -1).all() and found.agrees.all()


def test_what_cannot_be_drawn_is_said():
    pool = simulated(3, 4, HARD)
    with pytest.raises(UserError, match="5 draws from a pool of 4"):
        replay([pool], Rule(5))
    with pytest.raises(UserError, match="plan of 2 draws for a maximum of 4"):
        replay([pool], Rule(4), plan=cascade([2]))
    with pytest.raises(UserError, match="at most 0 samples"):
        Rule(0)
    for threshold in (0.5, 1.1):
        with pytest.raises(UserError, match="threshold"):
            Rule(4, threshold)
    for shares in ([], [0], [-1, 2]):
        with pytest.raises(UserError, match="shares"):
            turns(shares, 4)
