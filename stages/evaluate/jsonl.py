"""A team's own evaluation set: one JSON object per line (docs/evaluation.md, "Sets").

{"id", "question", "image": path or [paths], "video": path, "options": [texts] or {letter: text}, "answer": text or
[texts], "kind", "metric", "multiple", "task", "category", "language", "max_tiles", "history": [{from, value}], "box":
[x1, y1, x2, y2] or a list of such, "size": [width, height]}. Only `question` and `answer` (or `box`) are needed. Paths
are relative to the file. A box is in thousandths of the picture, or in pixels where `size` says how large it is; its
question is the sentence that describes the region, which is wrapped in the official words (prompts.grounding).

What is not said follows: options make a choice, a box a region, an answer of yes or no asks for these, a number is
compared as one, anything else as a text. Unknown fields are of no interest, but one that is nearly a known one is
refused: it would be a slip of the pen.
"""

import difflib
import json
from collections.abc import Iterator
from typing import Any, get_args

from stages.evaluate import prompts
from stages.evaluate.items import AnswerKind, Item, Media
from stages.evaluate.match import METRICS
from stages.evaluate.records import (
    Place,
    form,
    is_number,
    objects,
    options_of,
    placed,
    references_of,
    right_letters,
    stems,
    with_options,
    with_video,
)
from stages.evaluation import EvalSet

SUFFIXES = (".jsonl", ".json")
FIELDS = (
    "id", "question", "image", "video", "options", "answer", "kind", "metric", "multiple", "task", "category",
    "language", "max_tiles", "history", "box", "size",
)  # fmt: skip
KINDS: tuple[AnswerKind, ...] = get_args(AnswerKind)


def items(name: str, params: EvalSet, paths: list[str]) -> Iterator[Item]:
    for path, stem in zip(paths, stems(paths)):
        task, prefix = (name, "") if len(paths) == 1 else (f"{name}/{stem}", f"{stem}/")
        for place, record in objects(path, params.endpoint_url):
            yield _item(params, place, record, task, prefix)


def _item(params: EvalSet, place: Place, record: dict[str, Any], task: str, prefix: str) -> Item:
    for key in record:
        if key not in FIELDS and (near := difflib.get_close_matches(key, FIELDS, 1, 0.8)):
            raise place.wrong(key, "is not known", f"did you mean `{near[0]}`?")
    question, language = _text(record, "question", place), _language(record, place, params.language)
    options = options_of(record.get("options"), place)
    boxes = _boxes(record, place)
    references = boxes or references_of(record.get("answer"), place, literal=False)
    kind, metric = _form(params, place, record, options, boxes, references)
    if kind == "choice":
        if not options:
            raise place.wrong("options", "is empty", "list the options of a choice, or give another kind")
        references = tuple(right_letters(one, options, place) for one in references)
        if record.get("multiple"):  # else each of a list is right by itself
            references = ("".join(sorted(set("".join(references)))),)
    if kind == "box":
        if not boxes:
            raise place.wrong("box", "is absent", "give [x1, y1, x2, y2] in thousandths of the picture")
        question = prompts.grounding(question, language)
    if options:
        question = with_options(question, options)
    history = _history(record, place)
    question, images, video = _media(record, place, question)
    return Item(
        id=prefix + _text(record, "id", place, place.record.split()[-1]), task=_text(record, "task", place, task),
        question=question, kind=kind, metric=metric, references=references, options=options,
        multiple=bool(record.get("multiple")) or (kind == "choice" and any(len(one) > 1 for one in references)),
        category=_text(record, "category", place, ""), images=images, video=video,
        max_tiles=_tiles(record, place, params.max_tiles), language=language, history=history,
    )  # fmt: skip


