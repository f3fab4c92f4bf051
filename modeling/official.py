"""Configurations of the official `internvl_chat` layout and of Hugging Face's, both ways.

Fields and their defaults: configuration_internvl_chat.py, configuration_intern_vit.py, configuration_internlm2.py
(OpenGVLab/InternVL, commit 2410d1dbf208). Invariant: a setting that changes what the model computes is mapped or
refused, never dropped; what only tells how to train or serve (attention kernels, remote code, LoRA of a merged model)
is dropped. InternLM2 is Llama with another spelling, so it is read as Llama and Llama is written as InternLM2.
"""

from dataclasses import fields
from typing import Any

from modeling.errors import CheckpointError

VISION_TYPE, INTERNLM2, CHAT = "intern_vit_6b", "internlm2", "internvl_chat"
TEMPLATE = "internvl2_5"

# official name: (Hugging Face's, the official class's default)
_VISION: dict[str, tuple[str, Any]] = {
    "num_channels": ("num_channels", 3),
    "patch_size": ("patch_size", 14),
    "image_size": ("image_size", 224),
    "hidden_size": ("hidden_size", 3200),
    "num_hidden_layers": ("num_hidden_layers", 48),
    "num_attention_heads": ("num_attention_heads", 25),
    "intermediate_size": ("intermediate_size", 12800),
    "qkv_bias": ("attention_bias", False),
    "qk_normalization": ("use_qk_norm", True),
    "norm_type": ("norm_type", "rms_norm"),
    "layer_norm_eps": ("layer_norm_eps", 1e-6),
    "hidden_act": ("hidden_act", "gelu"),
    "dropout": ("projection_dropout", 0.0),
    "attention_dropout": ("attention_dropout", 0.0),
    "initializer_range": ("initializer_range", 0.02),
    "initializer_factor": ("layer_scale_init_value", 0.1),
}
_INTERNLM2: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 103168),
    "hidden_size": ("hidden_size", 4096),
    "intermediate_size": ("intermediate_size", 11008),
    "num_hidden_layers": ("num_hidden_layers", 32),
    "num_attention_heads": ("num_attention_heads", 32),
    "num_key_value_heads": ("num_key_value_heads", None),
    "hidden_act": ("hidden_act", "silu"),
    "max_position_embeddings": ("max_position_embeddings", 2048),
    "initializer_range": ("initializer_range", 0.02),
    "rms_norm_eps": ("rms_norm_eps", 1e-6),
    "bias": ("attention_bias", True),
    "pad_token_id": ("pad_token_id", 0),
    "bos_token_id": ("bos_token_id", 1),
    "eos_token_id": ("eos_token_id", 2),
}
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
_ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor")


def vision_to_hf(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of an InternVLVisionConfig; `use_mean_pooling` there says that the ViT ends without a norm."""
    ours = {name: config.get(official, default) for official, (name, default) in _VISION.items()}
    if ours["use_qk_norm"] and ours["layer_norm_eps"] != 1e-6:
        raise _refused(f"vision_config.layer_norm_eps {ours['layer_norm_eps']} with qk_normalization", "1e-6", where)
    return ours | {"use_mean_pooling": True}


def vision_to_official(vision: Any, where: str) -> dict[str, Any]:
    """vision: an InternVLVisionConfig. Raises CheckpointError for what the official ViT does not know."""
    _same(vision, {
        "use_mean_pooling": True, "use_absolute_position_embeddings": True, "use_mask_token": False,
        "hidden_dropout_prob": 0.0,
    }, where)  # fmt: skip
    config = {official: getattr(vision, name) for official, (name, _) in _VISION.items()}
    for name in ("image_size", "patch_size"):
        sides = config[name]
        if sides[0] != sides[1]:
            raise _refused(f"vision_config.{name} {list(sides)}", "a square", where)
        config[name] = sides[0]
    return {"architectures": ["InternVisionModel"], "model_type": VISION_TYPE, **config, "drop_path_rate": 0.0}


def text_to_hf(llm: dict[str, Any], where: str) -> Any:
    """A transformers configuration of the language model, its head untied. Raises CheckpointError for a type that
    the library does not have."""
    from transformers import CONFIG_MAPPING, LlamaConfig, PreTrainedConfig

    kind = str(llm.get("model_type"))
    rope = {name: llm[name] for name in _ROPE if llm.get(name) is not None}
    rope |= {"rope_scaling": dict(rope["rope_scaling"])} if "rope_scaling" in rope else {}
    if kind == INTERNLM2:
        if llm.get("rope_pos_id_version", "default") != "default":
            raise _refused(f"llm_config.rope_pos_id_version {llm['rope_pos_id_version']!r}", "'default'", where)
        ours = {name: llm.get(official, default) for official, (name, default) in _INTERNLM2.items()}
        return _built(LlamaConfig, ours | {"rope_theta": 10000.0} | rope, where)
    if kind not in CONFIG_MAPPING:
        raise CheckpointError(
            f"transformers has no language model of type {kind!r}", where=where,
            remedy="import one of InternLM2, Qwen2, Llama, Phi-3",
        )  # fmt: skip
    config_class = CONFIG_MAPPING[kind]
    own = {field.name for field in fields(config_class)} - {field.name for field in fields(PreTrainedConfig)}
    kept = {name: llm[name] for name in own.union(_TOKENS) - {"use_cache"} if name in llm}
    return _built(config_class, kept | rope | {"tie_word_embeddings": False}, where)


def says_internlm2(text: Any) -> bool:
    """Whether a language model's configuration is a Llama that InternLM2's can say."""
    if text.model_type != "llama" or text.mlp_bias:
        return False
    plain = text.head_dim * text.num_attention_heads == text.hidden_size
    return plain and text.rope_parameters["rope_type"] in ("default", "linear", "dynamic")


def text_to_official(text: Any) -> dict[str, Any]:
    """The official `llm_config`, in the spelling of the transformers version that the official code wants (4.37)."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    rope = dict(getattr(text, "rope_parameters", None) or {})
    kind = rope.pop("rope_type", "default")
    spelled: dict[str, Any] = {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    spelled["rope_scaling"] = None if kind == "default" else {"type": kind} | rope
    if says_internlm2(text):
        if spelled["rope_scaling"]:
            spelled["rope_scaling"] = {"type": kind, "factor": float(rope["factor"])}  # official: these two, a float
        config = {official: getattr(text, name) for official, (name, _) in _INTERNLM2.items()}
        head = {"architectures": ["InternLM2ForCausalLM"], "model_type": INTERNLM2}
        return head | config | spelled | {"attn_implementation": "eager", "tie_word_embeddings": False}
    common = {field.name for field in fields(PreTrainedConfig)}
    own = [field.name for field in fields(text) if field.name not in common and field.name != "rope_parameters"]
    config = {name: getattr(text, name) for name in [*own, *(t for t in _TOKENS if t not in own)]}
    head = {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]], "model_type": text.model_type}
    return head | config | spelled | {"tie_word_embeddings": False}


