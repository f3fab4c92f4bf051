"""Trackers beside a stage: what they are told, once each, whatever ends or fails."""

import json
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboardX.proto import event_pb2

from modeling.errors import UserError
from orchestrator.ledger import Ledger
from orchestrator.liveness import owner
from orchestrator.progress import Recorder, read_metrics
from orchestrator.store import MemoryStore
from orchestrator.tracking import follow, tensorboard, wandb_run
from orchestrator.tracking.about import About
from orchestrator.tracking.follow import Follower, unfinished
from orchestrator.tracking.params import TensorBoardParams, TrackingParams, WandbParams
from orchestrator.tracking.place import place
from orchestrator.tracking.rows import flat, numbers, rows_after
from orchestrator.tracking.tensorboard import TensorBoardRun

P = "stages/train/0123456789abcdef"
BOARD = "experiments/exp/tensorboard/stage/0123456789abcdef-a1b2c3"


def record(store, token, first, last, every=3):
    recorder = Recorder(store, P, token)
    for step in range(first, last + 1):
        recorder.row(step, 100, {"loss": 1 / step})
        if step % every == 0:
            recorder.flush()
    recorder.flush()


# -- rows ------------------------------------------------------------------------------------------------

lives = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 4), st.booleans()), min_size=1, max_size=6)


@settings(max_examples=60)
@given(lives, st.integers(0, 20))
def test_the_rows_after_a_step_are_those_of_the_surviving_lineage(attempts, step):
    store, committed = MemoryStore(), 0
    for number, (length, every, flushed) in enumerate(attempts, 1):
        recorder = Recorder(store, P, (1, number))
        for at in range(committed + 1, committed + length + 1):
            recorder.row(at, 1000, {"by": number})
            if (at - committed) % every == 0:
                recorder.flush()
        if flushed:
            recorder.flush()
        committed += length // every * every
    assert rows_after(store, P, step) == [row for row in read_metrics(store, P) if row["step"] > step]


def test_only_segments_that_can_hold_new_rows_are_read(monkeypatch):
    store, read = MemoryStore(), []
    record(store, (1, 1), 1, 30)
    monkeypatch.setattr(store, "get", lambda key, get=store.get: read.append(key) or get(key))
    assert [row["step"] for row in rows_after(store, P, 28)] == [29, 30]
    assert len(read) == 1


def test_what_can_be_plotted():
    row = {"step": 3, "attempt": "e0001a0001", "loss": 1.5, "grad_norm": None, "data/packs": [0, 8], "epoch": 0,
           "data/checksum": 99, "mfu": float("nan")}  # fmt: skip
    assert numbers(row) == {"loss": 1.5, "epoch": 0}
    summary = {"stage": "a", "tables": {"direct": {"digit": {"accuracy": 0.5, "n": 4}}}, "sets": ["x"], "done": True}
    assert flat(summary) == {"tables/direct/digit/accuracy": 0.5, "tables/direct/digit/n": 4}


# -- following a stage -------------------------------------------------------------------------------------


class Fake:
    """A tracker in memory that keeps what it was told; fails where `trouble` says so."""

    name = "fake"

    def __init__(self, about, kept, trouble):
        self.about, self.kept, self.trouble = about, kept, trouble
        self.last, self.moved = 0, ""

    def open(self):
        self.trouble("open")
        self.last = self.kept[-1] if self.kept else 0

    def log(self, rows):
        for row in rows:
            self.trouble("log")
            self.kept.append(row["step"])
            self.last = row["step"]

    def finish(self, done):
        self.trouble("finish")
        self.kept.append("done" if done else "ended")


class Scene:
    """A stage in storage, and a follower of it with a fake tracker."""

    def __init__(self, look_s=0.02):
        self.store, self.kept, self.events, self.failing = MemoryStore(), [], [], set()
        self.ledger, self.look_s = Ledger(self.store, P), look_s

    def trouble(self, what):
        if what in self.failing:
            raise RuntimeError(f"no {what}")

    def follow(self, ours=False, base="train"):
        stage = SimpleNamespace(name="s", kind=SimpleNamespace(base=base))
        makers = [lambda about: Fake(about, self.kept, self.trouble)]
        told = lambda name, message: self.events.append(message)  # noqa: E731
        return Follower(self.store, P, stage, makers, told, self.look_s, lambda nonce: nonce, ours)  # pyright: ignore

    def complete(self, token):
        self.ledger.append("completed", token, manifest={}, summary={"tables": {"x": 1}}, train_s=1.0)


@pytest.fixture
def scene(monkeypatch):
    monkeypatch.setattr(follow, "RETRY_S", 0.05)
    return Scene()


