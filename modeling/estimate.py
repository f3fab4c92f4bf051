"""What a model and a training step cost, before anything is allocated: parameters, FLOPs, bytes.

Invariant: counted, not guessed. Parameters are those of the real module tree on torch's meta device; saved activations
are what autograd keeps in a real forward pass there, of one and of two layers, extended to all. FLOPs are those of what
a stage differentiates: a frozen part through which no gradient flows costs its forward alone, one that passes a
gradient on costs twice that, one that trains three times (arXiv 2412.05271 §3.2 names what each stage trains).
Recomputation is no useful work and is not in `step_flops`.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from modeling.freeze import PREFIXES, module_of, set_trainable

HEAD_CHUNK = 4096  # positions whose logits exist at a time (modeling/loss.py)
OVERHEAD = 1.1  # allocator blocks, buffers of collectives
COMPILED = 0.92  # of what a step saves for its backward pass a compiled one saves at most: .73 to .91 on an H200
# Dense bf16 FLOPs per second of one GPU, from its maker's data sheet; by a part of the name that CUDA gives it
PEAK = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12}


@dataclass(frozen=True)
class Sizes:
    """parameters, linear: by module (vit, mlp, language): all of them, and those in matrix products but the head's and
    the patch embedding's.

    width: of the attention, heads × head size, by module; layers likewise.
    """

    parameters: dict[str, int]
    linear: dict[str, int]
    width: dict[str, int]
    layers: dict[str, int]
    hidden: int
    vocabulary: int
    patches: int  # of a tile, with the class token
    embedding: int  # weights of the patch embedding, whose input needs no gradient
    tokens_per_tile: int

    @property
    def total(self) -> int:
        return sum(self.parameters.values())

    def trained(self, train: Iterable[str]) -> int:
        return sum(self.parameters[module] for module in train)


def skeleton(vision: dict[str, Any], language: dict[str, Any], layers: int | None = None) -> Any:
    """InternVLForConditionalGeneration on the meta device: shapes without memory. layers: of both towers, if not all.

    vision, language: configuration fields, as presets.sizes() gives them.
    """
    from transformers import AutoConfig, InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig

    from modeling.presets import DOWNSAMPLE

    cut = {} if layers is None else {"num_hidden_layers": layers}
    left_out = ("model_type", "tokenizer", "layer_types", "architectures", "tie_word_embeddings")
    text = {key: value for key, value in language.items() if key not in left_out} | cut
    tower: dict[str, Any] = {key: value for key, value in vision.items() if key not in left_out}
    tower |= cut | {"use_mean_pooling": True}
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**tower),
        text_config=AutoConfig.for_model(
            language["model_type"], **{"vocab_size": 512, **text, "tie_word_embeddings": False}
        ),
        image_token_id=0,
        image_seq_length=_tokens_per_tile(vision),
        downsample_ratio=DOWNSAMPLE,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return InternVLForConditionalGeneration(config)


def _side(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)


def _tokens_per_tile(vision: dict[str, Any]) -> int:
    return (_side(vision.get("image_size", 448)) // _side(vision.get("patch_size", 14)) // 2) ** 2


def measure(model: Any) -> Sizes:
    """The sizes of a model, on any device."""
    parameters = dict.fromkeys(PREFIXES, 0)
    for name, parameter in model.named_parameters():
        parameters[module_of(name)] += parameter.numel()
    linear = dict.fromkeys(PREFIXES, 0)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            linear[module_of(name + ".")] += module.weight.numel()
    config: Any = model.config
    vision, text = config.vision_config, config.text_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Sizes(
        parameters, linear,
        {"vit": vision.hidden_size, "mlp": 0, "language": head * text.num_attention_heads},
        {"vit": vision.num_hidden_layers, "mlp": 0, "language": text.num_hidden_layers},
        text.hidden_size, text.vocab_size, (_side(vision.image_size) // _side(vision.patch_size)) ** 2 + 1,
        model.model.vision_tower.embeddings.patch_embeddings.projection.weight.numel(), config.image_seq_length,
    )  # fmt: skip


def step_flops(
    sizes: Sizes, train: Sequence[str], *, tokens: float, squares: float, supervised: float, tiles: float
) -> float:
    """Useful floating-point operations, forward and backward. squares: sum of the squared lengths of the samples.

    A multiply-add counts as two. Norms, activations and the optimizer's update are left out (under 1 %).
    """
    forward = {
        "vit": tiles * 2 * sizes.linear["vit"] * sizes.patches,
        "mlp": tiles * 2 * sizes.linear["mlp"] * sizes.tokens_per_tile,
        "language": tokens * 2 * sizes.linear["language"],
        "head": supervised * 2 * sizes.vocabulary * sizes.hidden,
    }
    attention = {
        "vit": tiles * 4 * sizes.patches**2 * sizes.width["vit"] * sizes.layers["vit"],
        "language": squares * 2 * sizes.width["language"] * sizes.layers["language"],  # causal: half of it
    }
    embedding = tiles * 2 * sizes.embedding * (sizes.patches - 1) * (2 if "vit" in train else 1)
    weights = {**{module: float(module in train) for module in PREFIXES}, "head": float("language" in train)}
    inputs = {  # whether a gradient leaves the module towards what trains before it
        "vit": float("vit" in train), "mlp": float("vit" in train), "language": 1.0, "head": 1.0,
    }  # fmt: skip
    total = sum(work * (1 + weights[module] + inputs[module]) for module, work in forward.items())
    return embedding + total + sum(work * (1 + 2 * inputs[module]) for module, work in attention.items())


def peak_flops(device_name: str, precision: str) -> float | None:
    """What a GPU can do at best; None where it is not known, for CPUs and for fp32 among others."""
    known = [peak for name, peak in PEAK.items() if name in device_name]
    return known[0] if known and precision == "bf16" else None


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float

    @property
    def total(self) -> float:
        return OVERHEAD * (self.weights + self.gradients + self.optimizer + self.activations + self.head)


def state_bytes(
    sizes: Sizes, train: Sequence[str], precision: str, zero: int, world: int
) -> tuple[float, float, float]:
    """(weights, gradients, optimizer) of one rank under a ZeRO stage (arXiv 1910.02054, §5).

    bf16: gradients are accumulated in fp32, the optimizer keeps fp32 masters; ZeRO 0 and 1 run as ZeRO 2 (engine.py).
    """
    if precision == "bf16":
        zero = max(zero, 2)
    size, trained = (2 if precision == "bf16" else 4), sizes.trained(train)
    masters = 4 if precision == "bf16" or zero else 0  # ZeRO 0 in fp32 updates the weights themselves
    weights = sizes.total * size / (world if zero == 3 else 1)
    gradients = trained * (4 + (2 if precision == "bf16" else 0)) / (world if zero >= 2 else 1)
    return weights, gradients, trained * (8 + masters) / (world if zero >= 1 else 1)


def activation_bytes(
    vision: dict[str, Any], language: dict[str, Any], train: Sequence[str], precision: str, *,
    lengths: Sequence[int], tiles: int, checkpointed: Sequence[str] = (),
) -> tuple[float, float]:  # fmt: skip
    """(saved, head): bytes that autograd keeps for the backward pass of one row, and of its largest chunk of logits.

    lengths: tokens of each sample of the row, with its tiles' tokens. checkpointed: modules (vit, language) that keep
    only the input of each layer; the layer that is being recomputed is counted once.
    """
    depth = {"vit": vision["num_hidden_layers"], "language": language["num_hidden_layers"]}
    one, two = (_kept(json.dumps([vision, language, n, train, precision, lengths, tiles])) for n in (1, 2))
    size = 2 if precision == "bf16" else 4
    inputs = {
        "vit": tiles * _patches(vision) * vision["hidden_size"] * size,
        "language": sum(lengths) * language["hidden_size"] * size,
    }
    total = sum(one.values())
    for module in ("vit", "language"):
        layer = two[module] - one[module]
        if module in checkpointed and layer:
            total += depth[module] * inputs[module]  # and the one of `one` is the layer recomputed
        else:
            total += (depth[module] - 1) * layer
    logits = min(HEAD_CHUNK, sum(lengths)) * language.get("vocab_size", 512) * (size + 2 * 4)
    return float(total), float(logits)


def _patches(vision: dict[str, Any]) -> int:
    return (_side(vision.get("image_size", 448)) // _side(vision.get("patch_size", 14))) ** 2 + 1


class _Flash(torch.autograd.Function):
    """What a fused attention kernel keeps: query, key, value, output, and a log-sum per query and head."""

    @staticmethod
    def forward(ctx: Any, query, key, value):
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out


def _flash(module: nn.Module, query, key, value, attention_mask, **_: Any):
    return _Flash.apply(query, key, value).transpose(1, 2), None  # pyright: ignore[reportAttributeAccessIssue]


@cache  # `plan` asks for a stage's row again with every module it might recompute
def _kept(arguments: str) -> dict[str, int]:
    return _saved(*json.loads(arguments))


def _saved(vision, language, layers, train, precision, lengths, tiles) -> dict[str, int]:
    """Bytes kept by a forward pass of `layers` layers in both towers, by the tower in which they were kept."""
    from transformers import AttentionInterface

    from modeling.attention import Segments
    from modeling.batches import Batch, Counts
    from modeling.internvl import TrainingLoss

    AttentionInterface.register("stageline_estimate", _flash)
    model = skeleton(vision, language, layers)
    set_trainable(model, train)
    model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    loss = TrainingLoss(model, tuple(train))
    for part in (model.model.vision_tower, model.model.language_model):
        part.config._attn_implementation = "stageline_estimate"
    kept: dict[str, dict[int, int]] = {"vit": {}, "language": {}}
    where = ["vit"]
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[where[0]][storage._cdata] = max(kept[where[0]].get(storage._cdata, 0), storage.nbytes())
            alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []  # so that no address is used twice
    length = sum(lengths)
    with torch.device("meta"):
        ids = torch.zeros(1, length, dtype=torch.long)
        positions = torch.zeros(0, dtype=torch.long)  # the head is counted apart
        side = _side(vision.get("image_size", 448))
        batch = Batch(
            input_ids=ids, position_ids=torch.zeros(1, length, dtype=torch.long),
            segments=Segments((), positions, positions, length), positions=positions, targets=positions,
            weights=torch.zeros(0), uniforms=None, counts=Counts(),
            pixels=torch.zeros(tiles, 3, side, side) if tiles else None,
        )  # fmt: skip
    hook = model.model.language_model.register_forward_pre_hook(lambda *_: where.__setitem__(0, "language"))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(batch)
    hook.remove()
    return {module: sum(sizes.values()) for module, sizes in kept.items()}


def memory(
    sizes: Sizes, vision: dict[str, Any], language: dict[str, Any], train: Sequence[str], *, precision: str, zero: int,
    world: int, max_tokens: int, max_tiles: int, checkpointed: Sequence[str] = (), fused: bool = False,
) -> Memory:  # fmt: skip
    """Of one rank with a full row: max_tokens tokens, max_tiles tiles. fused: compiled layers and loss (kernels.py)."""
    saved, head = activation_bytes(
        vision, language, train, precision, lengths=[max_tokens], tiles=max_tiles, checkpointed=checkpointed
    )
    if fused:  # logits and their gradient, and no fp32 copies
        size = 2 if precision == "bf16" else 4
        saved, head = COMPILED * saved, head * 2 * size / (size + 2 * 4)
    return Memory(*state_bytes(sizes, train, precision, zero, world), saved, head)


def choose_checkpointing(fits: float, cost_of: Any) -> tuple[str, ...] | None:
    """The fewest modules to checkpoint so that a step needs at most `fits` bytes; None where nothing suffices.

    cost_of(modules) -> Memory. The ViT first: its layers keep most per tile and cost least to run again.
    """
    for modules in ((), ("vit",), ("language",), ("vit", "language")):
        if cost_of(modules).total <= fits:
            return modules
    return None


def human(count: float) -> str:
    """'8.1B', '304M', '12k'."""
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            value = count / limit
            return f"{value:.1f}{suffix}" if value < 100 else f"{math.floor(value + 0.5)}{suffix}"
    return str(int(count))
