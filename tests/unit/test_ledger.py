"""The ledger under races, zombies, lost answers and kills; and whether an owner is still there."""

import json
import os
import random
import subprocess
import sys
import threading
import time as time_module

import pytest

from modeling.errors import UserError
from orchestrator import liveness
from orchestrator.errors import ErrorClass, Fenced
from orchestrator.ledger import Ledger, StageState, state
from orchestrator.store import FileStore, MemoryStore

P = "stages/train/0123456789abcdef"
ME = {"host": "h", "pid": 1}


def ledger(store) -> Ledger:
    return Ledger(store, P, clock=lambda: 1.0)


def test_the_life_of_a_stage():
    store = MemoryStore()
    one = ledger(store)
    assert one.state() == StageState()
    token = one.claim(ME)
    assert (token, one.state().status, one.state().owner) == ((1, 0), "claimed", ME)
    token = one.start_attempt(token, workers=2)
    for step in (10, 20, 30):
        one.append("checkpoint", token, step=step, manifest=f"m{step}", train_s=1.0)
    one.append("retired", token, step=10, manifest="m10")
    one.append("failed", token, error_class=ErrorClass.lost_node, message="gone", step=34)
    now = ledger(store).state()
    assert (now.status, now.token, now.attempts, now.furthest) == ("failed", (1, 1), 1, 30)
    assert [(c.step, c.manifest) for c in now.checkpoints] == [(30, "m30"), (20, "m20")]
    assert [(f.error_class, f.message, f.step, f.reached) for f in now.failures] == [
        (ErrorClass.lost_node, "gone", 30, 34)
    ]
    token = one.start_attempt(token, workers=1)
    assert token == (1, 2) and one.state().status == "running"
    one.append("completed", token, manifest={"folder": "r"}, summary={"loss": 1}, train_s=2.0)
    done = ledger(store).state()
    assert done.status == "completed"
    assert done.completed == {"manifest": {"folder": "r"}, "summary": {"loss": 1}, "train_s": 2.0}
    assert one.state() == done == state(one.entries()), "folded as it is read, or at once"
    assert store.list() == [f"{P}/ledger/{n:08d}.json" for n in range(9)]


def test_budgets_count_since_progress():
    one = ledger(MemoryStore())
    token = one.start_attempt(one.claim(ME), 1)
    one.append("failed", token, error_class="hang", message="", step=0)
    one.append("checkpoint", token, step=10, manifest="a", train_s=1.0)
    one.append("failed", token, error_class="lost_node", message="", step=0)
    one.append("checkpoint", token, step=10, manifest="b", train_s=1.0)  # the same step again is no progress
    one.append("preempted", token, step=12, reason="asked to stop")
    assert one.state().since_progress == (ErrorClass.lost_node, ErrorClass.preempted)
    assert len(one.state().failures) == 3


def test_a_driver_that_lost_its_claim_commits_nothing():
    store = MemoryStore()
    old, new = ledger(store), ledger(store)
    before = old.start_attempt(old.claim(ME), 1)
    after = new.claim({"host": "other"})
    assert after == (2, 0)
    count = len(store.list())
    for act in (
        lambda: old.append("checkpoint", before, step=1, manifest="m", train_s=1.0),
        lambda: old.append("completed", before, manifest={}, summary={}, train_s=1.0),
        lambda: old.start_attempt(before, 1),
        lambda: old.check(before),
    ):
        with pytest.raises(Fenced):
            act()
    assert len(store.list()) == count
    new.check(after)


def test_a_worker_of_an_earlier_attempt_is_fenced_too():
    store = MemoryStore()
    driver, zombie = ledger(store), ledger(store)
    first = driver.start_attempt(driver.claim(ME), 2)
    second = driver.start_attempt(first, 1)
    with pytest.raises(Fenced):
        zombie.append("checkpoint", first, step=1, manifest="m", train_s=1.0)
    ledger(store).append("checkpoint", second, step=1, manifest="n", train_s=1.0)


def test_a_completed_stage_is_neither_claimed_nor_attempted_again():
    store = MemoryStore()
    driver, worker, other = ledger(store), ledger(store), ledger(store)
    token = driver.start_attempt(driver.claim(ME), 1)
    worker.append("completed", token, manifest={}, summary={}, train_s=1.0)  # its driver has given it up meanwhile
    for act in (lambda: driver.start_attempt(token, 1), lambda: other.claim({"host": "other"})):
        with pytest.raises(Fenced, match="completed"):
            act()
    assert len(store.list()) == 3


def test_an_entry_with_a_lower_token_is_void():
    store = MemoryStore()
    one = ledger(store)
    token = one.start_attempt(one.claim(ME), 1)
    one.claim(ME)
    body = {
        "version": 1,
        "type": "checkpoint",
        "token": list(token),
        "nonce": "x",
        "time": 0,
        "step": 5,
        "manifest": "m",
    }
    store.put(f"{P}/ledger/00000003.json", json.dumps(body).encode())  # as a broken writer would
    assert ledger(store).state().checkpoints == () and len(ledger(store).entries()) == 4


