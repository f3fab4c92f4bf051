"""One behaviour for every store, and what only a folder can get wrong."""

import os
import threading

import pytest

from modeling.errors import UserError
from orchestrator.store import Exists, FileStore, MemoryStore, Missing, open_store


@pytest.fixture(params=["memory", "file"])
def store(request, tmp_path):
    return MemoryStore() if request.param == "memory" else FileStore(tmp_path / "store")


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


def test_a_create_succeeds_once(store):
    store.put("k", b"first", create=True)
    with pytest.raises(Exists):
        store.put("k", b"second", create=True)
    assert store.get("k") == b"first"


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
    assert target.read_bytes() == bytes(100_000)


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/./b", "a/", ".tmp-1", "a\0b"])
def test_keys_that_could_leave_the_store(store, key):
    with pytest.raises(ValueError, match="not a key"):
        store.put(key, b"x")


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
    with pytest.raises(OSError, match="No space"):
        store.put("a", b"new")
    assert store.get("a") == b"old" and os.listdir(tmp_path) == ["a"]


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
        ("s3://bucket/x", "arrives with a later version"),
        ("s3://user:pw@bucket/x", "storage s3://bucket/x"),
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
