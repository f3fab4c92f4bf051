"""What `model:` names: presets, or folders in Hugging Face layout or of the official InternViT and InternLM2.

A preset fixes sizes only; weights start fresh. A folder gives its own config.json and weights. Either way
`resolve` answers, without building anything, what data preparation needs: tokenizer, tile size, tokens per tile.
The published family: arXiv 2412.05271, Tables 1 and 2, and the config.json of the models it starts from; a folder that
is not there yet but has the name of a published one has known sizes (`sizes`), so that an experiment can be planned
before anything was fetched.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling import remote
from modeling.errors import UserError
from modeling.official import CHAT, INTERNLM2, VISION_TYPE, text_to_hf, vision_to_hf

# InternVLVisionConfig fields. 300M-style (LayerNorm, biased qkv, no qk-norm, no final norm after the last block).
VISION: dict[str, dict[str, Any]] = {
    "internvit-300m": dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, image_size=448,
        patch_size=14,
    ),
    "internvit-6b": dict(  # 45 layers: the last three of 48 are cut off (Table 1)
        hidden_size=3200, num_hidden_layers=45, num_attention_heads=25, intermediate_size=12800, image_size=448,
        patch_size=14, norm_type="rms_norm", use_qk_norm=True, attention_bias=False, layer_scale_init_value=0.1,
    ),
    "tiny-vit": dict(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=288, image_size=32, patch_size=4,
    ),
    "tiny-vit-s": dict(  # tiny-vit, smaller and larger: one tile, one number of tokens, so one prepared mixture
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=144, image_size=32, patch_size=4,
    ),
    "tiny-vit-l": dict(
        hidden_size=160, num_hidden_layers=4, num_attention_heads=4, intermediate_size=480, image_size=32, patch_size=4,
    ),
    "micro-vit": dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
    ),
}  # fmt: skip


def _qwen2_5(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> dict[str, Any]:
    return dict(
        model_type="qwen2", tokenizer=None, vocab_size=151674, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=intermediate,
        max_position_embeddings=32768, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip


def _internlm2_5(hidden: int, layers: int, heads: int, intermediate: int) -> dict[str, Any]:
    """On the Llama architecture, onto which InternLM2 maps without a change of result."""
    return dict(
        model_type="llama", tokenizer=None, vocab_size=92553, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, intermediate_size=intermediate,
        max_position_embeddings=32768, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip


# Fields of Qwen2Config, or of `model_type`'s. tokenizer: what a fresh language model is born with; None: it has to be
# given. vocab_size: with the nine image tokens, where the tokenizer is not there to be counted.
LANGUAGE: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _qwen2_5(896, 24, 14, 2, 4864),
    "qwen2.5-3b": _qwen2_5(2048, 36, 16, 2, 11008),
    "qwen2.5-32b": _qwen2_5(5120, 64, 40, 8, 27648),
    "qwen2.5-72b": _qwen2_5(8192, 80, 64, 8, 29568),
    "internlm2.5-1.8b": _internlm2_5(2048, 24, 16, 8192),
    "internlm2.5-7b": _internlm2_5(4096, 32, 32, 14336),
    "internlm2.5-20b": _internlm2_5(6144, 48, 48, 16384),
    "tiny-qwen2": dict(
        tokenizer="tiny-bpe", hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=352, max_position_embeddings=4096,
    ),
    "tiny-qwen2-s": dict(
        tokenizer="tiny-bpe", hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=176, max_position_embeddings=4096,
    ),
    "tiny-qwen2-l": dict(
        tokenizer="tiny-bpe", hidden_size=192, num_hidden_layers=5, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=528, max_position_embeddings=4096,
    ),
    "micro-qwen2": dict(
        tokenizer="tiny-bpe", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, max_position_embeddings=4096,
    ),
}  # fmt: skip
# Released folders, by the last part of their name, whatever release of the weights.
PUBLISHED = {
    "InternViT-300M-448px": "internvit-300m", "InternViT-300M-448px-V2_5": "internvit-300m",
    "InternViT-6B-448px-V1-5": "internvit-6b", "InternViT-6B-448px-V2_5": "internvit-6b",
    "Qwen2.5-0.5B-Instruct": "qwen2.5-0.5b", "Qwen2.5-3B-Instruct": "qwen2.5-3b",
    "Qwen2.5-32B-Instruct": "qwen2.5-32b", "Qwen2.5-72B-Instruct": "qwen2.5-72b",
    "internlm2_5-1_8b-chat": "internlm2.5-1.8b", "internlm2_5-7b-chat": "internlm2.5-7b",
    "internlm2_5-20b-chat": "internlm2.5-20b",
}  # fmt: skip
TOKENIZERS = ("bytes", "tiny-bpe")
DOWNSAMPLE = 0.5  # pixel shuffle: four patches become one token (official `down_sample_ratio`)


@dataclass(frozen=True)
class Resolved:
    """The parts of a model, by configuration. `*_folder` is where weights come from, None for fresh ones; whole: the
    folder of all of them."""

    vision: dict[str, Any]
    language: dict[str, Any]
    tokenizer_name: str
    tile_size: int
    vision_folder: Path | None
    language_folder: Path | None
    whole: Path | None = None

    @property
    def tokens_per_tile(self) -> int:
        patch = self.vision["patch_size"]
        patch = patch[0] if isinstance(patch, list | tuple) else patch
        return int((self.tile_size // patch * DOWNSAMPLE) ** 2)

    def tokenizer(self):
        """The tokenizer with the nine InternVL image tokens added."""
        from modeling.template import SPECIAL_TOKENS
        from modeling.tokenizer import build_tokenizer, read_tokenizer

        if self.tokenizer_name in TOKENIZERS:
            return build_tokenizer(self.tokenizer_name)
        tokenizer = read_tokenizer(Path(self.tokenizer_name))
        if tokenizer is None:
            raise UserError(
                "the folder has no tokenizer", where=self.tokenizer_name,
                remedy="name a preset or a folder that has one as the tokenizer",
            )  # fmt: skip
        tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
        return tokenizer


def folders(params: Any, weights: bool = False) -> dict[str, Path]:
    """The parts of `model:` that are folders rather than presets, by field name: local ones, and copies of those on
    S3 (remote.py), with weights only where these are asked for."""
    out = {}
    for part, path in given(params).items():
        out[part] = remote.model_folder(path, params.endpoint_url, weights and part != "tokenizer")
    return out


def as_planned(params: Any) -> Any:
    """The same for workers, which take no other state of a folder on S3 than this process saw."""
    update = {part: remote.as_planned(path, params.endpoint_url) for part, path in given(params).items()}
    return params.model_copy(update=update)


def given(params: Any) -> dict[str, str]:
    """The same as they are given."""
    if params.folder:
        return {"folder": params.folder}
    named: dict[str, tuple[str, Any]] = {"vision": (params.vision, VISION), "language": (params.language, LANGUAGE)}
    if params.tokenizer:
        named["tokenizer"] = (params.tokenizer, TOKENIZERS)
    return {field: value for field, (value, presets) in named.items() if value not in presets}


def vision_fields(preset: str) -> dict[str, Any]:
    """InternVLVisionConfig's of a preset."""
    return {"attention_bias": True, "layer_scale_init_value": 1.0, **VISION[preset]}


