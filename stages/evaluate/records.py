"""What the formats of evaluation sets share: finding files, telling where a record is wrong, placing pictures, options.

Invariants: a record becomes an Item or a DataError that names file, line or row, and field; none is left out. In a
question stands one `<image>` for each of its pictures, in their order. Numbered places (`<image 2>` of MMMU, also in
options) are filled where they stand, and a picture named twice is shown twice, as VLMEvalKit's `split_MMMU` does; what
has no place is put in front, several as `Image-1: <image>` (the paper's tags, recipe §2.3, and VLMEvalKit's
`reorganize_prompt`). Options are lines "A. text", as in the official eval/mmmu/evaluate_mmmu.py and in VLMEvalKit's
`build_multi_choice_prompt`.
"""

import ast
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modeling import files
from modeling.errors import DataError
from modeling.sources import Rejection, parse_json
from modeling.template import IMAGE, IMG_CONTEXT, VIDEO
from stages.evaluate import numerals
from stages.evaluate.choices import comparable
from stages.evaluate.items import AnswerKind, Media
from stages.evaluate.spans import compatible

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LONGEST_LIST = 1 << 20  # characters of a list that is written as text; of pictures more

_WRITE_JSON = "write one JSON object per line in a .jsonl file, or a list of them in a .json file"
_NUMBERED = re.compile(r"<image ?(\d{1,2})>")
_SURROGATE = re.compile("[\ud800-\udfff]")
_OWN_LETTER = re.compile(r"\(?([A-Z])[.):] ?")
_BY_METRIC: dict[str, AnswerKind] = {"choice": "choice", "yes_no": "yes_no", "iou": "box", "number": "number"}
METRIC_OF: dict[AnswerKind, str] = {
    "choice": "choice", "yes_no": "yes_no", "number": "number", "text": "exact", "box": "iou",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A record: its file, and where it stands there, "3" (a line) or " row 3 (index 17)"."""

    file: str
    record: str

    def wrong(self, field: str, message: str, remedy: str) -> DataError:
        return DataError(f"`{field}` {message}", where=str(self), remedy=remedy)

    def __str__(self) -> str:
        return f"{self.file}:{self.record}"

    def media(self, name: str, field: str) -> str:
        """A path of the record as a local path or an address: relative ones are relative to the file's folder."""
        if not name or "\0" in name:
            raise self.wrong(field, f"is {name!r}", "give the path of a file")
        if name.startswith(("http://", "https://", "data:")):
            raise self.wrong(field, f"is {name[:60]!r}", "save the file, and give its path or s3:// address")
        path = files.join(folder_of(self.file), name)
        return path + "/" if name.endswith("/") else path  # a folder of frames


def folder_of(path: str) -> str:
    return path.rpartition("/")[0] or ("/" if path.startswith("/") else ".")


def found(path: str, suffixes: tuple[str, ...], endpoint: str | None = None) -> list[str]:
    """The files that a set's `path` names, in order: the file, those in the folder and below it, or those of a pattern.

    suffixes: of the files in a folder; () takes all. Empty where nothing is there. Raises DataError where a store does
    not let us read.
    """
    try:
        if any(mark in path for mark in "*?") and files.state(path, endpoint) is None:
            return files.listed(path, endpoint)
        if not os.path.isdir(path) and files.state(path, endpoint) is not None:
            return [path]
        if files.is_remote(path):
            inside = files.states(path, endpoint)
        else:
            inside = [os.path.join(at, name) for at, _, names in os.walk(path) for name in names]
        return sorted(
            one for one in inside if (not suffixes or one.endswith(suffixes)) and "/." not in one[len(path) :]
        )
    except (PermissionError, FileNotFoundError) as error:
        raise DataError(f"cannot read it: {error}", where=path, remedy="check the path and its rights") from error


def stems(paths: Sequence[str]) -> list[str]:
    """A name for each file: that without its ending; where several have the same one, with the folders above it that
    they do not share, and where these are the same too, with the ending."""
    folder = os.path.commonpath([folder_of(path) for path in paths]) if paths else ""
    below = [os.path.relpath(path, folder) for path in paths]
    for names in ([os.path.basename(path) for path in below], below):
        bare = [os.path.splitext(name)[0] for name in names]
        if len(set(bare)) == len(bare):
            return bare
    return below


def objects(path: str, endpoint: str | None = None) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The records of a .jsonl file (blank lines are none), or of a .json file that holds a list of them."""
    if path.endswith(".json"):
        whole = b'{"list": ' + files.read(path, endpoint).removeprefix(b"\xef\xbb\xbf") + b"}"
        records = _parsed(whole, path)["list"]
        for number, record in enumerate(records if isinstance(records, list) else [records], 1):
            if not isinstance(records, list) or not isinstance(record, dict):
                raise DataError("no list of objects", where=f"{path}: element {number}", remedy=_WRITE_JSON)
            place = Place(path, f" element {number}")
            yield place, _whole(record, place)
        return
    with files.opened(path, endpoint) as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                place = Place(path, str(number))
                yield place, _whole(_parsed(raw.removeprefix(b"\xef\xbb\xbf"), str(place)), place)


def _parsed(raw: bytes, where: str) -> dict[str, Any]:
    try:
        return parse_json(raw)
    except Rejection as rejection:
        raise DataError(f"not JSON: {rejection.detail}", where=where, remedy=_WRITE_JSON) from None


def _whole(record: dict[str, Any], place: Place) -> dict[str, Any]:
    """The record, all of whose text is Unicode: JSON can write half a character ("\\ud800"), which no file takes."""
    for field, value in record.items():
        if halved(field) or halved(value):
            name = field.encode(errors="backslashreplace").decode()
            raise place.wrong(name, "holds half a character (a lone surrogate)", "write the text anew, as UTF-8")
    return record


def halved(value: Any) -> bool:
    """Whether a text, or one within a list or mapping, holds a lone surrogate."""
    if isinstance(value, Mapping):
        return any(halved(one) for pair in value.items() for one in pair)
    if isinstance(value, list | tuple):
        return any(halved(one) for one in value)
    return isinstance(value, str) and not value.isascii() and _SURROGATE.search(value) is not None


# -- pictures ------------------------------------------------------------------------------------------


def placed(question: str, pictures: Mapping[int, Media], place: Place, field: str) -> tuple[str, tuple[Media, ...]]:
    """The question with one `<image>` for each picture, and the pictures in that order. pictures: by number, from 1."""
    _check_words(question, place, field)
    named = [int(number) for number in _NUMBERED.findall(question)]
    count = question.count(IMAGE)
    if named and count:
        raise place.wrong(field, f"has both {IMAGE} and <image {named[0]}>", "number all places of pictures, or none")
    if absent := [number for number in named if number not in pictures]:
        raise place.wrong(field, f"names <image {absent[0]}>, and there is no such picture", "add it, or the right one")
    if count and count != len(pictures):
        remedy = f"write {IMAGE} once for each picture, or leave it out: pictures are then shown first"
        raise place.wrong(field, f"has {count} {IMAGE} for {len(pictures)} pictures", remedy)
    if count:
        return question, tuple(pictures.values())
    front = [number for number in pictures if number not in named]
    tags = (f"Image-{number}: {IMAGE}\n" if len(pictures) > 1 else f"{IMAGE}\n" for number in front)
    shown = tuple(pictures[number] for number in [*front, *named])
    return "".join(tags) + _NUMBERED.sub(IMAGE, question), shown


def with_video(question: str, place: Place, field: str) -> str:
    """The question with `<video>` once, on a line of its own, as the chat template takes it."""
    _check_words(question, place, field)
    if IMAGE in question or question.count(VIDEO) > 1:
        raise place.wrong(
            field, f"has {IMAGE}, or {VIDEO} twice, for one video", f"write {VIDEO} once, or leave it out"
        )
    before, mark, behind = question.partition(VIDEO)
    return f"{before}{VIDEO}\n{behind.removeprefix(chr(10))}" if mark else f"{VIDEO}\n{question}"


def _check_words(question: str, place: Place, field: str) -> None:
    if IMG_CONTEXT in question:
        raise place.wrong(field, f"holds {IMG_CONTEXT}, which stands for pictures", "take it out of the text")


# -- options and answers -------------------------------------------------------------------------------


def listed(value: Any, longest: int = LONGEST_LIST) -> list[Any] | None:
    """A list, or one that is written as a Python or JSON literal in text; None where it is neither."""
    if isinstance(value, list):
        return value
    if not isinstance(value, str) or not (text := value.strip()).startswith("[") or not text.endswith("]"):
        return None
    if len(text) > longest:
        return None
    try:
        out = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return out if isinstance(out, list) and not halved(out) else None


def options_of(value: Any, place: Place, field: str = "options", lettered: bool = False) -> dict[str, str]:
    """{letter: text} of a mapping, or of a list for A, B, C… lettered: the texts may begin with their own letters."""
    if value in (None, "", [], {}):
        return {}
    if isinstance(value, Mapping):
        options = {str(letter).strip(): str(text) for letter, text in value.items()}
        if any(letter not in LETTERS or len(letter) != 1 for letter in options):
            raise place.wrong(field, f"has the keys {list(options)[:5]}", "use A, B, C…")
        return options
    texts = listed(value)
    if texts is None or len(texts) > len(LETTERS) or not all(isinstance(text, str | int | float) for text in texts):
        raise place.wrong(field, f"is no list of texts: {str(value)[:80]!r}", "give a list, or a mapping from letters")
    pairs = dict(zip(LETTERS, (str(text).strip() for text in texts)))
    own = [_OWN_LETTER.match(text) for text in pairs.values()] if lettered else []
    if own and all(match and match[1] == letter for match, letter in zip(own, pairs)):
        return {letter: text[match.end() :] for (letter, text), match in zip(pairs.items(), own) if match}
    return pairs


def with_options(question: str, options: Mapping[str, str]) -> str:
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in options.items())])


def references_of(value: Any, place: Place, field: str = "answer", literal: bool = True) -> tuple[str, ...]:
    """One text, or those of a list, repetitions too: ten are the answers of annotators.

    literal: also of a list of quoted texts that is itself written as text; "[0, 1]" is an answer in any case.
    """
    several = listed(value) if literal or isinstance(value, list) else None
    if several is not None and not isinstance(value, list) and not _quoted(several):
        several = None
    many = [value] if several is None else several
    many = [one for one in many if not isinstance(one, str) or one.strip()]
    if not many or any(one is None or isinstance(one, bool) or not isinstance(one, str | int | float) for one in many):
        found = "is absent" if value is None else f"is {str(value)[:80]!r}"
        raise place.wrong(field, found, "give a text, or a list of texts of which each is right")
    return tuple(str(one).strip() for one in many)


def _quoted(several: list[Any]) -> bool:
    return bool(several) and all(isinstance(one, str) for one in several)


def right_letters(answer: str, options: Mapping[str, str], place: Place, field: str = "answer") -> str:
    """The letters of an answer to a choice: "B", "(b)", "A, C", or the text of an option."""
    bare = answer.strip(" ().").upper()
    if bare in options:
        return bare
    same = [letter for letter, text in options.items() if comparable(text) and comparable(text) == comparable(answer)]
    if len(same) == 1:
        return same[0]
    letters = re.sub(r"[\s,;、()]|\bAND\b", "", bare)
    if letters and set(letters) <= set(options) and len(set(letters)) == len(letters):
        return "".join(sorted(letters))
    remedy = f"give one of {', '.join(options)}" + (": test splits have no answers" if answer.strip() == "?" else "")
    raise place.wrong(field, f"is {answer[:80]!r}, which is none of the options", remedy)


def is_number(text: str) -> bool:
    return numerals.value(compatible(text)) is not None


def form(
    kind: AnswerKind | None, metric: str | None, references: tuple[str, ...], usual: AnswerKind = "text"
) -> tuple[AnswerKind, str]:
    """How an answer without options is read and compared: as given, else by the metric, else as is usual."""
    numbers = all(map(is_number, references))
    if kind is None and metric == "relaxed":
        kind = "number" if numbers else "text"
    kind = kind or _BY_METRIC.get(metric or "") or ("text" if metric else usual)
    return kind, metric or METRIC_OF[kind]


def open_form(kind: AnswerKind | None, metric: str | None, references: tuple[str, ...]) -> tuple[AnswerKind, str]:
    """Of an open question of MMMU: a number where all references are, else a text without articles and case."""
    if kind is None and metric is None and not all(map(is_number, references)):
        return "text", "vqa"
    return form(kind, metric, references, "number")
