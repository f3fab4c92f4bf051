"""Test-time scaling of one task: curves of every method and paired comparisons, all from the same pools.

Invariant: a method sees nothing but the samples of a pool (voting.py, ensemble.py), so all are compared on the same
generations; with S training seeds each value has a row per seed (statistics.py). Answers are votes by match.vote_key.

"one sample" is the mean over the pool, at the temperature of the sampling; "pass" is what an oracle would choose, no
method; "best of, r" takes the sample that re-ranker r scores highest; "weighted, r" a vote of such weights; "dynamic"
stops each question where its vote is settled, so its cost is lower than k.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from stages.evaluate import ensemble, voting
from stages.evaluate.ensemble import Rule
from stages.evaluate.statistics import compare, curve
from stages.evaluate.voting import Pool, Sample

HALF = 0.5  # a graded value that counts as right in a vote: the threshold of ANLS
FREE = ("likelihood", "certainty")

Value = Callable[[int, str], float]  # of a question, by its place, and an answer


def points(n: int) -> list[int]:
    """1, 2, 4 … and n."""
    return sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})


def pools_of(
    rows: Sequence[Sequence[Sequence[Mapping[str, Any]]]], keys: Callable[[int, str], str], value: Value
) -> list[Pool]:
    """One pool for each of C checkpoints. rows: (C, Q, n) of {answer, tokens, logprob, scores}. keys(question, answer):
    what equal answers share; the first answer of a key is the one that is valued."""
    first: list[dict[str, float]] = [{} for _ in rows[0]]
    out = []
    for pool in rows:
        samples, right = [], []
        for i, row in enumerate(pool):
            found = [None if one["answer"] is None else keys(i, one["answer"]) for one in row]
            for key, one in zip(found, row, strict=True):
                if key is not None and key not in first[i]:
                    first[i][key] = value(i, one["answer"])
            samples.append(
                [Sample(key, one["tokens"], one["logprob"], one["scores"]) for key, one in zip(found, row, strict=True)]
            )
            right.append([key is not None and first[i][key] >= HALF for key in found])
        out.append(Pool.of(samples, np.array(right)))
    return out


@dataclass(frozen=True)
class Method:
    """right: (Q, K) chances in 0 … 1; samples, tokens: (Q, K) that it costs."""

    name: str
    right: np.ndarray
    samples: np.ndarray
    tokens: np.ndarray


def methods(
    pools: Sequence[Pool], rerank: Mapping[str, str], threshold: float, posterior: Any
) -> tuple[list[int], list[Method]]:
    """(k, methods) of one checkpoint's pool, or of several checkpoints that take turns. rerank: kind by name."""
    pool = Pool.joined(pools) if len(pools) > 1 else pools[0]
    ks = points(pool.size)
    asked = np.broadcast_to(np.array(ks, dtype=float), (len(pool.codes), len(ks)))
    cost = pool.cost(ks)
    out = [
        Method("pass", voting.pass_at(pool, ks), asked, cost),
        Method("majority", voting.majority_at(pool, ks), asked, cost),
    ]
    for name, kind in {**dict.fromkeys(FREE), **rerank}.items():
        if name not in pool.scores:
            continue
        scores = pool.scores[name]
        weights = voting.softmax_weights(pool, scores) if name in FREE or kind in FREE else scores
        out.append(Method(f"best of, {name}", voting.best_at(pool, scores, ks), asked, cost))
        out.append(Method(f"weighted, {name}", voting.weighted_at(pool, weights, ks), asked, cost))
    out.append(_dynamic(pools, ks, threshold, posterior))
    return ks, out


def _dynamic(pools: Sequence[Pool], ks: Sequence[int], threshold: float, posterior: Any) -> Method:
    columns = []
    for k in ks:
        plan = ensemble.turns([1] * len(pools), k)
        found = ensemble.replay(pools, Rule(k, threshold, posterior), plan=plan)
        columns.append([found.right.mean(0), found.samples.mean(0), found.tokens.mean(0)])
    right, samples, tokens = (np.stack(column, -1) for column in zip(*columns, strict=True))
    return Method("dynamic", right, samples, tokens)


def study(
    seeds: Sequence[Sequence[Pool]], rerank: Mapping[str, str], threshold: float, posterior: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(curves, comparisons) as JSON. seeds: for each training seed the pools of its checkpoints (one, or several that
    answer together), all of the same questions.

    Curves: statistics.Curve, `samples` and `tokens` being those of one question. Comparisons: method a minus b at k
    samples (of the dynamic ensemble: at most), for k = 8 and the whole pool, and at half of the cost; samples_a and
    samples_b are drawn.
    """
    found = [methods(pools, rerank, threshold, posterior) for pools in seeds]
    ks, names = found[0][0], [method.name for method in found[0][1]]
    stacked = {
        name: [np.stack([getattr(its[i], part) for _, its in found]) for part in ("right", "samples", "tokens")]
        for i, name in enumerate(names)
    }
    curves = [curve(name, *arrays).json() | {"k": ks} for name, arrays in stacked.items()]
    at = {k: i for i, k in enumerate(ks)}
    few = min(8, ks[-1])

    def told(a: str, k: int, b: str, of: int) -> dict[str, Any]:
        (first, samples, _), (second, beside, _) = stacked[a], stacked[b]
        names = f"{a}@{k}", "one sample" if of == 1 else f"{b}@{of}"
        return _told(*names, first[:, :, at[k]], second[:, :, at[of]]) | {
            "samples_a": float(samples[:, :, at[k]].mean()), "samples_b": float(beside[:, :, at[of]].mean()),
        }  # fmt: skip

    comparisons = []
    for k in sorted({few, ks[-1]} - {1}):
        comparisons.append(told("majority", k, "majority", 1))
        comparisons += [told(name, k, "majority", k) for name in names if name not in ("pass", "majority")]
    others = [name for name in names if name not in ("pass", "majority", "dynamic")]
    if few > 2:  # at half of the cost
        half = max(k for k in ks if k <= few / 2)
        comparisons += [told(name, half, "majority", few) for name in others]
    if few < ks[-1]:  # the same cost, spent where it is needed
        comparisons.append(told("dynamic", ks[-1], "majority", few))
    return curves, comparisons


def _told(a: str, b: str, first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    found = compare(first, second)
    return {"a": a, "b": b, **asdict(found), "accuracy_a": float(first.mean()), "accuracy_b": float(second.mean())}
