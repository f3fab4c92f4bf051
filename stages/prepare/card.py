"""The data card: one HTML page that says what a mixture is made of, what was left out and why, and how it will weigh.

Invariants: read = kept + rejected by reason, in all and in every set, and the page shows the sum; figures come from
verdicts.parquet alone; the same input gives the same bytes (the date is an argument). Plots and examples are safe as
page.py says. Beside the mixture's shares stand those of InternVL 2.5 (arXiv 2412.05271, §4.1).
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from stages.prepare import charts, shares
from stages.prepare.counts import SCORES, Counts, Set, Spread, count_verdicts, in_order
from stages.prepare.page import Example, number, percent, shown, write_page

KEPT_SHOWN = 3  # examples of a set
REJECTED_SHOWN = 5  # examples of a reason
EXAMPLES = 1000  # in all
CHARACTERS = 2000  # of an example
PICTURES = 4
MOST_COLUMNS = 48  # of a plot

# 1, 2, 3, 4, 6, 8, 11, 16, 23, 32 …: two columns for each doubling, as lengths spread over orders of magnitude
LENGTH_EDGES = np.unique([0, *np.round(2.0 ** (np.arange(64) / 2)).astype(np.int64)])


def write_card(
    path: Path,
    title: str,
    verdicts: Path,
    examples: Iterable[Example],
    *,
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes the card and returns its figures, for summary.json.

    settings: curation's limits. provenance: what the page is about (digest of the sources, version, date). Both may be
    nested. examples: as many as wanted, KEPT_SHOWN of a set and REJECTED_SHOWN of a reason are shown, the first ones.
    """
    counts = count_verdicts(verdicts)
    kept, rejected = _examples(examples)
    whole, found = counts.whole, figures(counts)
    write_page(
        path,
        "card",
        title=title,
        counts=counts,
        whole=whole,
        figures=found,
        waterfall=_waterfall(whole),
        charts=[_length_chart(counts.lengths), _tile_chart(counts.tiles)] if whole.kept else [],
        lengths=[(shares.name(kind), found["lengths"][kind]) for kind in _types(counts) if kind in counts.lengths],
        types=_type_rows(counts),
        share_chart=_share_chart(counts),
        sets=_sets(counts),
        score_charts=[_score_chart(name, parts) for name, parts in counts.scores.items() if parts.any()],
        domains=sorted(counts.domains.items()),
        kept=kept,
        rejected=rejected,
        kept_shown=KEPT_SHOWN,
        rejected_shown=REJECTED_SHOWN,
        settings=list(_flat(settings)),
        provenance=list(_flat(provenance)),
        type_name=shares.name,
        bar=charts.bar,
    )
    return found


def figures(counts: Counts) -> dict[str, Any]:
    """The card's figures as JSON: counts by set and reason, shares, quantiles of length."""
    return {
        **_figures(counts.whole),
        "sets": {name: _figures(one) for name, one in counts.sets.items()},
        "tokens": sum(part.tokens for part in counts.parts),
        "supervised": sum(part.supervised for part in counts.parts),
        "tiles": sum(part.tiles for part in counts.parts),
        "shares": shares.summary(counts.parts),
        "lengths": {kind: _quantiles(spread) for kind, spread in counts.lengths.items()},
        "scored": {score: int(counts.scores[score].sum()) for score in SCORES},
    }


def _figures(one: Set) -> dict[str, Any]:
    reasons = {step: dict(counts) for step, _, counts in one.by_step()}
    return {"read": one.read, "kept": one.kept, "rejected": one.rejected, "reasons": reasons}


def _quantiles(spread: Spread) -> dict[str, int | float]:
    shares_of = {"median": 0.5, "p90": 0.9, "p99": 0.99, "longest": 1.0}
    quantiles = {name: spread.quantile(share) for name, share in shares_of.items()}
    return {"samples": int(spread.counts.sum()), "mean": spread.mean(), **quantiles}


def _waterfall(one: Set) -> list[tuple[str, int, int, list[tuple[str, int]]]]:
    """(step, what it rejected, what is left after it, its reasons), down to what is kept."""
    left, rows = one.read, []
    for step, count, reasons in one.by_step():
        left -= count
        rows.append((step, count, left, reasons))
    assert left == one.kept, (left, one.kept)
    return rows


def _types(counts: Counts) -> list[str]:
    """The paper's types, and any other that was kept."""
    return [*shares.PAPER, *sorted({part.type for part in counts.parts} - set(shares.PAPER))]


