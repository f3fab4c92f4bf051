"""A training stage's metrics as curves and sums: the rows of the surviving lineage (progress.py), thinned for a page.

Invariants: a row whose figure is not finite is a gap, never a zero; where there are more rows than POINTS, neighbours
share a point, which is their mean, with a band from the lowest to the highest, so that no spike is lost.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from markupsafe import Markup

from orchestrator.report.lines import Line, chart

POINTS = 600  # of a line
STEEP = 30  # times the lowest value: from here on the scale is logarithmic

# key in metrics.jsonl, title, axis
CURVES = (
    ("loss", "Loss", "nats a token, weighted"),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("learning_rate", "Learning rate", "learning rate"),
    ("real_tokens_per_second", "Throughput", "tokens a second, all ranks"),
)
PACKING = (
    ("packing/token_fill", "token fill", "tokens of a step over packs × max_tokens"),
    ("packing/tile_fill", "tile fill", "tiles of a step over packs × max_tiles"),
    ("balance/max_over_mean", "balance", "cost of the busiest rank over the mean; 1 is even"),
)


@dataclass(frozen=True)
class Spread:
    name: str
    meaning: str
    mean: float
    low: float
    high: float


def thin(x: Sequence[float], y: Sequence[float | None], most: int = POINTS) -> Line:
    """At most so many points, each the mean of as many neighbours; with a band where neighbours share one."""
    each = math.ceil(len(x) / most)
    if each <= 1:
        return Line(x, y)
    parts = [(x[i : i + each], [v for v in y[i : i + each] if v is not None]) for i in range(0, len(x), each)]
    return Line(
        [place[-1] for place, _ in parts],
        [fmean(values) if values else None for _, values in parts],
        [min(values, default=None) for _, values in parts],
        [max(values, default=None) for _, values in parts],
    )


def curves(name: str, rows: Sequence[dict[str, Any]]) -> list[Markup]:
    """A chart for each of CURVES that the rows have. name: unique in the page."""
    steps = [row["step"] for row in rows]
    marks = [
        (after["step"], f"a new attempt goes on with step {after['step']:,}")
        for before, after in pairwise(rows)
        if before.get("attempt") != after.get("attempt")
    ]
    out = []
    for number, (key, title, axis) in enumerate(CURVES):
        values = [_finite(row.get(key)) for row in rows]
        known = [value for value in values if value is not None]
        if known:
            steep = key in ("loss", "grad_norm") and min(known) > 0 and max(known) > STEEP * min(known)
            line = thin(steps, values)
            note = f"{title} over {len(rows)} steps, from {known[0]:.4g} to {known[-1]:.4g}."
            out.append(
                chart(
                    f"{name}-{number}", title, [line], x="optimizer step", y=axis, log_y=steep, marks=marks, note=note,
                    from_zero=not steep,
                )
            )  # fmt: skip
    return out


def packing(rows: Sequence[dict[str, Any]]) -> list[Spread]:
    """Mean, lowest and highest over the steps."""
    out = []
    for key, name, meaning in PACKING:
        values = [value for row in rows if (value := _finite(row.get(key))) is not None]
        if values:
            out.append(Spread(name, meaning, fmean(values), min(values), max(values)))
    return out


def _finite(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None
