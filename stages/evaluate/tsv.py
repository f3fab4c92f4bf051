"""VLMEvalKit's TSV files, as they are (vlmeval/dataset/image_base.py): choices, yes or no, and questions with texts.

Columns: `index`, `question`, `answer`; `image` in base64, a list of such, or the index of the row that has the same
picture (64 characters at most); `image_path` where nothing is embedded; A, B, C… as options; `hint`, `category`,
`l2-category`, `split`; for videos `video_path`, or `video` below `prefix`, with `candidates` as options.

Kinds: a row with options is a choice; a file whose answers are all yes or no asks for these; else a text, compared as
VLMEvalKit does by the name of the benchmark (image_vqa.py): DocVQA and InfoVQA by ANLS, ChartQA relaxed, others "vqa".
OCRBench is by ANLS here, where its own count asks whether the reference is part of the response.

Unlike there: an option "None" or "NA" is one (pandas takes it for an empty cell), and a row without a picture is a
question in words (there it is left out). Several splits are several tasks. A question with Chinese characters is asked
in Chinese, as InternVL's prompts there are.
"""

import base64
import binascii
import csv
import io
import os
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing

from modeling import files
from modeling.errors import DataError
from modeling.sources import VIDEOS
from stages.evaluate.items import Item, Media
from stages.evaluate.records import (
    LETTERS,
    Place,
    form,
    listed,
    open_form,
    options_of,
    placed,
    references_of,
    right_letters,
    stems,
    with_options,
    with_video,
)
from stages.evaluation import EvalSet

SUFFIXES = (".tsv",)
LONGEST_INDEX = 64  # characters; a longer `image` is a picture
CELL = 1 << 30  # characters
_CHINESE = re.compile("[\u4e00-\u9fff]")
_METRICS = (("docvqa", "anls"), ("infovqa", "anls"), ("ocrbench", "anls"), ("chartqa", "relaxed"))

Row = dict[str, str]


def items(name: str, params: EvalSet, paths: list[str]) -> Iterator[Item]:
    for path, stem in zip(paths, stems(paths)):
        alone = len(paths) == 1
        yield from _File(path, stem, name if alone else f"{name}/{stem}", "" if alone else f"{stem}/", params).items()


def embeds(path: str, endpoint: str | None) -> bool:
    """Whether it has pictures inside, so that a look at its questions would decode them."""
    return "image" in _columns(path, endpoint)


def named(params: EvalSet, path: str) -> Iterator[str]:
    """The files that the rows of a file that embeds pictures name, where nothing is embedded; nothing is decoded."""
    if not {"image_path", "video_path", "video"} & _columns(path, params.endpoint_url):
        return
    file = _File(path, "", "", "", params)
    for place, row in file.rows:
        if not file.cells[row["index"]].strip():
            images, video = file.images(place, row), file.video(place, row)
            yield from (one for one in images or (video,) if isinstance(one, str))


def _columns(path: str, endpoint: str | None) -> set[str]:
    rows = _rows(path, endpoint)
    with closing(rows):
        return set(next(rows)[1])


