"""A save goes on behind the training, and what it holds is the state of its own step."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load

from modeling.checkpoint import Fragment, Snapshot
from stages.saving import Saver


class Io:
    rank, world = 0, 1

    def __init__(self):
        self.stored: dict[int, bytes] = {}
        self.committed: list[tuple[int, float]] = []

    def saving(self, step: int) -> None:
        pass

    def put_shard(self, step: int, name: str, data: memoryview) -> dict[str, Any]:
        self.stored[step] = bytes(data)
        return {"name": name}

    def commit(self, step: int, files: list, meta: dict, train_s: float, stall_s: float) -> None:
        self.committed.append((step, stall_s))


@pytest.fixture
def weights() -> torch.Tensor:
    return torch.arange(5.0)


@pytest.fixture
def saver(weights, monkeypatch):
    fragment = Fragment("weight", 0, weights, torch.zeros(5), torch.zeros(5))
    engine: Any = SimpleNamespace(device=torch.device("cpu"), to_write=lambda: [fragment])
    monkeypatch.setattr(dist, "all_gather_object", lambda out, item: out.__setitem__(0, item))
    monkeypatch.setattr(dist, "barrier", lambda: None)
    return Saver(Io(), engine)  # type: ignore[arg-type]


def test_no_weight_changes_before_the_snapshot_is_taken(saver, weights, monkeypatch):
    go, take = threading.Event(), Snapshot.take
    monkeypatch.setattr(Snapshot, "take", lambda *a: (go.wait(60), take(*a))[1])
    assert saver.start(3, {}, 1.0) < 5, "it does not wait for the copy"
    threading.Timer(1.0, go.set).start()
    stall = saver.settle()
    assert 0.1 < stall < 60
    assert saver.settle() == 0.0, "it is taken"
    weights += 1  # the next update
    saver.finish()
    assert load(saver.io.stored[3])["weight|0|master"].tolist() == [0, 1, 2, 3, 4]
    ((step, told),) = saver.io.committed
    assert step == 3 and told >= stall


def test_nothing_is_committed_before_every_ranks_file_is_stored(saver, monkeypatch):
    """That a rank has stored its file travels with a step; all ranks then gather at the same one."""
    go, put = threading.Event(), saver.io.put_shard
    monkeypatch.setattr(saver.io, "put_shard", lambda *a: (go.wait(60), put(*a))[1])
    saver.start(3, {}, 1.0)
    saver.settle()
    assert not saver.uploaded()
    other = threading.Thread(target=saver.gather)  # too early: it waits for its own file
    other.start()
    time.sleep(0.1)
    assert other.is_alive() and saver.io.committed == []
    go.set()
    other.join()
    saver.finish()
    assert [step for step, _ in saver.io.committed] == [3] and 3 in saver.io.stored


def test_no_rank_goes_on_before_the_last_save_is_committed(weights, monkeypatch):
    """Two ranks that save last and stop. Ray ends both at the first that has ended: rank 1, whose part is done long
    before rank 0's commit is where the store is slow, may not be it."""
    gathered: dict[int, Any] = {}
    meet, go, over = threading.Barrier(2), threading.Event(), []

    def gather(out: list, item: Any) -> None:
        gathered[ranks[threading.get_ident()]] = item
        meet.wait(60)
        out[:] = [gathered[0], gathered[1]]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(dist, "barrier", lambda: meet.wait(60))
    ranks: dict[int, int] = {}

    def rank(number: int) -> None:
        ranks[threading.get_ident()] = number
        io = Io()
        io.rank, io.world = number, 2
        if number == 0:
            io.commit = lambda *_: go.wait(60)  # type: ignore[method-assign]
        fragment = Fragment("weight", 0, weights, torch.zeros(5), torch.zeros(5))
        engine: Any = SimpleNamespace(device=torch.device("cpu"), to_write=lambda: [fragment])
        saver = Saver(io, engine)  # type: ignore[arg-type]
        saver.start(3, {}, 1.0)
        saver.finish()
        over.append(number)
        saver.finish()  # nothing is in flight: no rank waits for another

    threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    assert over == [], "rank 1 went on before the commit"
    go.set()
    for thread in threads:
        thread.join(60)
    assert sorted(over) == [0, 1]


def test_a_save_that_failed_is_raised_in_the_training(saver, monkeypatch):
    def fails(*_):
        raise OSError("no space left")

    monkeypatch.setattr(saver.io, "put_shard", fails)
    saver.start(1, {}, 1.0)
    saver.settle()
    with pytest.raises(OSError, match="no space"):
        while not saver.uploaded():
            time.sleep(0.01)
