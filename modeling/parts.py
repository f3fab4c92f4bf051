"""A ViT or a language model of its own, from a folder in Hugging Face layout or in the official one.

Official folders: InternViT (`intern_vit_6b`) and InternLM2 (`internlm2`), whose classes come as remote code elsewhere;
here they are mapped (layouts.py, official.py) and nothing but safetensors and JSON is read. Invariant: a weight that
is missing, unexpected or of another shape is an error that names it.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from modeling import layouts, official
from modeling.errors import CheckpointError
from modeling.tensors import TensorFolder, read_json

_REMEDY = "fetch the folder again, or write it again from its source"


def pretrained(library_class: Any, folder: Path, dtype: Any) -> Any:
    """from_pretrained, safetensors only. Raises CheckpointError for weights that cannot be read, lack or add a key."""
    try:
        model, info = library_class.from_pretrained(
            folder, output_loading_info=True, use_safetensors=True, dtype=dtype, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"the weights cannot be read: {error}", where=str(folder), remedy=_REMEDY) from error
    wrong = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(key)}
    if wrong:
        raise CheckpointError(f"weights do not fit the configuration: {wrong}", where=str(folder), remedy=_REMEDY)
    return model


def vision_tower(folder: Path) -> Any:
    """An InternVLVisionModel in fp32."""
    from transformers import AutoModel, InternVLVisionConfig, InternVLVisionModel

    config = read_json(folder / "config.json")
    if config.get("model_type") != official.VISION_TYPE:
        return pretrained(AutoModel, folder, torch.float32)
    with torch.device("meta"):
        model = InternVLVisionModel(InternVLVisionConfig(**official.vision_to_hf(config, str(folder))))
    return _filled(model, folder, "vision_model.", "vision_tower.")


def text_config(folder: Path) -> Any:
    """The transformers configuration of a language folder; Llama's for InternLM2."""
    from transformers import AutoConfig

    config = read_json(folder / "config.json")
    if config.get("model_type") == official.INTERNLM2:
        return official.text_to_hf(config, str(folder))
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"config.json cannot be used: {error}", where=str(folder), remedy=_REMEDY) from error


def language_model(folder: Path) -> Any:
    """A causal language model in fp32."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    config = read_json(folder / "config.json")
    if config.get("model_type") != official.INTERNLM2:
        return pretrained(AutoModelForCausalLM, folder, torch.float32)
    with torch.device("meta"):
        model = LlamaForCausalLM(official.text_to_hf(config, str(folder)))
    return _filled(model, folder, "language_model.", "language_model.")


def _filled(model: Any, folder: Path, prefix: str, ours: str) -> Any:
    """An empty model with the weights of an official folder. prefix: what its names lack of a whole model's; ours: what
    Hugging Face's lack."""
    whole = {layouts.canonical_name(ours + name): name for name in model.state_dict()}
    shapes = {name: tuple(model.get_parameter(short).shape) for name, short in whole.items()}
    files = TensorFolder(folder, lambda name: prefix + name)
    tensors = layouts.read_official(files, shapes, model.config, internlm2=True)
    model.load_state_dict({whole[name]: tensor.float() for name, tensor in tensors}, assign=True)
    return model
