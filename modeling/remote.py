"""Model folders on S3, as local ones: fetched once for all processes of a machine (disk.py).

Invariants. A local folder belongs to one state of the remote one: to its names, sizes and ETags, which are kept beside
the files and are its identity (digests.py); what is uploaded there later makes another folder. A file gets its name
when every byte of it came, and the remote one still has the listed state. Nothing is fetched that a model does not need
or that could run code. Planning and preparing take configuration and tokenizer; weights come where they are loaded.
What a driver planned with it hands on as `s3://bucket/key#state`, and no worker takes another state for it.
"""

import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from modeling import files
from modeling.disk import cache_folder, disk_errors, locked, make_room, take_lock
from modeling.errors import UserError

WEIGHTS = ".safetensors"
FETCHED = (".json", ".txt", ".jinja", ".model", WEIGHTS)
LISTING = ".s3.json"  # in the local folder: {name: [bytes, ETag]}
PIECE = 32 << 20  # bytes of one request, which s3fs asks again as a whole
AT_ONCE = 4  # requests

Listing = Mapping[str, tuple[int, str]]


def model_folder(path: str, endpoint: str | None = None, weights: bool = False) -> Path:
    """The local folder of a model: itself, or a copy that stays until this process ends.

    It is not there where the remote one has no files. Raises UserError where that may not be read, does not fit on the
    disk, or is in another state than `path` names (`as_planned`); files.Unavailable where the store gives no answer.
    """
    if not files.is_remote(path):
        return Path(path)
    path, _, planned = path.partition("#")
    path = path.rstrip("/")
    listing = _listing(path, endpoint)
    if planned and planned != state(listing):
        raise UserError("it was changed, or removed, after the run was planned", where=path,
                        remedy="run again: it is then another model")  # fmt: skip
    if not listing:
        return Path(path)
    folder = _held(path, json.dumps(listing))
    need = [name for name in listing if weights or not name.endswith(WEIGHTS)]
    if not all(_whole(folder / name, listing) for name in need):
        with locked(folder.parent.with_suffix(".fill")):  # others may have fetched it meanwhile
            missing = [name for name in need if not _whole(folder / name, listing)]
            if missing:
                make_room(folder.parent, sum(listing[name][0] for name in missing), path)
            with disk_errors(folder):
                for name in missing:
                    _fetch(f"{path}/{name}", endpoint, folder / name, listing)
    return folder


def as_planned(path: str, endpoint: str | None) -> str:
    """For workers: a remote folder with the state that this process sees. Any other is itself."""
    return f"{path}#{state(_listing(path.rstrip('/'), endpoint))}" if files.is_remote(path) else path


def address(path: str) -> str:
    """Without the state that a driver planned with."""
    return path.partition("#")[0] if files.is_remote(path) else path


def state(listing: Listing) -> str:
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()


def recorded(folder: Path) -> Listing | None:
    """What the remote folder holds of which this is a copy; None for any other folder, and for a damaged copy."""
    try:
        if folder.parent.parent == cache_folder():
            return json.loads((folder / LISTING).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        pass
    return None


@cache
def _listing(path: str, endpoint: str | None) -> Listing:
    """Asked once: a process sees one state."""
    try:
        with _told(path):
            found = files.states(path, endpoint, deep=False)
    except FileNotFoundError:  # no such bucket
        return {}
    names = {one.removeprefix(f"{path}/"): its for one, its in sorted(found.items())}
    return {name: its for name, its in names.items() if name.endswith(FETCHED) and name[0] != "."}


@cache
def _held(path: str, listing: str) -> Path:
    """A folder of the remote one's name, in an entry of the cache that this process holds from now on."""
    digest = hashlib.sha256(f"{path}\0{listing}".encode()).hexdigest()[:32]
    entry = cache_folder() / digest
    take_lock(entry.with_suffix(".use"), fcntl.LOCK_SH)
    folder = entry / path.rpartition("/")[2]
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if recorded(folder) is None:
            part = folder / f".part-{uuid.uuid4().hex}"
            part.write_text(listing)
            os.replace(part, folder / LISTING)
        os.utime(entry)
    return folder


def _whole(path: Path, listing: Listing) -> bool:
    return path.is_file() and path.stat().st_size == listing[path.name][0]


def _fetch(address: str, endpoint: str | None, path: Path, listing: Listing) -> None:
    """Of the state that is listed: what was uploaded since, or is gone, is refused."""
    size, part = listing[path.name][0], path.with_name(f".part-{path.name}")
    changed = UserError("it was changed, or removed, while it was read", where=address,
                        remedy="run again, once nobody writes there")  # fmt: skip

    def piece(start: int) -> None:
        wanted = min(PIECE, size - start)
        with _told(address):
            try:
                data = files.read(address, endpoint, start, wanted)
            except files.Unavailable:  # as a store also is that has no such bytes any more
                if files.state(address, endpoint) == tuple(listing[path.name]):
                    raise
                data = b""
        if len(data) != wanted:
            raise changed
        os.pwrite(file.fileno(), data, start)

    try:
        with part.open("wb") as file, ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(piece, range(0, size, PIECE)))
            os.fsync(file.fileno())
    except FileNotFoundError as error:
        raise changed from error
    with _told(address):
        now = files.state(address, endpoint)
    if now != tuple(listing[path.name]):
        raise changed
    os.replace(part, path)


@contextmanager
def _told(address: str) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, of someone who may read it"
        raise UserError(str(error).removeprefix(f"{address}: "), where=address, remedy=remedy) from error
