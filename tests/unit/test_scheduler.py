"""The loop over stages: order, side by side within the resources, and what a failure blocks."""

import threading

import pytest

from modeling.errors import UserError
from orchestrator import scheduler
from orchestrator.placement import Machine
from orchestrator.scheduler import check_demand, run_all
from orchestrator.spec import load_spec

SPEC = """name: x
storage: runs
model: {vision: micro-vit, language: micro-qwen2}
data: {a: {meta: a.json}, b: {meta: b.json}}
stages:
  a_data: {kind: prepare, data: a}
  b_data: {kind: prepare, data: b}
  mlp_warmup: {needs: [a_data], lr: 1e-3, global_batch: 4, steps: 10, resources: {workers: 2}}
  eval_b: {kind: evaluate, needs: [b_data, mlp_warmup]}
  export: {needs: [mlp_warmup]}
"""
ALL = ["a_data", "b_data", "mlp_warmup", "eval_b", "export"]


@pytest.fixture(autouse=True)
def poll_often(monkeypatch):
    monkeypatch.setattr(scheduler, "POLL_S", 0.01)


@pytest.fixture
def spec(tmp_path):
    def load(*overrides):
        path = tmp_path / "x.yaml"
        path.write_text(SPEC)
        return load_spec(path, overrides)

    return load


class Runs:
    """start(name): records what starts and what is running then. `meet`: stages that wait for one another."""

    def __init__(self, fail=(), meet=()):
        self.fail, self.order, self.beside = fail, [], {}
        self.meet, self.barrier = set(meet), threading.Barrier(max(1, len(meet)))
        self.running, self.lock = set(), threading.Lock()

    def start(self, name):
        with self.lock:
            self.order.append(name)
            self.beside[name] = set(self.running)
            self.running.add(name)
        try:
            if name in self.meet:
                self.barrier.wait(timeout=60)
            if name in self.fail:
                raise RuntimeError(name)
        finally:
            with self.lock:
                self.running.discard(name)


def run(experiment, runs, done=(), cpus=8.0, watch=lambda running: None, **more):
    return run_all(experiment, set(done), lambda: [Machine({"CPU": cpus})], runs.start, watch, **more)


def test_a_stage_starts_after_what_it_needs(spec):
    runs = Runs()
    assert run(spec(), runs) == {}
    assert sorted(runs.order) == sorted(ALL)
    for name, needs in spec().needs.items():
        assert all(runs.order.index(need) < runs.order.index(name) for need in needs)


def test_independent_stages_run_side_by_side(spec):
    """Both wait for the other: one after the other would time out."""
    assert run(spec(), Runs(meet=("a_data", "b_data"))) == {}
    assert run(spec(), Runs(meet=("eval_b", "export"))) == {}


def test_what_is_done_does_not_run(spec):
    runs = Runs()
    assert run(spec(), runs, done=("a_data", "mlp_warmup", "b_data")) == {}
    assert sorted(runs.order) == ["eval_b", "export"]
    runs = Runs()
    assert run(spec(), runs, done=ALL) == {} and runs.order == []


def test_resources_bound_what_runs_at_once(spec):
    """On two cores the two-worker stage is alone, and one-core stages keep the order of the file."""
    runs = Runs(meet=("a_data", "b_data"))
    assert run(spec(), runs, cpus=2.0) == {}
    assert runs.beside["mlp_warmup"] == set() and runs.beside["eval_b"] == set()
    runs = Runs()
    assert run(spec("stages.mlp_warmup.resources.workers=1"), runs, cpus=1.0) == {}
    assert all(not beside for beside in runs.beside.values())
    assert runs.order == ["a_data", "b_data", "mlp_warmup", "eval_b", "export"]


def test_fractions_of_a_core_are_given_back_whole(spec):
    """1 - 0.3 - 0.1 + 0.3 + 0.1 is less than 1 in floating point: the stage after them has to start all the same."""
    experiment = spec(
        "stages.a_data.resources.cpus=0.3", "stages.b_data.resources.cpus=0.1", "stages.mlp_warmup.resources.cpus=0.5"
    )
    runs = Runs()
    assert run(experiment, runs, cpus=1.0) == {}
    assert sorted(runs.order) == sorted(ALL)


def test_fractions_that_fill_a_core_fit(spec):
    """0.1 + 0.2 is more than 0.3 in floating point."""
    cpus = {"a_data": 0.1, "b_data": 0.2, "mlp_warmup": 0.1, "eval_b": 0.1, "export": 0.1}
    experiment = spec(*(f"stages.{name}.resources.cpus={amount}" for name, amount in cpus.items()))
    assert run(experiment, Runs(meet=("a_data", "b_data")), cpus=0.3) == {}


def test_a_failure_blocks_only_what_needs_it(spec):
    runs = Runs(fail=("mlp_warmup",))
    failed = run(spec(), runs)
    assert list(failed) == ["mlp_warmup"] and isinstance(failed["mlp_warmup"], RuntimeError)
    assert sorted(runs.order) == ["a_data", "b_data", "mlp_warmup"]
    runs = Runs(fail=("b_data",))
    assert list(run(spec(), runs)) == ["b_data"]
    assert sorted(runs.order) == ["a_data", "b_data", "export", "mlp_warmup"]


