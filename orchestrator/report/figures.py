"""How figures are written, the same everywhere in the report: .912 [.880, .936], +.024, p < .001, 0.0296, 1,203,296.

Invariant: shares are written by stages/evaluate/figures.py, as in the log and in the model card, so that a figure that
stands in two places is the same to the letter.
"""

import math
from datetime import UTC, datetime

from stages.evaluate import figures
from stages.evaluate.figures import NONE as DASH
from stages.evaluate.figures import count as number
from stages.evaluate.figures import share

__all__ = [
    "DASH",
    "count",
    "difference",
    "interval",
    "moment",
    "number",
    "probability",
    "real",
    "share",
    "short",
    "signed",
]


def interval(value: float | None, low: float | None, high: float | None) -> str:
    """.912 [.880, .936]; without the brackets where there is no interval."""
    return f"{share(value)} {figures.interval(low, high)}".rstrip()


def signed(value: float | None) -> str:
    """A difference of two shares, with its sign: +.024."""
    text = share(value)
    return f"+{text}" if value is not None and value > 0 and text != ".000" else text


def difference(value: float, low: float | None, high: float | None) -> str:
    """+.024 [+.004, +.044]."""
    return signed(value) if low is None or high is None else f"{signed(value)} [{signed(low)}, {signed(high)}]"


def probability(value: float | None) -> str:
    """A p value: .023, < .001."""
    return "< .001" if value is not None and value < 0.001 else share(value)


def real(value: float | None) -> str:
    """Any other number, to three digits: 0.0296, 12.3, 4,092, 2e-05."""
    if value is None or not math.isfinite(value):
        return DASH
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def short(value: float) -> str:
    """For the ticks of an axis: 0.5, 20k, 1e-05."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def count(number_of: int, what: str) -> str:
    """1 stage, 2 stages."""
    return f"{number(number_of)} {what}{'s' * (number_of != 1)}"


def moment(seconds: float | None) -> str:
    """Wall clock time as 2025-11-26 20:16 UTC."""
    return DASH if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
