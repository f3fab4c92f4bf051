"""A stage from claim to result: what follows each kind of failure, and who may run it."""

import json
import time
from contextlib import contextmanager

import pytest

from modeling.errors import DataError, UserError
from orchestrator import attendant, driver, liveness
from orchestrator.attendant import Stop
from orchestrator.control import ask_to_stop, asked_to_stop, stacks_key
from orchestrator.driver import Job, StageFailed, run_stage
from orchestrator.errors import ErrorClass, Fenced, LostNode, Preempted, StorageTransient
from orchestrator.fingerprint import fingerprint, stage_identities
from orchestrator.ledger import Ledger
from orchestrator.plan import make_plan, read_mappings
from orchestrator.policy import Limits
from orchestrator.spec import load_spec
from orchestrator.store import MemoryStore

SPEC = """name: x
storage: runs
model: {vision: micro-vit, language: micro-qwen2}
data: {a: {meta: a.json}}
stages:
  a_data: {kind: prepare, data: a}
  mlp_warmup: {needs: [a_data], lr: 1e-3, global_batch: 4, steps: 10, resources: {workers: 2}, checkpoint: {keep: 5}}
"""


@pytest.fixture
def delays(monkeypatch):
    """What the driver would have slept."""
    slept = []
    monkeypatch.setattr(Stop, "wait", lambda self, seconds: slept.append(seconds))
    return slept


class World:
    def __init__(self, folder):
        (folder / "x.yaml").write_text(SPEC)
        self.store, self.experiment = MemoryStore(), load_spec(folder / "x.yaml")
        self.identities = stage_identities(self.experiment, lambda stage: {"sha": "1"})
        plans = make_plan(self.experiment, self.identities, self.store, {})
        self.plans = {item.name: item for item in plans}
        self.events, self.tasks = [], []

    def job(self, name) -> Job:
        stage, identity = self.experiment.stages[name], self.identities[name]
        parents = {need: self.plans[need].prefix for need in stage.params.needs}
        return Job(self.experiment, stage, identity, fingerprint(identity), self.plans[name].prefix, parents)

    def ledger(self, name="a_data") -> Ledger:
        return Ledger(self.store, self.plans[name].prefix)

    def complete(self, task, **summary):
        fields = {"manifest": {"folder": f"{task.prefix}/result", "files": []}, "summary": summary, "train_s": 1.0}
        Ledger(self.store, task.prefix).append("completed", task.token, **fields)

    def checkpoint(self, task, step):
        Ledger(self.store, task.prefix).append("checkpoint", task.token, step=step, manifest=f"m{step}", train_s=1.0)

    def run(self, *outcomes, name="a_data", **more):
        """outcomes: one per attempt: an exception to raise, or a function of the task; the last one completes."""
        todo = [*outcomes, self.complete]

        def attempt(task, stopping):
            self.tasks.append(task)
            outcome = todo.pop(0)
            if isinstance(outcome, BaseException):
                raise outcome
            outcome(task)

        run_stage(self.store, self.job(name), attempt, lambda *event: self.events.append(event), **more)


@pytest.fixture
def world(tmp_path, delays):
    return World(tmp_path)


def test_one_attempt_that_completes(world):
    world.run()
    state = world.ledger().state()
    assert (state.status, state.attempts, state.failures) == ("completed", 1, ())
    assert [entry.type for entry in world.ledger().entries()] == ["claimed", "attempt", "completed"]
    assert world.events == [] and liveness.alive(state.owner)
    assert set(read_mappings(world.store, "x")) == {"a_data"}
    world.run()
    assert len(world.tasks) == 1, "a completed stage is left alone"


def test_an_attempt_learns_what_it_needs(world):
    world.run()
    world.run(name="mlp_warmup")
    data, train = world.tasks
    assert (train.token, train.kind, train.keep, data.keep) == ((1, 1), "mlp_warmup", 5, 1)
    assert train.prefix == world.plans["mlp_warmup"].prefix and train.storage == world.store.url
    (parent,) = train.parents
    assert (parent.name, parent.kind, parent.folder) == ("a_data", "prepare", f"{data.prefix}/result")
    assert parent.fingerprint == data.prefix.rsplit("/", 1)[1] and parent.params["data"] == "a"
    attempts = [entry.fields for entry in world.ledger("mlp_warmup").entries() if entry.type == "attempt"]
    assert attempts == [{"workers": 2}]


