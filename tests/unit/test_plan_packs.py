"""The plan of a training stage, made on lengths alone and stored beside it."""

from types import SimpleNamespace

import numpy as np
import pytest
from fake_io import FakeIO

from modeling import epochs
from modeling.epochs import StepPlan
from modeling.errors import DataError
from modeling.shards import ShardReader
from stages.io import Input
from stages.params import DataParams, ModelParams, PrepareParams, TrainParams
from stages.plan_packs import PLAN, Lengths, data_parent, parent, plan_packs


def fake(folder, prepared, **fields) -> FakeIO:
    params = TrainParams(**{
        "train": ("mlp",), "lr": 1e-3, "global_batch": 2, "epochs": 2, "packing": {"max_tokens": 100, "max_tiles": 4},
        **fields,
    })  # fmt: skip
    data = Input("d_data", "prepare", "1" * 64, prepared, PrepareParams(data="d").model_dump(mode="json"))
    model = ModelParams(vision="micro-vit", language="micro-qwen2")
    return FakeIO(folder, params, model=model, sources={"d": DataParams(meta="m.json")}, inputs={"d_data": data})


def planned(folder, prepared, **fields) -> StepPlan:
    io = fake(folder, prepared, **fields)
    plan_packs(io)
    return StepPlan.load(io.fetch(PLAN))


def test_every_sample_is_planned_once_per_epoch_within_the_budgets(tmp_path, prepared):
    plan = planned(tmp_path / "a", prepared)
    index = ShardReader(prepared).index
    rows = np.concatenate(plan.packs)
    assert sorted(zip(plan.epoch[rows], plan.sample[rows])) == [(e, i) for e in (0, 1) for i in range(5)]
    for pack in plan.packs:
        members = plan.sample[pack]
        assert index["tokens"][members].sum() <= 100 and index["tiles"][members].sum() <= 4


def test_the_same_stage_has_the_same_plan_and_another_seed_another(tmp_path, prepared):
    fields = {"steps": 12, "epochs": None, "global_batch": 1}
    plans = [planned(tmp_path / str(n), prepared, seed=seed, **fields) for n, seed in enumerate((0, 0, 1))]
    assert plans[0].digest() == plans[1].digest() != plans[2].digest()
    assert plans[0].steps == 12 and all(len(plans[0].step(s)) == 1 for s in range(12))


def test_it_says_what_was_planned(tmp_path, prepared):
    io = fake(tmp_path / "a", prepared)
    plan_packs(io)
    plan = StepPlan.load(io.fetch(PLAN))
    assert io.lines[0].startswith(f"{len(plan.packs)} packs of 10 samples in {plan.steps} steps, token fill ")


@pytest.mark.parametrize("packing", [{"max_tokens": 30, "max_tiles": 4}, {"max_tokens": 100, "max_tiles": 2}])
def test_a_sample_that_fits_no_pack_is_told(tmp_path, prepared, packing):
    io = fake(tmp_path / "a", prepared, packing=packing)
    with pytest.raises(DataError, match="fit no pack of") as caught:
        plan_packs(io)
    assert caught.value.where == "stages.stage.packing" and "stage d_data" in caught.value.remedy
    assert not io.kept.exists(), "nothing half-written"


def test_steps_hold_packs_of_like_cost_as_the_ranks_count_it(tmp_path, prepared, monkeypatch):
    """The plan groups by the very costs that the ranks are balanced by."""
    given = {}
    plan_steps = epochs.plan_steps
    monkeypatch.setattr("stages.plan_packs.plan_steps", lambda *a, **k: given.update(k) or plan_steps(*a, **k))
    planned(tmp_path / "a", prepared)
    lengths = Lengths.of(ShardReader(prepared), "token", "conversation", 4)
    assert given["costs"].tolist() == lengths.cost.tolist()
    assert given["groups"].tolist() == [0, 0, 2, 1, 0]  # one, one, two, text, one


def test_parents_are_found_by_kind():
    """The stage that lends its vision encoder is no parent that training goes on from."""
    named = (("v", "train"), ("a", "prepare"), ("b", "train"))
    items = {n: Input(n, k, "0", None) for n, k in named}  # pyright: ignore
    io = SimpleNamespace(inputs=items, params=SimpleNamespace(vision_from="v"))
    assert data_parent(io) is items["a"] and parent(io, "train") is items["b"] and parent(io, "export") is None


def test_cost_grows_with_tokens_and_tiles(prepared):
    reader = ShardReader(prepared)
    lengths = Lengths.of(reader, "token", "conversation", 4)
    assert lengths.cost.tolist() == (reader.index["tokens"] + 16 * reader.index["tiles"]).tolist()
    assert lengths.weight.tolist() == [sum(a) for a in reader.index["answers"]]
