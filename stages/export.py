"""Export a trained stage in Hugging Face layout or in the official one, with what a stranger needs beside it.

A training stage already ends in Hugging Face layout (modeling/internvl.py); export checks every key against the
configuration and adds the chat template (modeling/chat.py), a generation configuration, what InternVLProcessor asks of
the tokenizer, and a card (model_card.py). The official layout is modeling/weights.py's.
"""

import json
from pathlib import Path
from typing import Any

from modeling.chat import chat_template, system_prompt
from modeling.template import DEFAULT_SYSTEM, IMG_CONTEXT, IMG_END, IMG_START
from modeling.weights import Layout, Source, empty_model, open_source, write
from stages.io import StageIO
from stages.model_card import model_card, read_evaluation
from stages.plan_packs import parent

TRAINED = "trained.json"  # beside the weights, as training leaves it (train.py, which imports what trains)
TEMPLATE = "chat_template.jinja"
# InternVLProcessor takes these from the tokenizer. It asks for a video's token too, and one that the vocabulary lacks
# would be added behind the last row of the embeddings; no prompt holds </img> before the processor puts it there, and
# a video is shown as its frames.
TOKENS = {
    "start_image_token": IMG_START, "end_image_token": IMG_END, "context_image_token": IMG_CONTEXT,
    "video_token": IMG_END,
}  # fmt: skip


def export_folder(source: Source, folder: Path, layout: Layout, system: str | None = None) -> int:
    """Write a model folder for others to use; its number of parameters. Raises as `modeling.weights.write` does.

    system: the system prompt of a conversation without one; None: what an earlier export wrote, or the official one.
    """
    parameters = write(source, folder, layout)
    if layout == "hf" and source.tokenizer is not None:
        bos = bool(getattr(source.tokenizer, "add_bos_token", False))
        if system is None:
            known = system_prompt(source.tokenizer)
            system = known if source.tokenizer.chat_template == chat_template(known, bos) else None
        (folder / TEMPLATE).write_text(chat_template(system, bos), encoding="utf-8")
        _name_tokens(folder / "tokenizer_config.json", source.tokenizer.get_vocab())
        _generation_config(source.tokenizer).save_pretrained(folder)
    return parameters


def _name_tokens(path: Path, vocabulary: dict[str, int]) -> None:
    if all(token in vocabulary for token in TOKENS.values()):
        path.write_text(json.dumps(json.loads(path.read_text()) | TOKENS, indent=2, ensure_ascii=False))


def _generation_config(tokenizer: Any) -> Any:
    """Greedy, to the end of a turn. No limit: vLLM takes one for the most that anybody may ask for."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def export(io: StageIO) -> None:
    """The parent's model in the layout asked for, checked key by key, with the chat template and a model card.

    The card has the figures of the evaluations among the parents. Raises DataError for one of another stage.
    """
    trained = parent(io, "train")
    assert trained is not None, "the spec lets no export pass without a trained stage"
    evaluations = [read_evaluation(its, trained) for its in io.inputs.values() if its.kind == "evaluate"]
    folder, layout = io.scratch / "export", io.params.layout
    source = open_source(trained.folder)
    system, note = _system(trained.folder)
    parameters = export_folder(source, folder, layout, system)
    sampling = [_sampled(its.sampling) for its in evaluations if its.sampling]
    notes = [note, *dict.fromkeys(sampling)] if layout == "hf" else []
    card = model_card(
        trained.name, trained, empty_model(source.config, str(trained.folder)), layout, evaluations, notes
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    io.log(f"exported {parameters:,} parameters of stage {trained.name}")
    io.complete(folder, {"stage": trained.name, "parameters": parameters, "layout": layout})


def _system(trained: Path) -> tuple[str, str]:
    """The system prompt that the model was trained with, and what to tell about it. It is read from the result of
    training: what else the experiment file says is no part of what an export is (fingerprint.py)."""
    path = trained / TRAINED
    system = json.loads(path.read_text(encoding="utf-8")).get("system") if path.is_file() else None
    if system is None:  # of an earlier version
        return DEFAULT_SYSTEM, (
            "The system prompt of training is not recorded: the chat template begins with the official one unless a "
            "conversation brings its own."
        )
    told = json.dumps(system, ensure_ascii=False) if system else "an empty one"
    return system, f"The chat template begins with the system prompt of training ({told})."


def _sampled(sampling: dict[str, Any]) -> str:
    """transformers keeps to the 50 likeliest tokens unless told otherwise; the study did not."""
    drawn = f"temperature={sampling['temperature']}, top_p={sampling.get('top_p', 1.0)}, top_k=0"
    return f"Samples of its evaluation were drawn as `generate(do_sample=True, {drawn})` draws them."
