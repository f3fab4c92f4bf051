"""Evaluation sets: from `eval.<name>:` to Items, and the digest by which a set is the same set again.

Invariants: every question of the files is an Item, or the set is refused with a DataError; ids are unique within a set.
The digest is of content: local files by sha256, objects on S3 by size and ETag, annotations and every picture and video
that they name; of a reader of one's own, its name, its source file, and the pictures and videos that its items hold or
name. Names within the set count, its place does not. Media are hashed when planning: about a second per GB. Objects on
S3 are asked for by folder where many lie there, a thousand with a request.
"""

import hashlib
import importlib
import inspect
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from modeling import files
from modeling.errors import DataError
from modeling.template import IMAGE
from stages.evaluate import jsonl, mmmu, tsv
from stages.evaluate.items import Item
from stages.evaluate.match import METRICS
from stages.evaluate.records import folder_of, found, halved
from stages.evaluation import EvalSet

Reader = Callable[[str, EvalSet, list[str]], Iterator[Item]]

READERS: dict[str, tuple[Reader, tuple[str, ...]]] = {  # and the files it takes from a folder
    "mmmu": (mmmu.items, mmmu.SUFFIXES),
    "tsv": (tsv.items, tsv.SUFFIXES),
    "jsonl": (jsonl.items, jsonl.SUFFIXES),
}
_AT_ONCE = 16
_MANY = 32  # objects of one folder, from which it is listed

