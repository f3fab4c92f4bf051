"""What an epoch of a mixture trains: its tokens by set and type, before any training.

Invariant: an epoch holds each kept sample `repeat` times (modeling/epochs.py: of a fraction, exactly that share of the
set's samples, rounded to whole ones), so a part's tokens per epoch are its tokens times its repeat factor. Shares are
exact fractions of what the factors are as floats, and sum to 1. Tokens are input ids, image tokens included, without
the padding of packs.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

import pyarrow as pa

Key = TypeVar("Key", bound=Hashable)

# Tokens of InternVL 2.5's fine-tuning mixture of 16.3 million samples (arXiv 2412.05271, §4.1). The paper's types are
# ours; how it counts tokens, it does not say.
PAPER = {"image": 0.4592, "multi_image": 0.0937, "video": 0.3979, "text": 0.0492}
NAMES = {"image": "single image", "multi_image": "multi-image", "video": "video", "text": "text", "": "unknown"}
COLUMNS = ("dataset", "type", "repeat", "mean_tokens", "supervised", "tiles")  # of verdicts.parquet


@dataclass(frozen=True)
class Part:
    """The kept samples of one set and type: how many, and their sums."""

    dataset: str
    type: str
    repeat: float
    samples: int
    tokens: int
    supervised: int
    tiles: int

    @property
    def epoch_tokens(self) -> Fraction:
        return Fraction(self.repeat) * self.tokens


def count_parts(columns: pa.Table) -> list[Part]:
    """The parts of kept samples, one row each with COLUMNS, sorted."""
    sums = [([], "count_all"), *((name, "sum") for name in COLUMNS[3:])]
    rows = columns.select(COLUMNS).group_by(list(COLUMNS[:3]), use_threads=False).aggregate(sums)
    names = (*COLUMNS[:3], "count_all", *(f"{name}_sum" for name in COLUMNS[3:]))
    return merge_parts(Part(*(row[name] for name in names)) for row in rows.to_pylist())


def merge_parts(parts: Iterable[Part]) -> list[Part]:
    """Parts of the same set, type and factor as one, sorted: of the pieces of a table, what the table itself gives."""
    merged: dict[tuple[str, str, float], Part] = {}
    for part in parts:
        key = (part.dataset, part.type, part.repeat)
        old = merged.get(key, Part(*key, 0, 0, 0, 0))
        merged[key] = Part(
            *key,
            old.samples + part.samples,
            old.tokens + part.tokens,
            old.supervised + part.supervised,
            old.tiles + part.tiles,
        )
    return [merged[key] for key in sorted(merged)]  # Arrow's groups have no order to rely on


def name(kind: str) -> str:
    return NAMES.get(kind, kind)


def by_type(part: Part) -> str:
    return part.type


def by_set(part: Part) -> str:
    return part.dataset


def by_set_and_type(part: Part) -> tuple[str, str]:
    return part.dataset, part.type


def token_shares(parts: Iterable[Part], by: Callable[[Part], Key] = by_set_and_type) -> dict[Key, Fraction]:
    """The share of an epoch's tokens by any property of the parts, in their order; {} where there is no token."""
    tokens: dict[Key, Fraction] = {}
    for part in parts:
        tokens[by(part)] = tokens.get(by(part), Fraction()) + part.epoch_tokens
    whole = sum(tokens.values())
    return {key: value / whole for key, value in tokens.items()} if whole else {}


def summary(parts: list[Part]) -> dict[str, Any]:
    """For summary.json: {tokens_per_epoch, by_type: {type: share}, by_set: {set: share}}, floats."""
    return {
        "tokens_per_epoch": float(sum(part.epoch_tokens for part in parts)),
        "by_type": {key: float(share) for key, share in token_shares(parts, by_type).items()},
        "by_set": {key: float(share) for key, share in token_shares(parts, by_set).items()},
    }
