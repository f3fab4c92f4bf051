"""The store on S3, by way of s3fs: create-only puts by If-None-Match, and patience with a store that fails for a while.

Invariants: every request goes through `_call`, the one place that tries again; s3fs's and botocore's own retries are
out of play, for they would multiply ours. A put that failed without a clear answer may have happened, so every create
and every multipart upload carries a mark of its own as metadata: when a key turns out to be taken, the mark on the
object tells whether it was this very put that took it. (That can be so at the first refusal too: aiohttp sends a PUT
again by itself when a kept connection breaks, and so do some load balancers.) An object is never seen in part: it
appears with its one put, or with the end of a multipart upload. A create is always one put: an exclusive multipart
upload is not exclusive on Ceph.
"""

import builtins
import copy
import logging
import os
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from modeling.errors import UserError
from orchestrator import s3errors
from orchestrator.address import S3Address, redact
from orchestrator.errors import StorageTransient
from orchestrator.retry import Retries
from orchestrator.store import Data, Exists, Missing, Store, check_key, local_file

PART = 32 * 2**20  # bytes; an object up to this size is one put, a larger one goes and comes in parts
_READERS = 32  # small objects read at once
STREAMS = 4  # parts of one object in flight; a transfer holds at most STREAMS * PART bytes
_MOST_PARTS = 10_000  # S3's own limit
_UPLOADS = 3  # of one object, before the store is given up
_FINISHING = 10.0  # seconds of patience with the end of an upload, the one request that Ceph may refuse for long
_AWS = "AWS"
_CONFIG = {"connect_timeout": 5, "read_timeout": 60, "retries": {"total_max_attempts": 1}, "max_pool_connections": 64}
_CHECKSUMS = ("request_checksum_calculation", "response_checksum_validation")

log = logging.getLogger(__name__)

T = TypeVar("T")


