"""The formats of annotations: how each is cut into units of work, and how a unit gives its records.

Invariants: units depend on the files alone, so the same sources give the same parts at any number of workers; every
record of a file is in exactly one unit and is yielded as a dict or as the reason why it cannot be read. A file that
cannot be cut (no Parquet, a list that never ends) is a DataError; where one breaks off while it is read, the place is
a record with the reason `broken_file`, for which the stage ends when all is read: what lies behind cannot be counted.

.jsonl: runs of lines, by bytes. .json: a list of records, found by its brackets without parsing it. .parquet: rows of
a row group. .tar (WebDataset): a whole archive, read once from front to back; members of one key are a record, its
`.json` holds the text, the others are its pictures or its video, in the order of their numbers, else of the archive.
"""

import mmap
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from modeling import files
from modeling.errors import DataError
from modeling.meta import Dataset
from modeling.sources import Media, Rejection, parse_json

RECORDS = 1024  # of a unit at most, where its format lets it choose
RUN_BYTES = 64 << 20  # of a unit of lines, which is read at once
SLICES = 4  # of a row group at most: each is decoded from the group's beginning
COLUMNS = ("id", "task", "conversations", "messages", "texts", "image", "images", "video", "videos", "clip")
MOST_BYTES = 2 << 30  # of one picture or video, which is held in memory
_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{},]', re.S)

Record = tuple[int, dict[str, Any] | Rejection, list[Media]]  # (place from 1, what it says, media that came with it)


@dataclass(frozen=True)
class Unit:
    """A run of records of one file. offset, size: bytes (.jsonl, .json) or rows (.parquet, of row group `group`).

    records: how many there are, blank lines included; 0 where only reading tells.
    """

    path: str
    first: int = 1
    records: int = 0
    offset: int = 0
    size: int = 0
    group: int = 0


def split(dataset: Dataset, path: str, scratch: Path) -> Iterator[Unit]:
    """The units of one annotation file, in order. Raises DataError."""
    suffix = os.path.splitext(path)[1]
    try:
        if suffix == ".jsonl":
            with files.opened(path, dataset.endpoint) as file:
                yield from (Unit(path, *run) for run in runs_of_lines(file))
        elif suffix == ".json":
            with files.local_copy(path, dataset.endpoint, scratch) as local:
                yield from (Unit(path, *run) for run in runs_of_list(local, path))
        elif suffix == ".parquet":
            yield from _row_runs(dataset, path)
        else:
            yield Unit(path)
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(f"cannot read it: {error}", where=path, remedy="check the path and its rights") from error


def read(unit: Unit, dataset: Dataset) -> Iterator[Record]:
    """The records of a unit, in order; blank lines are none."""
    suffix = os.path.splitext(unit.path)[1]
    if suffix == ".parquet":
        yield from _rows(unit, dataset)
        return
    if suffix == ".tar":
        yield from _archive(unit, dataset)
        return
    data = files.read(unit.path, dataset.endpoint, unit.offset, unit.size)
    lines = data.split(b"\n") if suffix == ".jsonl" else elements(data)
    for number, raw in enumerate(lines, unit.first):
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if raw.strip() or (suffix == ".json" and not data.endswith(raw)):
            yield number, _parsed(raw), []


def _parsed(raw: bytes) -> dict[str, Any] | Rejection:
    try:
        return parse_json(raw)
    except Rejection as rejection:
        return rejection


# -- lines and lists -----------------------------------------------------------------------------------


def runs_of_lines(file: Any, records: int = RECORDS) -> Iterator[tuple[int, int, int, int]]:
    """(first line, number of lines, offset, size) of every run of at most `records` lines."""
    offset = size = count = 0
    first = 1
    for raw in file:
        size += len(raw)
        count += 1
        if count == records or size >= RUN_BYTES:
            yield first, count, offset, size
            offset, first, size, count = offset + size, first + count, 0, 0
    if count:
        yield first, count, offset, size


def runs_of_list(local: Path, told: str, records: int = RECORDS) -> Iterator[tuple[int, int, int, int]]:
    """As runs_of_lines, of the elements of a JSON list; a run begins at an element and ends before a comma."""
    remedy = "give a JSON list of records, or one record per line in a .jsonl file"
    if not local.stat().st_size:
        raise DataError("an empty file is no JSON list", where=told, remedy=remedy)
    with open(local, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        depth = count = start = after = 0  # after: behind the last comma between elements
        first = 1
        for token in _TOKENS.finditer(text):
            place, mark = token.start(), text[token.start() : token.start() + 1]
            if depth == 0:
                if mark != b"[" or text[:place].strip(b" \t\r\n\xef\xbb\xbf"):
                    break
                depth, start, after = 1, place + 1, place + 1
                continue
            depth += (mark in (b"[", b"{")) - (mark in (b"]", b"}"))
            if depth == 0:
                if text[token.end() :].strip():
                    raise DataError("something follows the end of the list", where=told, remedy=remedy)
                count += bool(text[after:place].strip())
                if count:
                    yield first, count, start, place - start
                return
            if depth == 1 and mark == b",":
                count, after = count + 1, place + 1
                if count == records or place - start >= RUN_BYTES:
                    yield first, count, start, place - start
                    first, start, count = first + count, after, 0
    if depth == 0:
        raise DataError("the file is no JSON list", where=told, remedy=remedy)
    raise DataError(f"the list does not end: {depth} brackets are open at the end of the file", where=told,
                    remedy="fetch the file again; it seems to be cut off")  # fmt: skip


def elements(data: bytes) -> Iterator[bytes]:
    """The elements of a run of a list, between the commas outside of brackets."""
    depth = start = 0
    for token in _TOKENS.finditer(data):
        mark = data[token.start() : token.start() + 1]
        if mark in (b"[", b"{"):
            depth += 1
        elif mark in (b"]", b"}"):
            depth -= 1
        elif mark == b"," and depth == 0:
            yield data[start : token.start()]
            start = token.end()
    yield data[start:]


# -- Parquet -------------------------------------------------------------------------------------------


def _parquet(dataset: Dataset, path: str) -> Any:
    import pyarrow as pa

    from modeling.parquet import open_parquet

    try:
        return open_parquet(files.opened(path, dataset.endpoint), path, COLUMNS)
    except (ConnectionError, FileNotFoundError, PermissionError):
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"no Parquet file: {error}", where=path, remedy="fetch or write the file again") from None