def test_lost_nodes_and_preemptions_are_tried_again_at_once(world, delays):
    world.run(LostNode("gone"), Preempted("stopped"), LostNode("again"))
    assert delays == [0.0] * 3
    assert [task.token for task in world.tasks] == [(1, n) for n in (1, 2, 3, 4)]
    kinds = [entry.type for entry in world.ledger().entries() if entry.type != "attempt"]
    assert kinds == ["claimed", "failed", "preempted", "failed", "completed"]
    assert world.events[0] == ("a_data", "lost_node: gone; again in 0 s")


def test_a_storage_that_fails_is_given_time(world, delays):
    world.run(StorageTransient("slow down"), StorageTransient("slow down"))
    assert delays == sorted(delays) and delays[0] > 0 and delays[1] == 2 * delays[0]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DataError("bad", where="sample 3"), ErrorClass.data),
        (UserError("wrong"), ErrorClass.user),
        (MemoryError(), ErrorClass.out_of_memory),
        (KeyError("x"), ErrorClass.bug),
        (ValueError(" \n "), ErrorClass.bug),
    ],
)
def test_what_trying_again_cannot_help_ends_the_stage(world, delays, error, expected):
    with pytest.raises(StageFailed) as caught:
        world.run(error)
    assert (caught.value.error_class, caught.value.error, caught.value.stage) == (expected, error, "a_data")
    assert len(world.tasks) == 1 and delays == [] and caught.value.reason
    state = world.ledger().state()
    assert state.status == "failed" and state.failures[0].error_class is expected and state.failures[0].message
    (log,) = [key for key in world.store.list(world.plans["a_data"].prefix) if key.endswith("e0001a0001-error.log")]
    assert type(error).__name__ in world.store.get(log).decode()


def test_it_gives_up_where_nothing_moves(world, delays):
    limit = Limits().storage_retries
    with pytest.raises(StageFailed, match="storage_transient") as caught:
        world.run(*[StorageTransient("slow")] * (limit + 1))
    assert len(world.tasks) == limit + 1 and len(delays) == limit and "without progress" in caught.value.reason


def test_progress_gives_new_patience(world, delays):
    """A checkpoint further on than any before resets the budget, also that of earlier drivers."""
    limit = Limits().storage_retries

    def step(n):
        def run(task):
            world.checkpoint(task, n)
            raise StorageTransient("slow")

        return run

    world.run(*[StorageTransient("slow")] * limit, step(10), *[StorageTransient("slow")] * (limit - 1))
    assert len(world.tasks) == 2 * limit + 1


def test_budgets_survive_the_driver(world, delays):
    ledger = world.ledger()
    token = ledger.claim({**liveness.owner(), "started": 0.0})
    for _ in range(Limits().storage_retries):
        token = ledger.start_attempt(token, 1)
        ledger.append("failed", token, error_class="storage_transient", message="", step=0)
    with pytest.raises(StageFailed):
        world.run(StorageTransient("slow"))
    assert len(world.tasks) == 1


def test_completed_counts_although_the_attempt_raised(world):
    """A worker may abort at exit when all its work is committed."""

    def complete_and_die(task):
        world.complete(task)
        raise LostNode("aborted at exit")

    world.run(complete_and_die)
    assert len(world.tasks) == 1 and world.ledger().state().failures == ()


def test_an_attempt_without_a_result_is_a_failure(world):
    with pytest.raises(StageFailed, match="ended without a result"):
        world.run(lambda task: None)


