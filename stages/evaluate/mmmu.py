"""Items of the MMMU schema, and of MMMU-Pro: Parquet as published, or the same records as JSON.

A record: `id` "validation_Accounting_1", `question` with `<image 1>`…, `options` a Python list written as text (read as
a literal, never evaluated; the official code calls `eval`) or a list, `answer` a letter, for open questions a text or a
list, `image_1` … `image_7` as {bytes, path}, `question_type` multiple-choice or open. MMMU-Pro has no `question_type`
and, in its vision setting, one `image` that holds the question with its options.

The category is the subject within the id. A folder that holds several splits, as published, is read for its validation
split: dev are the examples for few shots, and test has no answers.
"""

import base64
import binascii
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from modeling import files
from modeling.errors import DataError
from stages.evaluate.items import Item, Media
from stages.evaluate.records import (
    Place,
    objects,
    open_form,
    options_of,
    placed,
    references_of,
    right_letters,
    with_options,
)
from stages.evaluation import EvalSet

SUFFIXES = (".parquet", ".jsonl", ".json")
PICTURES = 7
_ID = re.compile(r"(?:dev|validation|test)_(.+)_\d+")


def chosen(paths: list[str]) -> list[str]:
    """Of files of several splits, those of the validation split."""
    splits = {path: re.split("[-.]", os.path.basename(path))[0] for path in paths}
    if "validation" in splits.values() and set(splits.values()) & {"dev", "test"}:
        return [path for path in paths if splits[path] == "validation"]
    return paths


def items(name: str, params: EvalSet, paths: list[str]) -> Iterator[Item]:
    for path in chosen(paths):
        records = _rows(path, params.endpoint_url) if path.endswith(".parquet") else objects(path, params.endpoint_url)
        for place, record in records:
            yield _item(name, params, place, record)


def _rows(path: str, endpoint: str | None) -> Iterator[tuple[Place, dict[str, Any]]]:
    import pyarrow as pa

    from modeling.parquet import open_parquet

    number = 0
    try:
        with files.opened(path, endpoint) as file:
            for batch in open_parquet(file, path).iter_batches(64):
                for record in batch.to_pylist():
                    number += 1
                    yield Place(path, f" row {number}"), record
    except (ConnectionError, PermissionError, FileNotFoundError):
        raise
    except (pa.ArrowException, OSError) as error:
        where = f"{path}: row {number + 1}" if number else path
        raise DataError(f"no Parquet file that can be read: {error}", where=where, remedy="fetch it again") from None


def _item(name: str, params: EvalSet, place: Place, record: dict[str, Any]) -> Item:
    id = record.get("id")
    if not isinstance(id, str) or not id:
        raise place.wrong("id", f"is {id!r}", "give text as in validation_Accounting_1")
    place = Place(place.file, f"{place.record} ({id})")
    inside = record.get("question") is None and record.get("image") is not None
    question = "" if inside else record.get("question")
    if not isinstance(question, str):
        raise place.wrong("question", "is absent" if question is None else f"is {str(question)[:80]!r}", "give text")
    options = options_of(record.get("options"), place)
    asked = record.get("question_type") or ("multiple-choice" if options else "open")
    if asked not in ("multiple-choice", "open"):
        raise place.wrong("question_type", f"is {asked!r}", "multiple-choice or open")
    if asked == "open":
        options = {}
    elif not options:
        raise place.wrong("options", "is empty", "list the options of a multiple-choice question")
    text = question.strip() if inside or not options else with_options(question.strip(), options)
    text, images = placed(text, _pictures(record, place), place, "question")
    references = references_of(record.get("answer"), place)
    if options:
        kind, metric = "choice", "choice"
        references = tuple(right_letters(one, options, place) for one in references)
    else:
        if references == ("?",):
            raise place.wrong("answer", "is '?'", "take the validation split: test has no answers")
        kind, metric = open_form(params.kind, params.metric, references)
    subject = _ID.fullmatch(id)
    category = subject[1] if subject else str(record.get("subject") or record.get("subfield") or "")
    return Item(
        id=id, task=name, question=text, kind=kind, metric=metric, references=references, options=options,
        multiple=bool(options) and any(len(one) > 1 for one in references), category=category, images=images,
        max_tiles=params.max_tiles, language=params.language,
    )  # fmt: skip


def _pictures(record: Mapping[str, Any], place: Place) -> dict[int, Media]:
    fields = {k: f"image_{k}" for k in range(1, PICTURES + 1)}
    if record.get("image") is not None:
        fields = {1: "image"}
    given = {k: (field, record.get(field)) for k, field in fields.items()}
    return {k: _picture(value, field, place) for k, (field, value) in given.items() if value is not None}


def _picture(value: Any, field: str, place: Place) -> Media:
    """{bytes, path} of a row; in JSON a path, or {path}, or {bytes} in base64."""
    if isinstance(value, str):
        return place.media(value, field)
    data = value.get("bytes") if isinstance(value, dict) else None
    if isinstance(data, bytes) and data:
        return data
    if isinstance(data, str):
        try:
            return base64.b64decode(data, validate=True)
        except (ValueError, binascii.Error) as error:
            raise place.wrong(field, f"has bytes that are no base64: {error}", "write them as base64") from None
    path = value.get("path") if isinstance(value, dict) else None
    if isinstance(path, str) and not place.file.endswith(".parquet"):
        return place.media(path, field)
    raise place.wrong(field, f"has no bytes (path {path!r})", "embed the pictures in the file, as {bytes, path}")
