"""From responses to tables: the answer of an item, its value, the row of a task, and the maximum over prompts.

Invariants: what cannot be read is wrong, and its rate stands in the table; a choice drawn for it (`fallback_seed`, as
the old parsers do) changes the value and not that rate. A value lies in 0 … 1, one for each question; intervals are of
95 %: Wilson's where all values are 0 or 1, else the bootstrap over questions (statistics.py).

Yes or no, as in POPE (official eval/pope/eval_pope.py): "yes" is the positive class, yes_rate the share of answers that
say yes. An unreadable answer is wrong, and for precision, recall and yes_rate it is no "yes", as in VLMEvalKit's
`POPE_rating`; eval_pope.py itself calls all that has no "no" in it a yes. A category "adversarial,popular" counts in
both, as there. A maximum is of what was tried on these questions: it is labelled as such, and has no interval, for that
of a single try would be too good.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stages.evaluate import boxes, extract, match
from stages.evaluate.items import Item
from stages.evaluate.statistics import interval, wilson

CIRCLE = 1_000_000  # MMBench: a question with its options turned has an index of so much more (VLMEvalKit)

Row = dict[str, Any]


def answer_of(item: Item, response: str, cut: bool = False) -> str | None:
    """What the response answers, in the form of the item's kind, or None. cut: it ended at the limit of tokens."""
    if item.kind == "box":
        return boxes.extract(response, cut)
    return extract.extract(response, item.kind, item.options, multiple=item.multiple, cut=cut)


def value_of(item: Item, answer: str | None, fallback_seed: int | None = None) -> float:
    """How right the answer is, in 0 … 1. fallback_seed: draw a letter for a choice whose response has none."""
    if answer is None and fallback_seed is not None and item.kind == "choice":
        answer = extract.fallback(fallback_seed, item.id, item.options)
    return match.METRICS[item.metric](answer, item.references)


def key_of(item: Item, answer: str) -> str:
    """What equal answers to the item share, for votes."""
    return answer if item.kind == "box" else match.vote_key(answer, item.kind)


def table(
    items: Sequence[Item], answers: Sequence[str | None], cut: Sequence[bool], tokens: Sequence[int],
    values: Sequence[float], seed: int = 0,
) -> dict[str, Row]:  # fmt: skip
    """One row for each task, of sequences with one entry per question.

    A row: n, right (sum of values), accuracy, low, high, metric, unparsable, cut (rates), tokens (mean of a response),
    where there are categories {category: {n, accuracy}}, and f1, precision, recall, yes_rate (yes or no), iou (mean,
    grounding), circular {n, accuracy} (MMBench). tokens: generated, of each response. seed: of the bootstrap.
    """
    tasks: dict[str, list[int]] = {}
    for i, (item, *_) in enumerate(zip(items, answers, cut, tokens, values, strict=True)):
        tasks.setdefault(item.task, []).append(i)
    return {
        task: _row(
            [items[i] for i in its], [answers[i] for i in its], np.array([cut[i] for i in its], float),
            np.array([tokens[i] for i in its], float), np.array([values[i] for i in its], float), seed,
        )
        for task, its in sorted(tasks.items())
    }  # fmt: skip


def maximum(tables: Mapping[str, Mapping[str, Row]]) -> dict[str, Row]:
    """{task: {prompt, accuracy, n, label}}: the best prompt (or number of frames) of each task; the first of equals.

    tables: by prompt, what `table` gave for each. A task that was asked in one way only has no maximum.
    """
    tasks = sorted({task for rows in tables.values() for task in rows})
    out = {}
    for task in tasks:
        tried = {prompt: rows[task] for prompt, rows in tables.items() if task in rows}
        if len(tried) > 1:
            best = max(tried, key=lambda prompt: tried[prompt]["accuracy"])
            label = f"maximum over {', '.join(tried)}"
            out[task] = {"prompt": best, "accuracy": tried[best]["accuracy"], "n": tried[best]["n"], "label": label}
    return out


def _row(
    items: list[Item], answers: list[str | None], cut: np.ndarray, tokens: np.ndarray, values: np.ndarray, seed: int
) -> Row:
    n, right = len(items), float(values.sum())
    if np.isin(values, (0, 1)).all():
        low, high = wilson(right, n)
    else:
        bounds = interval(values, seed=seed)
        low, high = bounds.low, bounds.high
    row: Row = {
        "n": n, "right": right, "accuracy": right / n, "low": low, "high": high,
        "metric": ", ".join(sorted({item.metric for item in items})),
        "unparsable": sum(answer is None for answer in answers) / n, "cut": float(cut.mean()),
        "tokens": float(tokens.mean()),
    }  # fmt: skip
    kinds = {item.kind for item in items}
    if kinds == {"yes_no"}:
        row |= _yes_no(items, answers)
    if kinds == {"box"}:
        shares = [boxes.iou(answer, item.references) for item, answer in zip(items, answers)]
        row["iou"] = float(np.mean(shares))
    if kinds == {"choice"} and (circular := _circular(items, values)):
        row["circular"] = circular
    if categories := _categories(items, values):
        row["categories"] = categories
    return row


def _yes_no(items: list[Item], answers: list[str | None]) -> Row:
    wanted = np.array([match.yes_no("yes", item.references) for item in items])
    said = np.array([match.yes_no("yes", [answer]) if answer is not None else False for answer in answers])
    both = int((wanted & said).sum())
    precision = both / int(said.sum()) if said.any() else 0.0
    recall = both / int(wanted.sum()) if wanted.any() else 0.0
    f1 = 2 * precision * recall / (precision + recall) if both else 0.0
    return {"f1": f1, "precision": precision, "recall": recall, "yes_rate": float(said.mean())}


def _circular(items: list[Item], values: np.ndarray) -> Row | None:
    """MMBench: a question is right if it is with its options in every order; None where no order was turned."""
    numbers = [item.id.rpartition("/")[2] for item in items]
    if not all(number.isdecimal() for number in numbers):
        return None
    turned = [int(number) for number in numbers]
    if max(turned) < CIRCLE or not {number % CIRCLE for number in turned} <= set(turned):
        return None
    groups: dict[int, list[float]] = {}
    for number, value in zip(turned, values):
        groups.setdefault(number % CIRCLE, []).append(float(value))
    return {"n": len(groups), "accuracy": sum(min(group) for group in groups.values()) / len(groups)}


def _categories(items: list[Item], values: np.ndarray) -> dict[str, Row]:
    groups: dict[str, list[float]] = {}
    for item, value in zip(items, values):
        names = item.category.split(",") if item.kind == "yes_no" else [item.category]
        for name in filter(None, map(str.strip, names)):
            groups.setdefault(name, []).append(float(value))
    return {name: {"n": len(group), "accuracy": sum(group) / len(group)} for name, group in sorted(groups.items())}
