"""The model: transformers' InternVLForConditionalGeneration, built fresh or loaded, and its training loss.

The library's own module tree is kept, so every stage's result loads with plain transformers (design.md,
"The model and the step"). What differs from its forward is only what is computed: frozen parts run under
no_grad, logits exist at supervised positions only, samples of a packed row are isolated (attention.py).
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig

from modeling import attention, kernels, parts
from modeling.batches import Batch
from modeling.droppath import DropPath
from modeling.errors import CheckpointError
from modeling.layouts import canonical_name
from modeling.loss import weighted_cross_entropy
from modeling.presets import DOWNSAMPLE, TOKENIZERS, Resolved
from modeling.template import IMG_CONTEXT
from modeling.tensors import TensorFolder
from modeling.tiles import IMAGENET_MEAN, IMAGENET_STD
from modeling.tokenizer import read_tokenizer


def build_config(resolved: Resolved, tokenizer) -> InternVLConfig:
    """The configuration of the whole model; vocabulary for the tokenizer, head never tied (as official)."""
    ids: dict[str, Any] = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if resolved.language_folder:
        text = parts.text_config(resolved.language_folder)
        text.vocab_size = len(tokenizer)  # a folder's padding rows are cut, as the official resize does
        text.tie_word_embeddings = False
    else:
        sizes = {key: value for key, value in resolved.language.items() if key not in ("model_type", "vocab_size")}
        ids |= {"bos_token_id": None, "tie_word_embeddings": False, "vocab_size": len(tokenizer)}
        text = AutoConfig.for_model(resolved.language["model_type"], **ids, **sizes)
    vision = InternVLVisionConfig(**{k: v for k, v in resolved.vision.items() if k != "model_type"})
    vision.use_mean_pooling = True  # the official model has no final norm after the last ViT block
    return InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMG_CONTEXT),
        image_seq_length=resolved.tokens_per_tile,
        downsample_ratio=DOWNSAMPLE,
        tie_word_embeddings=False,
    )


def build_model(resolved: Resolved, tokenizer, seed: int) -> InternVLForConditionalGeneration:
    """Fresh weights from `seed`, replaced by those of the vision and language folders where given. fp32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration(build_config(resolved, tokenizer))
        embeddings = model.model.vision_tower.embeddings
        # the library starts these at zero, meant for weights loaded over them; a fresh ViT has to tell patches apart
        nn.init.normal_(embeddings.position_embeddings, std=0.02)
        nn.init.normal_(embeddings.cls_token, std=0.02)
        if resolved.language_folder:
            own = resolved.tokenizer_name not in TOKENIZERS
            known = len(read_tokenizer(Path(resolved.tokenizer_name)) if own else tokenizer)
            _load_language(model, resolved.language_folder, known)
    if resolved.vision_folder:
        tower = parts.vision_tower(resolved.vision_folder)
        missing, unexpected = model.model.vision_tower.load_state_dict(tower.state_dict(), strict=False)
        if missing or unexpected:
            where = str(resolved.vision_folder)
            raise CheckpointError(f"weights do not fit: missing {missing}, unexpected {unexpected}", where=where)
    return model


def _load_language(model: InternVLForConditionalGeneration, folder: Path, known: int) -> None:
    """Copy a language model in. known: tokens of its own tokenizer; those after them are new: their head rows become
    the mean of the known ones, even where a padded vocabulary had rows for them; their input rows stay what they are.
    """
    source = parts.language_model(folder)
    old = source.get_input_embeddings().weight.shape[0]
    state = {name: tensor for name, tensor in source.state_dict().items() if name.startswith("model.")}
    head = source.get_output_embeddings().weight.detach()
    rows = state.pop("model.embed_tokens.weight")
    target = model.model.language_model
    missing, unexpected = target.load_state_dict({k[6:]: v for k, v in state.items()}, strict=False)
    if unexpected or set(missing) - {"embed_tokens.weight"}:
        raise CheckpointError(f"weights do not fit: missing {missing}, unexpected {unexpected}", where=str(folder))
    with torch.no_grad():
        keep = min(old, target.embed_tokens.weight.shape[0])
        target.embed_tokens.weight[:keep] = rows[:keep]
        known = min(known, keep)
        model.lm_head.weight[:known] = head[:known]
        model.lm_head.weight[known:] = head[:known].mean(0)