def test_of_two_claims_at_once_one_wins():
    store = MemoryStore()
    first, second = ledger(store), ledger(store)
    second.entries()

    class Between:
        """Lets the other claim in after this one has read the ledger and before it writes."""

        def __getattr__(self, name):
            return getattr(store, name)

        def put(self, key, data, create=False):
            if not store.list():
                first.claim(ME)
            store.put(key, data, create)

    second.store = Between()
    with pytest.raises(Fenced, match="claimed it first"):
        second.claim({"host": "late"})
    assert first.state().owner == ME and len(store.list()) == 1


class Flaky:
    """A store whose puts fail without an answer, before or after they took effect."""

    def __init__(self, store, rng):
        self.store, self.rng = store, rng

    def __getattr__(self, name):
        return getattr(self.store, name)

    def put(self, key, data, create=False):
        fate = self.rng.random()
        if fate < 0.2:
            raise TimeoutError("before")
        self.store.put(key, data, create)
        if fate > 0.8:
            raise ConnectionError("after")


def test_a_put_without_an_answer_is_recognised():
    for seed in range(50):
        store = MemoryStore()
        one = Ledger(Flaky(store, random.Random(seed)), P)
        try:
            token = one.start_attempt(one.claim(ME), 1)
            for step in range(1, 6):
                one.append("checkpoint", token, step=step, manifest=str(step), train_s=1.0)
        except (TimeoutError, ConnectionError):
            continue  # three failures in a row: the caller's policy decides
        steps = [c.step for c in ledger(store).state().checkpoints]
        assert steps == [5, 4, 3, 2, 1] and len(store.list()) == 7


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"version": 1, "ty', "Unterminated string"),
        (b"[]", "damaged"),
        (b"", "Expecting value"),
        (b'{"version": 2}', "KeyError('type')"),
        (b'{"version": 9, "type": "danced", "token": [-1, 0], "nonce": "x", "time": 0}', "token"),
        (b'{"version": 1, "type": "claimed", "token": [1, 0], "nonce": "x", "time": 0}', "damaged"),
        (b'{"version": 1, "type": "danced", "token": [1, 0], "nonce": "x", "time": 0}', "damaged"),
        (b'{"version": 1, "type": "preempted", "token": [1, "0"], "nonce": "x", "time": 0}', "damaged"),
    ],
)
def test_an_entry_that_cannot_be_read_is_named(tmp_path, content, expected):
    store = FileStore(tmp_path)
    store.put(f"{P}/ledger/00000000.json", content)
    with pytest.raises(UserError) as caught:
        ledger(store).state()
    assert expected in str(caught.value) and f"{P}/ledger/00000000.json" in str(caught.value)


def written(store, number, version, kind, token, **fields):
    body = {"version": version, "type": kind, "token": token, "nonce": "x", "time": 0.0, **fields}
    store.put(f"{P}/ledger/{number:08d}.json", json.dumps(body).encode())


def test_entries_of_version_1_are_read():
    store = MemoryStore()
    written(store, 0, 1, "claimed", [1, 0], owner=ME)
    written(store, 1, 1, "attempt", [1, 1], workers=1)
    written(store, 2, 1, "checkpoint", [1, 1], step=5, manifest="m")
    written(store, 3, 1, "preempted", [1, 1])
    now = ledger(store).state()
    assert now.checkpoints[0].train_s == 0.0 and now.failures[0].message == "asked to stop"
    assert now.endings == {"preempted": 1}


def test_how_attempts_ended_tells_notices_growth_and_stops_apart():
    one = ledger(MemoryStore())
    token = one.claim(ME)
    for origin in ({"origin": "grown"}, {"origin": "asked"}, {"origin": "asked"}, {"origin": "notice"}, {}):
        token = one.start_attempt(token, 1)
        one.append("preempted", token, step=1, reason="", **origin)
    one.append("failed", one.start_attempt(token, 1), error_class="hang", message="", step=1)
    now = ledger(one.store).state()
    assert now.endings == {"grown": 1, "stopped": 2, "preempted": 2, "hang": 1}
    assert now.since_progress[:5] == (ErrorClass.preempted,) * 5, "for what follows they are all the same"
    with pytest.raises(AssertionError):
        one.append("preempted", token, step=1, origin="asked")  # without a reason


def test_the_process_that_claimed_a_stage_knows_it():
    one, me = ledger(MemoryStore()), liveness.owner()
    assert not one.state().owned_by(me)
    one.claim(me)
    assert one.state().owned_by(liveness.owner()), "its nonce is another at every call"
    assert not one.state().owned_by({**me, "pid": me["pid"] + 1}) and not one.state().owned_by({**me, "host": "h"})
    one.claim(ME)
    assert not one.state().owned_by(me)


def test_an_entry_of_a_newer_version_fences_and_is_told(caplog):
    store = MemoryStore()
    one = ledger(store)
    token = one.start_attempt(one.claim(ME), 1)
    written(store, 2, 9, "danced", [2, 0], tune="x")
    with pytest.raises(Fenced):
        one.append("checkpoint", token, step=1, manifest="m", train_s=1.0)
    assert one.state().token == (2, 0) and one.entries()[2].type == "unknown"
    assert "version 9" in caplog.text and "install the newer Stageline" in caplog.text
    assert one.claim(ME) == (3, 0)


