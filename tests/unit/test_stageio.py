"""Checkpoints and results over a store: what exists is what the ledger says, whoever dies when."""

import json
import threading
import time

import pytest

from modeling.errors import CheckpointError
from orchestrator import courier, stageio
from orchestrator.control import ask_to_stop
from orchestrator.errors import Fenced, Preempted, StorageTransient
from orchestrator.ledger import Ledger
from orchestrator.places import Places, read_places
from orchestrator.progress import read_logs, read_metrics
from orchestrator.stageio import ParentRef, StoreIO, Task
from orchestrator.store import FileStore, MemoryStore
from stages.io import Signal
from stages.params import TrainParams

P = "stages/train/0123456789abcdef"
PARAMS = TrainParams(train=("mlp",), lr=1e-3, global_batch=2, steps=10)


class World:
    """A stage on a store, claimed. `puts` and `deletes` in order in `operations`."""

    def __init__(self, store, monkeypatch, folder):
        self.store, self.folder, self.operations = store, folder, []
        for name in ("put", "put_file", "delete"):
            monkeypatch.setattr(store, name, self.recorded(name, getattr(store, name)))
        monkeypatch.setattr(stageio, "open_store", lambda url: store)
        self.ledger = Ledger(store, P)
        self.token = self.ledger.claim({"host": "h"})
        self.open = []

    def recorded(self, name, original):
        def call(key, *rest, **more):
            original(key, *rest, **more)
            self.operations.append((name, key))

        return call

    def attempt(self, keep=3, parents=(), mapper=None, kind="mlp_warmup", **more) -> StoreIO:
        self.token = self.ledger.start_attempt(self.token, 1)
        task = Task("", P, "mlp", kind, "0" * 64, PARAMS, None, {}, tuple(parents), self.token, keep)
        self.open.append(StoreIO(task, mapper=mapper, **more))
        return self.open[-1]

    def shards(self, io, step, ranks=2):
        """Every rank's file of a step, its content told by step, rank and attempt."""
        files = []
        for rank in range(ranks):
            data = f"step {step} rank {rank} token {io.task.token} ".encode() * 20
            files.append(io.put_shard(step, f"shard-{rank}", memoryview(data)))
        return files

    def save(self, io, step):
        io.saving(step)
        io.commit(step, self.shards(io, step), {"world": 2}, 1.5, 0.1)

    def logs(self):
        return "".join(read_logs(self.store, P).values())


@pytest.fixture(params=["file", "memory"])
def world(request, tmp_path, monkeypatch):
    """On a folder, read in place, and on a store whose files have to be fetched, as S3's."""
    store = FileStore(tmp_path / "store") if request.param == "file" else MemoryStore()
    world = World(store, monkeypatch, tmp_path)
    yield world
    for io in world.open:
        io.close()


def resume_point(io):
    """As stages/train.py goes on, on one rank."""
    for checkpoint in io.checkpoints():
        try:
            return io.load(checkpoint)
        except CheckpointError as error:
            io.log(f"cannot be used: {error}")
    return None


def key_of(store, step, name) -> str:
    (key,) = [k for k in store.list(f"{P}/checkpoints/checkpoint-{step:08d}/") if k.endswith(f"/{name}")]
    return key


def test_a_checkpoint_is_shards_then_manifest_then_entry(world):
    io = world.attempt()
    world.operations.clear()
    world.save(io, 10)
    keys = dict.fromkeys(key.rsplit("/", 1)[1] for _, key in world.operations if "/logs/" not in key)
    assert list(keys) == ["shard-0", "shard-1", "manifest.json", "00000002.json"]
    point = resume_point(world.attempt())
    assert point.step == 10 and point.manifest["world"] == 2 and point.manifest["token"] == [1, 1]
    for rank, item in enumerate(point.manifest["files"]):
        content = (point.folder / item["name"]).read_bytes()
        assert content.startswith(f"step 10 rank {rank} ".encode()) and item["size"] == len(content)


