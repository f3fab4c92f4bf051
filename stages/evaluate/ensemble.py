"""The dynamic ensemble: samples drawn one by one from one or several checkpoints until the vote is settled.

After each draw let the leading answer have a votes, the next b, and r samples remain of the maximum. Of the samples
that fall on these two, a share p falls on the leader, with a uniform prior: p ~ Beta(a + 1, b + 1). Two stopping rules,
each by a doubt that must be at most 1 - threshold:

"modal"   P(p ≤ 1/2), that the leader is not the more likely of the two: the Beta criterion of adaptive consistency
          (Aggarwal et al. 2023, "Let's Sample Step by Step", arXiv 2305.11860, §3; their code integrates numerically
          in adaptive_consistency/stopping_criterias.py, here the closed form) and their default, at 0.95, before the
          Dirichlet posterior over all answers, which it stands in for. It does not know how many samples remain.
"stays"   P(the next one draws level or overtakes if all r remaining samples fall on these two), the posterior
          predictive (beta-binomial) chance that the vote of the full maximum would differ. With r → ∞ it is "modal",
          with a > b + r it is exactly 0. The default: what is promised is the answer of the full vote.

Under both rules a vote that cannot change any more stops (a > b + r), so threshold 1 gives the full vote exactly.
An unparsable sample uses up a draw and gives no vote. Both rules take draws as exchangeable; with several checkpoints
that is only approximate, least so when they take turns (interleaved) and most so in a cascade.

Simulated at the default threshold (tests/unit/test_ensemble.py prints it): 2,000 questions, 5 answers, 4 % unparsable,
one sample right in 63 %. Share of the samples drawn, same answer as the full vote, accuracy, accuracy of the full vote:
    maximum  8   stays 0.64  0.996  0.747  0.747     modal 0.74  1.000  0.747  0.747
    maximum 16   stays 0.49  0.991  0.770  0.772     modal 0.56  0.997  0.771  0.772
    maximum 40   stays 0.29  0.983  0.783  0.785     modal 0.35  0.990  0.784  0.785
Harder questions cost more: where one sample is right in 50 %, "stays" draws 0.72, 0.60 and 0.39 of the samples, and
at maximum 40 gives the full vote's answer in 0.976: for large maxima and hard questions take a threshold of 0.97.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from modeling.errors import UserError
from stages.evaluate.voting import Pool, right_answers, tally


@dataclass(frozen=True)
class Rule:
    """When to stop. maximum: samples of a question at most; threshold: sureness wanted, over 0.5 to 1."""

    maximum: int
    threshold: float = 0.95
    posterior: Literal["stays", "modal"] = "stays"

    def __post_init__(self) -> None:
        if self.maximum < 1:
            raise UserError(f"at most {self.maximum} samples a question", remedy="set a maximum of at least 1")
        if not 0.5 < self.threshold <= 1:
            raise UserError(
                f"a stopping threshold of {self.threshold}",
                remedy="give a probability over 0.5 to 1; 0.95 is the default, 1 stops only when nothing can change",
            )

    def settled(self, first: int, second: int, remaining: int) -> bool:
        """Whether to stop, the two leading answers having so many votes and so many draws remaining."""
        if remaining <= 0 or first > second + remaining:
            return True
        doubt = doubt_stays(first, second, remaining) if self.posterior == "stays" else doubt_modal(first, second)
        return doubt <= 1 - self.threshold

    def done(self, answers: Sequence[str | None]) -> bool:
        """For a live loop: whether the answers drawn so far suffice. voting.winner(answers) is the result."""
        counts = sorted((answers.count(a) for a in set(answers) if a is not None), reverse=True)
        first, second, *_ = [*counts, 0, 0]
        return self.settled(first, second, self.maximum - len(answers))


@lru_cache(maxsize=1 << 16)
def doubt_modal(first: int, second: int) -> float:
    """P(p ≤ 1/2) for p ~ Beta(first + 1, second + 1), as the binomial sum that equals it."""
    n = first + second + 1
    return sum(math.comb(n, i) for i in range(second + 1)) / 2**n


@lru_cache(maxsize=1 << 18)
def doubt_stays(first: int, second: int, remaining: int) -> float:
    """P(second + x ≥ first + remaining - x), x of the remaining draws falling on the second: beta-binomial.

    Counted in whole numbers, so a certain outcome is exactly 0.
    """
    level = max(0, -(-(first + remaining - second) // 2))  # the least x that draws level
    ways = sum(
        math.comb(second + x, x) * math.comb(first + remaining - x, remaining - x) for x in range(level, remaining + 1)
    )
    return ways / math.comb(first + second + remaining + 1, remaining)


def turns(shares: Sequence[int], maximum: int) -> list[int]:
    """A plan of draws: checkpoints interleaved in these shares, as evenly as can be, the first one first.

    turns([2, 1], 6) is [0, 1, 0, 0, 1, 0]: the checkpoint furthest behind its share comes next.
    """
    if not shares or min(shares) < 0 or not sum(shares):
        raise UserError(
            f"shares of checkpoints {list(shares)}", remedy="give numbers of at least 0, one of them over 0"
        )
    plan, drawn = [], [0] * len(shares)
    for draw in range(1, maximum + 1):
        behind = [share * draw - count * sum(shares) if share else -math.inf for share, count in zip(shares, drawn)]
        plan.append(behind.index(max(behind)))
        drawn[plan[-1]] += 1
    return plan


def cascade(budgets: Sequence[int]) -> list[int]:
    """A plan of draws: the first checkpoint's budget, then, for what is not settled, the next one's: cheapest first."""
    return [i for i, budget in enumerate(budgets) for _ in range(budget)]


@dataclass(frozen=True)
class Replay:
    """R random orders of the pool for each of Q questions; all arrays (R, Q), drawn (R, Q, checkpoints).

    code: the answer in the joined pool's codes, -1 if none. full_right, full_tokens: of the vote of all `maximum`
    samples in the same order. agrees: the answer is that vote's.
    """

    code: np.ndarray
    right: np.ndarray
    samples: np.ndarray
    tokens: np.ndarray
    drawn: np.ndarray
    agrees: np.ndarray
    full_right: np.ndarray
    full_tokens: np.ndarray


def replay(
    pools: Sequence[Pool], rule: Rule, *, plan: Sequence[int] | None = None, seed: int = 0, orders: int = 16
) -> Replay:
    """Draw from stored samples as one would have drawn from the checkpoints, without replacement.

    pools: one for each checkpoint, of the same questions. plan: which checkpoint each draw comes from, at least
    `maximum` long (turns, cascade); by default all take equal turns.
    """
    plan = list(plan if plan is not None else turns([1] * len(pools), rule.maximum))[: rule.maximum]
    if len(plan) < rule.maximum:
        raise UserError(f"a plan of {len(plan)} draws for a maximum of {rule.maximum}", remedy="lower the maximum")
    for i, pool in enumerate(pools):
        if plan.count(i) > pool.size:
            raise UserError(
                f"{plan.count(i)} draws from a pool of {pool.size} samples a question", where=f"checkpoint {i}",
                remedy="lower the maximum or its share, or sample more",
            )  # fmt: skip
    joined = Pool.joined(pools)
    rng, right, questions = np.random.default_rng(seed), right_answers(joined), len(joined.codes)
    found = [_replayed(joined, right, _order(pools, plan, questions, rng), rule) for _ in range(orders)]
    code, samples, tokens, full_code, full_tokens = (np.stack(column) for column in zip(*found, strict=True))
    rows = np.arange(questions)
    reached = np.cumsum(np.eye(len(pools), dtype=int)[plan], axis=0)  # (maximum, checkpoints)
    return Replay(
        code, right[rows, code], samples, tokens, reached[samples - 1], code == full_code,
        right[rows, full_code], full_tokens,
    )  # fmt: skip


def _order(pools: Sequence[Pool], plan: Sequence[int], questions: int, rng: np.random.Generator) -> np.ndarray:
    """(Q, maximum) columns of the joined pool: each checkpoint's samples in random order, at its places in the plan."""
    order, start = np.zeros((questions, len(plan)), dtype=int), 0
    for i, pool in enumerate(pools):
        places = np.flatnonzero(np.array(plan) == i)
        order[:, places] = start + rng.random(pool.codes.shape).argsort(1)[:, : len(places)]
        start += pool.size
    return order