def take_vision(model: InternVLForConditionalGeneration, folder: Path) -> None:
    """Replace the vision encoder's weights by those of another model in Hugging Face layout: the paper's progressive
    scaling (arXiv 2412.05271 §3.3). Raises CheckpointError where it is another encoder."""
    tower, mark = model.model.vision_tower, "vision_tower."
    state = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                if mark in key:
                    state[key.split(mark, 1)[1]] = file.get_tensor(key)
    own = tower.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or [k for k in own if own[k].shape != state[k].shape]
    if wrong:
        raise CheckpointError(
            f"its vision encoder does not fit this model's: {', '.join(wrong[:8])}", where=str(folder),
            remedy="give 'vision_from' a stage whose model has the same vision preset",
        )  # fmt: skip
    tower.load_state_dict(state)


def take_language(model: InternVLForConditionalGeneration, tokenizer, folder: Path) -> None:
    """Replace the language model, embeddings and head included, by that of another model in Hugging Face layout, whose
    vision encoder may have any size. Raises CheckpointError where it is another one, or its words are others."""
    remedy = "give 'language_from' a stage whose model has the same language preset and tokenizer"
    its = read_tokenizer(Path(folder))
    if its is None or its.get_vocab() != tokenizer.get_vocab():
        raise CheckpointError("its tokenizer is not this model's", where=str(folder), remedy=remedy)
    mine = {name: tensor for name, tensor in model.state_dict().items() if _of_language(name)}
    files = TensorFolder(Path(folder), canonical_name)
    wrong = sorted(name for name, tensor in mine.items() if files.shapes.get(name) != tuple(tensor.shape))
    wrong += sorted(name for name in files.shapes if _of_language(name) and name not in mine)
    if wrong:
        raise CheckpointError(
            f"its language model does not fit this model's: {', '.join(wrong[:8])}", where=str(folder), remedy=remedy
        )
    model.load_state_dict({name: tensor for name, tensor in files if name in mine}, strict=False)


def _of_language(name: str) -> bool:
    return name.startswith(("model.language_model.", "lm_head."))


def start_from(folder: Path, tokenizer) -> InternVLForConditionalGeneration:
    """A whole model's weights in fp32, to be trained on with `tokenizer`. Raises CheckpointError as load_model does,
    and where the two do not agree on the image token."""
    model = load_model(folder)[0].float()
    ours, its = tokenizer.convert_tokens_to_ids(IMG_CONTEXT), model.config.image_token_id
    if ours != its or len(tokenizer) > model.lm_head.weight.shape[0]:
        raise CheckpointError(
            f"its image token is {its}, {IMG_CONTEXT} of its tokenizer {ours} of {len(tokenizer)}", where=str(folder),
            remedy="import the model again with its own tokenizer: stageline import SRC --output DIR",
        )  # fmt: skip
    return model


def load_model(path: str | Path) -> tuple[InternVLForConditionalGeneration, Any]:
    """(model in eval mode, tokenizer or None) from a folder in Hugging Face layout; safetensors only.

    Raises CheckpointError for a folder that is not one, or whose weights lack or add a key.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise CheckpointError("no config.json in the folder", where=str(path), remedy="give a Hugging Face folder")
    try:
        kind = json.loads((path / "config.json").read_text())["model_type"]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"config.json names no model type ({error!r})", where=str(path), remedy="give a Hugging Face folder"
        ) from error
    if kind != "internvl":
        raise CheckpointError(
            f"model type {kind!r} is not 'internvl'", where=str(path), remedy="give a folder that export wrote"
        )
    model = parts.pretrained(InternVLForConditionalGeneration, path, "auto")
    return model.eval(), read_tokenizer(path)


def save_model(
    model: InternVLForConditionalGeneration,
    tokenizer,
    folder: Path,
    tile_size: int,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Hugging Face layout, with the processor's JSON for users who have torchvision (this project needs none).

    tokenizer: None leaves the folder without one. state: the weights, where they are not the module's own (ZeRO 3).
    """
    if tokenizer is not None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        tokenizer.save_pretrained(folder)
    model.save_pretrained(folder, state_dict=state)
    processor = {
        "processor_class": "InternVLProcessor",
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": 12,
        "size": {"height": tile_size, "width": tile_size},
        "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
        "rescale_factor": 1 / 255, "resample": 3, "image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD),
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1))
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "InternVLProcessor", "image_seq_length": model.config.image_seq_length})
    )


