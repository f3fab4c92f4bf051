"""The plan of a training stage, made on lengths alone and stored beside it."""

from types import SimpleNamespace

import numpy as np
import pytest
from fake_io import FakeIO
from videos import LEAST, MOST, prepared_videos

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
    plan = planned(tmp_path / "a", prepared)
    reader = ShardReader(prepared)
    lengths, index = Lengths.of(reader, "token", "conversation", 4), reader.index
    cost = given["costs"](index["tokens"], index["tiles"])
    assert lengths.costs(plan, list(plan.packs)) == [cost[plan.sample[pack]].sum() for pack in plan.packs]
    assert given["groups"].tolist() == [0, 0, 2, 1, 0]  # one, one, two, text, one


def test_a_video_counts_with_the_frames_that_are_drawn(tmp_path, micro):
    """In the packs, in the log, in what ranks are balanced by and in the FLOPs that are told."""
    folder = prepared_videos(tmp_path / "data", micro)
    reader, packing = ShardReader(folder), {"max_tokens": 150, "max_tiles": 10}
    io = fake(tmp_path / "a", folder, packing=packing, epochs=20)
    plan_packs(io)
    plan = StepPlan.load(io.fetch(PLAN))
    assert plan.frames is not None
    choices, videos = reader.index["frame_tokens"], plan.sample < 4
    assert set(plan.frames[videos]) == set(range(LEAST, MOST + 1)) and not plan.frames[~videos].any()
    tokens = [
        int(choices[s][k - LEAST]) if k else int(reader.index["tokens"][s]) for s, k in zip(plan.sample, plan.frames)
    ]
    lengths = Lengths.of(reader, "token", "conversation", 4)
    for pack in plan.packs:
        in_pack, tiles = lengths.of_pack(plan, pack)
        assert in_pack.tolist() == [tokens[o] for o in pack] and tiles.tolist() == plan.frames[pack].tolist()
        assert sum(in_pack) <= 150 and sum(tiles) <= 10
        assert lengths.costs(plan, [pack]) == [sum(in_pack) + 16 * sum(tiles)]
    fill = sum(tokens[o] for o in plan.packs.values) / (150 * len(plan.packs))
    assert f"token fill {fill:.1%}" in io.lines[0]
    index = reader.index
    assert fill < index["tokens"][plan.sample[plan.packs.values]].sum() / (150 * len(plan.packs))


def test_parents_are_found_by_kind():
    """The stage that lends its vision encoder is no parent that training goes on from."""
    named = (("v", "train"), ("a", "prepare"), ("b", "train"))
    items = {n: Input(n, k, "0", None) for n, k in named}  # pyright: ignore
    io = SimpleNamespace(inputs=items, params=SimpleNamespace(lent={"v": "vision"}))
    assert data_parent(io) is items["a"] and parent(io, "train") is items["b"] and parent(io, "export") is None


def test_cost_grows_with_tokens_and_tiles(tmp_path, prepared):
    reader, plan = ShardReader(prepared), planned(tmp_path, prepared)
    lengths = Lengths.of(reader, "token", "conversation", 4)
    expected = (reader.index["tokens"] + 16 * reader.index["tiles"])[plan.sample].tolist()
    assert lengths.costs(plan, [np.array([o]) for o in range(len(plan.sample))]) == expected
    assert plan.frames is None
    assert lengths.weight.tolist() == [sum(a) for a in reader.index["answers"]]
