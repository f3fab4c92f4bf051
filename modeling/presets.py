"""What `model:` names: tiny presets, or folders in Hugging Face layout or of the official InternViT and InternLM2.

A preset fixes sizes only; weights start fresh. A folder gives its own config.json and weights. Either way
`resolve` answers, without building anything, what data preparation needs: tokenizer, tile size, tokens per tile.
Sizes of the published family: arXiv 2412.05271, Tables 1 and 2.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling.errors import UserError
from modeling.official import CHAT, VISION_TYPE, vision_to_hf

# InternVLVisionConfig fields. 300M-style (LayerNorm, biased qkv, no qk-norm, no final norm after the last block).
VISION: dict[str, dict[str, Any]] = {
    "tiny-vit": dict(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=288, image_size=32, patch_size=4,
    ),
    "micro-vit": dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
    ),
}  # fmt: skip
# Qwen2Config fields, and the tokenizer that a fresh language model is born with.
LANGUAGE: dict[str, dict[str, Any]] = {
    "tiny-qwen2": dict(
        tokenizer="tiny-bpe", hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=352, max_position_embeddings=4096,
    ),
    "micro-qwen2": dict(
        tokenizer="tiny-bpe", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, max_position_embeddings=4096,
    ),
}  # fmt: skip
TOKENIZERS = ("bytes", "tiny-bpe")
DOWNSAMPLE = 0.5  # pixel shuffle: four patches become one token (official `down_sample_ratio`)


@dataclass(frozen=True)
class Resolved:
    """The parts of a model, by configuration. `*_folder` is where weights come from, None for fresh ones."""

    vision: dict[str, Any]
    language: dict[str, Any]
    tokenizer_name: str
    tile_size: int
    vision_folder: Path | None
    language_folder: Path | None

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


def folders(params: Any) -> dict[str, Path]:
    """The parts of `model:` that are folders rather than presets, by field name."""
    named: dict[str, tuple[str, Any]] = {"vision": (params.vision, VISION), "language": (params.language, LANGUAGE)}
    if params.tokenizer:
        named["tokenizer"] = (params.tokenizer, TOKENIZERS)
    return {field: Path(value) for field, (value, presets) in named.items() if value not in presets}


def _read_config(folder: Path, field: str, presets) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"'{folder}' is neither a preset nor a folder with a config.json",
            where=f"model.{field}",
            remedy=f"give a Hugging Face folder or one of the presets {', '.join(presets)}",
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        config = error
    if not isinstance(config, dict):
        raise UserError(
            f"{path} is not a JSON object: {config}", where=f"model.{field}", remedy="fetch the folder again"
        )
    return config


def resolve(params: Any) -> Resolved:
    """Read presets and config files. params: stages.params.ModelParams. Raises UserError for unknown names."""
    paths = folders(params)
    vision_folder, language_folder = paths.get("vision"), paths.get("language")
    if vision_folder:
        vision = _read_config(vision_folder, "vision", VISION)
        if vision.get("model_type") == VISION_TYPE:
            vision = vision_to_hf(vision, str(vision_folder))
        elif vision.get("model_type") != "internvl_vision":
            raise UserError(
                f"'{vision_folder}' holds a model of type {vision.get('model_type')!r}, not 'internvl_vision'",
                where="model.vision", remedy="give a vision tower alone, in Hugging Face or official InternVL layout",
            )  # fmt: skip
    else:
        vision = dict(VISION[params.vision], attention_bias=True, layer_scale_init_value=1.0)
    if language_folder:
        language = _read_config(language_folder, "language", LANGUAGE)
        if language.get("model_type") in ("internvl", CHAT):
            raise UserError(
                f"'{language_folder}' holds a whole InternVL model",
                where="model.language", remedy="give a language model alone",
            )  # fmt: skip
        tokenizer = params.tokenizer or str(language_folder)
    else:
        language = dict(LANGUAGE[params.language], model_type="qwen2")
        tokenizer = params.tokenizer or language["tokenizer"]
        del language["tokenizer"]
    size = vision.get("image_size", 448)
    size = params.tile_size or (size[0] if isinstance(size, list | tuple) else size)
    patch = vision.get("patch_size", 14)
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    if size % (2 * patch):
        raise UserError(
            f"tile_size {size} is not a multiple of twice the patch size {patch}",
            where="model.tile_size", remedy=f"use a multiple of {2 * patch}",
        )  # fmt: skip
    return Resolved(dict(vision, patch_size=patch), language, tokenizer, size, vision_folder, language_folder)
