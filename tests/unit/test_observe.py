"""What metrics say of a stage, from ledgers and notes on a clock that the test moves; and when the store is away."""

import json
import time

import pytest

from cluster.monitoring.catalogue import FROM_ROW
from orchestrator.errors import StorageTransient
from orchestrator.ledger import Ledger
from orchestrator.liveness import owner
from orchestrator.observe import marker
from orchestrator.observe import meters as module
from orchestrator.observe.meters import Meters
from orchestrator.observe.readings import readings, sentence
from orchestrator.progress import Recorder, read_progress
from orchestrator.store import MemoryStore

P = "stages/train/0123456789abcdef"


class Stage:
    """A stage with its ledger and notes."""

    def __init__(self):
        self.now, self.store = 1000.0, MemoryStore()
        self.ledger = Ledger(self.store, P, clock=lambda: self.now)
        self.token = self.ledger.claim(owner())

    def attempt(self, workers):
        self.token = self.ledger.start_attempt(self.token, workers)
        self.recorder = Recorder(self.store, P, self.token)

    def train(self, steps, loss=2.0, **more):
        for step in steps:
            if step == steps[0]:
                self.ledger.append("started", self.token, step=step - 1)
            self.now += 1.0
            row = {"loss": loss, "time/step": 1.0, "time/data_wait": 0.25, "time/checkpoint_stall": 0.0, "tokens": 100}
            self.recorder.row(step, 100, row | more)
        self.recorder.flush()

    def checkpoint(self, step, train_s):
        self.ledger.append("checkpoint", self.token, step=step, manifest=f"{step}", train_s=train_s)

    @property
    def readings(self):
        return readings(self.ledger.entries(), read_progress(self.store, P), self.now)


@pytest.fixture
def stage():
    return Stage()


def test_a_running_attempt_tells_its_newest_step_and_the_sums_of_all(stage):
    stage.attempt(3)
    stage.train(range(1, 11), mfu=0.4)
    now = stage.readings
    assert now.gauges["stageline_step"] == 10 and now.gauges["stageline_steps"] == 100
    assert now.gauges["stageline_loss"] == 2.0 and now.gauges["stageline_mfu_ratio"] == 0.4
    assert now.gauges["stageline_workers"] == 3
    assert now.sums["stageline_training_seconds"] == 10.0 and now.sums["stageline_data_wait_seconds"] == 2.5
    assert now.sums["stageline_tokens"] == 1000


def test_one_line_says_how_far_it_is(stage):
    assert sentence(stage.readings) == ""
    stage.attempt(3)
    stage.train(range(1, 11))
    stage.checkpoint(10, 5.0)
    assert sentence(stage.readings) == "step 10 of 100  loss 2.0000  goodput 50.0%  checkpoint 10"


def test_what_is_not_known_is_not_told_as_zero(stage):
    stage.attempt(1)
    stage.train([1], loss=None)
    told = stage.readings.gauges
    assert "stageline_loss" not in told and "stageline_mfu_ratio" not in told and "stageline_eta_seconds" not in told
    assert "stageline_goodput_ratio" not in told and "stageline_checkpoint_step" not in told
    assert told["stageline_preemptions"] == 0 and set(stage.readings.failures.values()) == {0}


def test_a_stage_that_waits_after_a_preemption_tells_what_stays_and_no_loss(stage):
    stage.attempt(2)
    stage.train(range(1, 21))
    stage.checkpoint(20, 20.0)
    stage.ledger.append("preempted", stage.token, step=20, reason="a notice")
    stage.now += 20.0
    told = stage.readings.gauges
    assert not told.keys() & {*FROM_ROW, "stageline_eta_seconds"} and sentence(stage.readings) == ""
    assert told["stageline_step"] == 20 and told["stageline_steps"] == 100
    assert stage.readings.sums["stageline_tokens"] == 2000, "what came last is still counted"
    assert told["stageline_preemptions"] == 1 and told["stageline_checkpoint_step"] == 20
    assert told["stageline_goodput_ratio"] == pytest.approx(0.5) and "stageline_workers" not in told
    stage.attempt(1)  # the note is still the earlier attempt's
    told = stage.readings.gauges
    assert told["stageline_attempts"] == 2 and told["stageline_workers"] == 1
    assert "stageline_loss" not in told and stage.readings.sums == {}


def test_a_failed_attempt_tells_no_loss_while_the_next_one_is_put_off(stage):
    stage.attempt(2)
    stage.train(range(1, 11))
    stage.ledger.append("failed", stage.token, error_class="lost_node", message="gone", step=10)
    assert "stageline_loss" not in stage.readings.gauges and stage.readings.sums["stageline_tokens"] == 1000


def test_growth_and_a_stop_that_was_asked_for_are_no_preemptions(stage):
    for origin in ("grown", "asked", "notice"):
        stage.attempt(2)
        stage.ledger.append("preempted", stage.token, step=1, reason="", origin=origin)
    stage.attempt(2)
    stage.ledger.append("preempted", stage.token, step=1, reason="")  # as an earlier Stageline wrote it
    assert stage.readings.gauges["stageline_preemptions"] == 2


