"""Weights in and out: a model folder in either layout, read tensor by tensor and written in either layout.

Layouts: Hugging Face's (what every stage writes and `modeling.internvl.load_model` reads) and the official
`internvl_chat` one; which of them a folder has is read from its config.json. Invariants: names and shapes are checked
against the configuration before a tensor is read; tensors keep dtype and bits both ways; memory holds about one copy
of the model; no remote code and no pickle (layouts.py, official.py, tensors.py say how).
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from modeling import layouts, official
from modeling.errors import CheckpointError, UserError
from modeling.internvl import build_model, save_model
from modeling.presets import Resolved
from modeling.template import IMG_CONTEXT
from modeling.tensors import TensorFolder, read_json
from modeling.tokenizer import read_tokenizer

Layout = Literal["hf", "official"]
Shapes = dict[str, tuple[int, ...]]
SHARD = "5GB"
HEAD, EMBEDDINGS = "lm_head.weight", "model.language_model.embed_tokens.weight"
# <IMG_CONTEXT> in the published models (InternLM2.5's vocabulary, Qwen2.5's), for folders without a tokenizer
PUBLISHED = {"internlm2": 92546, "qwen2": 151667}


@dataclass(frozen=True)
class Source:
    """A model folder, recognised. config: InternVLConfig; tokenizer: None where the folder has none; internlm2: whether
    its language model has InternLM2's names; notes: what a user should know about it."""

    folder: Path
    layout: Layout
    config: Any
    tokenizer: Any
    internlm2: bool = False
    notes: tuple[str, ...] = ()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in `InternVLForConditionalGeneration.state_dict()`, tensor), each once. Raises CheckpointError, before
        the first one, with the list of keys that do not fit."""
        state = empty_model(self.config, str(self.folder)).state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if self.layout == "official":
            return layouts.read_official(TensorFolder(self.folder), shapes, self.config.text_config, self.internlm2)
        return _from_hf(TensorFolder(self.folder, layouts.canonical_name), shapes, self.config.tie_word_embeddings)


def open_source(folder: str | Path, *, image_token_id: int | None = None, tokenizer: str | None = None) -> Source:
    """Recognise a folder and read all of it but the weights.

    image_token_id: which token stands for an image, where no tokenizer tells. tokenizer: a folder to take instead of
    its own. Raises CheckpointError for a folder of neither layout or a configuration that cannot be mapped.
    """
    folder = Path(folder)
    where, config = str(folder), read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in ("internvl", official.CHAT):
        raise CheckpointError(
            f"model type {kind!r} is neither 'internvl' (Hugging Face) nor '{official.CHAT}' (official)",
            where=where, remedy="give a whole model; separate parts with --vision and --language",
        )  # fmt: skip
    text = config.get("llm_config" if kind == official.CHAT else "text_config")
    text = text if isinstance(text, dict) else {}
    spoken = read_tokenizer(Path(tokenizer) if tokenizer else folder, text)
    if tokenizer and spoken is None:
        raise UserError("the folder has no tokenizer", where=tokenizer, remedy="give one with a tokenizer.json")
    token, notes = _image_token(spoken, image_token_id, config.get("image_token_id"), text.get("model_type"), where)
    mapped = _hf_config(folder, token) if kind == "internvl" else official.chat_to_hf(config, token, where)
    rows = mapped.text_config.vocab_size
    if spoken is not None and len(spoken) > rows:
        raise CheckpointError(
            f"the tokenizer has {len(spoken)} tokens, the model rows for {rows}", where=where,
            remedy="name the folder of the model's own tokenizer with --tokenizer",
        )  # fmt: skip
    if kind == "internvl":
        return Source(folder, "hf", mapped, spoken, notes=notes)
    if config.get("template", official.TEMPLATE) != official.TEMPLATE:
        notes += (f"its chat template is {config['template']!r}; Stageline talks {official.TEMPLATE!r} to it",)
    return Source(folder, "official", mapped, spoken, text.get("model_type") == official.INTERNLM2, notes)


def _image_token(
    tokenizer: Any, given: int | None, recorded: int | None, language: str | None, where: str
) -> tuple[int, tuple[str, ...]]:
    """The id of <IMG_CONTEXT>, and what to tell the user about it."""
    if tokenizer is None:
        token = given if given is not None else recorded
        guessed = "" if token is not None else " as in the published models (or --image-token-id)"
        token = PUBLISHED.get(str(language), PUBLISHED["qwen2"]) if token is None else token
        told = f"no tokenizer: token {token} stands for {IMG_CONTEXT}{guessed}"
        return token, (f"{told}; the model loads, but cannot be asked or trained before it has one",)
    known = tokenizer.get_vocab().get(IMG_CONTEXT, recorded)
    if known is None:
        raise CheckpointError(
            f"the tokenizer does not know {IMG_CONTEXT}", where=where,
            remedy="name the folder of the model's own tokenizer with --tokenizer",
        )  # fmt: skip
    if given not in (None, known):
        raise UserError(
            f"{IMG_CONTEXT} is token {known} of the tokenizer, not {given}", where=where, remedy="leave it out"
        )
    return known, ()


def _hf_config(folder: Path, image_token_id: int) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import InternVLConfig

    try:
        config = InternVLConfig.from_pretrained(folder)
    except (StrictDataclassError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"config.json cannot be used: {error}", where=str(folder)) from error
    config.image_token_id = image_token_id
    return config


def empty_model(config: Any, where: str) -> Any:
    """The model of a configuration without memory for its weights. Raises CheckpointError for one that makes none."""
    from transformers import InternVLForConditionalGeneration

    try:
        with torch.device("meta"):
            return InternVLForConditionalGeneration(config)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"the configuration makes no model: {error}", where=where) from error


def _from_hf(files: TensorFolder, shapes: Shapes, tied: bool) -> Iterator[tuple[str, Tensor]]:
    if not tied or HEAD in files.shapes:
        files.check(shapes)
        return iter(files)
    files.check({name: shape for name, shape in shapes.items() if name != HEAD})
    return (pair for name, tensor in files for pair in ([(name, tensor)] + [(HEAD, tensor)] * (name == EMBEDDINGS)))


def write(source: Source, folder: Path, layout: Layout) -> int:
    """A whole model folder in a layout, tokenizer included; its number of parameters. It appears when it is complete.

    Raises UserError where `folder` holds something already, CheckpointError where the source's weights do not fit or
    the layout cannot say what the model does.
    """
    with appearing(folder) as place:
        if layout == "official":
            return _write_official(source, place)
        model = empty_model(source.config, str(source.folder))
        model.load_state_dict(dict(source.tensors()), assign=True)
        save_model(model, source.tokenizer, place, source.config.vision_config.image_size[0])
        return sum(tensor.numel() for tensor in model.state_dict().values())


def _write_official(source: Source, folder: Path) -> int:
    text = source.config.text_config
    config = official.chat_to_official(source.config, "", str(source.folder))
    state, fused = dict(source.tensors()), {}
    for name, parts in layouts.plan(list(state), official.says_internlm2(text)).items():
        fused[name] = layouts.fuse(name, [state.pop(part) for part in parts], text)
        if parts == (HEAD,):
            fused[name] = fused[name].clone()  # a tied head becomes one of its own: the official code ties none
    embedded = fused[next(name for name in fused if name.endswith(("embed_tokens.weight", "tok_embeddings.weight")))]
    dtype = str(embedded.dtype).removeprefix("torch.")
    for part in (config, config["vision_config"], config["llm_config"]):
        part["torch_dtype"] = dtype
    save_torch_state_dict(fused, folder, max_shard_size=SHARD, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False))
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(folder)
        about = read_json(folder / "tokenizer_config.json")
        if about.get("tokenizer_class") == "TokenizersBackend":  # the name since transformers 5
            about["tokenizer_class"] = "PreTrainedTokenizerFast"
        (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2, ensure_ascii=False))
    return sum(tensor.numel() for tensor in fused.values())


def write_parts(resolved: Resolved, seed: int, folder: Path) -> int:
    """A model of separate ViT and language folders: projector fresh from `seed`, head rows of new tokens the mean of
    the known ones (`build_model`). It has the dtype of its parts where they agree, else fp32."""
    parts = [part for part in (resolved.vision_folder, resolved.language_folder) if part]
    dtypes = set().union(*(TensorFolder(part).dtypes for part in parts))
    with appearing(folder) as place:
        tokenizer = resolved.tokenizer()
        model = build_model(resolved, tokenizer, seed)
        if dtypes in ({"BF16"}, {"F16"}):
            model.to(torch.bfloat16 if dtypes == {"BF16"} else torch.float16)  # pyright: ignore[reportArgumentType]
        save_model(model, tokenizer, place, resolved.tile_size)
        return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` when the block ends well, and nothing otherwise."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("there is something already", where=str(folder), remedy="name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        place = Path(scratch) / "model"
        place.mkdir()
        yield place
        place.replace(folder)