def _replayed(pool: Pool, right: np.ndarray, order: np.ndarray, rule: Rule) -> tuple[np.ndarray, ...]:
    """One order: answer, samples and tokens when stopped, then answer and tokens of the full vote; each (Q,)."""
    codes, tokens = np.take_along_axis(pool.codes, order, 1), np.take_along_axis(pool.tokens, order, 1).cumsum(1)
    rows, count = np.arange(len(codes)), order.shape[1]
    code, samples, leader = np.full(len(codes), -1), np.zeros(len(codes), dtype=int), np.full(len(codes), -1)
    for draw, (votes, leader) in enumerate(tally(codes, np.ones(codes.shape)), start=1):
        running = np.flatnonzero(samples == 0)
        if not len(running):
            continue  # the full vote goes on
        two = np.zeros((len(running), 2), dtype=int)
        top = np.sort(votes[running], axis=1)[:, :-3:-1]
        two[:, : top.shape[1]] = top
        pairs, which = np.unique(two, axis=0, return_inverse=True)
        stops = np.array([rule.settled(int(a), int(b), count - draw) for a, b in pairs])[which.ravel()]
        stopped = running[stops]
        code[stopped], samples[stopped] = leader[stopped], draw
    return code, samples, tokens[rows, samples - 1], leader.copy(), tokens[:, -1]
