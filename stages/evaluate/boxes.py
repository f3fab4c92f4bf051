"""Regions: the box of a response, and how much of it is that of the reference.

Invariants: pure, linear in the response; coordinates are thousandths of the picture's width and height, as InternVL
writes them: `<box>[[x1, y1, x2, y2]]</box>`. Four numbers that all lie in 0 … 1 are fractions of it, as the official
eval/refcoco/evaluate_grounding.py takes them. Other forms that are read: one pair of brackets, (x1, y1), (x2, y2),
x1 = …, a JSON object, a `\\boxed{…}` around any of them. What a box or marker states wins (spans.py); then the
last `<box>`; then the last sentence; then the only four numbers in brackets. Of several boxes in one place the first
counts, as there. A box whose corners are the wrong way round has no area, and shares none.
"""

import re
from collections.abc import Sequence

from stages.evaluate.spans import compatible, plain, sentences, statements, thought_out

RIGHT = 0.5  # IoU from which a box is right (RefCOCO's Precision@1)

Box = tuple[float, float, float, float]

_NUMBER = r"(-?(?:\d{1,6}(?:\.\d{0,9})?|\.\d{1,9}))"
_LABEL = r"(?:[\"']?(?:[xy]_?(?:min|max|[12])|left|top|right|bottom)[\"']? ?[:=] ?)?"
_NEXT = r"(?: ?[,，;] ?| )"
_PAIR = rf"{_LABEL}{_NUMBER}{_NEXT}{_LABEL}{_NUMBER}"
_FOUR = rf"{_PAIR}(?:{_NEXT}| ?[)\]）]{_NEXT}[(\[（] ?){_PAIR}"
_BARE = re.compile(rf"(?<![\w.\-]){_FOUR}(?!\w|\.\d| ?[,，;] ?-?\d)", re.IGNORECASE)
_BRACKETS = re.compile(rf"[\[(（{{] ?{_FOUR} ?[\])）}}]", re.IGNORECASE)
_TAG = re.compile(r"<box>([^<]{0,400})</box>")


def coordinates(text: str) -> Box | None:
    """The first four numbers that stand together, as they are written."""
    match = _BRACKETS.search(text) or _BARE.search(text)
    return _box(match) if match else None


def extract(response: str, cut: bool = False) -> str | None:
    """The box of a response as "[x1, y1, x2, y2]" in thousandths, or None.

    cut: the generation ended at its limit, so that only what is stated, or begins the response, counts.
    """
    lines = compatible(thought_out(response))
    text = lines.replace("\n", " ")
    for said in statements(lines):
        region = plain(said.text)
        if said.boxed and not region:
            continue
        if (box := coordinates(region)) or said.boxed:
            return _told(box)
    if cut and not text.startswith(("<ref>", "<box>")):
        return None
    if tags := _TAG.findall(text):
        return _told(coordinates(tags[-1]))
    if last := _BRACKETS.search((sentences(lines) or [""])[-1]):
        return _told(_box(last))
    everywhere = {_box(match) for match in _BRACKETS.finditer(text)}
    if len(everywhere) == 1:
        return _told(everywhere.pop())
    return _told(coordinates(text)) if _BARE.fullmatch(text.strip(" .")) else None


def iou(answer: str | None, references: Sequence[str]) -> float:
    """The largest intersection over union of the answer's box with that of a reference, in 0 … 1."""
    box = coordinates(answer) if answer is not None else None
    return 0.0 if box is None else max((overlap(box, one) for one in map(coordinates, references) if one), default=0.0)


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    union = _area(one) + _area(other) - shared
    return shared / union if shared > 0 else 0.0


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _box(match: re.Match[str]) -> Box:
    x1, y1, x2, y2 = map(float, match.groups())
    return x1, y1, x2, y2


def _told(box: Box | None) -> str | None:
    if box is None:
        return None
    scale = 1000 if all(0 <= x <= 1 for x in box) else 1
    return f"[{', '.join(format(round(x * scale, 3), 'g') for x in box)}]"
