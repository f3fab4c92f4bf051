"""Finished results on a node's own disk: fetched once for all its processes, verified, and kept for the next attempt.

Invariants. A folder is named by the digests of its files, so it serves whoever needs that result, and never another. A
file is there whole or not at all: it gets its name when its size and SHA-256 are those of the ledger and it is on the
disk. One process fetches and the others of its node wait; one that is killed leaves what it has fetched. A folder in
use is locked, and the kernel lets go of the lock when its user ends, however it ends; of those that nobody uses the
oldest go when a new one needs the room.

STAGELINE_CACHE: the folder (default: one below the folder for temporary files; give a fast local disk).
STAGELINE_CACHE_GB: its size (default: half of that disk). What one stage needs is fetched even beyond it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from modeling.errors import CheckpointError, UserError
from orchestrator.checkpoints import sha256_of
from orchestrator.ledger import Ledger
from orchestrator.store import Missing, Store, disk_errors

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
    lock = _lock(entry.with_suffix(".use"), fcntl.LOCK_SH)
    try:
        need = [file for file in files if wanted(file["name"])]
        if not all(_whole(entry / file["name"], file) for file in need):
            with _locked(entry.with_suffix(".fill")):  # others may have fetched it meanwhile
                missing = [file for file in need if not _whole(entry / file["name"], file)]
                _fetch(store, prefix, missing, entry)
        entry.mkdir(exist_ok=True)
        os.utime(entry)
    except BaseException:
        os.close(lock)
        raise
    return Held(entry, lock)


def cache_folder() -> Path:
    """This user's, made where it is not there yet."""
    given = os.environ.get("STAGELINE_CACHE")
    folder = Path(given) if given else Path(tempfile.gettempdir()) / f"stageline-cache-{os.getuid()}"
    with disk_errors(folder, where="STAGELINE_CACHE" if given else ""):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UserError(
            "it belongs to another user", where=str(folder), remedy="set STAGELINE_CACHE to a folder of yours"
        )
    return folder


def _whole(path: Path, file: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == file["size"]


def _fetch(store: Store, prefix: str, files: list[dict[str, Any]], entry: Path) -> None:
    if not files:
        return
    need = sum(file["size"] for file in files)
    _make_room(entry, need)
    free = shutil.disk_usage(entry.parent).free
    if need > free:
        raise UserError(
            f"{need / 1e9:.1f} GB of inputs do not fit into {entry.parent}, which has {free / 1e9:.1f} GB free",
            where=prefix, remedy="free space there, or set STAGELINE_CACHE to a folder on a larger disk",
        )  # fmt: skip

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


def _make_room(entry: Path, need: int) -> None:
    """Remove what nobody uses, oldest first, until all fits into the cache's size."""
    given = os.environ.get("STAGELINE_CACHE_GB")
    try:
        limit = float(given) * 1e9 if given else shutil.disk_usage(entry.parent).total / 2
    except ValueError:
        message = f"must be a number of gigabytes, found {given!r}"
        raise UserError(message, where="STAGELINE_CACHE_GB", remedy="write a number such as 200") from None
    others = [path for path in entry.parent.iterdir() if path.is_dir()]
    sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in others}
    for path in sorted(others, key=lambda path: path.stat().st_mtime):
        if sum(sizes.values()) + need <= limit:
            return
        with contextlib.suppress(BlockingIOError):
            lock = _lock(path.with_suffix(".use"), fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
            del sizes[path]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = _lock(path, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(lock)


def _lock(path: Path, how: int) -> int:
    """An open lock file; closing it lets go. It stays: a name that is removed would lock nothing."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, how)
    except BaseException:
        os.close(file)
        raise
    return file