def _type_rows(counts: Counts) -> list[dict[str, Any]]:
    ours = shares.token_shares(counts.parts, shares.by_type)
    rows = []
    for kind in _types(counts):
        parts = [part for part in counts.parts if part.type == kind]
        rows.append(
            {
                "name": shares.name(kind),
                "samples": sum(part.samples for part in parts),
                "tokens": sum(part.tokens for part in parts),
                "supervised": sum(part.supervised for part in parts),
                "epoch": sum(part.epoch_tokens for part in parts),
                "share": ours.get(kind, 0),
                "paper": shares.PAPER.get(kind, 0.0),
            }
        )
    return rows


def _sets(counts: Counts) -> list[tuple[shares.Part, float]]:
    """(part, share of the epoch), the largest first."""
    ours = shares.token_shares(counts.parts, lambda part: part)
    return sorted(((part, float(ours.get(part, 0))) for part in counts.parts), key=lambda pair: -pair[1])


def _share_chart(counts: Counts) -> Markup:
    rows = [(row["name"], (float(row["share"]), row["paper"])) for row in _type_rows(counts)]
    note = "; ".join(f"{name} {percent(ours)}, InternVL 2.5 {percent(paper)}" for name, (ours, paper) in rows)
    series = ("this mixture", "InternVL 2.5")
    return charts.side_by_side("shares", "Tokens by type", rows, x="% of tokens an epoch", series=series, note=note)


def _length_chart(lengths: Mapping[str, Spread]) -> Markup:
    heights = np.zeros(len(LENGTH_EDGES), np.int64)
    for spread in lengths.values():
        np.add.at(heights, np.searchsorted(LENGTH_EDGES, spread.values, "right") - 1, spread.counts)
    first, last = np.flatnonzero(heights)[[0, -1]]
    bars = [
        (f"{number(LENGTH_EDGES[i])} to {number(LENGTH_EDGES[i + 1] - 1)} tokens", [int(heights[i])])
        for i in range(first, last + 1)
    ]
    doublings = [i for i in range(first, last + 2) if int(LENGTH_EDGES[i]).bit_count() == 1]
    ticks = [(i - first, number(LENGTH_EDGES[i])) for i in doublings[:: -(-len(doublings) // 6)]]
    note = f"{number(heights.sum())} samples, most of them with {bars[heights[first : last + 1].argmax()][0]}."
    return charts.columns(
        "length", "Length of kept samples", bars, ticks, x="tokens (logarithmic)", y="samples", note=note
    )


def _tile_chart(tiles: Spread) -> Markup:
    wide = max(1, -(-(int(tiles.values[-1]) + 1) // MOST_COLUMNS))  # tiles a column
    heights = np.zeros(int(tiles.values[-1]) // wide + 1, np.int64)
    np.add.at(heights, tiles.values // wide, tiles.counts)
    bars = [
        (f"{i * wide} tiles" if wide == 1 else f"{i * wide} to {i * wide + wide - 1} tiles", [int(height)])
        for i, height in enumerate(heights)
    ]
    every = max(1, -(-len(bars) // 8))
    middle = 0.5 if wide == 1 else 0.0
    ticks = [(i + middle, number(i * wide)) for i in range(0, len(bars), every)]
    note = f"Mean {tiles.mean():.1f}, median {tiles.quantile(0.5)}, most {tiles.quantile(1.0)} tiles a sample."
    return charts.columns(
        "tiles", "Tiles of kept samples", bars, ticks, x="tiles, thumbnails included", y="samples", note=note
    )


def _score_chart(score: str, parts: np.ndarray) -> Markup:
    return charts.columns(
        f"score-{score}",
        f"Scores of {score}",
        [(f"score {i}", kept_rejected.tolist()) for i, kept_rejected in enumerate(parts)],
        [(i + 0.5, str(i)) for i in range(len(parts))],
        x="score, rounded (0 worst, 10 best)",
        y="samples",
        series=("kept", "rejected"),
        note=f"{number(parts.sum())} scored records.",
    )


def _examples(examples: Iterable[Example]) -> tuple[dict[str, list[Any]], dict[tuple[str, str], list[Any]]]:
    """Kept ones by set, rejected ones by step and reason. Pictures are made small at once."""
    kept: dict[str, list[Any]] = {}
    rejected: dict[tuple[str, str], list[Any]] = {}
    taken = 0
    for example in examples:
        if example.verdict == "kept":
            group, most = kept.setdefault(example.dataset, []), KEPT_SHOWN
        else:
            group, most = rejected.setdefault((example.step, example.reason), []), REJECTED_SHOWN
        if len(group) < most and taken < EXAMPLES:
            group.append(shown(example, characters=CHARACTERS, pictures=PICTURES))
            taken += 1
    order = [key for key, _ in in_order(Counter(dict.fromkeys(rejected, 1)))]
    return kept, {key: rejected[key] for key in order}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, value as text) of every leaf."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            yield f"{prefix}{name}", text
