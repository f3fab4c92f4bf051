"""What `run` would do, from storage alone."""

import pytest

from modeling.errors import UserError
from orchestrator.fingerprint import fingerprint, stage_identities
from orchestrator.ledger import Ledger
from orchestrator.plan import (
    differences,
    make_plan,
    read_mappings,
    read_previous,
    record_mapping,
    stage_prefix,
    write_identity,
)
from orchestrator.spec import load_spec
from orchestrator.store import MemoryStore

SPEC = """name: x
storage: runs
model: {vision: tiny-vit, language: tiny-qwen2}
data: {a: {meta: a.json}}
stages:
  a_data: {kind: prepare, data: a}
  mlp_warmup: {needs: [a_data], lr: 1e-3, global_batch: 4, steps: 10}
  full_finetune: {needs: [a_data, mlp_warmup], lr: 4e-5, global_batch: 4, steps: 10}
  export: {needs: [full_finetune]}
"""


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


class World:
    def __init__(self, folder):
        self.path, self.store = folder / "x.yaml", MemoryStore()
        self.path.write_text(SPEC)

    def identities(self, *overrides, sources=True):
        self.experiment = load_spec(self.path, overrides)
        return stage_identities(self.experiment, lambda stage: {"sha": "1"} if sources else None)

    def plan(self, *overrides, sources=True):
        identities = self.identities(*overrides, sources=sources)
        plans = make_plan(self.experiment, identities, self.store, read_previous(self.store, "x"))
        return {plan.name: plan for plan in plans}

    def start(self, name):
        """Claims a stage, as a driver would; returns its ledger and token."""
        identity = self.identities()[name]
        base = self.experiment.stages[name].kind.base
        ledger = Ledger(self.store, write_identity(self.store, base, identity))
        record_mapping(self.store, "x", name, identity, fingerprint(identity))
        return ledger, ledger.start_attempt(ledger.claim({"host": "h"}), 1)

    def finish(self, *names):
        for name in names:
            ledger, token = self.start(name)
            ledger.append("completed", token, manifest={}, summary={}, train_s=1.0)


def actions(plans):
    return [plan.action for plan in plans.values()]


def test_at_first_everything_runs(world):
    plans = world.plan()
    assert actions(plans) == ["run"] * 4
    assert plans["a_data"].reason == "not run yet"
    assert plans["export"].reason == "needs full_finetune, which will run"
    assert plans["export"].prefix == stage_prefix("export", plans["export"].fingerprint)
    assert world.store.list() == [], "planning writes nothing"


def test_what_is_completed_is_reused(world):
    world.finish("a_data", "mlp_warmup", "full_finetune", "export")
    assert actions(world.plan()) == ["reuse"] * 4


def test_a_change_names_its_field_and_reaches_only_what_depends_on_it(world):
    world.finish("a_data", "mlp_warmup", "full_finetune", "export")
    plans = world.plan("stages.full_finetune.lr=1e-5")
    assert actions(plans) == ["reuse", "reuse", "run", "run"]
    assert plans["full_finetune"].changed == ("lr: 4e-05 → 1e-05",)
    assert plans["full_finetune"].reason == "changed: lr: 4e-05 → 1e-05"
    assert plans["export"].changed == ()
    assert plans["export"].reason == "needs full_finetune, which will run"


def test_going_back_finds_the_old_result(world):
    world.finish("a_data", "mlp_warmup", "full_finetune", "export")
    changed = world.identities("stages.full_finetune.lr=1e-5")["full_finetune"]
    record_mapping(world.store, "x", "full_finetune", changed, fingerprint(changed))
    assert actions(world.plan()) == ["reuse"] * 4


def test_a_stage_with_a_checkpoint_resumes(world):
    world.finish("a_data")
    ledger, token = world.start("mlp_warmup")
    ledger.append("checkpoint", token, step=5, manifest="m5", train_s=1.0)
    ledger.append("checkpoint", token, step=10, manifest="m10", train_s=1.0)
    plans = world.plan()
    assert actions(plans) == ["reuse", "resume", "run", "run"]
    assert (plans["mlp_warmup"].step, plans["full_finetune"].reason) == (10, "needs mlp_warmup, which will run")


def test_a_failure_before_the_first_checkpoint_is_told(world):
    world.finish("a_data")
    ledger, token = world.start("mlp_warmup")
    assert world.plan()["mlp_warmup"].reason == "started before, without a checkpoint"
    ledger.append("failed", token, error_class="diverged", message="the loss of step 1 is NaN", step=0)
    plan = world.plan()["mlp_warmup"]
    assert plan.action == "run" and "diverged the loss of step 1 is NaN" in plan.reason


def test_absent_sources_are_unknown_and_block_the_rest(world):
    plans = world.plan(sources=False)
    assert actions(plans) == ["unknown", "blocked", "blocked", "blocked"]
    assert "unknown until prepare" in plans["a_data"].reason and "a.json" in plans["a_data"].reason
    assert plans["export"].reason == "needs full_finetune, unknown until prepare"
    assert make_plan(world.experiment, world.identities(sources=False), None)[0].action == "unknown"


def test_a_folder_of_another_identity_is_refused(world):
    world.finish("a_data")
    plan = world.plan()["a_data"]
    world.store.put(f"{plan.prefix}/identity.json", b'{"kind":"prepare"}')
    with pytest.raises(UserError, match="another identity") as caught:
        world.plan()
    assert plan.prefix in str(caught.value)
    with pytest.raises(UserError, match="another identity"):
        write_identity(world.store, "prepare", world.identities()["a_data"])


def test_mappings_are_kept_by_experiment_and_stage(world):
    world.finish("a_data")
    identity = world.identities()["a_data"]
    assert read_mappings(world.store, "x") == {"a_data": {"fingerprint": fingerprint(identity), "identity": identity}}
    assert read_mappings(world.store, "another") == {}
    world.store.put("experiments/x/stages/a_data.json", b"{")
    with pytest.raises(UserError, match="damaged record"):
        read_mappings(world.store, "x")


def test_differences_are_named_as_in_the_yaml():
    before = {"params": {"lr": 1e-3, "packing": {"max_tokens": 8}, "steps": None}, "sources": {"a": 1}, "version": 1}
    now = {"params": {"lr": 1e-3, "packing": {"max_tokens": 16}, "steps": 5}, "sources": {"a": 2}, "version": 2}
    assert differences(before, now) == ["packing.max_tokens: 8 → 16", "steps: none → 5", "the data", "version: 1 → 2"]
    assert differences(before, before) == []
