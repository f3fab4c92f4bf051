"""One behaviour for every store, and what only a folder can get wrong."""

import errno
import os
import pickle
import subprocess
import sys
import tempfile
import threading

import pytest
from s3_service import s3_store

from modeling.errors import UserError
from orchestrator.address import parse_s3, redact
from orchestrator.folders import StoreFolder
from orchestrator.probe import check_scratch, probe
from orchestrator.store import Exists, FileStore, MemoryStore, Missing, open_store


@pytest.fixture(params=["memory", "file", "s3"])
def store(request, tmp_path, monkeypatch):
    if request.param == "memory":
        return MemoryStore()
    if request.param == "file":
        return FileStore(tmp_path / "store")
    return s3_store(monkeypatch)


def test_objects(store, tmp_path):
    with pytest.raises(Missing):
        store.get("a/b")
    store.put("a/b", b"1")
    store.put("a/b", b"22")
    assert (store.get("a/b"), store.size("a/b"), store.exists("a/b"), store.exists("a")) == (b"22", 2, True, False)
    with pytest.raises(Missing):
        store.get("a")
    with pytest.raises(Missing):
        store.size("a/c")
    store.delete("a/b")
    store.delete("a/b")
    assert not store.exists("a/b")


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_all_that_is_bytes_can_be_put(store, kind):
    store.put("k", kind(b"0123"), create=True)
    store.put("l", memoryview(kind(b"0123456789"))[2:5])
    assert (store.get("k"), store.get("l")) == (b"0123", b"234")


def test_a_create_succeeds_once(store):
    store.put("k", b"first", create=True)
    with pytest.raises(Exists):
        store.put("k", b"second", create=True)
    assert store.get("k") == b"first"


def test_a_run_of_objects_ends_at_the_first_that_is_missing(store):
    keys = [f"run/{number:04d}" for number in range(60)]
    assert store.get_run(keys) == []
    for number in [*range(40), 45]:
        store.put(keys[number], str(number).encode())
    assert store.get_run(keys) == [str(number).encode() for number in range(40)]
    assert store.get_run(keys[:3]) == [b"0", b"1", b"2"] and store.get_run(keys[45:46]) == [b"45"]
    assert store.get_run(keys[40:41]) == []


def test_list_takes_any_prefix_and_sorts(store):
    for key in ("b/2", "b/10", "b/1/x", "a", "bc"):
        store.put(key, b"")
    assert store.list() == ["a", "b/1/x", "b/10", "b/2", "bc"]
    assert store.list("b/1") == ["b/1/x", "b/10"]
    assert store.list("b/") == ["b/1/x", "b/10", "b/2"]
    assert store.list("nothing/here") == []


def test_files(store, tmp_path):
    source, target = tmp_path / "source", tmp_path / "new" / "target"
    source.write_bytes(bytes(100_000))
    store.put_file("x/y", source)
    source.write_bytes(b"changed later")
    store.get_file("x/y", target)
    assert target.read_bytes() == bytes(100_000)
    with pytest.raises(Missing):
        store.get_file("x/z", target)
    assert target.read_bytes() == bytes(100_000) and os.listdir(target.parent) == ["target"]


def test_a_copy_is_an_object_of_its_own(store):
    store.put("a/x", b"1")
    store.copy("a/x", "b/c/y")
    store.put("a/x", b"2")
    assert store.get("b/c/y") == b"1"
    store.copy("a/x", "b/c/y")
    store.delete("a/x")
    assert store.get("b/c/y") == b"2" and store.list() == ["b/c/y"]
    with pytest.raises(Missing):
        store.copy("a/x", "z")


@pytest.mark.parametrize("store", ["file", "s3"], indirect=True)  # the other is of one process
def test_a_folder_crosses_processes_and_is_cleared_whole(store, tmp_path):
    folder = pickle.loads(pickle.dumps(StoreFolder(store.url, "work/parts")))
    path = tmp_path / "a.txt"
    path.write_bytes(b"hello")
    assert folder.put_file("1/a.txt", path)["size"] == 5
    assert folder.create("1.json", b"{}") and not folder.create("1.json", b"[]")
    assert folder.names() == ["1.json", "1/a.txt"] and folder.get(["1.json"]) == [b"{}"]
    assert folder.fetch("1/a.txt", tmp_path / "fetched").read_bytes() == b"hello"
    with pytest.raises(Missing):
        folder.get(["1.json", "none"])
    other = StoreFolder(store.url, "work/result")
    folder.copy_to(other, "1/a.txt", "shards/b")
    store.put("work/partsbeside", b"")
    folder.clear()
    folder.clear()
    assert store.list("work/") == ["work/partsbeside", "work/result/shards/b"]


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/./b", "a/", ".tmp-1", "a\0b"])
def test_keys_that_could_leave_the_store(store, key):
    with pytest.raises(ValueError, match="not a key"):
        store.put(key, b"x")


