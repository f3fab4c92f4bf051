"""What became of every record of a mixture, counted from verdicts.parquet.

Invariant: read = kept + the sum over all reasons, in every set and in all: each row is counted once, as one or the
other. Rows are streamed in batches and grouped by Arrow, so memory depends on the batch and on the different sets,
reasons and lengths, not on the rows: 223 MB for a process that counts 1 million rows, 231 MB for 16 million.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from modeling.parquet import open_parquet
from stages.prepare.shares import Part, count_parts, merge_parts

STEPS = ("structure", "review", "images", "text", "duplicates", "contamination", "scores")  # as they run
SCORES = ("quality", "repetition")
BEST = 10  # scores are 0 to 10 (arXiv 2412.05271, §4.3)
BATCH = 1 << 16
COLUMNS = [
    "dataset",
    "type",
    "verdict",
    "step",
    "reason",
    "tokens",
    "mean_tokens",
    "supervised",
    "tiles",
    "repeat",
    "domain",
    *SCORES,
]

Why = tuple[str, str]  # step, reason


class Spread:
    """Whole numbers and how often each came: exact quantiles in the memory of the different ones."""

    def __init__(self) -> None:
        self.values = np.zeros(0, np.int64)
        self.counts = np.zeros(0, np.int64)

    def add(self, values: np.ndarray) -> None:
        new, counts = np.unique(values.astype(np.int64), return_counts=True)
        self.values, place = np.unique(np.concatenate([self.values, new]), return_inverse=True)
        counts = np.concatenate([self.counts, counts])
        self.counts = np.zeros(len(self.values), np.int64)
        np.add.at(self.counts, place, counts)

    def quantile(self, share: float) -> int:
        """The smallest value that at least `share` of all do not exceed."""
        reached = np.cumsum(self.counts)
        return int(self.values[np.searchsorted(reached, share * reached[-1])])

    def mean(self) -> float:
        return float((self.values * self.counts).sum() / self.counts.sum())


@dataclass
class Set:
    """Records of one set. reasons: (step, reason) of the rejected ones."""

    read: int = 0
    kept: int = 0
    reasons: Counter[Why] = field(default_factory=Counter)

    @property
    def rejected(self) -> int:
        return sum(self.reasons.values())

    def by_step(self) -> list[tuple[str, int, list[tuple[str, int]]]]:
        """(step, its count, its reasons with theirs), as steps run, the most frequent reason first."""
        steps: dict[str, list[tuple[str, int]]] = {}
        for (step, reason), count in in_order(self.reasons):
            steps.setdefault(step, []).append((reason, count))
        return [(step, sum(count for _, count in reasons), reasons) for step, reasons in steps.items()]


@dataclass
class Domain:
    """Scored records of one domain. sums: of each score, and how many have it."""

    scored: int = 0
    kept: int = 0
    sums: dict[str, tuple[float, int]] = field(default_factory=lambda: dict.fromkeys(SCORES, (0.0, 0)))

    def mean(self, score: str) -> float | None:
        total, count = self.sums[score]
        return total / count if count else None


@dataclass
class Counts:
    """sets: in source order. parts, lengths, tiles: of kept samples; lengths in tokens by type. scores: [score, 2],
    how many records were given 0, 1 … 10 (rounded), kept and rejected."""

    sets: dict[str, Set] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    lengths: dict[str, Spread] = field(default_factory=dict)
    tiles: Spread = field(default_factory=Spread)
    scores: dict[str, np.ndarray] = field(
        default_factory=lambda: {name: np.zeros((BEST + 1, 2), np.int64) for name in SCORES}
    )
    domains: dict[str, Domain] = field(default_factory=dict)

    @property
    def whole(self) -> Set:
        """All sets as one."""
        reasons = sum((one.reasons for one in self.sets.values()), Counter())
        return Set(sum(s.read for s in self.sets.values()), sum(s.kept for s in self.sets.values()), reasons)


def count_verdicts(path: Path) -> Counts:
    """The counts of a whole verdicts.parquet."""
    counts = Counts()
    with open_parquet(path, str(path)) as file:
        for group in range(file.num_row_groups):  # one at a time: asked for all, Arrow keeps more of them
            for batch in file.iter_batches(BATCH, [group], COLUMNS, use_threads=False):
                _add(counts, pa.Table.from_batches([batch]))
    return counts


def in_order(reasons: Counter[Why]) -> list[tuple[Why, int]]:
    """Reasons by step, in the order in which steps run, the most frequent first."""
    rank = {step: i for i, step in enumerate(STEPS)}
    return sorted(reasons.items(), key=lambda item: (rank.get(item[0][0], len(rank)), -item[1], item[0]))


def _add(counts: Counts, table: pa.Table) -> None:
    for name in table["dataset"].unique().to_pylist():  # in their order, which Arrow's groups do not keep
        counts.sets.setdefault(name, Set())
    for row in _groups(table, "dataset", "verdict", "step", "reason"):
        one = counts.sets[row["dataset"]]
        one.read += row["count_all"]
        if row["verdict"] == "kept":
            one.kept += row["count_all"]
        elif row["verdict"] == "rejected":
            one.reasons[row["step"], row["reason"]] += row["count_all"]
        else:
            raise ValueError(f"a verdict is kept or rejected, found {row['verdict']!r}")

    kept = table.filter(pc.field("verdict") == "kept")
    counts.parts = merge_parts([*counts.parts, *count_parts(kept)])
    for kind in kept["type"].unique().to_pylist():
        lengths = counts.lengths.setdefault(kind, Spread())
        lengths.add(kept.filter(pc.field("type") == kind)["tokens"].to_numpy())
    counts.tiles.add(kept["tiles"].to_numpy())

    for column, rows in enumerate((kept, table.filter(pc.field("verdict") != "kept"))):
        for score in SCORES:
            values = rows[score].to_numpy()  # NaN where there is no score
            rounded = np.clip(np.floor(values[np.isfinite(values)] + 0.5), 0, BEST).astype(np.int64)
            counts.scores[score][:, column] += np.bincount(rounded, minlength=BEST + 1)
    in_domains = table.filter(pc.field("domain") != "")
    for row in _groups(in_domains, "domain", "verdict", sums=SCORES):
        one = counts.domains.setdefault(row["domain"], Domain())
        one.scored += row["count_all"]
        one.kept += row["count_all"] if row["verdict"] == "kept" else 0
        for score in SCORES:
            total, count = one.sums[score]
            one.sums[score] = total + (row[f"{score}_sum"] or 0.0), count + row[f"{score}_count"]


def _groups(table: pa.Table, *keys: str, sums: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    wanted: list[Any] = [([], "count_all")]
    wanted += [(name, how) for name in sums for how in ("sum", "count")]
    yield from table.group_by(list(keys), use_threads=False).aggregate(wanted).to_pylist()