class TrainingLoss(nn.Module):
    """Σ weight·cross-entropy over a micro-batch (fp32 scalar); the caller divides by the global batch's weight."""

    def __init__(
        self,
        model: InternVLForConditionalGeneration,
        train: tuple[str, ...],
        drop_path: float = 0.0,
        checkpointed: tuple[str, ...] = (),
        always_vision: bool = False,
        fused: bool = False,
    ):
        """checkpointed: modules (vit, language) whose layers run again in the backward pass. always_vision: also for a
        row without a picture where nothing of it trains, since under ZeRO 3 every module is a collective. fused:
        compiled layers and loss, on a GPU and not under ZeRO 3, which takes every module apart by itself."""
        super().__init__()
        self.internvl = model
        self.always_vision, self.fused = always_vision, fused
        if fused:
            kernels.fuse(model)
        layers = {"vit": model.model.vision_tower.encoder.layer, "language": model.model.language_model.layers}
        for module in checkpointed:
            for layer in layers[module]:
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
                layer.training = True  # the library's layers look at it
        self.vit, self.mlp = "vit" in train, "mlp" in train
        model.model.language_model.config._attn_implementation = attention.NAME
        self.drop_path = DropPath(model.model.vision_tower, drop_path) if self.vit and drop_path else None

    def image_features(self, pixels: Tensor, uniforms: Tensor | None) -> Tensor:
        """pixels [tiles, 3, S, S] -> [tiles · tokens_per_tile, hidden], with only the gradients the stage needs."""
        model = self.internvl.model
        with torch.set_grad_enabled(self.vit):
            if self.drop_path is not None:
                self.drop_path.set(uniforms, pixels.dtype)
            patches = model.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]
        side = int(patches.shape[1] ** 0.5)
        with torch.set_grad_enabled(self.vit or self.mlp):
            grid = model.pixel_shuffle(patches.reshape(len(pixels), side, side, -1), scale_factor=DOWNSAMPLE)
            features = model.multi_modal_projector(grid.reshape(len(pixels), -1, grid.shape[-1]))
        return features.flatten(0, 1)

    def forward(self, batch: Batch) -> Tensor:
        model = self.internvl.model
        embeds = model.language_model.embed_tokens(batch.input_ids)
        dtype = embeds.dtype
        if batch.pixels is not None:
            features = self.image_features(batch.pixels.to(dtype), batch.uniforms).to(dtype)
            image = (batch.input_ids == self.internvl.config.image_token_id).unsqueeze(-1)
            embeds = embeds.masked_scatter(image, features)
        elif self.vit or self.mlp or self.always_vision:
            # a rank without an image still has to take part in the gradient exchange: one tile of weight zero
            size = model.vision_tower.config.image_size
            dummy = torch.zeros(1, 3, *size, dtype=dtype, device=embeds.device)
            depth = model.vision_tower.config.num_hidden_layers
            uniforms = torch.ones(1, depth, 2, device=embeds.device) if self.drop_path is not None else None
            embeds = embeds + 0.0 * self.image_features(dummy, uniforms).sum()
        hidden = model.language_model(
            inputs_embeds=embeds, position_ids=batch.position_ids, use_cache=False, segments=batch.segments
        ).last_hidden_state
        selected = hidden[0].index_select(0, batch.positions)
        head = self.internvl.lm_head.weight
        return weighted_cross_entropy(selected, head, batch.targets, batch.weights, fused=self.fused)