def test_without_an_entry_it_does_not_exist(world):
    io = world.attempt()
    assert resume_point(io) is None
    world.save(io, 10)
    files = world.shards(io, 20)
    manifest = {"step": 20, "files": files}
    world.store.put(f"{P}/checkpoints/checkpoint-00000020/e0001a0001/manifest.json", json.dumps(manifest).encode())
    assert resume_point(io).step == resume_point(world.attempt()).step == 10


def flip(store, step):
    key = key_of(store, step, "shard-1")
    content = bytearray(store.get(key))
    content[7] ^= 1
    store.put(key, bytes(content))


def truncate(name):
    def damage(store, step):
        key = key_of(store, step, name)
        store.put(key, store.get(key)[:-30])

    return damage


def replace(content):
    return lambda store, step: store.put(key_of(store, step, "manifest.json"), content)


@pytest.mark.parametrize(
    "damage",
    [
        flip, truncate("shard-0"), truncate("manifest.json"), replace(b""), replace(b"[]"), replace(b"{}"),
        replace(b'{"files": [1]}'), replace(b"\xff\xfe"),
        lambda store, step: store.delete(key_of(store, step, "shard-1")),
        lambda store, step: store.delete(key_of(store, step, "manifest.json")),
        lambda store, step: [store.delete(key_of(store, step, n)) for n in ("manifest.json", "shard-0", "shard-1")],
    ],
)  # fmt: skip
def test_damage_falls_back_to_the_checkpoint_before_and_says_so(world, damage):
    io = world.attempt()
    for step in (10, 20):
        world.save(io, step)
    damage(world.store, 20)
    point = resume_point(world.attempt())
    assert point.step == 10 and (point.folder / "shard-0").read_bytes().startswith(b"step 10 rank 0")
    assert "cannot be used" in world.logs() and "checkpoint-00000020" in world.logs()
    flip(world.store, 10)
    assert resume_point(world.attempt()) is None, "a stage without a checkpoint starts anew"
    assert "checkpoint-00000010" in world.logs()


def test_ranks_of_one_file_system_share_the_digesting(world, monkeypatch):
    """Of two ranks one finds the damage; files that had to be fetched are digested by each that fetched them."""
    world.save(world.attempt(), 10)
    flip(world.store, 10)
    found = []
    for rank in range(2):
        io = world.attempt(rank=rank, world=2)
        try:
            io.load(io.checkpoints()[0])
        except CheckpointError:
            found.append(rank)
    assert found == ([1] if isinstance(world.store, FileStore) else [0, 1])


def test_no_flipped_byte_of_a_manifest_gives_wrong_files(tmp_path, monkeypatch):
    """Every byte in turn: the checkpoint before, or this one with the very files that were written."""
    world = World(FileStore(tmp_path / "store"), monkeypatch, tmp_path)
    io = world.attempt()
    monkeypatch.setattr(io, "log", lambda message: None)
    for step in (10, 20):
        world.save(io, step)
    path = world.store.local_path(key_of(world.store, 20, "manifest.json"))
    written = path.read_bytes()
    outcomes = set()
    for place in range(len(written)):
        path.write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
        point = resume_point(io)
        outcomes.add(point.step)
        names = [item["name"] for item in point.manifest["files"]]
        assert names == ["shard-0", "shard-1"] and point.folder.parent.name.endswith(f"{point.step:08d}")
    assert outcomes == {10, 20}
    io.close()


def test_retention_tells_the_ledger_before_it_removes(world):
    io = world.attempt(keep=2)
    world.save(io, 10)
    world.save(io, 20)
    world.operations.clear()
    world.save(io, 30)
    retired = next(i for i, (_, key) in enumerate(world.operations) if key.endswith("ledger/00000005.json"))
    deletes = [i for i, (name, _) in enumerate(world.operations) if name == "delete"]
    assert len(deletes) == 3 and min(deletes) > retired
    assert [entry.type for entry in world.ledger.entries()][-2:] == ["checkpoint", "retired"]
    assert [c.step for c in world.ledger.state().checkpoints] == [30, 20]
    folders = {key.split("/")[4] for key in world.store.list(f"{P}/checkpoints/")}
    assert folders == {"checkpoint-00000020", "checkpoint-00000030"}
    assert resume_point(world.attempt()).step == 30


