"""Source files, on local disks and on S3, behind a few functions.

A path is a local one or `s3://bucket/key`; `endpoint` is the address of a store that is not AWS (None: what botocore
takes from the environment, as it does for the keys). s3fs tries again by itself what fails for a moment; what stays is
raised: FileNotFoundError and PermissionError for what the user can mend, Unavailable for a store that gives no
answer, which must never be taken for a sample's fault.
"""

import errno
import fnmatch
import glob
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

REMOTE = "s3://"
BLOCK = 8 << 20  # bytes of a remote file that are read at a time
TRIES = 8  # of a request, by s3fs with growing pauses: about two minutes

T = TypeVar("T")


class Unavailable(ConnectionError):
    """The store of a source does not answer."""


def is_remote(path: str) -> bool:
    return path.startswith(REMOTE)


def join(root: str, name: str) -> str:
    """`name` below `root`, normalised; a name that is absolute, or an address, is itself."""
    if is_remote(name):
        root, name = REMOTE, name[len(REMOTE) :]
    if is_remote(root):
        return REMOTE + os.path.normpath("/" + os.path.join(root[len(REMOTE) :], name)).lstrip("/")
    return os.path.normpath(os.path.join(root, name))


def state(path: str, endpoint: str | None = None) -> tuple[int, str] | None:
    """(bytes, modification time in ns or ETag): another means that the file was edited. None where there is none."""
    if is_remote(path):
        try:
            found = _asked(lambda: _system(endpoint, os.getpid()).info(path), path)
        except FileNotFoundError:
            return None
        return None if found["type"] == "directory" else (found["size"], _tag(found))
    try:
        status = os.stat(path)
    except (OSError, UnicodeEncodeError):
        return None
    return status.st_size, str(status.st_mtime_ns)


def states(root: str, endpoint: str | None = None, deep: bool = True) -> dict[str, tuple[int, str]]:
    """The state of every object below an S3 root, by its address: one request for a thousand, 200 bytes each.

    deep: also of those in folders below it.
    """
    bucket, _, prefix = root[len(REMOTE) :].partition("/")
    out: dict[str, tuple[int, str]] = {}
    more: dict[str, str] = {}
    while True:
        asked = {"Bucket": bucket, "Prefix": prefix.rstrip("/") + "/" if prefix else "", **more}
        asked |= {} if deep else {"Delimiter": "/"}
        page = _asked(lambda asked=asked: _system(endpoint, os.getpid()).call_s3("list_objects_v2", **asked), root)
        for item in page.get("Contents", []):
            out[f"{REMOTE}{bucket}/{item['Key']}"] = (item["Size"], _tag(item))
        if not page.get("IsTruncated"):
            return out
        more = {"ContinuationToken": page["NextContinuationToken"]}


def read(path: str, endpoint: str | None = None, start: int = 0, size: int | None = None) -> bytes:
    """The file's bytes [start, start + size), or from `start` on. Raises OSError."""
    if is_remote(path):
        stop = None if size is None else start + size
        return _asked(lambda: _system(endpoint, os.getpid()).cat_file(path, start=start or None, end=stop), path)
    with open(path, "rb") as file:
        file.seek(start)
        if size is not None:  # a read makes room for as much as it is asked for
            size = min(size, max(0, os.fstat(file.fileno()).st_size - start))
        return file.read(-1 if size is None else size)


def opened(path: str, endpoint: str | None = None) -> BinaryIO:
    """Open for reading, seekable. Raises OSError."""
    if is_remote(path):
        file = _asked(lambda: _system(endpoint, os.getpid()).open(path, "rb", block_size=BLOCK), path)
        return io.BufferedReader(_Remote(file, path), BLOCK)
    return open(path, "rb")


class _Remote(io.RawIOBase):
    """What goes wrong while a remote file is read, in the words of this module. Lines come from a buffer above it: s3fs
    takes 130 times as long for one."""

    def __init__(self, file: Any, path: str):
        self._file, self._path = file, path

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        data = _asked(lambda: self._file.read(len(buffer)), self._path)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def inside(folder: str, endpoint: str | None = None) -> list[str]:
    """The files that lie in a folder, in order; none where there is no such folder."""
    if is_remote(folder):
        try:
            found = _asked(lambda: _system(endpoint, os.getpid()).ls(folder, detail=True), folder)
        except FileNotFoundError:
            return []
        return sorted(REMOTE + one["name"] for one in found if one["type"] == "file")
    try:
        return sorted(one.path for one in os.scandir(folder) if one.is_file())
    except (FileNotFoundError, NotADirectoryError, UnicodeEncodeError, ValueError):
        return []


def listed(pattern: str, endpoint: str | None = None) -> list[str]:
    """The files that a pattern with * or ? names, in order."""
    folder, _, last = pattern.rpartition("/")
    if is_remote(pattern):
        names = _asked(lambda: _system(endpoint, os.getpid()).glob(pattern), pattern)
        return sorted(REMOTE + str(name) for name in names)
    if any(mark in folder for mark in "*?["):
        return sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    try:
        names = os.listdir(folder or "/")
    except OSError:
        return []
    paths = (os.path.join(folder, name) for name in names if fnmatch.fnmatchcase(name, last))
    return sorted(path for path in paths if os.path.isfile(path))


@contextmanager
def local_copy(path: str, endpoint: str | None, folder: Path) -> Iterator[Path]:
    """The file as a local one: itself, or fetched to `folder` for the time of the block."""
    if not is_remote(path):
        yield Path(path)
        return
    folder.mkdir(parents=True, exist_ok=True)
    local = folder / os.path.basename(path)
    _asked(lambda: _system(endpoint, os.getpid()).get_file(path, str(local)), path)
    try:
        yield local
    finally:
        local.unlink(missing_ok=True)


@lru_cache(maxsize=8)
def _system(endpoint: str | None, process: int) -> Any:
    """One per process: its loop does not survive a fork."""
    from s3fs import S3FileSystem

    config: dict[str, Any] = {"max_pool_connections": 64, "connect_timeout": 10, "read_timeout": 60}
    if endpoint or os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL_S3"):
        config |= dict.fromkeys(("request_checksum_calculation", "response_checksum_validation"), "when_required")
    system = S3FileSystem(
        endpoint_url=endpoint, config_kwargs=config, use_listings_cache=False, skip_instance_cache=True
    )
    system.retries = TRIES
    return system


def forget() -> None:
    """Keys and endpoints are read from the environment again."""
    _system.cache_clear()


def _tag(info: dict[str, Any]) -> str:
    return str(info.get("ETag", "")).strip('"')


def _asked(action: Callable[[], T], path: str) -> T:
    from aiohttp import ClientError as BrokenBody
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        return action()
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except NoCredentialsError as error:
        raise PermissionError(f"{path}: no keys for S3 in the environment") from error
    except (OSError, BotoCoreError, ClientError, BrokenBody, TimeoutError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):  # of the disk it is written to
            raise
        raise Unavailable(f"{path}: {type(error).__name__}: {error}") from error