@pytest.mark.parametrize("store", ["memory", "file"], indirect=True)  # moto looks first and writes then; Ceph is raced
def test_of_racing_creates_one_wins_and_none_is_torn(store):
    won, start = [], threading.Barrier(8)

    def race(me: int) -> None:
        start.wait()
        for number in range(20):
            try:
                store.put(f"race/{number}", bytes([me]) * 1000, create=True)
                won.append((number, me))
            except Exists:
                seen = store.get(f"race/{number}")
                assert len(seen) == 1000 and len(set(seen)) == 1

    threads = [threading.Thread(target=race, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for number, _ in won) == list(range(20))
    assert all(store.get(f"race/{number}")[0] == me for number, me in won)


def test_what_a_killed_writer_leaves_behind_is_not_an_object(tmp_path):
    store = FileStore(tmp_path)
    store.put("a/b", b"1")
    (tmp_path / "a" / ".tmp-dead").write_bytes(b"half")
    assert store.list() == ["a/b"]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    store = FileStore(tmp_path)
    store.put("a", b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=rf"storage {tmp_path}: no space is left in .* → free space"):
        store.put("a", b"new")
    assert store.get("a") == b"old" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.EDQUOT, "no space is left"), (errno.EROFS, "is not writable"), (errno.EACCES, "is not writable")],
)
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, number, expected):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    store = FileStore(tmp_path)
    store.put("a/b", b"1")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match=expected):
        store.put("a/b", b"2")
    with pytest.raises(UserError, match=f"{tmp_path}/local.*{expected}|{expected}.*{tmp_path}/local"):
        store.get_file("a/b", tmp_path / "local" / "x")
    assert os.listdir(tmp_path / "local") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
def test_a_disk_that_is_really_full(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(small)], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        store = FileStore(small)
        with pytest.raises(UserError, match="no space is left"):
            store.put("a/b", bytes(200_000))
        assert store.list() == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def fail(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(UserError, match="has no hard links"):
        probe(FileStore(tmp_path))


def test_a_probe_leaves_nothing(store):
    probe(store)
    assert store.list() == []


def test_probes_at_once_do_not_disturb_each_other(store):
    store.put("mine", b"1")
    failures = []

    def run() -> None:
        try:
            probe(store)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and store.list() == ["mine"]


class Overwriting(MemoryStore):
    def put(self, key, data, create=False):
        super().put(key, data)


class Losing(MemoryStore):
    def put(self, key, data, create=False):
        if create:
            super().put(key, data, create)


class Hiding(MemoryStore):
    def list(self, prefix=""):
        return []


class Keeping(MemoryStore):
    def delete(self, key):
        pass


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Overwriting, "overwrote the object that was there"),
        (Losing, "gives back an old object"),
        (Hiding, "does not list"),
        (Keeping, "still has an object"),
    ],
)
def test_a_store_that_breaks_its_promises_is_refused(kind, expected):
    with pytest.raises(UserError, match=expected) as caught:
        probe(kind())
    assert "storage memory://" in str(caught.value) and "two drivers" in str(caught.value)


def test_a_scratch_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    check_scratch()
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=f"TMPDIR: no space is left in {tmp_path}"):
        probe(MemoryStore())


def test_opening_writes_nothing(tmp_path):
    store = open_store(str(tmp_path / "new"))
    assert store.list() == [] and store.local_path("x") is None
    assert not (tmp_path / "new").exists()
    store.put("x/y", b"1")
    assert store.local_path("x/y") == tmp_path / "new" / "x" / "y"
    assert store.local_path("x") == tmp_path / "new" / "x"
    assert open_store(f"file://{tmp_path}/new").get("x/y") == b"1"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://user:pw@bucket/x", "storage s3://bucket/x: keys do not belong"),
        ("s3://bucket/x?aws_secret_access_key=pw", "storage s3://bucket/x: keys do not belong"),
        ("s3://bucket/x?endpoint_url=http://user:pw@host", "keys do not belong in endpoint_url"),
        ("s3://bucket/x?endpoint_url=host:1", "endpoint_url is not an address"),
        ("s3://bucket/x?endpoint_url=http://host:port", "endpoint_url is not an address"),
        ("s3://bucket/x?region=eu", "unknown setting 'region'"),
        ("s3://bucket/x//y", "plain names"),
        ("s3://bucket/x#y", "plain names"),
        ("s3://", "no valid name of a bucket"),
        ("s3://buck et/x", "no valid name of a bucket"),
        ("ftp://host/x", "unknown kind of storage 'ftp://'"),
        ("{tmp}/file", "is a file"),
        ("{tmp}/file/below", "is a file"),
    ],
)
def test_storage_that_cannot_serve(tmp_path, url, expected):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        open_store(url.format(tmp=tmp_path))
    assert expected in str(caught.value) and " → " in str(caught.value) and "pw" not in str(caught.value)


def test_a_folder_one_may_not_write_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="is not writable"):
        open_store(str(tmp_path))


def test_addresses_survive_being_text():
    full = parse_s3("s3://bucket/a/b/", "http://127.0.0.1:9000/")
    assert str(full) == "s3://bucket/a/b?endpoint_url=http://127.0.0.1:9000" and parse_s3(str(full)) == full
    assert parse_s3(str(full), "http://127.0.0.1:9000") == full and full.short == "s3://bucket/a/b"
    assert str(parse_s3("s3://bucket")) == "s3://bucket" == redact("s3://me:pw@bucket?x=pw#pw")
    with pytest.raises(UserError, match="two different values"):
        parse_s3(str(full), "http://other")


def test_opening_s3_asks_nothing_and_imports_nothing_heavy():
    code = (
        "import sys, orchestrator.probe; from orchestrator.store import open_store;"
        "open_store('s3://nowhere/x?endpoint_url=http://127.0.0.1:9').local_path('a');"
        "print([m for m in ('s3fs', 'fsspec', 'botocore', 'aiohttp', 'ray', 'torch') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
