"""The rows of a training stage that are new, while it runs: what trackers are told.

Invariant: rows come in the order of their steps, each step once, of the lineage that survives so far (progress.py). A
look reads the segments that can hold new rows, not those before them: their names say where each one begins.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

from orchestrator.store import Store

NO_METRIC = ("step", "data/checksum")
Segment = tuple[str, int, float]  # key, its first step, and the step from which on another segment holds the rows


def surviving(keys: Sequence[str]) -> list[Segment]:
    """Of sorted keys `.../<token>-<first step>.jsonl`, those that still count: an attempt takes over the steps from its
    first one on."""
    out: list[Segment] = []
    before = ""
    for key in keys:
        token, _, first = key.rsplit("/", 1)[1].removesuffix(".jsonl").partition("-")
        step = int(first)
        if token == before:
            out[-1] = (*out[-1][:2], step)
        else:
            out = [(name, start, min(until, step)) for name, start, until in out if start < step]
        out.append((key, step, math.inf))
        before = token
    return out


def rows_after(store: Store, prefix: str, step: int) -> list[dict[str, Any]]:
    """The rows that storage has of the steps beyond `step`."""
    rows = []
    for key, first, until in surviving(store.list(f"{prefix}/metrics/")):
        if until > step + 1:
            segment = map(json.loads, store.get(key).decode().splitlines())
            rows += [row for row in segment if max(step + 1, first) <= row["step"] < until]
    return rows


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """What of a row a tracker can plot."""
    plain = {key: value for key, value in row.items() if isinstance(value, int | float) and key not in NO_METRIC}
    return {key: value for key, value in plain.items() if math.isfinite(value)}


def flat(values: dict[str, Any], before: str = "") -> dict[str, float]:
    """The numbers of nested mappings, by their path: {"tables/direct/digit/accuracy": 0.9}."""
    out: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= flat(value, f"{before}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            out[before + key] = value
    return numbers(out)
