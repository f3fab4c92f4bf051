"""Configurations of both layouts: what is mapped comes back, what the other side cannot say is refused."""

import json

import pytest
import torch
from conftest import OFFICIAL
from official_reference import rotate
from transformers import InternVLVisionConfig, LlamaConfig, Phi3Config, Qwen2Config

from modeling.errors import CheckpointError
from modeling.official import says_internlm2, text_to_hf, text_to_official, vision_to_hf, vision_to_official

# config.json of InternLM2.5-7B-chat as far as it says what is computed, with what else such a file holds
INTERNLM2 = {
    "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "vocab_size": 92553, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "hidden_act": "silu", "max_position_embeddings": 32768, "initializer_range": 0.02, "rms_norm_eps": 1e-5,
    "bias": False, "rope_theta": 1000000, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "pad_token_id": 2,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "attn_implementation": "flash_attention_2",
    "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"}, "use_cache": False, "top_k": 50,
    "torch_dtype": "bfloat16",
}  # fmt: skip


def test_internlm2_is_llama():
    text = text_to_hf(INTERNLM2, "")
    assert isinstance(text, LlamaConfig) and says_internlm2(text)
    assert text.rope_parameters == {"rope_type": "dynamic", "type": "dynamic", "factor": 2.0, "rope_theta": 1000000}
    assert (text.rms_norm_eps, text.attention_bias, text.mlp_bias, text.head_dim) == (1e-5, False, False, 128)
    assert not hasattr(text, "auto_map") and text._attn_implementation != "flash_attention_2"
    back = text_to_official(text)
    dropped = {"auto_map", "attn_implementation", "use_cache", "top_k", "torch_dtype"}
    assert {name: value for name, value in INTERNLM2.items() if name not in dropped} == {
        name: value for name, value in back.items() if name != "attn_implementation"
    }


def test_what_an_internlm2_file_leaves_out_is_the_official_default():
    text = text_to_hf({"model_type": "internlm2", "num_attention_heads": 4, "hidden_size": 64}, "")
    assert (text.attention_bias, text.rms_norm_eps, text.num_key_value_heads) == (True, 1e-6, 4)
    assert text.rope_parameters["rope_theta"] == 10000 and text.max_position_embeddings == 2048


def test_dynamic_scaling_is_the_official_one():
    """Beyond max_position_embeddings the base grows with the length (InternLM2DynamicNTKScalingRotaryEmbedding)."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 32, "rope_theta": 500000}
    rope = LlamaRotaryEmbedding(text_to_hf(INTERNLM2 | sizes, ""))
    for length in (20, 32, 80, 31):
        x = torch.randn(1, 4, length, 16)
        base = 500000 * (2.0 * max(length, 32) / 32 - 1.0) ** (16 / 14)
        cos, sin = rope(x, torch.arange(length)[None])
        found, _ = apply_rotary_pos_emb(x, x, cos, sin)
        torch.testing.assert_close(found[0], rotate(x[0], base), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "text",
    [
        Qwen2Config(hidden_size=64, num_attention_heads=4, num_hidden_layers=3, eos_token_id=7),
        Qwen2Config(
            hidden_size=64, num_attention_heads=4, num_hidden_layers=3, use_sliding_window=True, max_window_layers=1,
            rope_parameters={
                "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 9,
            },
        ),
        LlamaConfig(hidden_size=64, num_attention_heads=4, mlp_bias=True),
        LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=32),
        LlamaConfig(
            hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
            rope_parameters={
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_theta": 5e5,
            },
        ),
        LlamaConfig(
            hidden_size=64, num_attention_heads=4,
            rope_parameters={"rope_type": "linear", "factor": 2, "rope_theta": 1e4},
        ),
        Phi3Config(hidden_size=64, num_attention_heads=4, num_hidden_layers=2, pad_token_id=3),
    ],
    ids=["qwen2", "qwen2 yarn", "llama with mlp bias", "llama of other heads", "llama3 rope", "llama linear", "phi3"],
)  # fmt: skip
def test_a_language_model_comes_back(text):
    """A Llama that InternLM2 cannot say keeps its own names, which the official code reads as well."""
    written = json.loads(json.dumps(text_to_official(text)))
    expected = "internlm2" if says_internlm2(text) else text.model_type
    assert written["model_type"] == expected and "rope_parameters" not in written
    plain = isinstance(text, LlamaConfig) and text.rope_parameters["rope_type"] == "linear"
    assert (expected == "internlm2") is plain
    back = text_to_hf(written, "").to_dict()
    before = text.to_dict()
    for config in (back, before):
        config["rope_parameters"].pop("type", None)
        for name in ("use_cache", "pretraining_tp", "_name_or_path", "partial_rotary_factor"):
            config.pop(name, None)
    assert back == before


def test_a_vit_comes_back():
    official = json.loads((OFFICIAL / "config.json").read_text())["vision_config"]
    back = vision_to_official(InternVLVisionConfig(**vision_to_hf(official, "")), "")
    assert back == {name: value for name, value in official.items() if name not in ("use_flash_attn", "torch_dtype")}


def test_what_a_vit_file_leaves_out_is_the_official_default():
    vision = InternVLVisionConfig(**vision_to_hf({"image_size": 448}, ""))
    assert (vision.norm_type, vision.use_qk_norm, vision.attention_bias) == ("rms_norm", True, False)
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (3200, 48, 25)
    assert vision.layer_scale_init_value == 0.1 and vision.use_mean_pooling


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"use_mean_pooling": False}, "use_mean_pooling False"),
        ({"use_mask_token": True}, "use_mask_token True"),
        ({"image_size": (448, 224)}, r"image_size \[448, 224\]"),
    ],
)
def test_a_vit_that_the_official_code_does_not_have(fields, named):
    with pytest.raises(CheckpointError, match=named):
        vision_to_official(InternVLVisionConfig(**{"use_mean_pooling": True} | fields), "here")


def test_an_eps_that_qk_norm_would_not_have():
    """transformers' QK-norm has 1e-6 whatever the configuration says; the official one has layer_norm_eps."""
    with pytest.raises(CheckpointError, match="layer_norm_eps 1e-05 with qk_normalization"):
        vision_to_hf({"layer_norm_eps": 1e-5}, "here")
    assert vision_to_hf({"layer_norm_eps": 1e-5, "qk_normalization": False}, "")["layer_norm_eps"] == 1e-5


def test_positions_of_v2pe_are_refused():
    with pytest.raises(CheckpointError, match="rope_pos_id_version 'v2pe'"):
        text_to_hf(INTERNLM2 | {"rope_pos_id_version": "v2pe"}, "here")
