"""What k of n samples would have scored: pass@k, majority, weighted vote and best-of-k from ONE pool per question.

Invariant: every figure is the expectation over k samples drawn without replacement, in random order, from the pool
that was made once; so all methods and all k are compared on the same generations, and the same pool gives the same
figures. pass@k (Chen et al. 2021, arXiv 2107.03374, eq. 1; openai/human-eval evaluation.py) and best-of-k (order
statistics) are exact. Majority@k is exact for pools of up to EXACT samples and otherwise, like every weighted vote,
the mean over seeded random orders of the pool, of which each gives all k at once (its first k samples).

The vote: the answer with the highest count wins; of several, the one that reached that count first. In a random order
equal counts are interchangeable, so each of T tied answers wins in 1/T of the orders: what the exact sum uses. An
unparsable answer (None) costs its sample and its tokens and never wins, nor does best-of-k choose it. Answers are
compared as text: to make "1/2" and "0.5" one answer is the work of extraction, before the vote.

One core, 1,000 questions of up to 12 answers, k = 1, 2, 4 … n: the exact majority takes 0.2 s for n = 16, 0.7 s for 32
and 1.6 s for 64; 256 random orders of 64 samples take 1 s and are off by 0.03 a question, by 0.002 in the mean. Where
all samples differ, the sum takes up to 5 s for 64.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from modeling.errors import DataError, UserError

EXACT = 64  # samples a question up to which majority@k is summed over all subsets
ORDERS = 256  # random orders of a larger pool


@dataclass(frozen=True)
class Sample:
    """One generation. answer: extracted, None if unparsable; logprob: natural, summed over its tokens."""

    answer: str | None
    tokens: int
    logprob: float = 0.0
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Pool:
    """Q questions with n samples each, in columns of shape (Q, n).

    codes: the answer as its place in answers[question], in order of first appearance; -1 is unparsable.
    scores: by the name of the re-ranker, higher is better.
    """

    answers: tuple[tuple[str, ...], ...]
    codes: np.ndarray
    right: np.ndarray
    tokens: np.ndarray
    logprob: np.ndarray
    scores: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, samples: Sequence[Sequence[Sample]], right: np.ndarray | Sequence[Sequence[bool]]) -> "Pool":
        """right: (Q, n), whether each answer matches its reference. One text is right everywhere or nowhere."""
        if not samples or not samples[0]:
            raise DataError("a pool without samples", remedy="generate at least one sample for a question")
        n, names = len(samples[0]), sorted(samples[0][0].scores)
        for i, row in enumerate(samples):
            if len(row) != n:
                raise DataError(
                    f"{len(row)} samples, but {n} for question 0", where=f"question {i}",
                    remedy="every question of a pool needs the same number of samples: finish the generation",
                )  # fmt: skip
            if any(sorted(sample.scores) != names for sample in row):
                raise DataError(
                    f"not every sample has the scores {names}", where=f"question {i}",
                    remedy="run each re-ranker on the whole pool",
                )  # fmt: skip
        texts, codes = _coded([[sample.answer for sample in row] for row in samples])
        marks = np.asarray(right, dtype=bool)
        _check(codes, marks)
        return cls(
            texts, codes, marks,
            np.array([[s.tokens for s in row] for row in samples]),
            np.array([[s.logprob for s in row] for row in samples], dtype=float),
            {name: np.array([[s.scores[name] for s in row] for row in samples], dtype=float) for name in names},
        )  # fmt: skip

    @classmethod
    def joined(cls, pools: Sequence["Pool"]) -> "Pool":
        """Pools of several checkpoints on the same questions, side by side: (Q, n₁ + n₂ + …); scores all have."""
        if len({len(pool.codes) for pool in pools}) != 1:
            raise DataError("pools of different questions", remedy="ask every checkpoint the same questions")
        texts, codes = _coded([[a for pool in pools for a in pool.texts(i)] for i in range(len(pools[0].codes))])
        right = np.hstack([pool.right for pool in pools])
        _check(codes, right)
        common = set.intersection(*(set(pool.scores) for pool in pools))
        return cls(
            texts, codes, right, np.hstack([pool.tokens for pool in pools]),
            np.hstack([pool.logprob for pool in pools]),
            {name: np.hstack([pool.scores[name] for pool in pools]) for name in sorted(common)},
        )  # fmt: skip

    @property
    def size(self) -> int:
        """n, the samples of a question."""
        return self.codes.shape[1]

    def texts(self, question: int) -> list[str | None]:
        """The answers of one question, sample by sample."""
        names = self.answers[question]
        return [names[code] if code >= 0 else None for code in self.codes[question]]

    def likelihood(self) -> np.ndarray:
        """(Q, n): log-likelihood per token, the re-ranker that needs no second model."""
        return self.logprob / np.maximum(self.tokens, 1)

    def cost(self, ks: Sequence[int]) -> np.ndarray:
        """(Q, len(ks)): expected tokens of k samples."""
        return self.tokens.mean(1)[:, None] * np.asarray(ks)


def _coded(rows: Sequence[Sequence[str | None]]) -> tuple[tuple[tuple[str, ...], ...], np.ndarray]:
    """Distinct answers per question in order of first appearance, and (Q, n) places in them."""
    texts = [{a: j for j, a in enumerate(dict.fromkeys(a for a in row if a is not None))} for row in rows]
    codes = [[-1 if a is None else places[a] for a in row] for places, row in zip(texts, rows, strict=True)]
    return tuple(tuple(places) for places in texts), np.array(codes, dtype=np.int32)


def _check(codes: np.ndarray, right: np.ndarray) -> None:
    if right.shape != codes.shape:
        raise ValueError(f"correctness of shape {right.shape} for samples of shape {codes.shape}")
    for i, (row, marks) in enumerate(zip(codes, right, strict=True)):
        if marks[row < 0].any():
            raise ValueError(f"question {i}: an unparsable answer is marked right")
        if set(row[marks].tolist()) & set(row[~marks].tolist()):
            raise ValueError(f"question {i}: one answer text is marked both right and wrong")


def _checked(name: str, ks: Sequence[int], n: int) -> None:
    for k in ks:
        if not 1 <= k <= n:
            raise UserError(
                f"{name}@{k} from a pool of {n} samples a question", remedy=f"take k from 1 to {n}, or sample more"
            )


def pass_at(pool: Pool, ks: Sequence[int]) -> np.ndarray:
    """(Q, len(ks)): the chance that at least one of k samples is right, 1 - C(n-c, k) / C(n, k)."""
    _checked("pass", ks, pool.size)
    n, wrong = pool.size, pool.size - pool.right.sum(1)
    # all k samples wrong, draw after draw; the factors reach 0 once the wrong ones are used up
    factors = np.maximum(wrong[:, None] - np.arange(n), 0) / (n - np.arange(n))
    return 1 - np.cumprod(factors, axis=1)[:, np.asarray(ks) - 1]


def majority_at(pool: Pool, ks: Sequence[int], *, seed: int = 0, orders: int | None = None) -> np.ndarray:
    """(Q, len(ks)): the chance that the vote of k samples is right.

    orders: None sums over all subsets up to EXACT samples, and takes ORDERS random orders of larger pools; a number
    asks for so many random orders, 0 for the sum whatever it costs.
    """
    _checked("majority", ks, pool.size)
    if orders is None:
        orders = 0 if pool.size <= EXACT else ORDERS
    if orders:
        return _resampled(pool, np.ones(pool.codes.shape), ks, seed, orders)
    out = np.zeros((len(pool.codes), len(ks)))
    for i, (codes, right) in enumerate(zip(pool.codes, pool.right, strict=True)):
        kinds = len(pool.answers[i])
        counts = np.bincount(codes + 1, minlength=kinds + 1)
        good = np.bincount(codes[right], minlength=kinds) > 0
        rights, wrongs = (tuple(sorted(counts[1:][marks].tolist())) for marks in (good, ~good))
        out[i] = [_chance(rights, wrongs, int(counts[0]), k) for k in ks]
    return out


@lru_cache(maxsize=1 << 16)
def _chance(rights: tuple[int, ...], wrongs: tuple[int, ...], lost: int, k: int) -> float:
    """The chance that one of the right answers wins the vote of k samples, given how often each is in the pool."""
    total = 0.0
    for j, own in enumerate(rights):
        others, most = rights[:j] + rights[j + 1 :] + wrongs, min(own, k)
        # ways[t, s, T]: choices of s samples in which no other answer comes more than t times, and T come t times
        ways = np.zeros((most + 1, k + 1, min(len(others), k) + 1))
        ways[:, :, 0] = [math.comb(lost, s) for s in range(k + 1)]
        for count in others:
            more = ways.copy()
            for x in range(1, min(count, most) + 1):
                more[x + 1 :, x:] += math.comb(count, x) * ways[x + 1 :, :-x]
                more[x, x:, 1:] += math.comb(count, x) * ways[x, :-x, :-1]
            ways = more
        share = 1 / np.arange(1, ways.shape[2] + 1)  # of T + 1 tied answers each wins equally often
        total += sum(math.comb(own, t) * float(ways[t, k - t] @ share) for t in range(1, most + 1))
    return total / math.comb(sum(rights) + sum(wrongs) + lost, k)


def weighted_at(
    pool: Pool, weights: np.ndarray, ks: Sequence[int], *, seed: int = 0, orders: int = ORDERS
) -> np.ndarray:
    """(Q, len(ks)): the chance that the vote of k samples is right, each counting by its weight.

    weights: (Q, n), finite and at least 0 (a verifier's probability as it is; softmax_weights for other scores).
    An answer without weight never wins.
    """
    _checked("weighted", ks, pool.size)
    if weights.shape != pool.codes.shape or not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError("weights must be finite, at least 0, and of the pool's shape")
    return _resampled(pool, weights, ks, seed, orders)


def softmax_weights(pool: Pool, scores: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """(Q, n): exp(score / temperature), the best parsable sample of each question having 1."""
    top = np.where(pool.codes >= 0, scores, -np.inf).max(1, keepdims=True)
    return np.exp(np.minimum(scores - np.where(np.isfinite(top), top, 0), 0) / temperature)


def best_at(pool: Pool, scores: np.ndarray, ks: Sequence[int]) -> np.ndarray:
    """(Q, len(ks)): the chance that the highest-scored parsable one of k samples is right; of equals, the first drawn.

    scores: (Q, n), finite. The sample of rank i (from 0) is the best of k in C(n-1-i, k-1) of C(n, k) subsets.
    """
    _checked("best", ks, pool.size)
    if scores.shape != pool.codes.shape or not np.isfinite(scores).all():
        raise ValueError("scores must be finite and of the pool's shape")
    n, given = pool.size, np.where(pool.codes >= 0, scores, -np.inf)
    order = np.argsort(-given, axis=1, kind="stable")
    ranked, right = np.take_along_axis(given, order, 1), np.take_along_axis(pool.right, order, 1)
    # samples of equal score are drawn first equally often: each stands for the mean of its group
    starts = np.ones(ranked.shape, dtype=bool)
    starts[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    group = starts.ravel().cumsum() - 1
    means = np.bincount(group, right.ravel()) / np.bincount(group)
    chance = np.array([[math.comb(n - 1 - i, k - 1) / math.comb(n, k) for k in ks] for i in range(n)])
    return means[group].reshape(right.shape) @ chance


def tally(codes: np.ndarray, weights: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Vote draw by draw in B rows: after each the sums (B, answers) and the leader (B,), -1 while there is none.

    codes, weights: (B, draws). The leader changes only when overtaken, so it was the first to reach its sum.
    The arrays are changed in place by the next draw.
    """
    rows = np.arange(len(codes))
    sums = np.zeros((len(codes), int(codes.max(initial=-1)) + 2))  # the last column takes what is unparsable
    leader = np.full(len(codes), -1)
    for code, weight in zip(codes.T, weights.T, strict=True):
        sums[rows, code] += weight
        sums[:, -1] = 0
        ahead = sums[rows, code] > sums[rows, leader]
        leader[ahead] = code[ahead]
        yield sums[:, :-1], leader


def winner(answers: Sequence[str | None], weights: Sequence[float] | None = None) -> str | None:
    """The answer that wins one vote in the order drawn; None where none can be parsed."""
    if not answers:
        return None
    texts, codes = _coded([answers])
    *_, (_, leader) = tally(codes, np.ones(codes.shape) if weights is None else np.array([weights], dtype=float))
    return texts[0][leader[0]] if leader[0] >= 0 else None


def right_answers(pool: Pool) -> np.ndarray:
    """(Q, answers + 1): whether each code is right; the last column, code -1, is not."""
    table = np.zeros((len(pool.codes), int(pool.codes.max(initial=-1)) + 2), dtype=bool)
    rows, columns = np.nonzero(pool.right)
    table[rows, pool.codes[rows, columns]] = True
    return table


def _resampled(pool: Pool, weights: np.ndarray, ks: Sequence[int], seed: int, orders: int) -> np.ndarray:
    """Mean over random orders of whether the vote of the first k is right."""
    rng, right, rows = np.random.default_rng(seed), right_answers(pool), np.arange(len(pool.codes))
    hits = np.zeros((len(pool.codes), pool.size))
    for _ in range(orders):
        order = rng.random(pool.codes.shape).argsort(1)
        codes, weight = (np.take_along_axis(a, order, 1) for a in (pool.codes, weights))
        for k, (_, leader) in enumerate(tally(codes, weight)):
            hits[:, k] += right[rows, leader]
    return hits[:, np.asarray(ks) - 1] / orders
