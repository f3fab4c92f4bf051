"""Names and tensors of the official `internvl_chat` layout and of Hugging Face's, both ways.

The official layout is that of OpenGVLab/InternVL, commit 2410d1dbf208 (`vision_model.`, `mlp1.`, `language_model.`);
Hugging Face's is `InternVLForConditionalGeneration.state_dict()`. Invariants: every official tensor is one tensor
there, or exactly a query, a key and a value; both ways only rows move, so that export and import give the same bits in
the same dtype. A plan of names follows from the model alone, so what a checkpoint lacks or adds is known from headers.

Fused rows: the ViT's `attn.qkv` is three equal blocks; InternLM2's `attention.wqkv` holds for every key-value head its
group of query heads, then its key, then its value (modeling_internlm2.py), [kv_head, group + 2, head_dim].
InternLM2 is Llama otherwise: w1 is the gate, w2 the down, w3 the up projection.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modeling.tensors import TensorFolder

# (official, Hugging Face): what a name starts with
_PARTS = (
    ("vision_model.", "model.vision_tower."),
    ("mlp1.0.", "model.multi_modal_projector.layer_norm."),
    ("mlp1.1.", "model.multi_modal_projector.linear_1."),
    ("mlp1.3.", "model.multi_modal_projector.linear_2."),
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
)
# (official, Hugging Face): what is replaced within the names of a part; going to Hugging Face from first to last
_VISION = (
    ("embeddings.class_embedding", "embeddings.cls_token"),
    ("embeddings.patch_embedding.", "embeddings.patch_embeddings.projection."),
    ("embeddings.position_embedding", "embeddings.position_embeddings"),
    ("encoder.layers.", "encoder.layer."),
    (".attn.", ".attention."),
    (".attention.proj.", ".attention.projection_layer."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".ls1", ".lambda_1"),
    (".ls2", ".lambda_2"),
)
_INTERNLM2 = (
    ("language_model.model.tok_embeddings.", "language_model.model.embed_tokens."),
    ("language_model.output.", "language_model.lm_head."),
    (".attention.", ".self_attn."),
    (".self_attn.wo.", ".self_attn.o_proj."),
    (".feed_forward.w1.", ".mlp.gate_proj."),
    (".feed_forward.w2.", ".mlp.down_proj."),
    (".feed_forward.w3.", ".mlp.up_proj."),
    (".attention_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
)
_QKV = (".q_proj.", ".k_proj.", ".v_proj.")


def official_name(name: str, internlm2: bool) -> str:
    """Where a Hugging Face tensor is in the official layout. internlm2: whether the language model has its names."""
    for official, ours in _PARTS:
        if name.startswith(ours):
            name = official + name.removeprefix(ours)
            break
    vision = name.startswith("vision_model.")
    if vision or (internlm2 and name.startswith("language_model.")):
        for part in _QKV:
            name = name.replace(part, ".qkv." if vision else ".wqkv.")
        for official, ours in reversed(_VISION if vision else _INTERNLM2):
            name = name.replace(ours, official)
    return name


def plan(names: Iterable[str], internlm2: bool) -> dict[str, tuple[str, ...]]:
    """Official name -> the Hugging Face names it is made of: one, or query, key, value. names: a state_dict's."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(official_name(name, internlm2), []).append(name)
    return {official: tuple(sorted(parts, key=_place)) for official, parts in found.items()}


def _place(name: str) -> int:
    return next((place for place, part in enumerate(_QKV) if part in name), 0)


def canonical_name(name: str) -> str:
    """A tensor's name in `state_dict()`, from any of the names that transformers has written it to disk under."""
    name = name.removeprefix("model.")
    if name.startswith("language_model.lm_head."):
        name = name.removeprefix("language_model.")
    if name.startswith("language_model.model."):
        name = "language_model." + name.removeprefix("language_model.model.")
    return name if name.startswith("lm_head.") else "model." + name


def split(name: str, tensor: Tensor, text: Any) -> list[Tensor]:
    """The tensors of an official one, in the order of `plan`. text: the language model's configuration (Llama's)."""
    if ".attn.qkv." in name:
        return [part.clone() for part in tensor.chunk(3)]
    if ".attention.wqkv." not in name:
        return [tensor]
    rows = tensor.view(text.num_key_value_heads, -1, text.head_dim, *tensor.shape[1:])
    query, key, value = rows[:, :-2].flatten(0, 2), rows[:, -2].flatten(0, 1), rows[:, -1].flatten(0, 1)
    return [query.clone(), key.clone(), value.clone()]


def fuse(name: str, parts: Sequence[Tensor], text: Any) -> Tensor:
    """The inverse of `split`."""
    if len(parts) == 1:
        return parts[0]
    if ".attention.wqkv." not in name:
        return torch.cat(list(parts))
    heads = [part.view(text.num_key_value_heads, -1, text.head_dim, *part.shape[1:]) for part in parts]
    return torch.cat(heads, dim=1).flatten(0, 2)


def fused_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of the official tensor that parts of these shapes make."""
    return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]


def read_official(
    files: TensorFolder, shapes: Mapping[str, tuple[int, ...]], text: Any, internlm2: bool
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of files with official names. shapes: a state_dict's, by Hugging Face name.

    Raises CheckpointError with the list of keys that do not fit, before a tensor is read.
    """
    names = plan(shapes, internlm2)
    files.check({name: fused_shape([shapes[part] for part in parts]) for name, parts in names.items()})
    return (pair for name, tensor in files for pair in zip(names[name], split(name, tensor, text), strict=True))