def test_a_death_within_the_removal_harms_nothing(world, monkeypatch):
    io = world.attempt(keep=1)
    world.save(io, 10)
    dying = world.store.delete

    def dies(key):
        dying(key)
        raise ConnectionError("killed")

    monkeypatch.setattr(world.store, "delete", dies)
    with pytest.raises(ConnectionError):
        world.save(io, 20)
    monkeypatch.setattr(world.store, "delete", dying)
    later = world.attempt(keep=1)
    assert resume_point(later).step == 20 and "cannot be used" not in world.logs()


def test_an_earlier_attempt_commits_nothing_and_harms_no_file_of_a_later_one(world):
    old = world.attempt()
    world.save(old, 10)
    new = world.attempt()
    world.save(new, 20)
    before = world.store.get(key_of(world.store, 20, "shard-0"))
    entries = len(world.ledger.entries())
    files = world.shards(old, 20)
    with pytest.raises(Fenced):
        old.commit(20, files, {}, 1.0)
    (world.folder / "result").mkdir()
    (world.folder / "result" / "weights").write_bytes(b"old")
    with pytest.raises(Fenced):
        old.complete(world.folder / "result", {})
    assert len(world.ledger.entries()) == entries
    point = resume_point(world.attempt())
    assert point.step == 20 and (point.folder / "shard-0").read_bytes() == before


def test_a_step_committed_again_after_a_fall_back_is_the_new_one(world):
    io = world.attempt()
    for step in (10, 20):
        world.save(io, step)
    flip(world.store, 20)
    again = world.attempt()
    assert resume_point(again).step == 10
    world.save(again, 20)
    point = resume_point(world.attempt())
    assert point.step == 20 and b"token (1, 2)" in (point.folder / "shard-1").read_bytes()


def test_a_result_lies_under_its_token_with_the_metrics_of_the_lineage(world):
    first = world.attempt()
    for step in range(1, 9):
        first.tick(step, 10, {"loss": 9.0, "time/step": 0.1})
    first.close()
    second = world.attempt()
    for step in range(5, 11):
        second.tick(step, 10, {"loss": 1.0, "time/step": 0.1})
    folder = world.folder / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "weights").write_bytes(b"12345")
    (folder / "deep" / "more").write_bytes(b"x")
    second.complete(folder, {"loss": 1.0})
    done = world.ledger.state().completed
    assert done["summary"] == {"loss": 1.0} and done["manifest"]["folder"] == f"{P}/result/e0001a0002"
    assert [(item["name"], item["size"]) for item in done["manifest"]["files"]] == [("deep/more", 1), ("weights", 5)]
    rows = [json.loads(line) for line in world.store.get(f"{P}/metrics.jsonl").splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(s, 9.0 if s < 5 else 1.0) for s in range(1, 11)]
    parent = ParentRef("mlp", "train", "0" * 16, done["manifest"]["folder"], {"lr": 1e-3})
    child = StoreIO(
        Task("", "stages/train/child", "child", "mlp_warmup", "1" * 64, PARAMS, None, {}, (parent,), (1, 1))
    )
    world.open.append(child)
    given = child.inputs["mlp"]
    assert (given.folder / "weights").read_bytes() == b"12345" and (given.folder / "deep" / "more").read_bytes() == b"x"
    assert (given.kind, given.params) == ("train", {"lr": 1e-3})


