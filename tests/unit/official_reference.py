"""The official forward in plain torch, from the formulas alone, on tensors under official names.

Independent of the project's code and of transformers' models: InternViT with LayerNorm or RMSNorm and QK-norm over the
full width, pixel shuffle v2, `mlp1`, and InternLM2 with its fused wqkv (arXiv 2412.05271 §3; modeling_intern_vit.py and
modeling_internlm2.py of OpenGVLab/InternVL, commit 2410d1dbf208). fp32, one sample, no padding.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x / (x.square().mean(-1, keepdim=True) + eps).sqrt())


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    out = x @ w[f"{name}.weight"].T
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """[..., heads, L, d] -> [..., L, heads · d]"""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    out = (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1) @ v
    return out.transpose(-2, -3).flatten(-2)


def vision(w: Weights, config: dict, pixels: Tensor) -> Tensor:
    """pixels [tiles, 3, S, S] -> [tiles, 1 + patches, width], class token first"""
    eps, heads, width = config["layer_norm_eps"], config["num_attention_heads"], config["hidden_size"]

    def norm(name: str, x: Tensor) -> Tensor:
        if config["norm_type"] == "rms_norm":
            return rms_norm(x, w[f"{name}.weight"], eps)
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], eps)

    at = "vision_model.embeddings"
    patches = F.conv2d(
        pixels, w[f"{at}.patch_embedding.weight"], w[f"{at}.patch_embedding.bias"], stride=config["patch_size"]
    ).flatten(2).transpose(1, 2)  # fmt: skip
    x = torch.cat([w[f"{at}.class_embedding"].expand(len(pixels), 1, width), patches], 1)
    x = x + w[f"{at}.position_embedding"]
    for layer in range(config["num_hidden_layers"]):
        at = f"vision_model.encoder.layers.{layer}"
        q, k, v = linear(w, f"{at}.attn.qkv", norm(f"{at}.norm1", x)).split(width, -1)
        if config["qk_normalization"]:
            q, k = (rms_norm(t, w[f"{at}.attn.{n}_norm.weight"], eps) for n, t in (("q", q), ("k", k)))
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        x = x + w[f"{at}.ls1"] * linear(w, f"{at}.attn.proj", attend(q, k, v))
        hidden = F.gelu(linear(w, f"{at}.mlp.fc1", norm(f"{at}.norm2", x)))
        x = x + w[f"{at}.ls2"] * linear(w, f"{at}.mlp.fc2", hidden)
    return x


def features(w: Weights, config: dict, pixels: Tensor) -> Tensor:
    """[tiles, patches / 4, language width]: a token is a square of four patches, its columns within a row first"""
    x = vision(w, config, pixels)[:, 1:]
    side = int(x.shape[1] ** 0.5)
    grid = x.unflatten(1, (side, side))
    parts = [grid[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]
    x = torch.cat(parts, -1).flatten(1, 2)
    x = F.layer_norm(x, x.shape[-1:], w["mlp1.0.weight"], w["mlp1.0.bias"], 1e-5)
    return linear(w, "mlp1.3", F.gelu(linear(w, "mlp1.1", x)))


def rotate(x: Tensor, theta: float) -> Tensor:
    """x [heads, L, d]; the two halves of d are the real and the imaginary part"""
    length, half = x.shape[1], x.shape[2] // 2
    angles = torch.outer(torch.arange(length).float(), theta ** (-torch.arange(half).float() / half))
    real, imaginary = x[..., :half], x[..., half:]
    return torch.cat(
        [real * angles.cos() - imaginary * angles.sin(), imaginary * angles.cos() + real * angles.sin()], -1
    )


def internlm2(w: Weights, config: dict, x: Tensor) -> Tensor:
    """embeddings [L, width] -> logits [L, vocabulary]"""
    eps, kv_heads = config["rms_norm_eps"], config["num_key_value_heads"]
    group = config["num_attention_heads"] // kv_heads
    mask = torch.ones(len(x), len(x)).tril().bool()
    for layer in range(config["num_hidden_layers"]):
        at = f"language_model.model.layers.{layer}"
        h = linear(w, f"{at}.attention.wqkv", rms_norm(x, w[f"{at}.attention_norm.weight"], eps))
        h = h.unflatten(-1, (kv_heads, group + 2, -1)).permute(1, 2, 0, 3)  # [kv_head, group + 2, L, d]
        q, k, v = h[:, :group].flatten(0, 1), h[:, group], h[:, group + 1]
        q, k = rotate(q, config["rope_theta"]), rotate(k, config["rope_theta"])
        k, v = (torch.stack([head for head in t for _ in range(group)]) for t in (k, v))
        x = x + linear(w, f"{at}.attention.wo", attend(q, k, v, mask))
        h = rms_norm(x, w[f"{at}.ffn_norm.weight"], eps)
        gate, up = linear(w, f"{at}.feed_forward.w1", h), linear(w, f"{at}.feed_forward.w3", h)
        x = x + linear(w, f"{at}.feed_forward.w2", gate * gate.sigmoid() * up)
    return linear(w, "language_model.output", rms_norm(x, w["language_model.model.norm.weight"], eps))


def qwen2(w: Weights, config: dict, x: Tensor) -> Tensor:
    """embeddings [L, width] -> logits [L, vocabulary]"""
    eps, kv_heads, heads = config["rms_norm_eps"], config["num_key_value_heads"], config["num_attention_heads"]
    mask = torch.ones(len(x), len(x)).tril().bool()
    for layer in range(config["num_hidden_layers"]):
        at = f"language_model.model.layers.{layer}"
        h = rms_norm(x, w[f"{at}.input_layernorm.weight"], eps)
        q, k, v = (linear(w, f"{at}.self_attn.{n}_proj", h).unflatten(-1, (count, -1)).transpose(0, 1)
                   for n, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)))  # fmt: skip
        q, k = rotate(q, config["rope_theta"]), rotate(k, config["rope_theta"])
        k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (k, v))
        x = x + linear(w, f"{at}.self_attn.o_proj", attend(q, k, v, mask))
        h = rms_norm(x, w[f"{at}.post_attention_layernorm.weight"], eps)
        gate, up = linear(w, f"{at}.mlp.gate_proj", h), linear(w, f"{at}.mlp.up_proj", h)
        x = x + linear(w, f"{at}.mlp.down_proj", gate * gate.sigmoid() * up)
    return linear(w, "language_model.lm_head", rms_norm(x, w["language_model.model.norm.weight"], eps))


def logits(w: Weights, config: dict, ids: Tensor, pixels: Tensor, image_token: int) -> Tensor:
    """ids [L], pixels [tiles, 3, S, S] -> [L, vocabulary]. config: the official config.json."""
    llm = config["llm_config"]
    old = llm["model_type"] == "internlm2"
    x = w[f"language_model.model.{'tok_embeddings' if old else 'embed_tokens'}.weight"][ids]
    if len(pixels):
        x = x.clone()
        x[ids == image_token] = features(w, config["vision_config"], pixels).flatten(0, 1)
    return (internlm2 if old else qwen2)(w, llm, x)


def variant(style: str, config: dict, weights: Weights) -> tuple[dict, Weights]:
    """A checkpoint of another style made of the official tiny one's (config, weights), seeded where it has none.

    "6b": RMSNorm, QK-norm, no qkv bias. "internlm2": that language model, with biases and an eps that matters.
    """
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return mean + scale * torch.randn(*shape, generator=generator)

    if style == "6b":
        sizes = {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False}
        gone = (".norm1.bias", ".norm2.bias", ".qkv.bias")
        kept = {name: tensor for name, tensor in weights.items() if not name.endswith(gone)}
        for layer in range(config["vision_config"]["num_hidden_layers"]):
            for name in ("q_norm", "k_norm"):
                kept[f"vision_model.encoder.layers.{layer}.attn.{name}.weight"] = normal(64, scale=0.5, mean=1.5)
        return config | {"vision_config": config["vision_config"] | sizes}, kept
    assert style == "internlm2"
    width, inner, vocabulary, heads, kv_heads = 64, 128, 320, 4, 2
    llm = {
        "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "vocab_size": vocabulary,
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": 2, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 0.01,
        "rope_theta": 500000, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "bias": True, "pad_token_id": 256,
        "bos_token_id": 258, "eos_token_id": 259, "attn_implementation": "flash_attention_2",
        "auto_map": {"AutoModel": "modeling_internlm2.InternLM2ForCausalLM"},
    }  # fmt: skip
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("language_model.")}
    kept["language_model.model.tok_embeddings.weight"] = normal(vocabulary, width)
    kept["language_model.output.weight"] = normal(vocabulary, width, scale=width**-0.5)
    kept["language_model.model.norm.weight"] = normal(width, scale=0.3, mean=1.0)
    fused = (heads + 2 * kv_heads) * width // heads
    for layer in range(2):
        at = f"language_model.model.layers.{layer}"
        for name, rows, columns in (
            ("attention.wqkv", fused, width), ("attention.wo", width, width), ("feed_forward.w1", inner, width),
            ("feed_forward.w3", inner, width), ("feed_forward.w2", width, inner),
        ):  # fmt: skip
            kept[f"{at}.{name}.weight"] = normal(rows, columns, scale=1.5 * columns**-0.5)
            if name.startswith("attention"):
                kept[f"{at}.{name}.bias"] = normal(rows, scale=0.3)
        for name in ("attention_norm", "ffn_norm"):
            kept[f"{at}.{name}.weight"] = normal(width, scale=0.3, mean=1.0)
    return config | {"llm_config": llm}, kept
