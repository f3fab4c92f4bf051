"""What `model:` names: sizes from presets, sizes and weights from folders."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from modeling.errors import CheckpointError, UserError
from modeling.presets import LANGUAGE, VISION, folders, resolve
from modeling.template import SPECIAL_TOKENS
from stages.params import ModelParams


@pytest.mark.parametrize("vision", VISION)
def test_tokens_per_tile_is_what_the_model_makes_of_a_tile(vision):
    """A quarter of the patches (pixel shuffle 0.5), as for the family: 256 at 448 pixels and patches of 14."""
    resolved = resolve(ModelParams(vision=vision, language="micro-qwen2"))
    patches = (VISION[vision]["image_size"] // VISION[vision]["patch_size"]) ** 2
    assert resolved.tokens_per_tile * 4 == patches
    assert replace(resolved, vision={"patch_size": 14}, tile_size=448).tokens_per_tile == 256
    assert replace(resolved, vision={"patch_size": [14, 14]}, tile_size=448).tokens_per_tile == 256


@pytest.mark.parametrize("language", LANGUAGE)
def test_presets_need_no_folder_and_know_the_image_tokens(language):
    params = ModelParams(vision="micro-vit", language=language, tokenizer=LANGUAGE[language]["tokenizer"] or "tiny-bpe")
    resolved = resolve(params)
    assert folders(params) == {} and resolved.vision_folder is None and resolved.language_folder is None
    tokenizer = resolved.tokenizer()
    assert all(len(tokenizer(token).input_ids) == 1 for token in SPECIAL_TOKENS)
    assert len(replace(resolved, tokenizer_name="bytes").tokenizer()) == 269


def test_the_preset_model_has_the_sizes_of_the_table(micro):
    config = micro.build().config
    assert config.vision_config.num_hidden_layers == VISION["micro-vit"]["num_hidden_layers"]
    assert config.text_config.hidden_size == LANGUAGE["micro-qwen2"]["hidden_size"]
    assert config.text_config.vocab_size == len(micro.tokenizer)
    assert config.image_seq_length == micro.resolved.tokens_per_tile
    assert config.image_token_id == micro.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")


@pytest.mark.parametrize(
    ("fields", "where"),
    [({"vision": "no-such-vit"}, "model.vision"), ({"language": "no-such-llm"}, "model.language")],
)
def test_a_name_that_is_neither_preset_nor_folder(fields, where):
    with pytest.raises(UserError, match="neither a preset nor a folder") as caught:
        resolve(ModelParams(**{"vision": "micro-vit", "language": "micro-qwen2"} | fields))
    assert caught.value.where == where and "presets" in caught.value.remedy


def test_a_tile_size_that_cannot_be_shuffled():
    with pytest.raises(UserError, match="not a multiple of twice the patch size 8") as caught:
        resolve(ModelParams(vision="micro-vit", language="micro-qwen2", tile_size=40))
    assert caught.value.where == "model.tile_size"
    assert resolve(ModelParams(vision="micro-vit", language="micro-qwen2", tile_size=64)).tokens_per_tile == 16


def test_a_vision_folder_of_another_kind(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip_vision_model"}))
    with pytest.raises(UserError, match="'clip_vision_model', not 'internvl_vision'"):
        resolve(ModelParams(vision=str(tmp_path), language="micro-qwen2"))


def test_a_config_that_is_not_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json") as caught:
        resolve(ModelParams(vision=str(tmp_path), language="micro-qwen2"))
    assert caught.value.where == "model.vision"


PADDED = 280  # rows of the language folder's embeddings, more than its tokenizer has tokens


@pytest.fixture(scope="module")
def parts(tmp_path_factory, micro):
    """A vision folder; a language folder with a tokenizer of `known` tokens, none of InternVL's, padded rows and a tied
    head, as Qwen2.5-0.5B has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        AutoTokenizer,
        InternVLVisionConfig,
        InternVLVisionModel,
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    torch.manual_seed(7)
    vision, language = tmp_path_factory.mktemp("vision"), tmp_path_factory.mktemp("language")
    tower = InternVLVisionModel(InternVLVisionConfig(**micro.resolved.vision))
    torch.nn.init.normal_(tower.embeddings.position_embeddings)
    tower.save_pretrained(vision)
    sizes = {key: value for key, value in micro.resolved.language.items() if key != "model_type"}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=PADDED, tie_word_embeddings=True, **sizes))
    model.save_pretrained(language)
    alphabet = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    plain = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    tokenizer.save_pretrained(language)
    return SimpleNamespace(
        vision=vision, language=language, tower=tower.state_dict(), source=model,
        known=len(AutoTokenizer.from_pretrained(language)),
    )  # fmt: skip


