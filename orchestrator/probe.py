"""Does a store keep the promises the ledger rests on? Asked once, before anything starts.

Invariant: what passes has just shown, on a key of its own, that a create-only put refuses a taken key and leaves it
alone, and that reads and lists see the last write. Several gateways accept If-None-Match and overwrite in silence:
with such a store two drivers would each believe that they own a stage. Two probes at once do not meet, and a probe
leaves nothing behind.
"""

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from modeling.disk import disk_errors
from modeling.errors import UserError
from orchestrator.address import redact
from orchestrator.errors import StorageTransient
from orchestrator.s3 import S3Store, with_patience
from orchestrator.store import Exists, Store

FOLDER = ".stageline/probe/"


def reach(store: Store, patience: float = 10.0) -> None:
    """One listing: raises UserError for an endpoint that does not answer, wrong keys, or a bucket that is not there.

    patience: seconds; a wrong address should not take the two minutes that a store in a bad moment is given.
    """
    with _answers(store):
        with_patience(store, patience).list(FOLDER)


def probe(store: Store, patience: float = 10.0) -> None:
    """Raises UserError where the store, or the folder for temporary files, cannot serve a run."""
    check_scratch()
    reach(store, patience)
    with _answers(store):
        _check_promises(with_patience(store, patience), FOLDER + uuid.uuid4().hex)


def check_scratch() -> None:
    """Raises UserError where no temporary file can be written; results pass through one on their way."""
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise UserError("there is no folder for temporary files", where="TMPDIR",
                        remedy="set TMPDIR to a folder with space") from error  # fmt: skip
    with disk_errors(folder, "TMPDIR"), tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(4096))
        file.flush()
        os.fsync(file.fileno())


def _check_promises(store: Store, key: str) -> None:
    first, second = b"first " + key.encode(), b"second " + key.encode()
    try:
        store.put(key, first, create=True)
    except Exists:
        _refuse(store, "says that a new key is taken")
    try:
        try:
            store.put(key, second, create=True)
        except Exists:
            pass
        else:
            did = "overwrote" if store.get(key) == second else "did not refuse for"
            _refuse(store, f"accepted a second create-only put (If-None-Match) and {did} the object that was there")
        if store.get(key) != first:
            _refuse(store, "does not give back what was put")
        if store.list(FOLDER).count(key) != 1:
            _refuse(store, "does not list an object that was just put")
        store.put(key, second)
        if store.get(key) != second:
            _refuse(store, "gives back an old object after it was replaced")
    finally:
        store.delete(key)
    if store.exists(key) or key in store.list(FOLDER):
        _refuse(store, "still has an object after it was deleted")


def _refuse(store: Store, did: str) -> NoReturn:
    name = f"the store at {store.endpoint}" if isinstance(store, S3Store) else "this store"
    raise UserError(f"{name} {did}; two drivers could both own a stage", where=_where(store),
                    remedy="use AWS S3, Ceph's gateway or another store that honours If-None-Match, or a folder that "
                    "all machines share")  # fmt: skip


@contextmanager
def _answers(store: Store) -> Iterator[None]:
    try:
        yield
    except StorageTransient as error:
        raise UserError(f"the store does not answer: {error}", where=_where(store),
                        remedy="check endpoint_url (AWS_ENDPOINT_URL) and that the store is up") from error  # fmt: skip


def _where(store: Store) -> str:
    return f"storage {redact(store.url)}"
