"""The digest of a mixture's sources: what makes a prepare stage the same stage again (design.md, "Identity").

Invariant: it changes when the meta's meaning, any annotation byte, or any referenced media file's size or
modification time (on S3: ETag) changes; it does not when folders move or `length` (informational) is edited. Media
are looked at, not read: on local disks about 100,000 files/s, on S3 a thousand per request. Parquet files and archives,
which hold their media, are looked at likewise.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from modeling import files
from modeling.errors import DataError
from modeling.meta import Dataset, read_meta
from modeling.sources import Rejection, media_named, media_path, parse_json
from stages.prepare.formats import elements, split


def source_digest(meta_path: Path | str, endpoint: str | None = None) -> dict[str, Any]:
    """{"meta": sha256, "datasets": {name: {annotation, media: sha256, files, missing: counts}}}.

    Raises DataError where the meta file or an annotation is absent or malformed, or its store does not let us read.
    """
    datasets = read_meta(meta_path, endpoint)
    meaning = [[d.name, d.data_augment, d.max_tiles, d.repeat] for d in datasets]
    return {
        "meta": hashlib.sha256(json.dumps(meaning).encode()).hexdigest(),
        "datasets": {dataset.name: _dataset_digest(dataset) for dataset in datasets},
    }


def _dataset_digest(dataset: Dataset) -> dict[str, Any]:
    annotation, media = hashlib.sha256(), hashlib.sha256()
    seen: set[str] = set()
    missing = 0
    state = _state_of(dataset)
    try:
        for path in dataset.annotations:
            if path.endswith((".parquet", ".tar")):
                found = [os.path.basename(path), *(files.state(path, dataset.endpoint) or ())]
                annotation.update(json.dumps(found).encode() + b"\n")
                continue
            annotation.update(b"\0")  # a border that no line holds
            for raw in _records(path, dataset):
                annotation.update(raw)
                for name in _media_names(raw):
                    if name in seen:
                        continue
                    seen.add(name)
                    found = state(name)
                    missing += found is None
                    media.update(json.dumps([name, found]).encode() + b"\n")
    except (PermissionError, FileNotFoundError) as error:
        raise DataError(f"cannot read it: {error}", where=dataset.name, remedy="check path and rights") from error
    return {
        "annotation": annotation.hexdigest(),
        "media": media.hexdigest(),
        "files": len(seen) - missing,
        "missing": missing,
    }


def _records(path: str, dataset: Dataset) -> Iterator[bytes]:
    """The lines of a file, or the elements of its list."""
    if path.endswith(".jsonl"):
        with files.opened(path, dataset.endpoint) as file:
            yield from file
        return
    with tempfile.TemporaryDirectory() as scratch:
        for unit in split(dataset, path, Path(scratch)):
            yield from elements(files.read(path, dataset.endpoint, unit.offset, unit.size))


def _media_names(raw: bytes) -> list[str]:
    """The paths that a record names; none where it is malformed: its bytes are in the annotation's digest."""
    if b"image" not in raw and b"video" not in raw:
        return []
    try:
        return media_named(parse_json(raw))
    except Rejection:
        return []


def _state_of(dataset: Dataset) -> Callable[[str], Any]:
    """What a name below the root stands for now; None where there is no such file, or it lies outside of the root."""
    remote = files.states(dataset.root, dataset.endpoint) if files.is_remote(dataset.root) else None

    def state(name: str) -> Any:
        try:
            path = media_path(dataset.root, name)
        except Rejection:
            return None
        if path.endswith("/"):  # a folder of frames
            inside = files.inside(path.rstrip("/"), dataset.endpoint)
            return [(os.path.basename(one), files.state(one, dataset.endpoint)) for one in inside] or None
        return files.state(path) if remote is None else remote.get(path)

    return state
