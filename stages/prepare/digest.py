"""The digest of a mixture's sources: what makes a prepare stage the same stage again (design.md, "Identity").

Invariant: it changes when the meta's meaning, any annotation byte, or any referenced media file's size or
modification time changes; it does not when folders move or `length` (informational) is edited. Media files
are looked at, not read: on local disks about 100,000 files/s.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from modeling.sources import Dataset, Rejection, media_path, read_meta


def source_digest(meta_path: Path | str) -> dict[str, Any]:
    """{"meta": sha256, "datasets": {name: {annotation, media: sha256, files, missing: counts}}}.

    Raises DataError where the meta file or an annotation is absent or malformed.
    """
    datasets = read_meta(meta_path)
    meaning = [[d.name, d.data_augment, d.max_tiles, d.repeat] for d in datasets]
    return {
        "meta": hashlib.sha256(json.dumps(meaning).encode()).hexdigest(),
        "datasets": {dataset.name: _dataset_digest(dataset) for dataset in datasets},
    }


def _dataset_digest(dataset: Dataset) -> dict[str, Any]:
    annotation, media = hashlib.sha256(), hashlib.sha256()
    seen: set[str] = set()
    missing = 0
    with open(dataset.annotation, "rb") as file:
        for raw in file:
            annotation.update(raw)
            for name in _media_names(raw):
                if name in seen:
                    continue
                seen.add(name)
                state = _state(dataset.root, name)
                missing += state is None
                media.update(json.dumps([name, state]).encode() + b"\n")
    return {
        "annotation": annotation.hexdigest(),
        "media": media.hexdigest(),
        "files": len(seen) - missing,
        "missing": missing,
    }


def _media_names(raw: bytes) -> list[str]:
    """The `image` paths of a line; none where it is malformed: its bytes are in the annotation's digest."""
    if b'"image"' not in raw:
        return []
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        return []
    given = data.get("image") if isinstance(data, dict) else None
    names = given if isinstance(given, list) else [given]
    return [name for name in names if isinstance(name, str) and name]


def _state(root: str, name: str) -> tuple[int, int] | None:
    """(bytes, modification time in ns) of a media file; None where there is none inside `root`."""
    try:
        status = os.stat(media_path(root, name))
    except (OSError, UnicodeEncodeError, Rejection):
        return None
    return status.st_size, status.st_mtime_ns