States = Mapping[str, tuple[int, str]]


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

    {"files": {name: digest}, "media": sha256 over the media that files name, "media_files": their number}; of a reader
    of one's own also "reader": {format, source}, and "media" is over those that its items hold, too. Raises DataError:
    a malformed record, or a picture that is absent.
    """
    paths = _annotations(params)
    if not paths:
        return None
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    out: dict[str, Any] = {"files": dict(zip((os.path.relpath(p, root) for p in paths), _contents(paths, params)))}
    root, embedded = folder_of(paths[0]), []
    if params.format in READERS:
        media = sorted(set(_named(params, paths)))
    else:
        out["reader"] = {"format": params.format, "source": _source_digest(params.format)}
        named = set()
        for item in _items("", params, paths):
            shown = [one for one in (*item.images, item.video) if one is not None]
            named.update(one for one in shown if isinstance(one, str))
            embedded += [hashlib.sha256(one).hexdigest() for one in shown if isinstance(one, bytes)]
        media = sorted(named)
    contents = _contents(media, params, root)
    lines = [*(json.dumps([_below(p, root), c]) for p, c in zip(media, contents)), *embedded]
    return out | {"media": hashlib.sha256("\n".join(lines).encode()).hexdigest(), "media_files": len(media)}


def _below(path: str, root: str) -> str:
    """Its name within the set; an address elsewhere is itself."""
    if files.is_remote(path):
        return path.removeprefix(f"{root}/")
    return path if files.is_remote(root) else os.path.relpath(path, root)


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
        if path.endswith(".parquet"):
            continue
        if params.format == "tsv" and tsv.embeds(path, params.endpoint_url):
            yield from tsv.named(params, path)
            continue
        for item in _items("", params, [path]):
            yield from (one for one in (*item.images, item.video) if isinstance(one, str))


def _contents(paths: Iterable[str], params: EvalSet, root: str = "") -> list[str]:
    paths = list(paths)
    known = _states([path for path in paths if files.is_remote(path)], root, params.endpoint_url)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda path: _content(path, params.endpoint_url, known), paths))


def _states(paths: list[str], root: str, endpoint: str | None) -> States:
    """Of objects on S3, where many lie in one folder: that of the set, or any other."""
    within = [path for path in paths if path.startswith(f"{root}/")]
    folders = Counter(folder_of(path) for path in paths if not path.startswith(f"{root}/"))
    listed = [folder for folder, count in folders.items() if count >= _MANY]
    if len(within) >= _MANY:
        listed.append(files.REMOTE + os.path.commonpath([folder_of(path)[len(files.REMOTE) :] for path in within]))
    out: dict[str, tuple[int, str]] = {}
    for folder in listed:
        try:
            out |= files.states(folder, endpoint)
        except (PermissionError, FileNotFoundError):
            continue  # whoever may not list may still read: each is then asked for by itself
    return out


def _content(path: str, endpoint: str | None, known: States | None = None) -> str:
    """Of a file, or of the files in a folder of frames. known: of objects on S3, what need not be asked."""
    try:
        if path.endswith("/"):
            folder = path.rstrip("/")
            if files.is_remote(folder):  # one request, where `inside` and a state for each are many
                known = files.states(folder, endpoint)
                inside = sorted(one for one in known if "/" not in one[len(path) :] and one != path)
            else:
                inside = files.inside(folder, endpoint)
            if not inside:
                raise _absent(path)
            parts = [f"{os.path.basename(one)} {_content(one, endpoint, known)}" for one in inside]
            return hashlib.sha256("\n".join(parts).encode()).hexdigest()
        if files.is_remote(path):
            state = known[path] if known and path in known else files.state(path, endpoint)
            if state is None:
                raise _absent(path)
            return f"{state[0]} {state[1]}"
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except PermissionError as error:
        remedy = "give whoever plans the right to read it (for S3: keys in the environment, and the bucket's policy)"
        raise DataError(f"the set names it, and it may not be read: {error}", where=path, remedy=remedy) from error
    except files.Unavailable:
        raise
    except OSError:
        raise _absent(path) from None


def _absent(path: str) -> DataError:
    return DataError("cannot be read, and the set names it", where=path, remedy="put it there, or correct the set")


# -- a reader of one's own -----------------------------------------------------------------------------


def _load(format: str) -> Callable[[str], Iterable[Item]]:
    module, _, function = format.partition(":")
    where, remedy = f"format: {format}", "name it as module:function, and put its folder on PYTHONPATH"
    if not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise DataError("names no function", where=where, remedy=remedy)
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise  # something that the module itself imports
        raise DataError(f"there is no module '{module}'", where=where, remedy=remedy) from None
    reader = getattr(loaded, function, None)
    if not callable(reader):
        raise DataError(f"module '{module}' has no function '{function}'", where=where,
                        remedy="define it: it is called with the path, and yields Items")  # fmt: skip
    try:
        inspect.getfile(reader)  # pyright: ignore[reportArgumentType]
        inspect.signature(reader).bind("path")
    except (TypeError, ValueError):
        raise DataError("is no reader: not a Python function that takes one path", where=where,
                        remedy="define one that is called with the path, and yields Items") from None  # fmt: skip
    return cast(Callable[[str], Iterable[Item]], reader)


def _own_items(params: EvalSet) -> Iterator[Item]:
    items = _load(params.format)(params.path)
    if not isinstance(items, Iterable):
        raise DataError(f"gives a {type(items).__name__} in place of Items", where=f"format: {params.format}",
                        remedy="yield stages.evaluate.items.Item")  # fmt: skip
    for number, item in enumerate(items, 1):
        where = f"format: {params.format}, item {number}"
        if not isinstance(item, Item):
            raise DataError(f"is a {type(item).__name__}", where=where, remedy="yield stages.evaluate.items.Item")
        if item.metric not in METRICS:
            raise DataError(f"has the metric '{item.metric}'", where=where, remedy=f"one of {', '.join(METRICS)}")
        if halved((item.id, item.task, item.category, item.question, item.references, item.options, item.history)):
            raise DataError("holds half a character (a lone surrogate)", where=where, remedy="yield text of Unicode")
        if item.video is None and item.question.count(IMAGE) != len(item.images):
            raise DataError(f"has {item.question.count(IMAGE)} {IMAGE} for {len(item.images)} pictures", where=where,
                            remedy=f"write {IMAGE} once for each picture")  # fmt: skip
        yield item


def _source_digest(format: str) -> str:
    source = inspect.getsourcefile(_load(format))  # pyright: ignore[reportArgumentType]
    if source is None or not os.path.isfile(source):  # frozen into the interpreter
        raise DataError("has no source file", where=f"format: {format}", remedy="write it in a .py file")
    with open(source, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