class S3Store:
    """Objects below `prefix` of a bucket. Safe from several threads, and in a process forked after first use."""

    def __init__(self, address: S3Address, retries: Retries | None = None, part: int = PART):
        """part: bytes; S3 itself wants at least 5 MiB."""
        self.address, self.url, self.where = address, str(address), f"storage {address.short}"
        self._retries, self._part = retries or Retries(), part
        self._timeout: float | None = None
        self._systems: dict[int, Any] = {}  # s3fs's loop thread does not survive a fork: one file system per process

    @property
    def endpoint(self) -> str:
        """For messages: where requests go."""
        environment = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return redact(self.address.endpoint_url or environment or _AWS)

    def patient(self, seconds: float) -> "S3Store":
        """This store with another patience, which also limits a single request that hangs."""
        other = copy.copy(self)
        other._retries, other._timeout = replace(self._retries, patience=seconds), seconds
        return other

    def put(self, key: str, data: Data, create: bool = False) -> None:
        view = memoryview(data).cast("B")
        if create:
            assert len(view) <= self._part, f"a create-only put of {len(view)} bytes"
            self._create(key, bytes(view))
        else:
            self._put(key, len(view), lambda start, stop: bytes(view[start:stop]))

    def put_file(self, key: str, path: Path) -> None:
        with open(path, "rb") as file:
            self._put(key, os.fstat(file.fileno()).st_size, lambda a, b: os.pread(file.fileno(), b - a, a))

    def get(self, key: str) -> bytes:
        return self._read(key)[0]

    def get_run(self, keys: Sequence[str]) -> builtins.list[bytes]:
        def read(key: str) -> bytes | None:
            try:
                return self.get(key)
            except Missing:
                return None

        if len(keys) == 1:
            found = [read(keys[0])]
        else:
            with ThreadPoolExecutor(min(_READERS, len(keys))) as pool:
                found = pool.map(read, keys)
        return [data for data in takewhile(lambda data: data is not None, found) if data is not None]

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
            return True
        except Missing:
            return False

    def list(self, prefix: str = "") -> list[str]:
        if ".." in prefix.split("/") or prefix.startswith("/"):
            raise ValueError(f"not a prefix: {prefix!r}")
        root = f"{self.address.prefix}/" if self.address.prefix else ""
        keys: list[str] = []
        more: dict[str, str] = {}
        while True:
            page = self._call(partial(self._request, "list_objects_v2", Prefix=root + prefix, **more), "list", prefix)
            names = [item["Key"].removeprefix(root) for item in page.get("Contents", [])]
            keys += [name for name in names if name and not name.endswith("/")]  # some tools make "folders"
            if not page.get("IsTruncated"):
                return sorted(keys)
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def size(self, key: str) -> int:
        return self._object("head_object", "read", key)["ContentLength"]

    def delete(self, key: str) -> None:
        try:
            self._object("delete_object", "delete from", key)
        except Missing:
            return

    def get_file(self, key: str, path: Path) -> None:
        data, tag, length = self._read(key, most=self._part)
        with local_file(path) as temporary, open(temporary, "wb") as file:
            if length <= self._part:
                file.write(data)
                return

            def fetch(start: int) -> None:
                stop = min(start + self._part, length)
                piece, found, _ = self._read(key, Range=f"bytes={start}-{stop - 1}")
                if found != tag:
                    raise StorageTransient(f"{key} in {self.where} was replaced while it was read")
                os.pwrite(file.fileno(), piece, start)

            _in_parallel(fetch, range(0, length, self._part))

    def copy(self, key: str, new: str) -> None:
        source = {"Bucket": self.address.bucket, "Key": self._name(check_key(key))}
        self._object("copy_object", "write to", new, CopySource=source)

    def local_path(self, key: str) -> Path | None:
        return None

    def _create(self, key: str, data: bytes) -> None:
        name, mark = self._name(check_key(key)), _new_mark()

        def once() -> None:
            try:
                self._request("put_object", Key=name, Body=data, IfNoneMatch="*", Metadata=mark)
            except Exception as error:
                if not s3errors.taken(error):
                    raise
                if not self._bears(key, mark):
                    raise Exists(key) from None

        self._call(once, "write to", key)

    def _put(self, key: str, size: int, read: Callable[[int, int], bytes]) -> None:
        if size <= self._part:
            self._object("put_object", "write to", key, Body=_whole(read, 0, size))
        elif not any(self._upload(key, size, read) for _ in range(_UPLOADS)):
            raise StorageTransient(f"{self.where}: the store finished none of {_UPLOADS} uploads to {key}")

    def _upload(self, key: str, size: int, read: Callable[[int, int], bytes]) -> bool:
        """Whether the object is there now. If not, the store will not finish this upload, and a new one may do."""
        part, mark = max(self._part, -(-size // _MOST_PARTS)), _new_mark()
        begun = self._object("create_multipart_upload", "write to", key, Metadata=mark)
        upload: dict[str, Any] = {"UploadId": begun["UploadId"]}

        def send(start: int) -> dict[str, Any]:
            body, number = _whole(read, start, min(start + part, size)), start // part + 1
            out = self._object("upload_part", "write to", key, Body=body, PartNumber=number, **upload)
            return {"ETag": out["ETag"], "PartNumber": number}

        try:
            parts = {"Parts": _in_parallel(send, range(0, size, part))}
            if self._finish(key, mark, MultipartUpload=parts, **upload):
                return True
        except Missing:  # the store does not know the upload any more
            return False
        except BaseException:
            self._abort(key, upload)
            raise
        self._abort(key, upload)
        return False

    def _finish(self, key: str, mark: dict[str, str], **upload: Any) -> bool:
        """A Ceph gateway that dies while it joins the parts leaves a lock on the upload: any gateway then answers
        InternalError for ten minutes (rgw_mp_lock_max_time). To send the parts again is sooner done than to wait."""
        hasty = copy.copy(self)
        hasty._retries = replace(self._retries, patience=min(_FINISHING, self._retries.patience))
        try:
            hasty._object("complete_multipart_upload", "write to", key, **upload)
            return True
        except (Missing, StorageTransient):  # Missing: perhaps an earlier try of the same request finished it
            return self._bears(key, mark)

    def _bears(self, key: str, mark: dict[str, str]) -> bool:
        try:
            return mark.items() <= self._object("head_object", "read", key).get("Metadata", {}).items()
        except Missing:
            return False

    def _abort(self, key: str, upload: dict[str, Any]) -> None:
        try:
            self.patient(5)._object("abort_multipart_upload", "write to", key, **upload)
        except (Missing, StorageTransient, UserError) as error:
            log.warning(
                "%s: parts of a broken upload to %s stay until the bucket drops them: %s", self.where, key, error
            )

    def _read(self, key: str, most: int | None = None, **arguments: Any) -> tuple[bytes, str, int]:
        """The body (empty where it is longer than `most` bytes), its ETag and its length."""
        out = self._object("get_object", "read", key, most=most, **arguments)
        return out["Body"], out["ETag"], out["ContentLength"]

    def _object(self, method: str, verb: str, key: str, most: int | None = None, **arguments: Any) -> dict[str, Any]:
        name = self._name(check_key(key))
        return self._call(lambda: self._request(method, most, Key=name, **arguments), verb, key)

    def _name(self, key: str) -> str:
        return f"{self.address.prefix}/{key}" if self.address.prefix else key

    def _call(self, action: Callable[[], T], verb: str, key: str) -> T:
        """action() with patience, and errors as the protocol names them."""
        try:
            return self._retries.run(action, s3errors.transient, f"{verb} {self.address.short}, {key or 'all keys'}")
        except (Exists, StorageTransient):
            raise
        except Exception as error:
            if s3errors.absent(error):
                raise Missing(key) from None
            if mistake := s3errors.mistake(error, verb, self.address, self.endpoint):
                raise mistake from error
            raise

    def _request(self, method: str, most: int | None = None, **arguments: Any) -> dict[str, Any]:
        """One request, tried once."""
        from fsspec.asyn import sync

        system = self._system()
        arguments["Bucket"] = self.address.bucket
        answer: Any = sync(system.loop, _answer, system, method, most, arguments, timeout=self._timeout)
        return answer

    def _system(self) -> Any:
        system = self._systems.get(os.getpid())
        if system is None:
            from s3fs import S3FileSystem

            config: dict[str, Any] = _CONFIG
            if self.endpoint != _AWS:  # many stores do not know the checksums that botocore adds by itself
                config = config | dict.fromkeys(_CHECKSUMS, "when_required")
            system = S3FileSystem(
                endpoint_url=self.address.endpoint_url or None, config_kwargs=config,
                use_listings_cache=False, skip_instance_cache=True,
            )  # fmt: skip
            system = self._systems.setdefault(os.getpid(), system)  # two threads may each have made one
        return system


def with_patience(store: Store, seconds: float) -> Store:
    """The store with so much patience, where it needs any: a folder answers or it does not."""
    return store.patient(seconds) if isinstance(store, S3Store) else store


async def _answer(system: Any, method: str, most: int | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """The store's answer, its body read within s3fs's loop; a body of more than `most` bytes is left unread.

    Asked through s3fs's client, not its file calls: those wait, retry and translate errors in ways of their own.
    """
    answer = await getattr(await system.set_session(), method)(**arguments)
    if (body := answer.get("Body")) is not None:
        try:
            answer["Body"] = await body.read() if most is None or answer["ContentLength"] <= most else b""
        finally:
            body.close()
    return answer


def _new_mark() -> dict[str, str]:
    return {"put": uuid.uuid4().hex}


def _whole(read: Callable[[int, int], bytes], start: int, stop: int) -> bytes:
    data = read(start, stop)
    assert len(data) == stop - start, "the file became shorter while it was stored"
    return data


def _in_parallel(function: Callable[[int], T], starts: range) -> list[T]:
    with ThreadPoolExecutor(STREAMS) as pool:
        return list(pool.map(function, starts))