def until(holds):
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.01)


def test_every_step_once_through_attempts_that_train_again(scene):
    token = scene.ledger.claim(owner())
    follower = scene.follow()
    time.sleep(0.1)
    assert not scene.kept, "nothing to tell yet"
    record(scene.store, (1, 1), 1, 20)
    until(lambda: scene.kept == list(range(1, 21)))
    record(scene.store, (1, 2), 11, 26)  # from the checkpoint of step 10
    until(lambda: scene.kept == list(range(1, 27)))
    record(scene.store, (1, 2), 27, 30)
    scene.complete(token)
    follower.end()
    assert follower.join(20)
    assert scene.kept == [*range(1, 31), "done"] and not scene.events
    assert not unfinished(scene.store, P)


def test_another_drivers_stage_is_left_to_that_driver(scene):
    token = scene.ledger.claim(owner() | {"pid": 1})
    record(scene.store, (1, 1), 1, 5)
    scene.complete(token)
    follower = scene.follow()
    follower.end()
    assert follower.join(20) and not scene.kept and not unfinished(scene.store, P)


def test_what_a_killed_driver_did_not_pass_on_the_next_one_does(scene):
    token = scene.ledger.claim(owner() | {"pid": 1})
    record(scene.store, (1, 1), 1, 5)
    scene.store.put(f"{P}/tracking/state.json", json.dumps({"finished": False}).encode())
    scene.kept += [1, 2, 3]
    scene.complete(token)
    assert unfinished(scene.store, P)
    follower = scene.follow(ours=True)
    follower.end()
    assert follower.join(20) and scene.kept == [1, 2, 3, 4, 5, "done"] and not unfinished(scene.store, P)


def test_rows_that_a_tracker_refused_are_left_to_the_next_driver(scene):
    token = scene.ledger.claim(owner())
    record(scene.store, (1, 1), 1, 5)
    follower = scene.follow()
    until(lambda: scene.kept == [1, 2, 3, 4, 5])
    scene.failing.add("log")
    record(scene.store, (1, 1), 6, 9)
    scene.complete(token)
    follower.end()
    assert follower.join(20) and scene.kept == [1, 2, 3, 4, 5, "done"]
    assert unfinished(scene.store, P)
    scene.failing.clear()
    scene.kept.pop()
    again = scene.follow(ours=True)
    again.end()
    assert again.join(20) and scene.kept == [*range(1, 10), "done"] and not unfinished(scene.store, P)


@pytest.mark.parametrize("what", ["open", "log", "finish"])
def test_a_tracker_in_trouble_is_told_once_and_tried_again(scene, what):
    token = scene.ledger.claim(owner())
    record(scene.store, (1, 1), 1, 5)
    scene.failing.add(what)
    follower = scene.follow()
    until(lambda: scene.events or what == "finish")
    time.sleep(0.2)
    if what != "finish":
        scene.failing.clear()
        until(lambda: scene.kept == [1, 2, 3, 4, 5])
    scene.complete(token)
    follower.end()
    assert follower.join(20)
    assert scene.events == [f"tracking does not reach fake, the stage goes on: RuntimeError: no {what}"]
    assert unfinished(scene.store, P) == (what == "finish")


def test_storage_in_trouble_is_waited_for(scene, monkeypatch):
    token = scene.ledger.claim(owner())
    record(scene.store, (1, 1), 1, 5)
    original = scene.store.list
    monkeypatch.setattr(scene.store, "list", lambda *_: (_ for _ in ()).throw(ConnectionError("away")))
    follower = scene.follow()
    until(lambda: scene.events)
    monkeypatch.setattr(scene.store, "list", original)
    until(lambda: scene.kept == [1, 2, 3, 4, 5])
    scene.complete(token)
    follower.end()
    assert follower.join(20) and scene.events == ["tracking does not reach storage, the stage goes on: away"]


def test_an_evaluation_is_one_row_of_its_summary(scene):
    token = scene.ledger.claim(owner())
    follower = scene.follow(base="evaluate")
    time.sleep(0.1)
    assert not scene.kept
    scene.complete(token)
    follower.end()
    assert follower.join(20) and scene.kept == [1, "done"]


# -- TensorBoard -------------------------------------------------------------------------------------------


def about(store, run="0123456789abcdef-a1b2c3"):
    return About(run, "exp", "stage", "train", {"lr": 1.0}, store, P, lambda folder: [])


def events(folder):
    (file,) = folder.glob("events.out.tfevents.*")
    data, at = file.read_bytes(), 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        yield event_pb2.Event.FromString(data[at + 12 : at + 12 + size])  # pyright: ignore
        at += 12 + size + 4