def test_reading_is_incremental():
    store, gets = MemoryStore(), []

    class Counting:
        def __getattr__(self, name):
            return getattr(store, name)

        def get_run(self, keys):
            gets.append(keys)
            return store.get_run(keys)

    writer, reader = ledger(store), Ledger(Counting(), P)
    writer.claim(ME)
    reader.state()
    gets.clear()
    reader.state()
    assert gets == [[f"{P}/ledger/00000001.json"]]
    assert reader.beside().seen == reader.seen == writer.entries()
    token = writer.start_attempt((1, 0), 1)
    for step in range(1000):
        writer.append("started", token, step=step)
    gets.clear()
    assert len(reader.entries()) == 1002, "one that is far behind asks for many at once"
    assert len(gets) < 30 and sorted(key for keys in gets for key in keys) == [key for keys in gets for key in keys]


def test_this_process_is_alive_and_a_finished_one_is_not():
    assert liveness.alive(liveness.owner()) is True
    assert liveness.alive({**liveness.owner(), "started": 0.0}) is False, "the pid was given to another process"
    code = "import json; from orchestrator.liveness import owner; print(json.dumps(owner()))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    gone = json.loads(out.stdout)
    assert gone["pid"] != os.getpid() and liveness.alive(gone) is False
    assert liveness.alive({**gone, "host": "elsewhere"}) is None


class Time:
    """A clock that moves only in sleep(); `during` runs at each."""

    def __init__(self, during=lambda: None):
        self.now, self.during = 0.0, during

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.during()


AWAY = {"host": "elsewhere", "namespace": "", "pid": 1, "started": 0.0}


def dead(store, who, time, timeout=30.0):
    return liveness.presumed_dead(store, P, 1, who, timeout, time.clock, time.sleep)


def test_an_owner_on_this_host_that_is_gone_is_judged_at_once():
    time = Time()
    assert dead(MemoryStore(), {**liveness.owner(), "started": 0.0}, time) is True
    assert time.now == 0.0


def test_an_owner_on_this_host_that_is_there_is_judged_by_its_counter():
    """It may be stopped (SIGSTOP)."""
    store, still, me = MemoryStore(), Time(), liveness.owner()
    assert dead(store, me, still) is True and still.now >= 30.0
    beat = liveness.Heartbeat(store, P, 1)
    assert dead(store, me, Time(beat._beat)) is False


def test_an_owner_elsewhere_is_judged_by_its_counter():
    store, still = MemoryStore(), Time()
    assert dead(store, AWAY, still) is True and still.now >= 30.0
    beat = liveness.Heartbeat(store, P, 1)
    moving = Time(beat._beat)
    assert dead(store, AWAY, moving) is False and moving.now < 30.0


def test_a_store_that_was_away_took_the_owners_beats_too():
    """The watcher may be the first whom the store answers again."""
    time = Time()
    beat, store = liveness.Heartbeat(MemoryStore(), P, 1), MemoryStore()
    beat.store = store
    beat._beat()

    class Away:
        def get(self, key):
            if 5 < time.now < 100:
                time.now += 120.0  # of patience
            return store.get(key)

    def owner_beats_later():
        if time.now > 130:
            beat._beat()

    time.during = owner_beats_later
    assert liveness.presumed_dead(Away(), P, 1, AWAY, 30.0, time.clock, time.sleep) is False


def test_a_full_disk_for_a_moment_ends_no_heartbeat(monkeypatch, caplog):
    store = MemoryStore()
    with liveness.Heartbeat(store, P, 1, interval=0.01) as beat:
        monkeypatch.setattr(store, "put", lambda *_: (_ for _ in ()).throw(UserError("no space is left")))
        before, until = beat.counter, time_module.monotonic() + 60
        while beat.counter < before + 3:
            assert time_module.monotonic() < until
            threading.Event().wait(0.01)
        monkeypatch.undo()
        assert "no space is left" in caplog.text
        first = store.get(f"{P}/heartbeat/1.json")
        until = time_module.monotonic() + 60
        while store.get(f"{P}/heartbeat/1.json") == first:
            assert time_module.monotonic() < until
            threading.Event().wait(0.01)


def test_a_heartbeat_moves_and_signs_off(tmp_path):
    store, time = FileStore(tmp_path), Time()
    with liveness.Heartbeat(store, P, 1, interval=0.005) as beat:
        until = time_module.monotonic() + 60
        while beat.counter < 4:
            assert time_module.monotonic() < until
            time_module.sleep(0.005)
    assert dead(store, AWAY, time) is True and time.now == 0.0
    assert dead(store, liveness.owner(), time) is True, "this process runs on, but no longer for this stage"


def test_a_heartbeat_survives_a_store_that_fails(caplog):
    class Failing(MemoryStore):
        def put(self, key, data, create=False):
            raise TimeoutError("slow")

    liveness.Heartbeat(Failing(), P, 1)._beat()
    assert "not written" in caplog.text