def test_failures_are_counted_by_class_and_their_lost_steps(stage):
    stage.attempt(2)
    stage.train(range(1, 16))
    stage.checkpoint(10, 10.0)
    stage.ledger.append("failed", stage.token, error_class="lost_node", message="gone", step=15)
    stage.attempt(1)
    stage.train(range(11, 13))
    now = stage.readings
    assert now.failures["lost_node"] == 1 and sum(now.failures.values()) == 1
    assert now.gauges["stageline_steps_lost"] == 5 and "preempted" not in now.failures
    assert now.sums["stageline_training_seconds"] == 2.0, "of this attempt"


def test_prepares_running_totals_are_not_summed(stage):
    stage.attempt(1)
    for done in (10, 20):
        stage.recorder.row(done, 30, {"samples": done, "tokens": 100 * done})
    stage.recorder.flush()
    assert stage.readings.sums == {} and stage.readings.gauges["stageline_step"] == 20


# -- the thread -------------------------------------------------------------------------------------------


class Meter:
    """In the place of Ray's Gauge and Counter."""

    def __init__(self):
        self.values, self.total = [], 0.0

    def set(self, value, tags):
        self.values.append((value, tags))

    def inc(self, value, tags):
        self.total += value


@pytest.fixture
def told(monkeypatch):
    """What would be told to Ray, by name."""
    found: dict = {}
    monkeypatch.setattr(module, "_meter", lambda name: found.setdefault(name, Meter()))
    monkeypatch.setattr(module, "dashboard_url", lambda: "http://127.0.0.1:8265")
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    monkeypatch.setattr(marker, "_start", lambda name: found.setdefault("actors", []).append(name))
    monkeypatch.setattr(module, "SAY_S", float("inf"))
    return found


def until(true):
    end = time.monotonic() + 10.0
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_counters_grow_by_what_is_new_over_two_attempts(stage, told):
    stage.attempt(1)
    with Meters(stage.store, P, "digits", "full_finetune", "train"):
        stage.train(range(1, 11))
        until(lambda: told.get("stageline_tokens") and told["stageline_tokens"].total == 1000)
        stage.train(range(11, 16))
        until(lambda: told["stageline_tokens"].total == 1500)
        stage.attempt(1)
        stage.train(range(11, 13))
    assert told["stageline_tokens"].total == 1700
    value, tags = told["stageline_step"].values[-1]
    assert value == 12 and tags == {"experiment": "digits", "stage": "full_finetune", "kind": "train"}
    assert told["actors"] == ["digits/full_finetune/e0001a0001", "digits/full_finetune/e0001a0002"]
    assert "stageline_checkpoint_stall_seconds" not in told, "a counter cannot grow by nothing"


def test_a_driver_that_waits_for_another_ones_result_tells_nothing(stage, told, monkeypatch):
    """Nor counts what the other one trains; once it has the stage itself, it counts what it trains."""
    stage.token = stage.ledger.claim({**owner(), "pid": 1})
    stage.attempt(1)
    stage.train(range(1, 11))
    read, looks = stage.store.get_run, []
    monkeypatch.setattr(stage.store, "get_run", lambda keys: looks.append(keys) or read(keys))
    with Meters(stage.store, P, "digits", "full_finetune", "train"):
        until(lambda: len(looks) > 5)
        assert told == {}
        stage.token = stage.ledger.claim(owner())
        stage.attempt(1)
        stage.train(range(5, 8))
        until(lambda: "stageline_tokens" in told)
    assert told["stageline_tokens"].total == 300 and told["actors"] == ["digits/full_finetune/e0003a0001"]


def test_a_store_that_is_away_costs_looks_and_ends_nothing(stage, told, monkeypatch):
    stage.attempt(1)
    stage.train([1])
    read, looks = stage.store.get_run, []

    def away(keys):
        looks.append(1)
        if len(looks) < 5:
            raise StorageTransient("SlowDown")
        return read(keys)

    monkeypatch.setattr(stage.store, "get_run", away)
    with Meters(stage.store, P, "digits", "full_finetune", "train"):
        until(lambda: "stageline_loss" in told)
    assert len(looks) >= 5


def test_without_a_dashboard_nothing_is_read(stage, told, monkeypatch):
    monkeypatch.setattr(module, "dashboard_url", lambda: "")
    monkeypatch.setattr(stage.store, "get_run", lambda keys: pytest.fail("read"))
    with Meters(stage.store, P, "digits", "full_finetune", "train"):
        time.sleep(0.05)
    assert told == {}


def test_the_note_is_json_that_older_readers_understand(stage):
    stage.attempt(1)
    stage.train([1])
    note = json.loads(stage.store.get(f"{P}/progress.json"))
    assert {"token", "step", "total", "eta_s", "row", "time"} <= set(note)
    del note["sums"]  # as an older Stageline wrote it
    assert readings(stage.ledger.entries(), note, stage.now).sums == {}
