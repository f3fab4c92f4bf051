"""Results on a node's disk: fetched once, whole and verified, whoever asks and whoever dies."""

import hashlib
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from modeling import disk
from modeling.errors import CheckpointError, UserError
from orchestrator.cache import held_result
from orchestrator.ledger import Ledger
from orchestrator.store import FileStore, MemoryStore


class Counted(MemoryStore):
    """Keeps what was fetched; `before` is called with each key."""

    def __init__(self):
        super().__init__()
        self.fetched, self.before = [], lambda key: None

    def get_file(self, key, path):
        self.before(key)
        super().get_file(key, path)
        self.fetched.append(key.rsplit("/", 1)[1])


@pytest.fixture
def store():
    return Counted()


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("STAGELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def complete(store, stage: str = "a", **contents: bytes) -> str:
    """A completed stage with these files; the prefix of its result."""
    prefix = f"stages/train/{stage}/result/e0001a0001"
    ledger, files = Ledger(store, f"stages/train/{stage}"), []
    token = ledger.start_attempt(ledger.claim({"host": "h"}), 1)
    for name, data in contents.items():
        store.put(f"{prefix}/{name}", data)
        files.append({"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    ledger.append("completed", token, manifest={"folder": prefix, "files": files}, summary={}, train_s=0.0)
    return prefix


def test_the_ranks_of_a_node_fetch_once_and_a_later_attempt_not_at_all(store):
    store.before = lambda key: time.sleep(0.02)
    prefix = complete(store, one=b"1" * 100, two=b"2" * 10)
    with ThreadPoolExecutor(8) as ranks:
        held = list(ranks.map(lambda _: held_result(store, prefix), range(8)))
    assert sorted(store.fetched) == ["one", "two"] and len({one.folder for one in held}) == 1
    for one in held:
        assert (one.folder / "one").read_bytes() == b"1" * 100 and (one.folder / "two").read_bytes() == b"2" * 10
        one.release()
    assert held_result(store, prefix).folder == held[0].folder and len(store.fetched) == 2


def test_on_a_file_system_it_is_read_in_place(tmp_path, root):
    store = FileStore(tmp_path / "store")
    prefix = complete(store, one=b"1")
    assert held_result(store, prefix).folder == tmp_path / "store" / prefix and not root.exists()


def test_who_needs_a_part_fetches_a_part(store):
    prefix = complete(store, index=b"1", data=b"2")
    held = held_result(store, prefix, lambda name: name == "index")
    assert store.fetched == ["index"] and not (held.folder / "data").exists()
    assert (held_result(store, prefix).folder / "data").read_bytes() == b"2" and store.fetched == ["index", "data"]


def test_whoever_comes_after_one_that_was_killed_fetches_the_rest(store):
    def killed(key):
        if key.endswith("two"):
            raise KeyboardInterrupt

    prefix = complete(store, one=b"1" * 100, two=b"2" * 10)
    store.before = killed
    with pytest.raises(KeyboardInterrupt):
        held_result(store, prefix)
    store.before = lambda key: None
    held_result(store, prefix)
    assert store.fetched == ["one", "two"]


def test_a_file_cut_off_on_the_disk_is_fetched_again(store):
    prefix = complete(store, one=b"1" * 100)
    held = held_result(store, prefix)
    (held.folder / "one").write_bytes(b"1" * 99)
    held.release()
    assert (held_result(store, prefix).folder / "one").read_bytes() == b"1" * 100


@pytest.mark.parametrize("damage", [b"1" * 99 + b"x", b"1" * 99, None])
def test_what_is_not_what_was_written_gets_no_name(store, damage):
    prefix = complete(store, one=b"1" * 100)
    store.put(f"{prefix}/one", damage) if damage else store.delete(f"{prefix}/one")
    with pytest.raises(CheckpointError, match=r"one is missing or damaged: .* run it again"):
        held_result(store, prefix)
    store.put(f"{prefix}/one", b"1" * 100)
    held = held_result(store, prefix)
    assert [path.name for path in held.folder.iterdir()] == ["one"]


def test_another_result_under_the_same_name_is_another_folder(store):
    """As after the storage was removed and the stage was run anew, with other weights."""
    first, other = held_result(store, complete(store, one=b"1")), Counted()
    second = held_result(other, complete(other, one=b"2"))
    assert first.folder != second.folder and (second.folder / "one").read_bytes() == b"2"


def test_the_oldest_that_nobody_uses_goes_when_room_is_needed(store, monkeypatch):
    monkeypatch.setenv("STAGELINE_CACHE_GB", "0.0000025")  # 2,500 bytes
    held = {name: held_result(store, complete(store, name, one=name.encode() * 1000)) for name in "ab"}
    for age, name in enumerate("ba"):
        os.utime(held[name].folder, (age, age))
    third = held_result(store, complete(store, "c", one=b"c" * 1000))
    assert all((one.folder / "one").exists() for one in (*held.values(), third)), "all are in use"
    for one in held.values():
        one.release()
    held_result(store, complete(store, "d", one=b"d" * 400))
    assert not held["b"].folder.exists() and held["a"].folder.exists() and third.folder.exists()


def test_one_more_that_fits_costs_nothing(store, monkeypatch):
    monkeypatch.setenv("STAGELINE_CACHE_GB", "0.0000025")
    first = held_result(store, complete(store, "a", one=b"a" * 1000))
    first.release()
    held_result(store, complete(store, "b", one=b"b" * 1000))
    assert first.folder.exists()


def test_one_that_is_being_removed_is_fetched_again(store):
    """Whoever comes while another has the lock to remove it waits, and finds it gone."""
    prefix = complete(store, one=b"1")
    held = held_result(store, prefix)
    held.release()
    lock = disk.take_lock(held.folder.with_suffix(".use"), disk.fcntl.LOCK_EX)
    found = []
    other = threading.Thread(target=lambda: found.append(held_result(store, prefix)))
    other.start()
    time.sleep(0.1)
    assert not found
    shutil.rmtree(held.folder)
    os.close(lock)
    other.join(10)
    assert (found[0].folder / "one").read_bytes() == b"1" and store.fetched == ["one", "one"]


def test_what_a_user_can_mend(store, monkeypatch):
    prefix = complete(store, one=b"1" * 100)
    monkeypatch.setenv("STAGELINE_CACHE_GB", "much")
    with pytest.raises(UserError, match="STAGELINE_CACHE_GB: must be a number of gigabytes, found 'much'"):
        held_result(store, prefix)
    monkeypatch.setenv("STAGELINE_CACHE_GB", "1")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(total=1000, free=99))
    with pytest.raises(UserError, match=r"do not fit .* set STAGELINE_CACHE to a folder on a larger disk"):
        held_result(store, prefix)