def language_fields(preset: str) -> dict[str, Any]:
    """Those of a preset: its model_type's config, and `tokenizer`."""
    return {"model_type": "qwen2", **LANGUAGE[preset]}


def sizes(params: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(vision, language) configuration fields as far as they are known: presets, folders that are there, folders with
    the name of a published model. None where one is unknown."""
    paths, out = folders(params), []
    if "folder" in paths:
        return _of_whole(paths["folder"], params.folder) if (paths["folder"] / "config.json").is_file() else None
    for field, value, fields in (
        ("vision", params.vision, vision_fields), ("language", params.language, language_fields)
    ):  # fmt: skip
        if field not in paths:
            out.append(fields(value))
        elif (paths[field] / "config.json").is_file():
            known = fields(PUBLISHED[paths[field].name]) if paths[field].name in PUBLISHED else {}
            rows = {"vocab_size": known["vocab_size"]} if "vocab_size" in known else {}  # the file counts padding rows
            out.append(_in_hf_words(_read_config(paths[field], value, field, ()), value) | rows)
        elif paths[field].name in PUBLISHED:
            out.append(fields(PUBLISHED[paths[field].name]))
        else:
            return None
    return out[0], out[1]


def _of_whole(folder: Path, named: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(vision, language) fields of a whole model, which the user knows as `named`. Raises UserError for another model
    or layout."""
    config = _read_config(folder, named, "folder", ())
    if config.get("model_type") != "internvl" or not {"vision_config", "text_config"} <= config.keys():
        official = config.get("model_type") == CHAT
        raise UserError(
            f"'{named}' holds {'an InternVL in the official layout' if official else 'no InternVL model'}",
            where="model.folder", remedy=f"run `stageline import {named} --output DIR` and give DIR",
        )  # fmt: skip
    return config["vision_config"], config["text_config"]


def _in_hf_words(config: dict[str, Any], where: str) -> dict[str, Any]:
    if config.get("model_type") == VISION_TYPE:
        return vision_to_hf(config, where)
    return text_to_hf(config, where).to_dict() if config.get("model_type") == INTERNLM2 else config


def _read_config(folder: Path, named: str, field: str, presets) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"'{named}' is neither a preset nor a folder with a config.json",
            where=f"model.{field}",
            remedy=f"give a Hugging Face folder or one of the presets {', '.join(presets)}",
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        config = error
    if not isinstance(config, dict):
        raise UserError(
            f"{named}/config.json is not a JSON object: {config}",
            where=f"model.{field}",
            remedy="fetch the folder again",
        )
    return config


def resolve(params: Any, weights: bool = False) -> Resolved:
    """Read presets and config files. params: stages.params.ModelParams; weights: they will be read. Raises UserError
    for unknown names."""
    paths = folders(params, weights)
    vision_folder, language_folder, whole = paths.get("vision"), paths.get("language"), paths.get("folder")
    if whole:
        (vision, language), tokenizer = _of_whole(whole, params.folder), str(whole)
        return _resolved(params, vision, language, tokenizer, None, None, whole)
    if vision_folder:
        vision = _read_config(vision_folder, params.vision, "vision", VISION)
        if vision.get("model_type") == VISION_TYPE:
            vision = vision_to_hf(vision, params.vision)
        elif vision.get("model_type") != "internvl_vision":
            raise UserError(
                f"'{params.vision}' holds a model of type {vision.get('model_type')!r}, not 'internvl_vision'",
                where="model.vision", remedy="give a vision tower alone, in Hugging Face or official InternVL layout",
            )  # fmt: skip
    else:
        vision = vision_fields(params.vision)
    if language_folder:
        language = _read_config(language_folder, params.language, "language", LANGUAGE)
        if language.get("model_type") in ("internvl", CHAT):
            raise UserError(
                f"'{params.language}' holds a whole InternVL model",
                where="model.language", remedy="give a language model alone",
            )  # fmt: skip
        tokenizer = str(paths.get("tokenizer") or params.tokenizer or language_folder)
    else:
        language = language_fields(params.language)
        tokenizer = str(paths["tokenizer"]) if "tokenizer" in paths else params.tokenizer or language.pop("tokenizer")
        language.pop("tokenizer", None)
        if tokenizer is None:
            raise UserError(
                f"the preset '{params.language}' has no tokenizer of its own",
                where="model.tokenizer", remedy="add 'tokenizer:' with the folder of one",
            )  # fmt: skip
    return _resolved(params, vision, language, tokenizer, vision_folder, language_folder)


def _resolved(params: Any, vision: dict, language: dict, tokenizer: str, *weights: Path | None) -> Resolved:
    size = vision.get("image_size", 448)
    size = params.tile_size or (size[0] if isinstance(size, list | tuple) else size)
    patch = vision.get("patch_size", 14)
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    if size % (2 * patch):
        raise UserError(
            f"tile_size {size} is not a multiple of twice the patch size {patch}",
            where="model.tile_size", remedy=f"use a multiple of {2 * patch}",
        )  # fmt: skip
    return Resolved(dict(vision, patch_size=patch), language, tokenizer, size, *weights)
