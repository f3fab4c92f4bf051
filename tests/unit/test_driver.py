"""A stage from claim to result: what follows each kind of failure, and who may run it."""

from types import SimpleNamespace

import pytest

from modeling.errors import DataError, UserError
from orchestrator import driver, liveness
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
    monkeypatch.setattr(driver, "time", SimpleNamespace(sleep=slept.append))
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
        fields = {"manifest": {"folder": f"{task.prefix}/result", "files": []}, "summary": summary}
        Ledger(self.store, task.prefix).append("completed", task.token, **fields)

    def checkpoint(self, task, step):
        Ledger(self.store, task.prefix).append("checkpoint", task.token, step=step, manifest=f"m{step}")

    def run(self, *outcomes, name="a_data", **more):
        """outcomes: one per attempt: an exception to raise, or a function of the task; the last one completes."""
        todo = [*outcomes, self.complete]

        def attempt(task):
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
        ledger.append("failed", token, error_class="storage_transient", message="")
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


def test_a_living_driver_keeps_its_stage(world):
    world.ledger().claim(liveness.owner())
    with pytest.raises(UserError, match=r"another driver \(pid \d+ on .*\) is running this stage") as caught:
        world.run()
    assert caught.value.where == "stages.a_data" and world.tasks == []
    assert len(world.ledger().entries()) == 1, "nothing was written"


def test_a_dead_drivers_stage_is_taken_over(world):
    ledger = world.ledger()
    old = ledger.start_attempt(ledger.claim({**liveness.owner(), "started": 0.0}), 1)
    ledger.append("checkpoint", old, step=10, manifest="m10")
    world.run()
    assert world.tasks[0].token == (2, 1)
    with pytest.raises(Fenced):
        ledger.append("checkpoint", old, step=20, manifest="m20")
    assert [c.step for c in world.ledger().state().checkpoints] == [10], "its work is kept"


def test_a_driver_elsewhere_that_signed_off_is_followed_at_once(world):
    world.ledger().claim({"host": "elsewhere", "namespace": "", "pid": 1, "started": 0.0})
    with liveness.Heartbeat(world.store, world.plans["a_data"].prefix, 1):
        pass
    world.run()
    assert world.tasks[0].token == (2, 1)


def test_of_two_that_claim_at_once_one_is_told(world, monkeypatch):
    """Both watched the heartbeat of a dead one; this one is later to judge, and must not fence the first."""
    gone = {**liveness.owner(), "started": 0.0}
    world.ledger().claim(gone)

    def slow_to_judge(store, prefix, epoch, who):
        if who == gone:
            world.ledger().claim(liveness.owner())
        return liveness.presumed_dead(store, prefix, epoch, who)

    monkeypatch.setattr(driver, "presumed_dead", slow_to_judge)
    with pytest.raises(UserError, match="is running this stage"):
        world.run()
    assert world.ledger().state().token == (2, 0)


def test_a_stage_completed_while_watching_is_left_alone(world, monkeypatch):
    ledger = world.ledger()
    token = ledger.start_attempt(ledger.claim({**liveness.owner(), "started": 0.0}), 1)

    def completes(*_):
        world.ledger().append("completed", token, manifest={}, summary={})
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
    with pytest.raises(StageFailed) as caught:
        world.run(LostNode("its Ray was shut down"), stopping=lambda: True)
    assert caught.value.error_class is ErrorClass.preempted
    assert world.ledger().state().failures == () and len(world.tasks) == 1


def test_the_heartbeat_signs_off_when_the_stage_ends(world):
    world.run()
    prefix = world.plans["a_data"].prefix
    away = {"host": "elsewhere", "namespace": "", "pid": 1, "started": 0.0}
    assert liveness.presumed_dead(world.store, prefix, 1, away, sleep=lambda s: pytest.fail("it had to wait"))