def test_the_driver_fetches_what_it_plans_with(world):
    """It may be on a machine of its own, and the data of a training stage are large."""
    io = world.attempt()
    folder = world.folder / "result"
    (folder / "shards").mkdir(parents=True)
    for name in ("index.parquet", "shards/000000.tar"):
        (folder / name).write_bytes(name.encode())
    io.complete(folder, {})
    parent = ParentRef("data", "prepare", "0" * 16, world.ledger.state().completed["manifest"]["folder"], {})
    task = Task("", "stages/train/child", "child", "mlp_warmup", "1" * 64, PARAMS, None, {}, (parent,), (1, 1))
    for mapper in (map, None):
        child = StoreIO(task, mapper=mapper)
        world.open.append(child)
        given = child.inputs["data"].folder
        assert (given / "index.parquet").exists()
        assert (given / "shards").exists() == (mapper is None or isinstance(world.store, FileStore))


def test_a_result_counts_only_with_its_entry(world, monkeypatch):
    io = world.attempt()
    (world.folder / "model").mkdir()
    (world.folder / "model" / "weights").write_bytes(b"1")
    monkeypatch.setattr(stageio.Ledger, "append", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("killed")))
    with pytest.raises(ConnectionError):
        io.complete(world.folder / "model", {})
    assert world.ledger.state().completed is None


def test_what_is_kept_beside_the_stage_is_fetched_by_a_later_attempt(world):
    (world.folder / "plan").write_bytes(b"plan")
    world.attempt().keep("plan.npz", world.folder / "plan")
    assert world.attempt().fetch("plan.npz").read_bytes() == b"plan"