def test_more_than_there_is_is_refused_before_anything_starts(spec):
    runs = Runs()
    with pytest.raises(UserError, match=r"2 workers × \(1 CPU\), and there are 1 × \(1 CPU\)") as caught:
        run(spec(), runs, cpus=1.0)
    assert runs.order == [] and caught.value.where == "stages.mlp_warmup.resources"
    with pytest.raises(UserError, match=r"\(1 CPU, 1 GPU\), and there are 1 × \(8 CPU\) → .*gpus=0,"):
        run(spec("stages.mlp_warmup.resources.gpus=1"), runs)
    check_demand(spec(), ["a_data"], [Machine({"CPU": 1.0})])


A100 = Machine({"CPU": 192.0, "GPU": 8.0}, {"ray.io/accelerator-type": "A100", "disk": "ssd"})
CPU = Machine({"CPU": 32.0}, {"ray.io/market-type": "spot", "disk": "hdd"})


@pytest.mark.parametrize(
    "asks, remedy",
    [
        (["workers=1", "gpus=1", "accelerator=H100"],
         "set stages.mlp_warmup.resources.accelerator to what is there (A100) or leave it out, connect to"),
        (["labels={ray.io/market-type: on_demand}"],
         "set stages.mlp_warmup.resources.labels (ray.io/market-type) to what is there (spot) or leave it out"),
        (["labels={team: x}"], "leave stages.mlp_warmup.resources.labels (team) out, connect to"),
        (["accelerator=A100", "labels={disk: hdd}"],
         "leave one of ray.io/accelerator-type, disk out of stages.mlp_warmup.resources: no node has them all"),
        (["accelerator=H100", "labels={disk: x, team: y}"],
         "set stages.mlp_warmup.resources.accelerator to what is there (A100) or leave it out, set "
         "stages.mlp_warmup.resources.labels (disk) to what is there (hdd, ssd) or leave it out, leave "
         "stages.mlp_warmup.resources.labels (team) out, connect"),
        (["workers=[9, 16]", "gpus=2"], "ask for less, e.g. stages.mlp_warmup.resources.workers=4, connect"),
        (["workers=1", "gpus=16"], "ask for less, e.g. stages.mlp_warmup.resources.gpus=8, connect"),
        (["workers=1", "cpus=256"], "ask for less, e.g. stages.mlp_warmup.resources.cpus=192, connect"),
        (["workers=2", "gpus=1", "cpus=256"], "ask for less, e.g. stages.mlp_warmup.resources.cpus=1, connect"),
        (["workers=2", "gpus=9", "cpus=256"], "ask for less, connect"),
    ],
)  # fmt: skip
def test_what_is_advised_where_it_does_not_fit_would_help(spec, asks, remedy):
    experiment = spec(*(f"stages.mlp_warmup.resources.{setting}" for setting in asks))
    with pytest.raises(UserError) as caught:
        check_demand(experiment, ["mlp_warmup"], [A100, CPU])
    assert caught.value.remedy.startswith(remedy)


def test_nothing_is_refused_while_it_is_not_known_what_is_there(spec):
    """A control service that does not answer at the first look: the stages wait for room themselves."""
    runs = Runs()
    assert run_all(spec(), set(), list, runs.start, lambda _: None) == {}
    assert sorted(runs.order) == sorted(ALL)


def test_a_stage_that_has_to_wait_for_another_says_so(spec):
    told = []
    experiment = spec("stages.mlp_warmup.resources.workers=1")
    assert run(experiment, Runs(), cpus=1.0, queued=lambda name, reason: told.append((name, reason))) == {}
    reason = "asks for 1 worker × (1 CPU), which does not fit beside a_data on 1 × (1 CPU)"
    assert told[0] == ("b_data", reason)


def test_machines_that_come_later_are_used(spec):
    """Two cores at first: the second data stage starts beside the first one when a machine has joined."""
    there = [Machine({"CPU": 1.0}), Machine({"CPU": 2.0})]
    experiment = spec("stages.a_data.resources.cpus=2")
    runs = Runs(meet=("a_data", "b_data"))
    looks = iter(range(10_000))
    assert (
        run_all(experiment, set(), lambda: there if next(looks) != 1 else there[1:], runs.start, lambda _: None) == {}
    )


def test_what_is_done_needs_no_resources(spec):
    runs = Runs()
    assert run(spec(), runs, done=("a_data", "b_data", "mlp_warmup"), cpus=1.0) == {}


def test_watch_sees_what_runs(spec):
    seen = []
    runs = Runs(meet=("a_data", "b_data"))
    run(spec(), runs, watch=lambda running: seen.append(set(running)))
    assert all(names <= set(ALL) for names in seen) and seen[-1] == set()


def test_an_interrupt_is_not_held_up_by_a_running_stage(spec):
    """Ctrl-C arrives in the loop; the stages' threads may wait for workers that are gone."""
    started, release, ended = threading.Event(), threading.Event(), []

    def start(name):
        started.set()
        release.wait(60)
        ended.append(name)

    def interrupted(running):
        assert started.wait(60)
        raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            run_all(spec(), set(), lambda: [Machine({"CPU": 8.0})], start, interrupted)
        assert ended == []
    finally:
        release.set()