def _form(
    params: EvalSet, place: Place, record: dict[str, Any], options: dict[str, str], boxes: tuple[str, ...],
    references: tuple[str, ...],
) -> tuple[AnswerKind, str]:  # fmt: skip
    """The set's own settings, else the record's, else what the record looks like."""
    kind, metric = params.kind or record.get("kind"), params.metric or record.get("metric")
    if kind is not None and kind not in KINDS:
        raise place.wrong("kind", f"is {kind!r}", f"one of {', '.join(KINDS)}")
    if metric is not None and metric not in METRICS:
        raise place.wrong("metric", f"is {metric!r}", f"one of {', '.join(METRICS)}")
    if kind is None and (options or boxes):
        kind = "choice" if options else "box"
        metric = metric if record.get("metric") else None  # the set's is for its other questions
    yes_no = all(text.lower() in ("yes", "no", "是", "否") for text in references)
    usual = "yes_no" if yes_no else "number" if all(map(is_number, references)) else "text"
    return form(kind, metric, references, usual)


def _media(record: dict[str, Any], place: Place, question: str) -> tuple[str, tuple[Media, ...], Media | None]:
    given = record.get("image") or []
    paths, video = given if isinstance(given, list) else [given], record.get("video")
    if not all(isinstance(path, str) for path in paths):
        raise place.wrong("image", f"is {str(given)[:80]!r}", "give a path, or a list of paths")
    if video is not None:
        if not isinstance(video, str) or paths:
            raise place.wrong("video", f"is {str(video)[:80]!r}", "give one path, and no `image` beside it")
        return with_video(question, place, "question"), (), place.media(video, "video")
    pictures = {k: place.media(path, "image") for k, path in enumerate(paths, 1)}
    return *placed(question, pictures, place, "question"), None


def _boxes(record: dict[str, Any], place: Place) -> tuple[str, ...]:
    """References of 0 … 1000."""
    given = record.get("box")
    if given is None:
        return ()
    boxes = given if isinstance(given, list) and given and isinstance(given[0], list) else [given]
    size = record.get("size", [1000, 1000])
    if not _numbers(size, 2) or min(size) <= 0:
        raise place.wrong("size", f"is {size!r}", "give [width, height] of the picture in pixels")
    for box in boxes:
        if not _numbers(box, 4) or not (0 <= box[0] < box[2] <= size[0] and 0 <= box[1] < box[3] <= size[1]):
            remedy = f"give [x1, y1, x2, y2] with x1 < x2 ≤ {size[0]} and y1 < y2 ≤ {size[1]}" + (
                "" if "size" in record else ", in thousandths of the picture, or add its `size` in pixels"
            )
            raise place.wrong("box", f"is {box!r}", remedy)
    scale = [1000 / size[0], 1000 / size[1]] * 2
    return tuple(json.dumps([round(x * by, 3) for x, by in zip(box, scale)]) for box in boxes)


def _numbers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(type(one) in (int, float) for one in value)


def _history(record: dict[str, Any], place: Place) -> tuple[dict[str, str], ...]:
    turns = record.get("history") or []
    for turn in turns if isinstance(turns, list) else [turns]:
        keys = isinstance(turn, dict) and turn.get("from") in ("human", "gpt") and isinstance(turn.get("value"), str)
        if not keys or "<image>" in turn["value"]:
            remedy = "give turns {from: human or gpt, value: text} without pictures, which stand in the question"
            raise place.wrong("history", f"has {str(turn)[:80]!r}", remedy)
    if turns and turns[-1]["from"] == "human":
        remedy = "end it with the answer of gpt; the question itself stands in `question`"
        raise place.wrong("history", "ends with a turn of human", remedy)
    return tuple({"from": turn["from"], "value": turn["value"]} for turn in turns)


def _text(record: dict[str, Any], field: str, place: Place, otherwise: str | None = None) -> str:
    value = record.get(field, otherwise)
    if isinstance(value, int) and not isinstance(value, bool) and field == "id":
        value = str(value)
    if not isinstance(value, str) or (not value.strip() and otherwise is None):
        raise place.wrong(field, "is absent" if value is None else f"is {str(value)[:80]!r}", "give text")
    return value


def _tiles(record: dict[str, Any], place: Place, otherwise: int) -> int:
    value = record.get("max_tiles", otherwise)
    if type(value) is not int or value < 1:
        raise place.wrong("max_tiles", f"is {value!r}", "give a whole number from 1")
    return value


def _language(record: dict[str, Any], place: Place, otherwise: Any) -> Any:
    value = record.get("language", otherwise)
    if value not in ("en", "zh"):
        raise place.wrong("language", f"is {value!r}", "en or zh: the language of the prompt's words")
    return value