def test_folders_give_their_weights(parts):
    from modeling.internvl import build_model

    params = ModelParams(vision=str(parts.vision), language=str(parts.language))
    assert folders(params) == {"vision": parts.vision, "language": parts.language}
    resolved = resolve(params)
    tokenizer, known = resolved.tokenizer(), parts.known
    assert known + 9 < PADDED
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(known, known + 9))
    assert resolved.tile_size == 32 and resolved.tokens_per_tile == 4
    model = build_model(resolved, tokenizer, seed=0)
    taken = model.model.vision_tower.state_dict()
    assert set(taken) == set(parts.tower) and all(torch.equal(taken[name], parts.tower[name]) for name in parts.tower)
    decoder, own = model.model.language_model.state_dict(), parts.source.model.state_dict()
    assert set(decoder) == set(own)
    assert all(torch.equal(decoder[name], own[name][: len(decoder[name])]) for name in own)
    rows = model.model.language_model.embed_tokens.weight
    assert len(rows) == len(model.lm_head.weight) == model.config.text_config.vocab_size == known + 9 == len(tokenizer)


def test_head_rows_of_new_tokens_are_the_mean_of_the_old(parts):
    """Also where a padded vocabulary already had rows for them, as Qwen2.5's has; the rows beyond them are cut, as the
    official resize_token_embeddings(len(tokenizer)) does."""
    from modeling.internvl import build_model

    resolved = resolve(ModelParams(vision=str(parts.vision), language=str(parts.language)))
    model = build_model(resolved, resolved.tokenizer(), seed=0)
    old = parts.source.lm_head.weight.detach()[: parts.known]
    head = model.lm_head.weight.detach()
    assert torch.equal(head[: parts.known], old)
    torch.testing.assert_close(head[parts.known :], old.mean(0).expand(9, -1))
    assert head.data_ptr() != model.model.language_model.embed_tokens.weight.data_ptr(), "the head is not tied"


def test_a_larger_tokenizer_gets_rows(parts, micro):
    """The preset tokenizer has more tokens than the folder's embeddings have rows."""
    from modeling.internvl import build_model

    resolved = resolve(ModelParams(vision="micro-vit", language=str(parts.language), tokenizer="tiny-bpe"))
    model = build_model(resolved, micro.tokenizer, seed=0)
    embeddings = model.model.language_model.embed_tokens.weight
    assert len(embeddings) == len(model.lm_head.weight) == len(micro.tokenizer) > PADDED
    assert torch.equal(embeddings[:PADDED], parts.source.model.embed_tokens.weight)
    new = model.lm_head.weight.detach()[PADDED:]
    torch.testing.assert_close(new, parts.source.lm_head.weight.detach().mean(0).expand_as(new))
    assert embeddings[PADDED:].std() > 0.01, "new input rows start fresh"


def test_a_vision_folder_that_lacks_a_weight(parts, micro, tmp_path):
    from safetensors.torch import load_file, save_file

    from modeling.internvl import build_model

    tensors = load_file(parts.vision / "model.safetensors")
    del tensors["encoder.layer.1.lambda_1"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((parts.vision / "config.json").read_text())
    resolved = resolve(ModelParams(vision=str(tmp_path), language="micro-qwen2"))
    with pytest.raises(CheckpointError, match="lambda_1") as caught:
        build_model(resolved, micro.tokenizer, 0)
    assert caught.value.where == str(tmp_path)
