"""When the processes of the next stage are started: once, near the end of this attempt, where a stage follows."""

import pytest

from cluster.gcs import Unanswered
from orchestrator import ahead
from orchestrator.ahead import Ahead
from orchestrator.progress import Recorder
from orchestrator.stageio import Task
from orchestrator.store import open_store

P = "stages/train/0000000000000000"


class World:
    def __init__(self, folder, monkeypatch):
        self.url, self.environment, self.asked = str(folder / "storage"), folder / "environment", []
        self.environment.write_text('{"py_executable": "python"}')
        monkeypatch.setattr(ahead, "LOOK_S", 0.0)
        monkeypatch.setattr(Ahead, "_address", lambda self: ("127.0.0.1:1", "01000000"))
        monkeypatch.setattr(ahead, "start_idle", lambda *asked: self.asked.append(asked))

    def beside(self, followers=2) -> Ahead:
        task = Task(self.url, P, "mlp", "mlp_warmup", "0" * 64, None, None, {}, (), (1, 2), followers=followers)
        return Ahead(task, self.environment)

    def note(self, eta_s, token=(1, 2)):
        recorder = Recorder(open_store(self.url), P, token)
        recorder.row(5, 10, {})
        recorder._note["eta_s"] = eta_s
        recorder.flush()


@pytest.fixture
def world(tmp_path, monkeypatch):
    return World(tmp_path, monkeypatch)


def test_they_start_once_in_the_last_seconds(world):
    beside = world.beside()
    beside.look()
    world.note(None)
    beside.look()
    world.note(ahead.BEFORE_S + 1)
    beside.look()
    assert world.asked == []
    world.note(ahead.BEFORE_S - 1)
    beside.look()
    beside.look()
    environment = world.environment.read_text()
    assert world.asked == [("127.0.0.1:1", "01000000", environment, 2 + ahead.OF_RAY, ahead.KEEP_S)]


def test_none_start_where_no_training_stage_follows(world):
    world.note(1.0)
    world.beside(followers=0).look()
    assert world.asked == []


def test_the_note_of_an_earlier_attempt_says_nothing(world):
    world.note(1.0, token=(1, 1))
    world.beside().look()
    assert world.asked == []


def test_none_start_before_the_workers_environment_is_known(world):
    world.environment.unlink()
    world.note(1.0)
    beside = world.beside()
    beside.look()
    assert world.asked == [] and not beside.started


def test_a_raylet_that_does_not_answer_ends_nothing(world, monkeypatch, caplog):
    def refuse(*_):
        raise Unanswered("raylet at 127.0.0.1:1: gone")

    monkeypatch.setattr(ahead, "start_idle", refuse)
    world.note(1.0)
    world.beside().look()
    assert "the next stage will start slowly" in caplog.text
