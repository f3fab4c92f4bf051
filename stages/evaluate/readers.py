"""Evaluation sets: from `eval.<name>:` to Items, and the digest by which a set is the same set again.

Invariants: every question of the files is an Item, or the set is refused with a DataError; ids are unique within a set.
The digest is of content: local files by sha256, objects on S3 by size and ETag, annotations and every picture and video
that they name; of a reader of one's own, the source file too. Names within the set count, its place does not. Media are
hashed when planning: about a second per GB.
"""

import hashlib
import importlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from modeling import files
from modeling.errors import DataError
from modeling.template import IMAGE
from stages.evaluate import jsonl, mmmu, tsv
from stages.evaluate.items import Item
from stages.evaluate.match import METRICS
from stages.evaluate.records import found
from stages.evaluation import EvalSet

Reader = Callable[[str, EvalSet, list[str]], Iterator[Item]]

READERS: dict[str, tuple[Reader, tuple[str, ...]]] = {  # and the files it takes from a folder
    "mmmu": (mmmu.items, mmmu.SUFFIXES),
    "tsv": (tsv.items, tsv.SUFFIXES),
    "jsonl": (jsonl.items, jsonl.SUFFIXES),
}
_AT_ONCE = 16


def read_set(name: str, params: EvalSet) -> list[Item]:
    """The questions of a set, in the order of its files, embedded pictures as bytes in memory.

    name: of the set, and of its task; where several files are several benchmarks (tsv, jsonl), tasks are name/file.
    Raises DataError: nothing there, or a malformed record.
    """
    paths = _annotations(params)
    if not paths:
        raise DataError(f"nothing of format {params.format} is there", where=f"eval.{name}.path: {params.path}",
                        remedy="check the path; a folder is searched for its files")  # fmt: skip
    out, seen = [], set()
    for item in _items(name, params, paths):
        if item.id in seen:
            raise DataError(f"two questions have the id '{item.id}'", where=f"eval.{name}: {params.path}",
                            remedy="give each an id of its own")  # fmt: skip
        seen.add(item.id)
        out.append(item)
    if not out:
        raise DataError("has no questions", where=f"eval.{name}.path: {params.path}", remedy="check the files there")
    return out


def set_digest(params: EvalSet) -> dict[str, Any] | None:
    """What a set is, by content; None where nothing lies at its path.

    {"files": {name: digest}, "media": sha256 over the media that files name, "media_files": their number}, and
    "reader" for a module's source. Raises DataError: a malformed record, or a picture that is absent.
    """
    paths = _annotations(params)
    if not paths:
        return None
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    out: dict[str, Any] = {"files": dict(zip((os.path.relpath(p, root) for p in paths), _contents(paths, params)))}
    if params.format not in READERS:
        return out | {"reader": _source_digest(params.format)}
    media = sorted(set(_named(params, paths)))
    root = os.path.dirname(paths[0])
    lines = [json.dumps([os.path.relpath(p, root), c]) for p, c in zip(media, _contents(media, params))]
    return out | {"media": hashlib.sha256("\n".join(lines).encode()).hexdigest(), "media_files": len(media)}


def _annotations(params: EvalSet) -> list[str]:
    suffixes = READERS[params.format][1] if params.format in READERS else ()
    paths = found(params.path, suffixes, params.endpoint_url)
    return mmmu.chosen(paths) if params.format == "mmmu" else paths


def _items(name: str, params: EvalSet, paths: list[str]) -> Iterator[Item]:
    try:
        yield from READERS[params.format][0](name, params, paths) if params.format in READERS else _own_items(params)
    except (PermissionError, FileNotFoundError) as error:
        raise DataError(
            f"cannot read it: {error}", where=params.path, remedy="check the path and its rights"
        ) from error


def _named(params: EvalSet, paths: list[str]) -> Iterator[str]:
    """The media that the files name; what is embedded is not even decoded."""
    for path in paths:
        if path.endswith(".parquet") or (path.endswith(".tsv") and tsv.holds_media(path, params.endpoint_url)):
            continue
        for item in _items("", params, [path]):
            yield from (one for one in (*item.images, item.video) if isinstance(one, str))


def _contents(paths: Iterable[str], params: EvalSet) -> list[str]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda path: _content(path, params.endpoint_url), paths))


def _content(path: str, endpoint: str | None) -> str:
    """Of a file, or of the files in a folder of frames."""
    if path.endswith("/"):
        inside = files.inside(path.rstrip("/"), endpoint)
        if not inside:
            raise _absent(path)
        parts = [f"{os.path.basename(one)} {_content(one, endpoint)}" for one in inside]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    if files.is_remote(path):
        state = files.state(path, endpoint)
        if state is None:
            raise _absent(path)
        return f"{state[0]} {state[1]}"
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        raise _absent(path) from None


def _absent(path: str) -> DataError:
    return DataError("cannot be read, and the set names it", where=path, remedy="put it there, or correct the set")


# -- a reader of one's own -----------------------------------------------------------------------------


def _load(format: str) -> Callable[[str], Iterable[Item]]:
    module, _, function = format.partition(":")
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise  # something that the module itself imports
        raise DataError(f"there is no module '{module}'", where=f"format: {format}",
                        remedy="name it as module:function, and put its folder on PYTHONPATH") from None  # fmt: skip
    reader = getattr(loaded, function, None)
    if not callable(reader):
        raise DataError(f"module '{module}' has no function '{function}'", where=f"format: {format}",
                        remedy="define it: it is called with the path, and yields Items")  # fmt: skip
    return cast(Callable[[str], Iterable[Item]], reader)


def _own_items(params: EvalSet) -> Iterator[Item]:
    for number, item in enumerate(_load(params.format)(params.path), 1):
        where = f"format: {params.format}, item {number}"
        if not isinstance(item, Item):
            raise DataError(f"is a {type(item).__name__}", where=where, remedy="yield stages.evaluate.items.Item")
        if item.metric not in METRICS:
            raise DataError(f"has the metric '{item.metric}'", where=where, remedy=f"one of {', '.join(METRICS)}")
        if item.video is None and item.question.count(IMAGE) != len(item.images):
            raise DataError(f"has {item.question.count(IMAGE)} {IMAGE} for {len(item.images)} pictures", where=where,
                            remedy=f"write {IMAGE} once for each picture")  # fmt: skip
        yield item


def _source_digest(format: str) -> str:
    source = inspect.getsourcefile(_load(format))  # pyright: ignore[reportArgumentType]
    if source is None:
        raise DataError("has no source file", where=f"format: {format}", remedy="write it in a .py file")
    with open(source, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
