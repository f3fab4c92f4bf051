"""Progressive scaling: a model's first stage starts with the vision encoder that another model's stage made."""

import pytest
import torch
from harness import SMALL, Experiment
from safetensors.torch import load_file

FAMILY = (
    SMALL
    + """
name: cluster
storage: storage
seed: 0
models:
  large: {{vision: micro-vit, language: micro-qwen2}}
  small: {{vision: micro-vit, language: tiny-qwen2}}
stages:
  mix_data: {{kind: prepare, model: large, data: mix}}
  vit_large: {{kind: vit_incremental, model: large, needs: [mix_data], steps: 3, lr: 1e-3}}
  warmup_small: {{kind: mlp_warmup, model: small, vision_from: vit_large, needs: [mix_data], steps: 3, lr: 1e-3}}
"""
)


@pytest.fixture(scope="module")
def family(data, tmp_path_factory):
    experiment = Experiment(tmp_path_factory.mktemp("family"), data, FAMILY)
    experiment.run()
    return experiment


def test_the_vision_encoder_of_one_model_is_the_others_and_the_mlp_is_new(family):
    large, small = (load_file(family.result(stage) / "model.safetensors") for stage in ("vit_large", "warmup_small"))
    vision = {key for key in large if "vision_tower" in key}
    assert vision and vision == {key for key in small if "vision_tower" in key}
    assert all(torch.equal(large[key], small[key]) for key in vision), "frozen in MLP warmup"
    projector = [key for key in large if "multi_modal_projector" in key and large[key].shape == small[key].shape]
    assert projector and not any(torch.equal(large[key], small[key]) for key in projector)
    assert family.losses("warmup_small")[-1] > 0


def test_it_follows_when_the_other_models_stage_changes(family):
    planned = family.without_ray("plan", "stages.vit_large.lr=2e-3").stdout.split("Mixtures")[0]
    rows = [line.split() for line in planned.split("vit_large makes the vision encoder of small", 1)[0].splitlines()]
    actions = {row[0]: {"run", "reuse"} & set(row) for row in rows if row}
    assert [actions[stage] for stage in ("mix_data", "vit_large", "warmup_small")] == [{"reuse"}, {"run"}, {"run"}]
    assert "all 3 stages done, 3 of them reused" in family.run().stdout
