"""summary.json: per dataset and in all, what was read, kept and rejected by reason, and what the kept ones hold."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from modeling.meta import Dataset

COUNTS = ("samples", "kept", "rejected", "tokens", "supervised", "tiles")


def summarise(datasets: Sequence[Dataset], verdicts: Iterator[pa.Table], repeat: str) -> dict[str, Any]:
    """Verdicts of a mixture, table by table. Invariant: samples = kept + rejected = kept + the sum of all reasons."""
    counts: dict[str, Counter[str]] = {dataset.name: Counter(dict.fromkeys(COUNTS, 0)) for dataset in datasets}
    reasons: dict[str, Counter[str]] = {dataset.name: Counter() for dataset in datasets}
    for table in verdicts:
        for row in table.group_by(["dataset", "reason"]).aggregate([("line", "count")]).to_pylist():
            kept, count = not row["reason"], row["line_count"]
            counts[row["dataset"]].update({"samples": count, "kept" if kept else "rejected": count})
            if not kept:
                reasons[row["dataset"]][row["reason"]] += count
        kept = table.filter(pc.field("verdict") == "kept")
        sums = kept.group_by("dataset").aggregate([(name, "sum") for name in ("tokens", "supervised", "tiles")])
        for row in sums.to_pylist():
            counts[row["dataset"]].update({name: row[f"{name}_sum"] for name in ("tokens", "supervised", "tiles")})
    total: Counter[str] = sum(counts.values(), Counter())
    why: Counter[str] = sum(reasons.values(), Counter())
    assert total["samples"] == total["kept"] + why.total(), (total, why)
    return {
        **{name: total[name] for name in COUNTS},
        "reasons": dict(sorted(why.items())),
        "repeat": repeat,
        "datasets": {
            name: {**{what: counts[name][what] for what in COUNTS}, "reasons": dict(sorted(reasons[name].items()))}
            for name in counts
        },
    }