class _File:
    """One file, of which all rows are known before the first item: a picture may stand in another row."""

    def __init__(self, path: str, stem: str, task: str, prefix: str, params: EvalSet):
        self.names, self.task, self.prefix, self.params = f"{stem} {task}".lower(), task, prefix, params
        self.rows: list[tuple[Place, Row]] = []
        self.cells: dict[str, str] = {}
        for place, row in _rows(path, params.endpoint_url):
            index = row.get("index", "").strip()
            if not index:
                raise place.wrong("index", "is empty", "give every row an index of its own")
            place = Place(path, f"{place.record} (index {index})")
            if index in self.cells:
                raise place.wrong("index", "is that of another row too", "give every row an index of its own")
            self.cells[index] = row.pop("image", "")
            self.rows.append((place, row | {"index": index}))
        self.splits = len({row.get("split", "") for _, row in self.rows}) > 1
        self.options = [_options(row, place) for place, row in self.rows]
        answers = [row.get("answer", "").strip().lower() for _, row in self.rows]
        self.yes_no = not any(self.options) and set(answers) <= {"yes", "no"}
        choices = params.kind in (None, "choice")
        self.right = [
            tuple(right_letters(one, options, place) for one in references_of(row["answer"], place))
            if options and choices else ()
            for (place, row), options in zip(self.rows, self.options)
        ]  # fmt: skip
        self.multiple = any(len(letters) > 1 for right in self.right for letters in right)
        self.pictures: dict[str, tuple[Media, ...]] = {}

    def items(self) -> Iterator[Item]:
        for (place, row), options, right in zip(self.rows, self.options, self.right):
            yield self._item(place, row, options, right)

    def _item(self, place: Place, row: Row, options: Mapping[str, str], right: tuple[str, ...]) -> Item:
        question = row.get("question", "").strip()
        if not question:
            raise place.wrong("question", "is empty", "give the question")
        if hint := row.get("hint", "").strip():
            question = f"{hint}\n{question}"
        if options:
            question = with_options(question, options)
        params, references = self.params, right or references_of(row["answer"], place)
        kind, metric = ("choice", "choice") if right else self._form(references)
        if kind == "choice" and not right:
            raise place.wrong("A", "is empty, like B and C", "give the options of a choice, or another `kind:`")
        images, video = self.images(place, row), self.video(place, row)
        if video and not images:
            question = with_video(question, place, "question")
        else:
            question, images = placed(question, dict(enumerate(images, 1)), place, "question")
            video = None
        split = f"/{row.get('split') or 'none'}" if self.splits else ""
        return Item(
            id=self.prefix + row["index"], task=self.task + split, question=question, kind=kind, metric=metric,
            references=references, options=options if kind == "choice" else {}, multiple=self.multiple,
            category=(row.get("category") or row.get("l2-category") or "").strip(), images=images, video=video,
            max_tiles=params.max_tiles, language="zh" if _CHINESE.search(question) else params.language,
        )  # fmt: skip

    def _form(self, references: tuple[str, ...]):
        kind, metric = self.params.kind, self.params.metric
        if kind is None and metric is None and "mmmu" in self.names:
            return open_form(None, None, references)
        if kind is None and metric is None and not self.yes_no:
            metric = next((metric for name, metric in _METRICS if name in self.names), "vqa")
        return form(kind, metric, references, "yes_no" if self.yes_no else "text")

    def images(self, place: Place, row: Row) -> tuple[Media, ...]:
        index, cell = row["index"], self.cells[row["index"]].strip()
        if cell and len(cell) <= LONGEST_INDEX:
            index, cell = cell, self.cells.get(cell, "").strip()
            if len(cell) <= LONGEST_INDEX:
                remedy = "give the index of a row that has a picture, or the picture in base64"
                raise place.wrong("image", f"is {index!r}: no row of that index has a picture", remedy)
        if not cell:
            named = listed(row.get("image_path", "")) or [row.get("image_path", "")]
            return tuple(place.media(str(one).strip(), "image_path") for one in named if str(one).strip())
        if index not in self.pictures:  # decoded once for all rows that show it
            self.pictures[index] = tuple(_decoded(str(one), place) for one in listed(cell, CELL) or [cell])
        return self.pictures[index]

    def video(self, place: Place, row: Row) -> str | None:
        name = row.get("video_path", "").strip()
        if not name and row.get("video", "").strip().lower().endswith((*VIDEOS, ".gif")):
            name = os.path.join(row.get("prefix", "").strip(), row["video"].strip())
        return place.media(name, "video_path") if name else None


def _options(row: Row, place: Place) -> dict[str, str]:
    options = {letter: row[letter].strip() for letter in LETTERS if row.get(letter, "").strip()}
    return options or options_of(row.get("candidates"), place, "candidates", lettered=True)


def _decoded(text: str, place: Place) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise place.wrong(
            "image", f"is no base64: {error}", "fetch the file again, or write the picture as base64"
        ) from None


def _rows(path: str, endpoint: str | None) -> Generator[tuple[Place, Row]]:
    """Rows as {column: text}. Raises DataError: no table, no text, a column that is needed and absent."""
    number, limit = 0, csv.field_size_limit(CELL)  # of all readers of the process: set back as soon as a row is read
    try:
        with files.opened(path, endpoint) as binary:
            text = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
            reader = csv.DictReader(text, delimiter="\t", restval="", strict=True)
            columns = reader.fieldnames or []
            if missing := [one for one in ("index", "question", "answer") if one not in columns]:
                has = ", ".join(columns)[:200] or "nothing"
                raise DataError(f"has no column `{missing[0]}`, but {has}", where=path,
                                remedy="give a TSV file as VLMEvalKit has them, with answers")  # fmt: skip
            for number, row in enumerate(reader, 1):
                csv.field_size_limit(limit)
                place = Place(path, f" row {number}")
                if None in row:
                    raise DataError(f"has more cells than the {len(columns)} columns", where=str(place),
                                    remedy="quote cells that hold tabs")  # fmt: skip
                yield place, row
                csv.field_size_limit(CELL)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"no TSV file that can be read: {error}", where=f"{path}: row {number + 1}",
                        remedy="fetch it again, or write it as UTF-8") from None  # fmt: skip
    finally:
        csv.field_size_limit(limit)
    if not number:
        raise DataError("has no rows", where=path, remedy="fetch it again")
