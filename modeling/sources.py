"""What a mixture is made of: the InternVL meta JSON and its LLaVA annotation lines.

Invariant: a meta file is read in full or refused (DataError with file, key and remedy); an annotation line
becomes exactly one Sample or one Rejected with its reason. Nothing is dropped in silence, where the official
code loses the rest of a dataset after a few bad samples (OpenGVLab/InternVL `dataset_packed.py`).
Formats: `internvl_chat/internvl/train/internvl_chat_finetune.py`; `length` is informational, as there.
Standard library only, so that planning stays fast.
"""

import difflib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from modeling.errors import DataError

Reason = Literal[
    "bad_json",  # not JSON, or nested beyond reading
    "not_a_number",  # NaN or Infinity, which JSON does not have
    "invalid_utf8",  # bytes that are no UTF-8, or a lone surrogate
    "not_an_object",  # JSON, but not an object
    "bad_id",  # `id` neither text nor a whole number
    "missing_conversations",  # no `conversations` list
    "empty_conversation",  # a list without turns
    "bad_turn",  # a turn that is not {from, value} with text
    "unknown_role",  # `from` other than human, gpt, or system in first place
    "first_turn_not_human",
    "no_gpt_turn",
    "bad_image",  # `image` neither text nor a list of text
    "outside_root",  # a path that leaves the dataset's root
    "unsupported_video",
    "missing_image",
    "unreadable_image",  # not an image, truncated, or of a mode without RGB
    "zero_size",  # an empty file or a side of 0 pixels
    "too_many_pixels",  # a decompression bomb
    "placeholder_mismatch",  # <image> placeholders and images differ in number
    "too_long",
    "too_many_tiles",
    "no_supervised_token",
    # curation (stages/curation.py): what a step found in a sample that is whole
    "abnormal_length",
    "repetition",  # n-grams that come again and again
    "zero_run",  # a long run of zeros, or of another character
    "duplicate_lines",
    "odd_characters",
    "control_tokens",  # text that breaks the chat template
    "odd_shape",  # a picture too small or too long to show anything
    "duplicate",
    "near_duplicate",
    "contaminated",  # in an evaluation set
    "low_quality",  # by a language model
    "repetitive",  # by a language model
    "not_scored",  # the scorer gave no answer that can be read
    "review",  # by a person
]

KEYS = ("root", "annotation", "data_augment", "max_dynamic_patch", "repeat_time", "length")
DETAIL_CHARACTERS = 300


class Rejection(Exception):
    """Raised inside reading and measuring one sample; turned into a Rejected where the sample's place is known."""

    def __init__(self, reason: Reason, detail: str = ""):
        super().__init__(reason, detail)
        self.reason: Reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Dataset:
    """One entry of a meta file. `file` is the annotation as written there, `annotation` and `root` are resolved."""

    name: str
    root: str
    annotation: Path
    file: str
    data_augment: bool
    max_tiles: int | None  # tiles per image before the thumbnail; None: the stage's own
    repeat: float
    length: int | None = None


@dataclass(frozen=True)
class Sample:
    """One annotation line. `line` is 1-based; `images` are absolute paths that may not exist."""

    id: str
    task: str
    dataset: str
    file: str
    line: int
    conversation: tuple[dict[str, str], ...]  # {from: human|gpt|system, value}
    images: tuple[str, ...]


@dataclass(frozen=True)
class Rejected:
    """A sample that will not be trained on: where it stands, why, and what was found there."""

    dataset: str
    file: str
    line: int
    id: str
    reason: Reason
    detail: str

    @classmethod
    def of(cls, source: Sample, rejection: Rejection) -> "Rejected":
        detail = rejection.detail[:DETAIL_CHARACTERS]
        return cls(source.dataset, source.file, source.line, source.id, rejection.reason, detail)


