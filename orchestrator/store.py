"""Object storage behind a small protocol: bytes under keys, and one put that can only create.

Invariant: `put(..., create=True)` succeeds for exactly one of any number of writers, and no reader ever sees
part of an object. That is all the ledger asks (design.md, "The ledger"), and what every S3 that honours
If-None-Match gives (s3.py). On a file system: a temporary file in the same folder, fsync, link(2) (or rename for a
plain put), fsync of the folder. Opening a store writes nothing; folders appear with the first put; probe.py finds out
whether a store keeps its promises.
"""

import errno
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from modeling.disk import disk_errors
from modeling.errors import UserError
from orchestrator.address import parse_s3, redact
from orchestrator.direct import write_file

Data = bytes | bytearray | memoryview
TEMPORARY = ".tmp-"


class Exists(Exception):
    """A create-only put found its key taken."""


class Missing(Exception):
    """There is no object under this key."""


class Store(Protocol):
    """Keys are relative, with '/' between parts. Every call is safe from several threads and processes.

    What a user can mend (keys, bucket, rights, a full disk) is a UserError; a store that gives no clear answer for
    longer than its patience is a StorageTransient, and then a put may have happened.
    """

    url: str

    def put(self, key: str, data: Data, create: bool = False) -> None:
        """Durable on return. create: raises Exists where the key is taken; otherwise replaces."""
        ...

    def get(self, key: str) -> bytes:
        """Raises Missing."""
        ...

    def get_run(self, keys: Sequence[str]) -> list[bytes]:
        """The objects under these keys, up to the first that is missing."""
        ...

    def exists(self, key: str) -> bool: ...

    def list(self, prefix: str = "") -> list[str]:
        """The keys that start with `prefix`, sorted."""
        ...

    def size(self, key: str) -> int:
        """In bytes. Raises Missing."""
        ...

    def delete(self, key: str) -> None:
        """A key that is not there is no error."""
        ...

    def put_file(self, key: str, path: Path) -> None: ...

    def get_file(self, key: str, path: Path) -> None:
        """Writes the object to `path`, whose folders are made. Raises Missing, leaving `path` alone."""
        ...

    def copy(self, key: str, new: str) -> None:
        """Within the store; an object of 5 GiB at most, as S3 allows. Raises Missing."""
        ...

    def local_path(self, key: str) -> Path | None:
        """Where the object, or the folder of objects under it, already lies on this machine's file system."""
        ...


def check_key(key: str) -> str:
    """Returns the key; ValueError for one that could leave the store or hide in it."""
    parts = key.split("/")
    if not key or "\0" in key or any(part in ("", ".", "..") or part.startswith(TEMPORARY) for part in parts):
        raise ValueError(f"not a key: {key!r}")
    return key


def one_by_one(store: Store, keys: Sequence[str]) -> list[bytes]:
    """`get_run` where a request costs nothing."""
    found = []
    for key in keys:
        try:
            found.append(store.get(key))
        except Missing:
            break
    return found


def open_store(url: str) -> Store:
    """A folder, file:// and a folder, or s3://bucket/prefix (address.py). UserError where it cannot serve.

    Asks nothing of an S3 store yet, and creates nothing.
    """
    parts = urlsplit(url)
    if parts.scheme == "s3":
        from orchestrator.s3 import S3Store

        return S3Store(parse_s3(url))
    if "://" in url and parts.scheme != "file":
        raise UserError(f"unknown kind of storage '{parts.scheme}://'", where=f"storage {redact(url)}",
                        remedy="give a folder, or s3://bucket/prefix")  # fmt: skip
    folder = Path(parts.path if parts.scheme == "file" else url).expanduser().absolute()
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    if not nearest.is_dir():
        raise UserError(f"{nearest} is a file", where=f"storage {url}", remedy="give a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{nearest} is not writable", where=f"storage {url}",
                        remedy="give a folder you may write to")  # fmt: skip
    return FileStore(folder)


