"""A language model taken over by a model with another vision encoder, and what a training stage tells of its data."""

import numpy as np
import pytest
import torch
from test_plan_packs import planned

from modeling.errors import CheckpointError
from modeling.internvl import build_model, load_model, save_model, take_language
from modeling.presets import resolve
from modeling.shards import ShardReader
from stages.params import ModelParams
from stages.plan_packs import Lengths


def built(seed=0, **parts):
    resolved = resolve(ModelParams(**parts))
    return build_model(resolved, resolved.tokenizer(), seed), resolved.tokenizer()


@pytest.fixture(scope="module")
def lender(micro, tmp_path_factory):
    """A saved model with the micro vision encoder, and its weights."""
    folder, model = tmp_path_factory.mktemp("lender") / "model", micro.build(seed=5)
    save_model(model, micro.tokenizer, folder, 32)
    (folder / "trained.json").write_text("{}")  # as a training stage leaves it
    return folder, model.state_dict()


def of_language(name):
    return name.startswith(("model.language_model.", "lm_head."))


def test_a_language_model_is_taken_whole_and_nothing_else_is(lender):
    folder, given = lender
    model, tokenizer = built(vision="tiny-vit-s", language="micro-qwen2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    take_language(model, tokenizer, folder)
    after = model.state_dict()
    assert any(map(of_language, after)) and "lm_head.weight" in after
    for name, tensor in after.items():
        assert torch.equal(tensor, given[name] if of_language(name) else before[name]), name
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])


def test_another_language_model_or_tokenizer_is_refused(lender):
    larger, tokenizer = built(vision="micro-vit", language="tiny-qwen2")
    with pytest.raises(CheckpointError, match=r"does not fit this model.s: lm_head\.weight"):
        take_language(larger, tokenizer, lender[0])
    same, other = built(vision="micro-vit", language="micro-qwen2", tokenizer="bytes")
    with pytest.raises(CheckpointError, match=r"its tokenizer is not this model.s.*language_from"):
        take_language(same, other, lender[0])


def test_a_result_with_its_record_beside_it_still_loads(lender):
    assert torch.equal(load_model(lender[0])[0].state_dict()["lm_head.weight"], lender[1]["lm_head.weight"])


def test_a_fraction_plans_its_samples_alone_and_says_what_was_seen(tmp_path, prepared):
    reader = ShardReader(prepared)
    lengths = Lengths.of(reader, "token", "conversation", 4)
    whole = planned(tmp_path / "whole", prepared)
    assert lengths.seen(whole) == {"samples": 5, "tokens": 2 * int(reader.index["tokens"].sum())}
    half = planned(tmp_path / "half", prepared, fraction=0.5)
    used = np.unique(half.sample[half.packs.values])
    names, datasets = reader.index["id"], list(reader.index["dataset"])
    counts = {name: datasets.count(name) for name in set(datasets)}
    assert len(used) == sum(max(1, int(0.5 * n + 0.5)) for n in counts.values()) < 5
    assert {datasets[i] for i in used} == set(datasets), "no dataset is left out"
    assert lengths.seen(half) == {"samples": len(used), "tokens": 2 * int(reader.index["tokens"][used].sum())}
    least = planned(tmp_path / "least", prepared, fraction=0.01)
    assert {names[i] for i in np.unique(least.sample)} <= {names[i] for i in used}
