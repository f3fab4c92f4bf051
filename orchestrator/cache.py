"""Finished results on a node's own disk: fetched once for all its processes, verified, and kept for the next attempt.

Invariants. A folder is named by the digests of its files, so it serves whoever needs that result, and never another. A
file is there whole or not at all: it gets its name when its size and SHA-256 are those of the ledger and it is on the
disk. One process fetches and the others of its node wait; one that is killed leaves what it has fetched. What keeps a
folder, and what makes room for a new one: modeling/disk.py.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from modeling.disk import cache_folder, disk_errors, locked, make_room, take_lock
from modeling.errors import CheckpointError
from orchestrator.checkpoints import sha256_of
from orchestrator.ledger import Ledger
from orchestrator.store import Missing, Store

AT_ONCE = 4  # files in transfer, each of S3's in parts (s3.py)
FETCHES = 2  # of a file that arrives damaged, before the stored one is


class Held:
    """A result as a local folder, which stays until `release`, or the end of the process."""

    def __init__(self, folder: Path, lock: int = -1):
        self.folder, self._lock = folder, lock

    def release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def held_result(store: Store, prefix: str, wanted: Callable[[str], bool] = lambda name: True) -> Held:
    """The result of a completed stage under `<stage>/result/<token>`: in place where the store is a folder, else here.

    wanted: of its files, by name; others may be absent. Raises CheckpointError where the store has them no more as they
    were written, and UserError where they do not fit on the disk.
    """
    local = store.local_path(prefix)
    if local is not None:
        return Held(local)
    done = Ledger(store, prefix.rsplit("/result/", 1)[0]).state().completed
    assert done is not None and done["manifest"]["folder"] == prefix, f"{prefix} is not the result of its stage"
    files = done["manifest"]["files"]
    root = cache_folder()
    entry = root / hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:32]
    lock = take_lock(entry.with_suffix(".use"), fcntl.LOCK_SH)
    try:
        need = [file for file in files if wanted(file["name"])]
        if not all(_whole(entry / file["name"], file) for file in need):
            with locked(entry.with_suffix(".fill")):  # others may have fetched it meanwhile
                missing = [file for file in need if not _whole(entry / file["name"], file)]
                _fetch(store, prefix, missing, entry)
        entry.mkdir(exist_ok=True)
        os.utime(entry)
    except BaseException:
        os.close(lock)
        raise
    return Held(entry, lock)


def _whole(path: Path, file: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == file["size"]


def _fetch(store: Store, prefix: str, files: list[dict[str, Any]], entry: Path) -> None:
    if not files:
        return
    make_room(entry, sum(file["size"] for file in files), prefix)

    def one(file: dict[str, Any]) -> None:
        path = entry / file["name"]
        part = path.with_name(f".part-{path.name}")
        for _ in range(FETCHES):
            try:
                store.get_file(f"{prefix}/{file['name']}", part)
            except Missing:
                break
            if _whole(part, file) and sha256_of(part) == file["sha256"]:
                with part.open("rb") as written:
                    os.fsync(written.fileno())
                os.replace(part, path)
                return
        part.unlink(missing_ok=True)
        raise CheckpointError(
            f"{file['name']} is missing or damaged: its sha256 is not the ledger's", where=prefix,
            remedy="remove the folder of that stage and run it again",
        )  # fmt: skip

    with ThreadPoolExecutor(AT_ONCE) as pool, disk_errors(entry):
        list(pool.map(one, files))
