"""This machine's disk: what of its errors a user can mend, and a cache of folders that all processes of a user share.

Invariants of the cache. Entries are folders below `cache_folder()`, each with two locks beside it: who uses it holds
`<entry>.use` shared, who fills it `<entry>.fill` alone. The kernel lets go of a lock when its process ends, however it
ends. Of the entries that nobody uses the oldest go when a new one needs the room.

STAGELINE_CACHE: the folder (default: one below the folder for temporary files; give a fast local disk).
STAGELINE_CACHE_GB: its size (default: half of that disk). What one stage needs is fetched even beyond it.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from modeling.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def disk_errors(folder: Path, where: str = "") -> Iterator[None]:
    """What the user can mend of a failed write below `folder`, as a UserError; any other error passes."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(f"no space is left in {folder} ({error.strerror})", where=where,
                            remedy="free space there, raise the quota, or give another folder") from error  # fmt: skip
        if error.errno in _FORBIDDEN:
            raise UserError(f"{folder} is not writable ({error.strerror})", where=where,
                            remedy="give a folder you may write to") from error  # fmt: skip
        raise


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


def make_room(entry: Path, need: int, where: str) -> None:
    """Before `need` bytes are fetched into the entry: remove what nobody uses, oldest first, until all fits into the
    cache's size. where: what they are of. Raises UserError where they do not fit on the disk.
    """
    given = os.environ.get("STAGELINE_CACHE_GB")
    try:
        limit = float(given) * 1e9 if given else shutil.disk_usage(entry.parent).total / 2
    except ValueError:
        message = f"must be a number of gigabytes, found {given!r}"
        raise UserError(message, where="STAGELINE_CACHE_GB", remedy="write a number such as 200") from None
    others = [path for path in entry.parent.iterdir() if path.is_dir()]
    sizes = {path: _size(path) for path in others}
    for path in sorted(others, key=_used):
        if sum(sizes.values()) + need <= limit:
            break
        with contextlib.suppress(BlockingIOError):
            held = take_lock(path.with_suffix(".use"), fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
            os.close(held)
            del sizes[path]
    free = shutil.disk_usage(entry.parent).free
    if need > free:
        raise UserError(
            f"{need / 1e9:.1f} GB of inputs do not fit into {entry.parent}, which has {free / 1e9:.1f} GB free",
            where=where, remedy="free space there, or set STAGELINE_CACHE to a folder on a larger disk",
        )  # fmt: skip


def _size(folder: Path) -> int:
    """Bytes of its files, but for what other processes remove or rename at this moment."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(where, name)).st_size
    return total


def _used(path: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    held = take_lock(path, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(held)


def take_lock(path: Path, how: int) -> int:
    """An open lock file; closing it lets go. It stays: a name that is removed would lock nothing."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, how)
    except BaseException:
        os.close(file)
        raise
    return file