def _row_runs(dataset: Dataset, path: str) -> Iterator[Unit]:
    file = _parquet(dataset, path)
    first = 1
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        size = max(RECORDS, -(-rows // SLICES))
        for start in range(0, rows, size):
            count = min(size, rows - start)
            yield Unit(path, first, count, start, count, group)
            first += count


def _rows(unit: Unit, dataset: Dataset) -> Iterator[Record]:
    import pyarrow as pa

    file = _parquet(dataset, unit.path)
    columns = [name for name in COLUMNS if name in file.schema_arrow.names]
    number, skip, end = unit.first, unit.offset, unit.first + unit.size
    try:
        for batch in file.iter_batches(64, row_groups=[unit.group], columns=columns):
            rows = batch.slice(skip).slice(0, end - number)
            skip = max(0, skip - len(batch))
            for i in range(len(rows)):
                yield number, _row(rows.slice(i, 1)), []
                number += 1
            if number == end:
                return
    except (ConnectionError, TimeoutError, PermissionError):
        raise
    except (pa.ArrowException, OSError) as error:
        yield number, Rejection("broken_file", f"rows from here on cannot be read: {error}"), []


def _row(row: Any) -> dict[str, Any] | Rejection:
    try:
        return {name: value for name, value in row.to_pylist()[0].items() if value is not None}
    except (ValueError, OverflowError) as error:  # text that is no UTF-8, a time out of Python's range
        return Rejection("bad_record", f"a value of this row cannot be read: {error}")


# -- archives ------------------------------------------------------------------------------------------


def _archive(unit: Unit, dataset: Dataset) -> Iterator[Record]:
    """Neighbouring members of one key are one record. What is no plain file, or whose name leads out of the archive,
    is a record of its own that is refused: nothing of it is read, and nothing is ever extracted to a disk."""
    number, key, members, broken = 1, "", [], ""
    with files.opened(unit.path, dataset.endpoint) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"{member.name[:100]!r} is longer than the archive")
                    archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  # it keeps them all
                    if member.isdir() or os.path.basename(member.name).startswith("._"):
                        continue
                    reason = _refused(member)
                    name, _, suffix = os.path.basename(member.name).partition(".")
                    own = os.path.join(os.path.dirname(member.name), name)
                    if members and (reason or own != key):
                        yield number, *_record(members)
                        number, members = number + 1, []
                    if reason:
                        yield number, Rejection("bad_member", f"{member.name[:200]!r} {reason}"), []
                        number += 1
                        continue
                    content = archive.extractfile(member)
                    assert content is not None, "a plain file"
                    key = own
                    members.append((suffix, content.read()))
                broken = _unended(file, archive.offset)
        except tarfile.TarError as error:
            broken = str(error)
    if members:
        yield number, *_record(members)
        number += 1
    if broken:
        yield number, Rejection("broken_file", f"no plain tar archive, or damaged here: {broken}"), []


def _unended(file: BinaryIO, offset: int) -> str:
    """What stands where the archive's end should; "" where it ends. tarfile takes any damaged header for the end."""
    file.seek(offset)
    end = file.read(2 * tarfile.BLOCKSIZE)
    if len(end) < tarfile.BLOCKSIZE:
        return f"it ends at byte {offset} without an end mark"
    while end:
        if end.strip(b"\0"):
            return f"something that is no header follows at byte {offset}"
        end = file.read(1 << 20)
    return ""


def _refused(member: tarfile.TarInfo) -> str:
    if not member.isreg() or member.issparse():
        return "is no plain file (a link, a device, a file with holes)"
    if member.size > MOST_BYTES:
        return f"is larger than {MOST_BYTES >> 30} GiB"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "leads out of the archive"
    return ""


def _record(members: list[tuple[str, bytes]]) -> tuple[dict[str, Any] | Rejection, list[Media]]:
    texts = [data for suffix, data in members if suffix.lower() == "json"]
    if len(texts) != 1:
        names = ", ".join(suffix or "no extension" for suffix, _ in members)
        return Rejection("bad_record", f"{len(texts)} .json members in one record ({names})"), []
    media = [Media(suffix, data=data) for suffix, data in members if suffix.lower() != "json"]
    return _parsed(texts[0]), sorted(media, key=_place)


def _place(media: Media) -> tuple[int, ...]:
    """By the number in front of its extension ("0.jpg", "img2.png"); what has none keeps its place at the end."""
    digits = re.findall(r"\d+", os.path.splitext(media.name)[0])
    return (0, int(digits[-1])) if digits else (1,)