def read_meta(path: Path | str) -> list[Dataset]:
    """The datasets of a meta file, in its order. Relative paths are taken from the meta file's folder.

    Raises DataError: file absent or not JSON, unknown or ill-typed key, annotation absent or not .jsonl.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise DataError("meta file not found", where=str(path), remedy="check `meta:` under `data:`") from None
    except (UnicodeDecodeError, PermissionError) as error:
        raise DataError(f"cannot read the meta file: {error}", where=str(path), remedy="give a UTF-8 JSON") from None
    try:
        meta = json.loads(text, object_pairs_hook=lambda pairs: _no_duplicates(pairs, path))
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}"
        raise DataError(f"not JSON: {error.msg}", where=where, remedy="correct the JSON at this line") from None
    if not isinstance(meta, dict) or not meta:
        found = "an empty object" if meta == {} else f"a {type(meta).__name__}"
        remedy = 'write {"<dataset name>": {"root": …, "annotation": "….jsonl", …}}'
        raise DataError(f"a meta file names at least one dataset, found {found}", where=str(path), remedy=remedy)
    return [_dataset(name, entry, path) for name, entry in meta.items()]


def _no_duplicates(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"the key '{twice}' stands twice", where=str(path), remedy="rename or remove one of them")
    return out


def _dataset(name: str, entry: Any, path: Path) -> Dataset:
    def fail(key: str, message: str, remedy: str) -> DataError:
        return DataError(message, where=f"{path}: {name}.{key}" if key else f"{path}: {name}", remedy=remedy)

    if not isinstance(entry, dict):
        raise fail("", f"a dataset is an object, found {entry!r}", 'write {"root": …, "annotation": "….jsonl"}')
    for key in entry:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1, 0.5)
            remedy = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(KEYS)}"
            raise fail(key, f"unknown key '{key}'", remedy)

    for key in ("root", "annotation"):
        if not isinstance(entry.get(key), str):
            raise fail(key, f"must be a path, found {entry.get(key)!r}", f"give '{key}' as text")
        if "://" in entry[key]:
            raise fail(key, f"'{entry[key]}' is a URL", "copy the data to a local folder and name that")
    folder = path.absolute().parent
    annotation = folder / entry["annotation"]
    if annotation.suffix != ".jsonl":
        raise fail("annotation", f"'{entry['annotation']}' is not a .jsonl file", "write one JSON object per line")
    if not annotation.is_file():
        raise fail("annotation", f"{annotation} not found", "check the path; it is relative to the meta file")

    augment = entry.get("data_augment", False)
    if not isinstance(augment, bool):
        raise fail("data_augment", f"must be true or false, found {augment!r}", "write true or false")
    repeat = entry.get("repeat_time", 1)
    if isinstance(repeat, bool) or not isinstance(repeat, int | float) or not math.isfinite(repeat) or repeat <= 0:
        remedy = "give how often a sample is used per epoch, such as 1 or 0.5; remove the dataset to leave it out"
        raise fail("repeat_time", f"must be a number above 0, found {repeat!r}", remedy)
    counts = {"max_dynamic_patch": entry.get("max_dynamic_patch"), "length": entry.get("length")}
    for key, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise fail(key, f"must be a whole number, found {value!r}", f"correct or remove '{key}'")
    if counts["max_dynamic_patch"] == 0:
        raise fail("max_dynamic_patch", "must be at least 1, found 0", "1 means one tile, without tiling")
    return Dataset(
        name=name,
        root=os.path.normpath(folder / entry["root"]),
        annotation=annotation,
        file=entry["annotation"],
        data_augment=augment,
        max_tiles=counts["max_dynamic_patch"],
        repeat=float(repeat),
        length=counts["length"],
    )


def read_samples(dataset: Dataset) -> Iterator[Sample | Rejected]:
    """Every non-blank line of a dataset's annotation, in order."""
    with open(dataset.annotation, "rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                yield parse_line(dataset, number, raw)


def parse_line(dataset: Dataset, line: int, raw: bytes) -> Sample | Rejected:
    """One annotation line (1-based number, raw bytes) as a Sample, or as a Rejected with the reason."""
    id = f"{dataset.name}-{line}"
    try:
        data = _object(raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw)
        given = data.get("id")
        if given is not None:
            if isinstance(given, bool) or not isinstance(given, str | int):
                raise Rejection("bad_id", f"`id` is {given!r}: give text or a whole number")
            id = str(given)
        conversation = _conversation(data)
        images = _images(data, dataset.root)
        human = "".join(turn["value"] for turn in conversation if turn["from"] == "human")
        if images and "<video>" in human and "<image>" not in human:
            raise Rejection("unsupported_video", "<video> stands where <image> is expected")
        task = data.get("task")
        task = task if isinstance(task, str) and task else dataset.name
        for text in (id, task, *images, *(turn["value"] for turn in conversation)):
            _check_text(text)
        return Sample(id, task, dataset.name, dataset.file, line, conversation, images)
    except Rejection as rejection:
        id = id.encode("utf-8", "backslashreplace").decode()
        detail = rejection.detail.encode("utf-8", "backslashreplace").decode()[:DETAIL_CHARACTERS]
        return Rejected(dataset.name, dataset.file, line, id, rejection.reason, detail)


def _object(raw: bytes) -> dict[str, Any]:
    def constant(name: str) -> None:
        raise Rejection("not_a_number", f"{name} is not JSON")

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise Rejection("not_a_number", f"{text} is beyond a float")
        return value

    try:
        data = json.loads(raw.decode("utf-8"), parse_constant=constant, parse_float=number)
    except UnicodeDecodeError as error:
        raise Rejection("invalid_utf8", str(error)) from None
    except (ValueError, RecursionError) as error:
        raise Rejection("bad_json", str(error)) from None
    if not isinstance(data, dict):
        raise Rejection("not_an_object", f"found a {type(data).__name__}: write one JSON object per line")
    return data


def _conversation(data: dict[str, Any]) -> tuple[dict[str, str], ...]:
    turns = data.get("conversations")
    if not isinstance(turns, list):
        hint = "; OpenAI-style `messages` are not read yet" if "messages" in data else ""
        raise Rejection("missing_conversations", f"`conversations` must be a list{hint}")
    if not turns:
        raise Rejection("empty_conversation", "`conversations` has no turn")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise Rejection("bad_turn", f"turn {number} must be {{from, value}} with text, found {turn!r}")
        role = turn.get("from")
        if role not in ("human", "gpt") and not (role == "system" and number == 1):
            raise Rejection("unknown_role", f"turn {number} is from {role!r}: human, gpt, or system in first place")
    dialogue = turns[1:] if turns[0]["from"] == "system" else turns
    if not dialogue or dialogue[0]["from"] != "human":
        raise Rejection("first_turn_not_human", "a conversation starts with a human turn (after a system turn)")
    if all(turn["from"] != "gpt" for turn in dialogue):
        raise Rejection("no_gpt_turn", "nothing to learn from: no turn is from gpt")
    return tuple({"from": turn["from"], "value": turn["value"]} for turn in turns)


def _images(data: dict[str, Any], root: str) -> tuple[str, ...]:
    """Official order of tests: a non-empty `image`, then `video`, else text only."""
    given = data.get("image")
    if not given and given in (None, "", []):
        if data.get("video"):
            raise Rejection("unsupported_video", "videos are not read yet")
        return ()
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise Rejection("bad_image", f"`image` must be a path or a list of paths, found {given!r}")
    return tuple(media_path(root, name) for name in names)


def media_path(root: str, name: str) -> str:
    """`name` below `root`, as an absolute path; Rejection where it is no path inside `root`."""
    if "\0" in name:
        raise Rejection("bad_image", f"{name!r} is not a path")
    path = os.path.normpath(os.path.join(root, name))
    if not path.startswith(root.rstrip(os.sep) + os.sep):
        raise Rejection("outside_root", f"{name!r} is outside the dataset's root: widen `root` in the meta file")
    return path


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Rejection("invalid_utf8", f"a lone surrogate at character {error.start}") from None
