"""`model: {folder: …}`: a whole model, imported or exported, that stages train on."""

import json
import shutil

import pytest
import torch

from modeling.errors import CheckpointError, UserError
from modeling.internvl import save_model, start_from
from modeling.presets import resolve, sizes
from orchestrator.cli.main import main
from orchestrator.fingerprint import stage_identities
from orchestrator.spec import load_spec
from stages.params import ModelParams

YAML = """name: x
storage: runs
model: {model}
data: {{a: {{meta: a.json}}}}
defaults: {{lr: 1e-3, global_batch: 4}}
stages:
  a_data: {{kind: prepare, data: a}}
  full_finetune: {{needs: [a_data], steps: 10}}
"""


@pytest.fixture(scope="module")
def whole(micro, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "model"
    folder.mkdir()
    save_model(micro.build(3), micro.tokenizer, folder, micro.resolved.tile_size)
    return folder


def test_it_is_measured_and_trained_as_the_model_it_is(whole, micro):
    params = ModelParams(folder=str(whole))
    resolved = resolve(params)
    assert (resolved.tile_size, resolved.tokens_per_tile) == (micro.resolved.tile_size, micro.resolved.tokens_per_tile)
    known = sizes(params)
    assert known is not None and known[1]["hidden_size"] == micro.resolved.language["hidden_size"]
    tokenizer = resolved.tokenizer()
    assert tokenizer("<IMG_CONTEXT> 7").input_ids == micro.tokenizer("<IMG_CONTEXT> 7").input_ids
    state, expected = start_from(whole, tokenizer).state_dict(), micro.build(3).state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_tokenizer_that_is_not_its_own_is_refused(whole, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(whole, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_token_id": 5}))
    with pytest.raises(CheckpointError, match="image token is 5"):
        start_from(folder, resolve(ModelParams(folder=str(folder))).tokenizer())


def identities(folder, model: str):
    (folder / "x.yaml").write_text(YAML.format(model=model))
    return stage_identities(load_spec(folder / "x.yaml"), lambda stage: {"sha": "1"})


def test_its_content_and_not_its_place_is_what_a_stage_is(whole, tmp_path, micro):
    copy, other = tmp_path / "copy", tmp_path / "other"
    shutil.copytree(whole, copy)
    other.mkdir()
    save_model(micro.build(4), micro.tokenizer, other, micro.resolved.tile_size)
    one, same, another = (identities(tmp_path, f"{{folder: {path}}}") for path in (whole, copy, other))
    assert one == same and one["full_finetune"] != another["full_finetune"]
    assert one["a_data"] == another["a_data"], "the same tokens"
    assert one["a_data"] is not None and identities(tmp_path, "{folder: not/there}")["full_finetune"] is None


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("{folder: F, vision: micro-vit}", r"x\.yaml:3: model\.vision: a whole model is given by 'folder'"),
        ("{tile_size: 32}", r"missing 'vision' → add 'vision: \.\.\.', or 'folder: \.\.\.' of a whole model"),
        ("{vision: micro-vit}", r"x\.yaml:3: model: missing 'language'"),
    ],
)
def test_a_whole_model_and_parts_exclude_each_other(model, said, tmp_path):
    (tmp_path / "x.yaml").write_text(YAML.format(model=model))
    with pytest.raises(UserError, match=said):
        load_spec(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("config", "said"),
    [({"model_type": "internvl_chat"}, "official layout"), ({"model_type": "qwen2"}, "no InternVL model")],
)
def test_another_layout_is_told_to_be_imported(config, said, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "x.yaml").write_text(YAML.format(model="{folder: model}"))
    assert main(["plan", str(tmp_path / "x.yaml")]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert said in error and "model.folder" in error and "stageline import" in error