def test_a_living_driver_keeps_its_stage_and_its_result_is_reused(world, monkeypatch):
    token = world.ledger().start_attempt(world.ledger().claim(liveness.owner()), 1)
    looks = []

    def looks_twice(*_, **__):
        looks.append(len(world.ledger().entries()))
        if len(looks) == 2:
            world.ledger().append("completed", token, manifest={}, summary={}, train_s=0.0)
        return False

    monkeypatch.setattr(driver, "presumed_dead", looks_twice)
    world.run()
    assert world.tasks == [] and looks == [2, 2], "nothing was written"
    (_, waiting), (_, reused) = world.events
    assert waiting.startswith("made by another driver (pid ") and reused == "completed by the other driver, reused"


def test_who_waits_for_another_driver_can_be_stopped(world, monkeypatch):
    world.ledger().claim(liveness.owner())
    stop = Stop()
    monkeypatch.setattr(driver, "presumed_dead", lambda *_, **__: stop.set())
    with pytest.raises(StageFailed) as caught:
        world.run(stop=stop)
    assert caught.value.error_class is ErrorClass.preempted and len(world.ledger().entries()) == 1


def test_a_dead_drivers_stage_is_taken_over(world):
    ledger = world.ledger()
    old = ledger.start_attempt(ledger.claim({**liveness.owner(), "started": 0.0}), 1)
    ledger.append("checkpoint", old, step=10, manifest="m10", train_s=1.0)
    world.run()
    assert world.tasks[0].token == (2, 1)
    with pytest.raises(Fenced):
        ledger.append("checkpoint", old, step=20, manifest="m20", train_s=1.0)
    state = world.ledger().state()
    assert [c.step for c in state.checkpoints] == [10], "its work is kept"
    assert [(f.error_class, f.message) for f in state.failures] == [(ErrorClass.lost_node, "its driver was lost")]


def test_a_driver_elsewhere_that_signed_off_is_followed_at_once(world):
    world.ledger().claim({"host": "elsewhere", "namespace": "", "pid": 1, "started": 0.0})
    with liveness.Heartbeat(world.store, world.plans["a_data"].prefix, 1):
        pass
    world.run()
    assert world.tasks[0].token == (2, 1)


def test_of_two_that_claim_at_once_one_waits(world, monkeypatch):
    """Both watched the heartbeat of a dead one; this one is later to judge, and must not fence the first."""
    gone = {**liveness.owner(), "started": 0.0}
    world.ledger().claim(gone)

    def slow_to_judge(store, prefix, epoch, who, stop):
        if who == gone:
            world.ledger().claim(liveness.owner())
            return True
        ledger = world.ledger()
        assert ledger.state().token == (2, 0)
        ledger.append("completed", (2, 0), manifest={}, summary={}, train_s=0.0)
        return False

    monkeypatch.setattr(driver, "presumed_dead", slow_to_judge)
    world.run()
    assert world.tasks == [] and "made by another driver" in world.events[0][1]


def test_a_stage_completed_while_watching_is_left_alone(world, monkeypatch):
    ledger = world.ledger()
    token = ledger.start_attempt(ledger.claim({**liveness.owner(), "started": 0.0}), 1)

    def completes(*_, **__):
        world.ledger().append("completed", token, manifest={}, summary={}, train_s=0.0)
        return True

    monkeypatch.setattr(driver, "presumed_dead", completes)
    world.run()
    assert world.tasks == []


@pytest.mark.parametrize("error", [Fenced("a higher token"), LostNode("its workers were stopped"), None])
def test_a_driver_that_was_taken_over_stops_and_writes_nothing(world, error):
    """However its attempt learns of it: fenced, killed, or not at all."""
    counts = []

    def taken_over(task):
        world.ledger().claim({"host": "other"})
        counts.append(len(world.ledger().entries()))
        if error is not None:
            raise error

    with pytest.raises(StageFailed) as caught:
        world.run(taken_over)
    assert caught.value.error_class is ErrorClass.fenced and "another driver" in caught.value.reason
    assert len(world.tasks) == 1 and [len(world.ledger().entries())] == counts


def test_a_driver_on_its_way_out_records_no_failure(world):
    stop = Stop()

    def shuts_down(task):
        stop.set()
        raise LostNode("its Ray was shut down")

    with pytest.raises(StageFailed) as caught:
        world.run(shuts_down, stop=stop)
    assert caught.value.error_class is ErrorClass.preempted
    assert world.ledger().state().failures == () and len(world.tasks) == 1


