"""A ViT and a language model from folders of their own, in the official layout too, and the whole that they make."""

import json
import shutil

import pytest
import torch
from conftest import OFFICIAL
from official_reference import internlm2 as official_language
from official_reference import variant, vision
from safetensors.torch import load_file, save_file

from modeling.errors import CheckpointError, UserError
from modeling.internvl import build_model, load_model
from modeling.presets import resolve
from modeling.template import SPECIAL_TOKENS
from modeling.weights import open_source, write, write_parts
from stages.params import ModelParams


@pytest.fixture(scope="module")
def config():
    return json.loads((OFFICIAL / "config.json").read_text())


@pytest.fixture(scope="module")
def weights():
    return load_file(OFFICIAL / "model.safetensors")


@pytest.fixture(scope="module")
def vit(config, weights, tmp_path_factory):
    """An InternViT folder in the 6B style: the official names without the whole model's prefix."""
    folder = tmp_path_factory.mktemp("vit")
    whole, tensors = variant("6b", config, weights)
    (folder / "config.json").write_text(json.dumps(whole["vision_config"] | {"auto_map": {"AutoModel": "x.Y"}}))
    save_file(own(tensors, "vision_model."), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def llm(config, weights, tmp_path_factory):
    """An InternLM2 folder: 320 rows, a tokenizer of 260 tokens that knows none of InternVL's, in bf16."""
    folder = tmp_path_factory.mktemp("llm")
    whole, tensors = variant("internlm2", config, weights)
    (folder / "config.json").write_text(json.dumps(whole["llm_config"]))
    tensors = {name: tensor.bfloat16() for name, tensor in own(tensors, "language_model.").items()}
    save_file(tensors, folder / "model.safetensors")
    words = json.loads((OFFICIAL / "tokenizer.json").read_text())
    words["added_tokens"] = [token for token in words["added_tokens"] if token["content"] not in SPECIAL_TOKENS]
    (folder / "tokenizer.json").write_text(json.dumps(words))
    return folder


def own(tensors, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def test_an_official_vit_is_the_official_one(vit):
    resolved = resolve(ModelParams(vision=str(vit), language="micro-qwen2"))
    assert (resolved.tile_size, resolved.tokens_per_tile) == (56, 4)
    model = build_model(resolved, resolved.tokenizer(), seed=0).eval()
    pixels = load_file(OFFICIAL / "case.safetensors")["pixel_values"]
    tensors = {f"vision_model.{name}": tensor for name, tensor in load_file(vit / "model.safetensors").items()}
    with torch.inference_mode():
        expected = vision(tensors, json.loads((vit / "config.json").read_text()), pixels)
        torch.testing.assert_close(
            model.model.vision_tower(pixel_values=pixels).last_hidden_state, expected, atol=2e-5, rtol=0
        )


def test_an_official_language_model_is_the_official_one(llm):
    """Its known rows; those of new tokens stand in the head as the mean of the known, and padding rows are cut."""
    resolved = resolve(ModelParams(vision="micro-vit", language=str(llm)))
    tokenizer = resolved.tokenizer()
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(260, 269))
    model = build_model(resolved, tokenizer, seed=0).eval()
    model.model.language_model.config._attn_implementation = "eager"
    tensors = {f"language_model.{name}": t.float() for name, t in load_file(llm / "model.safetensors").items()}
    ids = torch.arange(40) * 6
    with torch.inference_mode():
        x = tensors["language_model.model.tok_embeddings.weight"][ids]
        expected = official_language(tensors, json.loads((llm / "config.json").read_text()), x)
        found = model(input_ids=ids[None]).logits[0]
    assert found.shape == (40, 269)
    torch.testing.assert_close(found[:, :260], expected[:, :260], atol=2e-5, rtol=0)
    mean = tensors["language_model.output.weight"][:260].mean(0)
    torch.testing.assert_close(model.lm_head.weight[260:], mean.expand(9, -1))


def test_parts_make_a_whole_that_loads(vit, llm, tmp_path):
    resolved = resolve(ModelParams(vision=str(vit), language=str(llm)))
    write_parts(resolved, 3, tmp_path / "whole")
    model, tokenizer = load_model(tmp_path / "whole")
    assert model.dtype == torch.float32, "fp32, where the parts disagree"
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>") == 262
    assert model.config.text_config.vocab_size == len(tokenizer) == 269
    write(open_source(tmp_path / "whole"), tmp_path / "official", "official")
    tensors = load_file(tmp_path / "official" / "model.safetensors")
    kept = {f"vision_model.{name}": tensor for name, tensor in load_file(vit / "model.safetensors").items()}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in kept.items())
    for seed, same in ((3, True), (4, False)):
        write_parts(resolved, seed, tmp_path / str(seed))
        again = load_model(tmp_path / str(seed))[0]
        projector = again.model.multi_modal_projector.linear_1.weight
        assert torch.equal(projector, model.model.multi_modal_projector.linear_1.weight) is same


