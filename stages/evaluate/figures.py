"""How figures are written, in one place: so that the report, the model card and the log say the same to the letter.

A share has three digits and no zero before the point, an interval follows in brackets: ".912 [.880, .936]".
"""

import math
from collections.abc import Mapping
from typing import Any

NONE = "–"


def share(x: float | None) -> str:
    """A share or a difference of shares: .912, 1.000, -.020; – where there is none."""
    if x is None or not math.isfinite(x):
        return NONE
    text = f"{round(x, 3) + 0.0:.3f}"  # + 0.0: no minus before a zero
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def interval(low: float | None, high: float | None) -> str:
    """[.880, .936]; nothing where there is none."""
    return "" if low is None or high is None else f"[{share(low)}, {share(high)}]"


def with_interval(row: Mapping[str, Any]) -> str:
    """The accuracy of a row of a table and its interval, where it has one: .912 [.880, .936]."""
    return f"{share(row.get('accuracy'))} {interval(row.get('low'), row.get('high'))}".rstrip()


def count(n: float) -> str:
    """1,203,296."""
    return f"{n:,.0f}"