def test_a_request_to_stop_reaches_the_attempt_and_its_end_is_recorded(world, monkeypatch):
    """As rank 0 would: it finds the request, saves, and raises Preempted."""
    monkeypatch.setattr(attendant, "LOOK_S", 0.01)
    stop = Stop()
    stop.in_s, stop.reason = 7.0, "the driver got SIGTERM"
    world.run()

    def trains(task):
        stop.set()
        while (asked := asked_to_stop(world.store, task.prefix, task.token)) is None:
            time.sleep(0.005)
        note = {"token": list(task.token), "step": 41}
        world.store.put(f"{task.prefix}/progress.json", json.dumps(note).encode())
        raise Preempted(f"{asked[1]}, {asked[0]} s")

    with pytest.raises(StageFailed) as caught:
        world.run(trains, name="mlp_warmup", stop=stop)
    assert caught.value.error_class is ErrorClass.preempted
    (failure,) = world.ledger("mlp_warmup").state().failures
    assert (failure.error_class, failure.reached, failure.origin) == (ErrorClass.preempted, 41, "asked")
    assert failure.message == "the driver got SIGTERM, 7.0 s"


def test_the_size_of_an_attempt_is_what_there_is_room_for(world, monkeypatch, delays):
    monkeypatch.setattr(driver, "SETTLE_S", 0.0)
    experiment = load_spec(world.experiment.path, ["stages.mlp_warmup.resources.workers=[1,3]"])
    world.experiment = experiment
    world.run()
    rooms = [0, 2, 5]
    world.run(LostNode("a node went"), name="mlp_warmup", room=lambda resources: rooms.pop(0))
    assert [task.workers for task in world.tasks[1:]] == [2, 3]
    attempts = [e.fields["workers"] for e in world.ledger("mlp_warmup").entries() if e.type == "attempt"]
    assert attempts == [2, 3] and delays[0] == driver.LATE_LOOK_S, "it waits where not even the smallest fits"


def test_without_room_it_waits_and_tells_why_once(world, monkeypatch, delays):
    """A full cluster is not asked for what it cannot give: each attempt would cost a start that times out."""
    monkeypatch.setattr(driver, "TELL_S", 0.0)
    world.run()
    rooms, reasons = [1] * 9 + [2], ["held by others"] * 5 + ["a node left"] * 9
    world.run(name="mlp_warmup", room=lambda resources: rooms.pop(0), waits=lambda resources: reasons.pop(0))
    assert [task.workers for task in world.tasks[1:]] == [2]
    told = [message for name, message in world.events if name == "mlp_warmup"]
    assert told == ["queued: held by others", "queued: a node left", "there is room for 2 workers"]


def test_a_cluster_that_grows_on_demand_is_asked_for_the_most_and_no_longer_than_it_has_to(world, monkeypatch, delays):
    """While a stage waits, and while it runs with fewer than it may have."""
    monkeypatch.setattr(driver, "TELL_S", 0.0)
    monkeypatch.setattr(driver, "SETTLE_S", 0.0)
    world.experiment = load_spec(world.experiment.path, ["stages.mlp_warmup.resources.workers=[2,3]"])
    world.run()
    standing, rooms, seen = [], [0, 0, 2], []

    @contextmanager
    def wish(resources, together, more):
        standing.append((together, more))
        yield True
        standing.remove((together, more))

    def room(resources):
        seen.append(list(standing))
        return rooms.pop(0)

    def trains(task):
        seen.append(list(standing))
        world.complete(task)

    world.run(trains, name="mlp_warmup", room=room, wish=wish)
    assert world.tasks[-1].workers == 2 and standing == []
    assert seen == [[], [(2, 1)], [(2, 1)], [(0, 1)]]