def test_a_driver_that_begins_writes_tensorboards_run_anew(tmp_path):
    params, store = TensorBoardParams(folder=str(tmp_path)), MemoryStore()
    for last in (3, 6):
        run = TensorBoardRun(params, about(store))
        run.open()
        assert run.last == 0
        run.log([{"step": step, "loss": 1 / step, "attempt": "x"} for step in range(1, last + 1)])
        assert run.last == last
        if last == 3:  # killed in the middle of a record
            run._writer.flush()
            (file,) = run.folder.glob("events*")
            file.write_bytes(file.read_bytes()[:-5])
            store.put_file(f"{BOARD}/{file.name}", file)
            time.sleep(1.1)  # another second, another name
        else:
            run.finish(True)
    found = list(events(tmp_path / "stage" / "0123456789abcdef-a1b2c3"))
    steps = [(its.step, its.summary.value[0].simple_value) for its in found if its.HasField("summary")]
    assert steps == [(step, pytest.approx(1 / step)) for step in range(1, 7)]
    assert [its.step for its in found if its.HasField("session_log")] == [1], "purges what TensorBoard has read"
    (file,) = (tmp_path / "stage" / "0123456789abcdef-a1b2c3").iterdir()
    assert store.list(f"{BOARD}/") == [f"{BOARD}/{file.name}"], "the older one is replaced in storage, too"
    assert store.get(f"{BOARD}/{file.name}") == file.read_bytes()


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp" / f"stageline-tracking-{os.getuid()}"


@pytest.mark.parametrize("wanted", ["/proc/boards", "/dev/null/boards"])
def test_event_files_are_elsewhere_where_the_folder_cannot_be_written(wanted, temporary, scene, tmp_path):
    """As beside an experiment in a ConfigMap of Kubernetes."""
    token = scene.ledger.claim(owner())
    record(scene.store, (1, 1), 1, 3)
    make = lambda _: TensorBoardRun(TensorBoardParams(folder=wanted), about(scene.store))  # noqa: E731
    stage = SimpleNamespace(name="stage", kind=SimpleNamespace(base="train"))
    told = lambda name, message: scene.events.append(message)  # noqa: E731
    follower = Follower(scene.store, P, stage, [make], told, 0.02, lambda nonce: nonce, False)  # pyright: ignore
    scene.complete(token)
    follower.end()
    assert follower.join(20) and not unfinished(scene.store, P)
    own = temporary / "exp"
    assert scene.events == [f"event files of TensorBoard are in {own}, and in storage when the stage is over"]
    steps = [its.step for its in events(own / "stage" / "0123456789abcdef-a1b2c3") if its.HasField("summary")]
    assert steps == [1, 2, 3] and len(scene.store.list(f"{BOARD}/")) == 1


def test_files_of_a_submitted_job_are_not_in_its_bundle(temporary, tmp_path, monkeypatch):
    """Which Ray removes with the job; a folder that all machines see is kept."""
    bundle = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    bundle.mkdir(parents=True)
    monkeypatch.chdir(bundle)
    asked = str(bundle / "tensorboard")
    assert place(asked, "exp") == Path(asked), "no job"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert place(asked, "exp") == temporary / "exp" == place(str(bundle), "exp")
    assert place(str(tmp_path / "shared"), "exp") == tmp_path / "shared"
    assert temporary.stat().st_mode & 0o777 == 0o700


# -- before any training -----------------------------------------------------------------------------------


def test_trackers_that_cannot_serve_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    online = TrackingParams(wandb=WandbParams())
    with pytest.raises(UserError, match=r"tracking.wandb: wandb has no key → .*WANDB_API_KEY"):
        follow.check(online)
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {'0' * 40}\n")
    (tmp_path / ".netrc").chmod(0o600)
    follow.check(online)
    monkeypatch.setattr(wandb_run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb is not installed → pip install 'stageline\[tracking\]'"):
        follow.check(TrackingParams(wandb=WandbParams(mode="offline")))
    with pytest.raises(UserError, match="a folder of this machine"):
        tensorboard.check(TensorBoardParams(folder="s3://bucket/boards"))


def test_folders_are_beside_the_experiment():
    params = TrackingParams(wandb=WandbParams(), tensorboard=TensorBoardParams(folder="boards"))
    found = params.located(lambda path: f"/exp/{path}")
    assert found.wandb and found.tensorboard
    assert (found.wandb.folder, found.tensorboard.folder) == ("/exp/.", "/exp/boards")
    assert TrackingParams().located(str) == TrackingParams()