@contextmanager
def local_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path`, whose folders are made, when the block ends well, and else is gone."""
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


class MemoryStore:
    """For tests and simulations. Thread safe; nothing outlives the process."""

    def __init__(self) -> None:
        self.url = f"memory://{id(self):x}"
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def put(self, key: str, data: Data, create: bool = False) -> None:
        check_key(key)
        with self._lock:
            if create and key in self._objects:
                raise Exists(key)
            self._objects[key] = bytes(data)

    def get(self, key: str) -> bytes:
        with self._lock:
            if key not in self._objects:
                raise Missing(key)
            return self._objects[key]

    def get_run(self, keys: Sequence[str]) -> list[bytes]:
        return one_by_one(self, keys)

    def exists(self, key: str) -> bool:
        with self._lock:
            return key in self._objects

    def list(self, prefix: str = "") -> list[str]:
        with self._lock:
            return sorted(key for key in self._objects if key.startswith(prefix))

    def size(self, key: str) -> int:
        return len(self.get(key))

    def delete(self, key: str) -> None:
        with self._lock:
            self._objects.pop(key, None)

    def put_file(self, key: str, path: Path) -> None:
        self.put(key, Path(path).read_bytes())

    def get_file(self, key: str, path: Path) -> None:
        data = self.get(key)
        with local_file(path) as temporary:
            temporary.write_bytes(data)

    def copy(self, key: str, new: str) -> None:
        self.put(new, self.get(key))

    def local_path(self, key: str) -> Path | None:
        return None


class FileStore:
    """A folder on a POSIX file system with hard links (a local disk, NFS)."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).absolute()
        self.url = str(self.folder)

    def put(self, key: str, data: Data, create: bool = False) -> None:
        self._write(key, create, lambda temporary: write_file(temporary, data))

    def put_file(self, key: str, path: Path) -> None:
        self._write(key, False, lambda temporary: shutil.copyfile(path, temporary))

    def get(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise Missing(key) from None

    def get_run(self, keys: Sequence[str]) -> list[bytes]:
        return one_by_one(self, keys)

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def list(self, prefix: str = "") -> list[str]:
        if ".." in prefix.split("/") or prefix.startswith("/"):
            raise ValueError(f"not a prefix: {prefix!r}")
        start = self.folder / prefix.rpartition("/")[0]
        keys = []
        for folder, _, names in os.walk(start):
            relative = Path(folder).relative_to(self.folder)
            keys += [(relative / name).as_posix() for name in names if not name.startswith(TEMPORARY)]
        return sorted(key for key in keys if key.startswith(prefix))

    def size(self, key: str) -> int:
        if not self.exists(key):
            raise Missing(key)
        return self._path(key).stat().st_size

    def delete(self, key: str) -> None:
        path = self._path(key)
        if path.is_file():
            path.unlink(missing_ok=True)
            _fsync(path.parent)

    def get_file(self, key: str, path: Path) -> None:
        if not self.exists(key):
            raise Missing(key)
        with local_file(path) as temporary:
            shutil.copyfile(self._path(key), temporary)

    def copy(self, key: str, new: str) -> None:
        """As a second name of the same file: objects are replaced, never written to."""
        source = self._path(key)
        if not source.is_file():
            raise Missing(key)
        self._write(new, False, lambda temporary: os.link(source, temporary))

    def local_path(self, key: str) -> Path | None:
        path = self._path(key)
        return path if path.exists() else None

    def _path(self, key: str) -> Path:
        return self.folder / check_key(key)

    def _write(self, key: str, create: bool, fill: Callable[[Path], object]) -> None:
        path, where = self._path(key), f"storage {self.folder}"
        temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
        with disk_errors(path.parent, where):
            _make_folders(path.parent)
            try:
                fill(temporary)
                _fsync(temporary)
                if create:
                    _link(temporary, path, key, where)
                else:
                    os.replace(temporary, path)
                _fsync(path.parent)
            finally:
                temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path, key: str, where: str) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise Exists(key) from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        message = "this file system has no hard links, which create-only writes need"
        raise UserError(message, where=where, remedy="use a local disk or NFS") from error


def _make_folders(folder: Path) -> None:
    """mkdir -p, durable: the parent of every folder made is synced."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        _fsync(new.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
