"""`stageline logs EXPERIMENT STAGE -f` ends: also where the driver was on another machine and is gone."""

import pytest

from orchestrator.cli import logs as module
from orchestrator.cli.main import main
from orchestrator.ledger import Ledger
from orchestrator.liveness import Heartbeat
from orchestrator.progress import Recorder
from orchestrator.store import MemoryStore

P = "stages/prepare/0123456789abcdef"
ELSEWHERE = {"host": "head-pod-1", "namespace": "x", "pid": 7, "started": 1.0, "nonce": "n"}
SPEC = """name: x
storage: runs
model: {vision: micro-vit, language: micro-qwen2}
data: {a: {meta: a.json}}
stages:
  a_data: {kind: prepare, data: a}
"""


@pytest.fixture
def world(tmp_path, monkeypatch):
    """(store, ledger, follow): follow() runs the command; its exit code."""
    store, path = MemoryStore(), tmp_path / "x.yaml"
    path.write_text(SPEC)
    monkeypatch.setattr(module, "reachable", lambda experiment: store)
    monkeypatch.setattr(module, "recorded", lambda experiment, store, stage: P)
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    monkeypatch.setattr(module, "QUIET_S", 0.3)
    return store, Ledger(store, P), lambda: main(["logs", str(path), "a_data", "-f"])


def test_of_a_driver_that_signed_off_elsewhere(world, capsys):
    """As after stageline cancel: the ledger says claimed."""
    store, ledger, follow = world
    token = ledger.start_attempt(ledger.claim(ELSEWHERE), 2)
    Recorder(store, P, token).log("the last line")
    with Heartbeat(store, P, token[0]):
        ledger.append("preempted", token, step=10, reason="cancelled by stageline cancel")
    module.QUIET_S = 1e9
    assert follow() == 0
    said = capsys.readouterr().out
    assert "the last line" in said and said.count("a_data is interrupted") == 1
    assert "its driver (pid 7 on head-pod-1) gives no sign of life" in said


def test_of_a_driver_that_was_lost_elsewhere(world, capsys):
    _, ledger, follow = world
    ledger.start_attempt(ledger.claim(ELSEWHERE), 2)
    assert follow() == 0
    assert "a_data is interrupted" in capsys.readouterr().out


def test_of_a_driver_that_lives_elsewhere_all_is_told_to_the_end(world, capsys, monkeypatch):
    store, ledger, follow = world
    monkeypatch.setattr(module, "QUIET_S", 30.0)
    token = ledger.start_attempt(ledger.claim(ELSEWHERE), 2)
    recorder, looks, sleep = Recorder(store, P, token), [], module.time.sleep

    def works(seconds):
        looks.append(seconds)
        recorder.log(f"line {len(looks)}")
        if len(looks) == 50:
            ledger.append("completed", token, manifest={}, summary={}, train_s=0.0)
        sleep(seconds)

    monkeypatch.setattr(module.time, "sleep", works)
    with Heartbeat(store, P, token[0], interval=0.02):
        assert follow() == 0
    said = capsys.readouterr().out
    assert "line 49" in said and "interrupted" not in said