def test_a_cluster_at_its_most_is_asked_once_it_may_start_machines_again(world, monkeypatch, delays):
    """It was full when the stage began to wait; then another's machines went."""
    monkeypatch.setattr(driver, "TELL_S", 0.0)
    monkeypatch.setattr(driver, "SETTLE_S", 0.0)
    world.run()
    may_start, asked, rooms = [False, False, True], [], [0] * 5 + [2]

    @contextmanager
    def wish(resources, together, more):
        asked.append(together)
        yield not may_start or may_start.pop(0)

    world.run(name="mlp_warmup", room=lambda resources: rooms.pop(0), wish=wish)
    waiting = [together for together in asked if together]
    assert waiting == [2, 2, 2], "at each look, until it heard"


def test_asked_to_stop_between_two_attempts_no_other_one_starts(world, monkeypatch):
    stop = Stop()
    monkeypatch.setattr(Stop, "wait", lambda self, seconds: self.set())
    with pytest.raises(StageFailed) as caught:
        world.run(LostNode("a node went"), stop=stop)
    assert caught.value.error_class is ErrorClass.preempted and len(world.tasks) == 1


def test_a_store_that_is_away_for_long_ends_no_stage(world, monkeypatch):
    """An upload gave up, and the driver has to wait for the same store before it can decide anything."""
    patience = []
    monkeypatch.setattr(driver, "with_patience", lambda store, seconds: patience.append(seconds) or store)
    world.run(StorageTransient("away"))
    assert min(patience) > 120.0 * 2, "longer than an upload has patience"
    assert world.ledger().state().completed is not None


def test_room_for_more_asks_the_attempt_to_stop(world, monkeypatch):
    monkeypatch.setattr(attendant, "LOOK_S", 0.01)
    monkeypatch.setattr(driver, "SETTLE_S", 0.0)
    world.experiment = load_spec(world.experiment.path, ["stages.mlp_warmup.resources.workers=[1,3]"])
    world.run()
    rooms = iter([1, 1, 0, 1, 1, 1])  # then 3: the attempt is over, all is free
    asked = []

    def trains(task):
        time.sleep(0.05)
        world.ledger("mlp_warmup").append("started", task.token, step=0)
        while not asked:
            if (request := asked_to_stop(world.store, task.prefix, task.token)) is not None:
                asked.append(request)
            time.sleep(0.005)
        raise Preempted(f"{asked[0][1]}: saved and stopped after step 1")

    world.run(trains, name="mlp_warmup", room=lambda resources: next(rooms, 3))
    assert asked == [(0.0, "room for 2 workers, 1 run")]
    assert world.ledger("mlp_warmup").state().endings == {"grown": 1}
    assert [task.workers for task in world.tasks[1:]] == [1, 3]


def test_a_notice_of_the_cluster_is_told_from_a_request_that_came_too_late(world, delays):
    def trains(task):
        ask_to_stop(world.store, task.prefix, task.token, 60.0, "the driver got SIGTERM")
        raise Preempted("node 10.0.0.7 is being drained: saved and stopped after step 3")

    world.run(trains, Preempted("node 10.0.0.8 is being drained: saved and stopped after step 5"))
    assert [failure.origin for failure in world.ledger().state().failures] == ["notice", "notice"]


def test_stacks_that_ranks_left_mean_that_it_hung(world, delays):
    def hangs(task):
        world.store.put(stacks_key(task.prefix, task.token, 1), b"where it stood")
        raise LostNode("exit code 86")

    world.run()
    world.run(hangs, name="mlp_warmup")
    (failure,) = world.ledger("mlp_warmup").state().failures
    assert failure.error_class is ErrorClass.hang and "stacks-rank00001.log" in failure.message and len(delays) == 1


def test_the_heartbeat_signs_off_when_the_stage_ends(world):
    world.run()
    prefix = world.plans["a_data"].prefix
    away = {"host": "elsewhere", "namespace": "", "pid": 1, "started": 0.0}
    assert liveness.presumed_dead(world.store, prefix, 1, away, sleep=lambda s: pytest.fail("it had to wait"))


def test_an_attempt_knows_how_large_a_training_stage_follows(world):
    world.run()
    world.run(name="mlp_warmup")
    assert {task.stage: task.followers for task in world.tasks} == {"a_data": 2, "mlp_warmup": 0}