def ticks_until(io, step, wanted, seconds=60.0):
    """Ticks until wanted(signal); the step it was at."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if wanted(io.tick(step, 10**6, {"time/step": 0.001})):
            return step
        step += 1
        time.sleep(0.002)
    raise AssertionError("not told in time")


def test_rank_0_is_told_at_a_step_that_it_was_fenced(world, monkeypatch):
    monkeypatch.setattr(courier, "FENCE_CHECK_S", 0.0)
    io = world.attempt()
    io.tick(1, 10**6, {"time/step": 0.001})
    world.ledger.claim({"host": "other"})
    with pytest.raises(Fenced):
        ticks_until(io, 2, lambda signal: False)


def test_a_request_to_stop_is_followed_once_and_says_why(world, monkeypatch):
    monkeypatch.setattr(courier, "POLL_S", 0.0)
    io = world.attempt()
    assert io.tick(7, 10**6, {"time/step": 0.001}) == Signal()
    ask_to_stop(world.store, P, world.token, 0.0, "the machine goes")
    ticks_until(io, 8, lambda signal: signal.stop and signal.save)
    with pytest.raises(Preempted, match="the machine goes: saved and stopped after step 9"):
        io.stopped(9)
    later = world.attempt()
    later.tick(10, 10**6, {"time/step": 0.001})
    time.sleep(0.1)
    assert not later.tick(11, 10**6, {"time/step": 0.001}).stop, "the request was to the attempt before"


def test_a_stage_that_does_not_train_says_why_it_stopped(world, monkeypatch):
    monkeypatch.setattr(courier, "POLL_S", 0.0)
    io = world.attempt(kind="prepare", mapper=map)
    io.tick(1, 10**6, {})
    ask_to_stop(world.store, P, world.token, 0.0, "the driver got SIGTERM")
    until = time.monotonic() + 60
    while not io.tick(2, 10**6, {}).stop:
        assert time.monotonic() < until
    with pytest.raises(Preempted, match=r"^the driver got SIGTERM: stopped after step 2$"):
        io.stopped(2)


def test_a_deadline_that_comes_nearer_is_heard(world, monkeypatch):
    """A rebalance recommendation that is followed by an interruption: the same node, the same reason, sooner."""
    monkeypatch.setattr(courier, "POLL_S", 0.0)
    notices = [(300.0, "node x is being drained")]
    io = world.attempt(notices=lambda: notices[-1])
    safety = ticks_until(io, 1, lambda signal: signal.save)
    assert not io.tick(safety + 1, 10**6, {"time/step": 0.001}).stop
    notices.append((299.5, "node x is being drained"))  # no news: both were asked a moment apart
    notices.append((0.5, "node x is being drained"))
    ticks_until(io, safety + 2, lambda signal: signal.stop)


@pytest.mark.parametrize("fails", [False, True])
def test_a_rank_that_hangs_ends_even_where_its_stacks_cannot_be_stored(world, monkeypatch, fails):
    codes = []
    monkeypatch.setattr(stageio.os, "_exit", codes.append)
    monkeypatch.setattr(stageio, "OTHERS_S", 0.0)
    io = world.attempt()
    if fails:
        monkeypatch.setattr(world.store, "put", lambda *_: (_ for _ in ()).throw(StorageTransient("away")))
        with pytest.raises(StorageTransient):
            io.hung("where it stood")
    else:
        io.hung("where it stood")
        assert world.logs().endswith("where it stood")
    assert codes == [stageio.HUNG_EXIT_CODE] and not io.scratch.exists()


def test_the_ledger_tells_where_an_attempt_started(world):
    io = world.attempt()
    io.tick(31, 100, {"time/step": 0.001})
    until = time.monotonic() + 60
    while not (started := [e.fields for e in world.ledger.entries() if e.type == "started"]):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert started == [{"step": 30}]


def test_a_store_that_does_not_answer_holds_no_step(world, monkeypatch):
    """What is kept meanwhile is written once it answers again."""
    io, original = world.attempt(), world.store.put
    monkeypatch.setattr(world.store, "put", lambda *_, **__: (_ for _ in ()).throw(StorageTransient("away")))
    for step in range(1, 101):
        io.tick(step, 100, {"time/step": 0.001})
        time.sleep(0.005)
    monkeypatch.setattr(world.store, "put", original)
    io.close()
    assert len(read_metrics(world.store, P)) == 100


def test_where_an_attempt_runs_is_noted_beside_it_and_its_start_waits_for_nothing(world, monkeypatch):
    io, put, away = world.attempt(), world.store.put, threading.Event()

    def slow(*rest, **more):
        away.wait(10)
        put(*rest, **more)

    monkeypatch.setattr(world.store, "put", slow)
    io.ran_on([{"ray.io/market-type": "spot"}, {}])
    assert read_places(world.store, P) == {}, "it waited until the store took the note"
    away.set()
    io.close()
    assert read_places(world.store, P) == {io.task.token: Places(1, 0, ({"ray.io/market-type": "spot"}, {}))}


def test_a_store_that_takes_no_note_of_places_ends_nothing(world, monkeypatch, caplog):
    io = world.attempt()
    with monkeypatch.context() as patch:
        patch.setattr(world.store, "put", lambda *_, **__: (_ for _ in ()).throw(StorageTransient("away")))
        io.ran_on([{}])
        io._placing.join(10)
    io.close()
    assert "its cost stays unknown: away" in caplog.text and read_places(world.store, P) == {}


def test_stopping_is_told_as_preempted(world):
    with pytest.raises(Preempted, match="after step 7"):
        world.attempt().stopped(7)
    with pytest.raises(Preempted, match=r"^saved and stopped after step 7$"):
        world.attempt(rank=1, world=2).stopped(7)


def test_map_runs_on_what_the_driver_gives(world):
    io = world.attempt(kind="prepare", mapper=lambda function, items, resources: map(function, items))
    assert list(io.map(str, [1, 2])) == ["1", "2"]
    with pytest.raises(AssertionError, match="maps nothing"):
        world.attempt().map(str, [1])


def test_the_drivers_part_of_a_training_stage_logs_apart_from_its_workers(world):
    world.attempt(mapper=map).log("planned")
    assert list(read_logs(world.store, P)) == ["e0001a0001-0plan.log"]


def test_close_leaves_no_scratch_behind(world):
    io = world.attempt()
    (io.scratch / "file").write_bytes(b"1")
    io.close()
    assert not io.scratch.exists()