def test_parts_that_agree_on_bf16_make_a_bf16_model(vit, llm, tmp_path):
    shutil.copytree(vit, tmp_path / "vit")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(vit / "model.safetensors").items()}
    save_file(tensors, tmp_path / "vit" / "model.safetensors")
    write_parts(resolve(ModelParams(vision=str(tmp_path / "vit"), language=str(llm))), 0, tmp_path / "whole")
    model, _ = load_model(tmp_path / "whole")
    assert model.dtype == torch.bfloat16
    write(open_source(tmp_path / "whole"), tmp_path / "official", "official")
    out = load_file(tmp_path / "official" / "model.safetensors")
    assert all(torch.equal(out[f"vision_model.{name}"], tensor) for name, tensor in tensors.items())
    language = load_file(llm / "model.safetensors")
    name = "model.layers.1.attention.wqkv.weight"
    assert torch.equal(out[f"language_model.{name}"], language[name])


def test_a_part_that_lacks_or_adds_a_weight_names_it_as_its_folder_does(vit, llm, tmp_path):
    for part, folder, lost in (
        ("vision", vit, "layers.1.attn.qkv.weight"),
        ("language", llm, "layers.1.attention.wqkv.bias"),
    ):
        shutil.copytree(folder, tmp_path / part)
        tensors = load_file(folder / "model.safetensors")
        del tensors[next(name for name in tensors if name.endswith(lost))]
        save_file(tensors | {"stranger": torch.zeros(1)}, tmp_path / part / "model.safetensors")
        named = {"vision": str(vit), "language": str(llm)} | {part: str(tmp_path / part)}
        with pytest.raises(CheckpointError, match=rf"1 missing keys: .*{lost}; 1 unexpected keys: .*stranger"):
            write_parts(resolve(ModelParams(**named)), 0, tmp_path / "whole")
        assert not (tmp_path / "whole").exists()


def test_a_whole_model_is_no_part(vit):
    with pytest.raises(UserError, match="holds a whole InternVL model"):
        resolve(ModelParams(vision=str(vit), language=str(OFFICIAL)))
    with pytest.raises(UserError, match="'internvl_chat', not 'internvl_vision'"):
        resolve(ModelParams(vision=str(OFFICIAL), language="micro-qwen2"))


def test_a_language_folder_without_a_tokenizer(llm, tmp_path):
    shutil.copy(llm / "config.json", tmp_path)
    with pytest.raises(UserError, match="no tokenizer") as caught:
        resolve(ModelParams(vision="micro-vit", language=str(tmp_path))).tokenizer()
    assert caught.value.where == str(tmp_path)


def test_a_tokenizer_that_needs_its_own_code_is_not_run(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", None]}})
    )
    (tmp_path / "code.py").write_text("raise SystemExit('run')")
    (tmp_path / "tokenizer.model").write_bytes(b"not a tokenizer")
    with pytest.raises(CheckpointError, match="tokenizer cannot be read") as caught:
        resolve(ModelParams(vision="micro-vit", language="micro-qwen2", tokenizer=str(tmp_path))).tokenizer()
    assert "needs no code of its own" in caught.value.remedy