def chat_to_hf(config: dict[str, Any], image_token_id: int, where: str) -> Any:
    """An InternVLConfig from an official config.json. Raises CheckpointError for what InternVL 2.5 does not do."""
    from transformers import InternVLConfig, InternVLVisionConfig

    for name, default, wanted, why in (
        ("ps_version", "v1", "v2", "v1 leaves height and width swapped"),
        ("select_layer", -1, -1, "cut the ViT's last layers off instead, as InternViT-6B-448px-V2.5 does"),
        ("downsample_ratio", 0.5, 0.5, "four patches make one token"),
        ("use_backbone_lora", 0, 0, "merge it first, with the official tools/merge_lora.py"),
        ("use_llm_lora", 0, 0, "merge it first, with the official tools/merge_lora.py"),
    ):
        if config.get(name, default) != wanted:
            raise _refused(f"{name} {config.get(name, default)!r}", f"{wanted!r} ({why})", where)
    for part in ("vision_config", "llm_config"):
        if not isinstance(config.get(part), dict):
            raise CheckpointError(f"the configuration has no {part}", where=where, remedy="fetch the folder again")
    vision = vision_to_hf(config["vision_config"], where)
    size = config.get("force_image_size") or vision["image_size"]
    if size != vision["image_size"]:
        raise _refused(
            f"force_image_size {size} with vision_config.image_size {vision['image_size']}",
            "the same number (the official resize_pos_embeddings makes it so)", where,
        )  # fmt: skip
    whole = {
        "vision_config": _built(InternVLVisionConfig, vision, where),
        "text_config": text_to_hf(config["llm_config"], where),
        "image_token_id": image_token_id,
        "image_seq_length": int((size // vision["patch_size"]) ** 2 * 0.25),
        "downsample_ratio": 0.5,
        "tie_word_embeddings": False,
    }
    return _built(InternVLConfig, whole, where)


def chat_to_official(config: Any, dtype: str, where: str) -> dict[str, Any]:
    """The official config.json of an InternVLConfig, without remote code; `image_token_id` is an addition of ours."""
    _same(config, {
        "downsample_ratio": 0.5, "projector_hidden_act": "gelu", "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }, where)  # fmt: skip
    vision, llm = vision_to_official(config.vision_config, where), text_to_official(config.text_config)
    return {
        "architectures": ["InternVLChatModel"], "model_type": CHAT,
        "vision_config": vision | {"torch_dtype": dtype}, "llm_config": llm | {"torch_dtype": dtype},
        "downsample_ratio": 0.5, "ps_version": "v2", "select_layer": -1, "template": TEMPLATE,
        "force_image_size": vision["image_size"], "dynamic_image_size": True, "use_thumbnail": True,
        "min_dynamic_patch": 1, "max_dynamic_patch": 12, "pad2square": False,
        "use_backbone_lora": 0, "use_llm_lora": 0, "tie_word_embeddings": False,
        "hidden_size": llm["hidden_size"], "image_token_id": config.image_token_id, "torch_dtype": dtype,
    }  # fmt: skip


def _built(config_class: Any, values: dict[str, Any], where: str) -> Any:
    from huggingface_hub.errors import StrictDataclassError

    try:
        return config_class(**values)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"config.json cannot be used: {error}", where=where) from error


def _same(config: Any, wanted: dict[str, Any], where: str) -> None:
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise _refused(
                f"{name} {getattr(config, name)!r}, which the official layout cannot say", repr(value), where
            )


def _refused(found: str, wanted: str, where: str) -> CheckpointError:
    return CheckpointError(f"the configuration has {found}", where=where, remedy=f"it must be {wanted}")
