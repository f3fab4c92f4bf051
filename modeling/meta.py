"""The InternVL meta JSON: what a mixture is made of.

Invariant: a meta file is read in full or refused (DataError with file, key and remedy). Official files work unchanged
(`internvl_chat/internvl/train/internvl_chat_finetune.py`; `length` is informational, as there). More than official:
`annotation` may also be a .json list, .parquet or .tar files, a pattern of them or a list, and lie on S3; `root` may
lie on S3 and be left out; `repeat_time` may have a fraction above 1.
Standard library only for local files, so that planning stays fast.
"""

import difflib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling import files
from modeling.errors import DataError

MOST_REPEATS = 1e6
KEYS = ("root", "annotation", "data_augment", "max_dynamic_patch", "repeat_time", "length")
FORMATS = (".jsonl", ".json", ".parquet", ".tar")


@dataclass(frozen=True)
class Dataset:
    """One entry of a meta file. `file` is the annotation as written there; `annotations` and `root` are resolved: local
    paths or s3:// addresses. endpoint: of the S3 store, None for botocore's own choice."""

    name: str
    root: str
    annotations: tuple[str, ...]
    file: str
    data_augment: bool
    max_tiles: int | None  # tiles per image before the thumbnail; None: the stage's own
    repeat: float
    length: int | None = None
    endpoint: str | None = None

    def told(self, annotation: str) -> str:
        """How messages name one of its files."""
        return self.file if len(self.annotations) == 1 else os.path.basename(annotation)


def read_meta(path: Path | str, endpoint: str | None = None) -> list[Dataset]:
    """The datasets of a meta file, in its order. Relative paths are taken from the meta file's folder.

    path: of a local file, or s3://. endpoint: the S3 store of what lies on s3://. Raises DataError: file absent or not
    JSON, unknown or ill-typed key, annotation absent or of no known format.
    """
    path = str(path)
    try:
        text = files.read(path, endpoint).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise DataError("meta file not found", where=path, remedy="check `meta:` under `data:`") from None
    except (UnicodeDecodeError, PermissionError) as error:
        raise DataError(f"cannot read the meta file: {error}", where=path, remedy="give a UTF-8 JSON") from None
    try:
        meta = json.loads(text, object_pairs_hook=lambda pairs: no_duplicates(pairs, path))
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}"
        raise DataError(f"not JSON: {error.msg}", where=where, remedy="correct the JSON at this line") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise DataError(f"cannot read the meta file: {error}", where=path, remedy="write it as documented") from None
    if not isinstance(meta, dict) or not meta:
        found = "an empty object" if meta == {} else f"a {type(meta).__name__}"
        remedy = 'write {"<dataset name>": {"root": …, "annotation": "….jsonl", …}}'
        raise DataError(f"a meta file names at least one dataset, found {found}", where=path, remedy=remedy)
    return [_dataset(name, entry, path, endpoint) for name, entry in meta.items()]


def no_duplicates(pairs: list[tuple[str, Any]], path: Path | str) -> dict[str, Any]:
    """A hook for json.loads. Raises DataError for a key that stands twice, of which JSON keeps the last."""
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"the key '{twice}' stands twice", where=str(path), remedy="rename or remove one of them")
    return out


def _dataset(name: str, entry: Any, path: str, endpoint: str | None) -> Dataset:
    def fail(key: str, message: str, remedy: str) -> DataError:
        return DataError(message, where=f"{path}: {name}.{key}" if key else f"{path}: {name}", remedy=remedy)

    if not isinstance(entry, dict):
        raise fail("", f"a dataset is an object, found {entry!r}", 'write {"root": …, "annotation": "….jsonl"}')
    for key in entry:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1, 0.5)
            remedy = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(KEYS)}"
            raise fail(key, f"unknown key '{key}'", remedy)

    if name.encode("utf-8", "ignore").decode() != name:
        raise fail("", "the name of this dataset is no text", "name it in plain characters")
    folder = path.rpartition("/")[0] if files.is_remote(path) else os.path.dirname(os.path.abspath(path))
    root, given = entry.get("root", "."), entry.get("annotation")
    if not isinstance(root, str):
        raise fail("root", f"must be a path, found {root!r}", "give 'root' as text")
    listed: list[Any] = given if isinstance(given, list) and given else [given]
    if not all(isinstance(one, str) and one for one in listed):
        raise fail("annotation", f"must be a path, found {given!r}", "give 'annotation' as text")
    for key, one in [("root", root), *(("annotation", one) for one in listed)]:
        if "://" in one and not files.is_remote(one):
            raise fail(key, f"'{one}' is a URL", "copy the data to a local folder or to s3://, and name that")

    augment = entry.get("data_augment", False)
    if not isinstance(augment, bool):
        raise fail("data_augment", f"must be true or false, found {augment!r}", "write true or false")
    repeat = entry.get("repeat_time", 1)
    if isinstance(repeat, bool) or not isinstance(repeat, int | float) or not 0 <= repeat < MOST_REPEATS:
        remedy = "give how often a sample is used per epoch, such as 1 or 0.5; 0 leaves the dataset out"
        raise fail("repeat_time", f"must be a number, 0 or more, found {repeat!r}", remedy)
    counts = {"max_dynamic_patch": entry.get("max_dynamic_patch"), "length": entry.get("length")}
    for key, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise fail(key, f"must be a whole number, found {value!r}", f"correct or remove '{key}'")
    if counts["max_dynamic_patch"] == 0:
        raise fail("max_dynamic_patch", "must be at least 1, found 0", "1 means one tile, without tiling")
    found = [found for one in listed for found in _annotations(files.join(folder, one), one, endpoint, fail)]
    return Dataset(
        name=name,
        root=files.join(folder, root),
        annotations=tuple(found),
        file=", ".join(listed),
        data_augment=augment,
        max_tiles=counts["max_dynamic_patch"],
        repeat=float(repeat),
        length=counts["length"],
        endpoint=endpoint,
    )


def _annotations(path: str, written: str, endpoint: str | None, fail: Any) -> list[str]:
    """The files that one `annotation` names."""
    if not written.endswith(FORMATS):
        remedy = f"name files that end in {', '.join(FORMATS)}: one, a list, or a pattern such as 'train-*.parquet'"
        raise fail("annotation", f"'{written}' is of no known format", remedy)
    if any(mark in written for mark in "*?"):
        found = _store(lambda: files.listed(path, endpoint), fail)
        if not found:
            raise fail("annotation", f"no file matches {path}", "check the pattern; it is relative to the meta file")
        return found
    if files.is_remote(path):
        there = _store(lambda: files.state(path, endpoint), fail) is not None
    else:
        there = os.path.isfile(path)
    if not there:
        raise fail("annotation", f"{path} not found", "check the path; it is relative to the meta file")
    return [path]


def _store(action: Any, fail: Any) -> Any:
    try:
        return action()
    except PermissionError as error:
        raise fail("annotation", str(error), "give this machine the right to read it") from error
