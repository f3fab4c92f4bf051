"""The model card of an exported folder: README.md, with the run's figures and a program that asks the model.

Invariants: its figures are those of the evaluations, written by figures.py as the report writes them; the front matter
is what the Hugging Face hub reads (model-index: one entry for each task, one metric for each prompt); the first Python
block runs as it stands beside the folder (tests/unit/test_model_card.py runs it). No license is stated: that is the
user's to decide.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from modeling.errors import DataError
from modeling.estimate import measure
from stages.evaluate.figures import count, share, with_interval
from stages.io import Input

HEAD = """from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

folder = "THIS_FOLDER"
model = AutoModelForImageTextToText.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
processor = AutoImageProcessor.from_pretrained(folder, backend="pil")  # the pixels of training; no torchvision

question = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
picture = processor(Image.open("picture.png"), return_tensors="pt")
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
)
tokens = model.config.image_seq_length * int(picture["num_patches"][0])
prompt = prompt.replace("<IMG_CONTEXT>", "<img>" + "<IMG_CONTEXT>" * tokens + "</img>")
inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
output = model.generate(**inputs, pixel_values=picture["pixel_values"], max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
USE = {
    "hf": f"""```python
{HEAD}```

Where torchvision is installed, `AutoProcessor.from_pretrained(folder)` does these steps in one; its pixels differ in
rounding. Answers are greedy unless `generate` is told otherwise. Several pictures share the tiles of one: give the
processor `max_patches=12 // pictures`, and write `Image-1: ` before the first, `Image-2: ` before the second. A video
is shown as its frames, each a picture of one tile (`max_patches=1`) with `Frame-1: ` before it.""",
    "official": "The folder has the layout of the official `internvl_chat` code (github.com/OpenGVLab/InternVL), whose "
    "`InternVLChatModel.from_pretrained` reads it.",
}


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation said of the model.

    tables: {prompt: {task: row with n, accuracy, low, high, and perhaps metric and unparsable, a share}}. maximum:
    {task: {prompt, accuracy}}. curves: {task: [{prompt, method}, and lists of one entry for each number of samples:
    samples, tokens, accuracy, low, high]}. sampling: how the samples were drawn.
    """

    name: str
    tables: dict[str, dict[str, dict[str, Any]]]
    maximum: dict[str, dict[str, Any]] = field(default_factory=dict)
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    sampling: dict[str, Any] | None = None

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for table in self.tables.values() for task in table))


def read_evaluation(evaluated: Input, stage: Input) -> Evaluation:
    """What an evaluation says of a trained stage, perhaps one of several that it asked. DataError where it did not.

    The stage is known by its fingerprint, for names may have changed since; by name in results without fingerprints.
    """
    trained = stage.name
    path, asked = evaluated.folder / "evaluation.json", evaluated.params.get("needs", ())
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        asked = found.get("checkpoints") or [found["stage"]]
        digests = found.get("fingerprints") or []
        if len(digests) == len(asked) and stage.fingerprint in digests:
            return _of_one(evaluated.name, found, asked[digests.index(stage.fingerprint)], len(asked) > 1)
        if not digests and trained in asked:
            return _of_one(evaluated.name, found, trained, len(asked) > 1)
    elif trained in asked:  # one of before there were forms of a question
        return Evaluation(evaluated.name, {"direct": json.loads((evaluated.folder / "scores.json").read_text())})
    raise DataError(
        f"evaluates {' and '.join(asked)}, and not '{trained}', which is exported", where=f"stage {evaluated.name}",
        remedy=f"list evaluations of '{trained}' under 'needs:'",
    )  # fmt: skip


def _of_one(name: str, found: dict[str, Any], trained: str, several: bool) -> Evaluation:
    tables, mark = found["tables"], f" · {trained}"
    if several:  # its tables bear the stage's name behind the prompt's
        tables = {key.removesuffix(mark): table for key, table in tables.items() if key.endswith(mark)}
    curves = {
        task: [row for row in rows if row.get("checkpoint", trained) == trained]
        for task, rows in (found.get("curves") or {}).items()
    }
    maximum = {} if several else found.get("maximum") or {}  # else perhaps another stage's
    return Evaluation(name, tables, maximum, curves, found.get("sampling"))


def model_card(
    title: str,
    trained: Input,
    model: Any,
    layout: str,
    evaluations: Sequence[Evaluation] = (),
    notes: Sequence[str] = (),
) -> str:
    """README.md. model: the module tree, on any device. notes: sentences for whoever uses it."""
    sizes = measure(model)
    data = ModelCardData(
        library_name="transformers", pipeline_tag="image-text-to-text", tags=["internvl", "stageline"],
        model_name=title, eval_results=_results(evaluations) or None,
    )  # fmt: skip
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}",
        f"An InternVL-2.5-style model of {count(sizes.total)} parameters, the result of stage `{trained.name}` "
        f"(fingerprint `{trained.fingerprint}`), trained with Stageline. No license is stated: before you publish it, "
        "add `license:` to the first lines.",
        "## Use", USE[layout], *notes,
        "## Architecture", _architecture(model.config, sizes.parameters),
    ]  # fmt: skip
    for evaluation in evaluations:
        parts += _evaluation(evaluation)
    parts += ["## Training", "Parameters of the last stage:", f"```json\n{json.dumps(trained.params, indent=1)}\n```"]
    return "\n\n".join(parts) + "\n"


def _results(evaluations: Sequence[Evaluation]) -> list[EvalResult]:
    return [
        EvalResult(
            "image-text-to-text", _plain(task), task, str(row.get("metric", "exact")),
            round(float(row["accuracy"]), 3), metric_name=f"{prompt}, stage {evaluation.name}",
        )
        for evaluation in evaluations
        for task in evaluation.tasks
        for prompt, table in evaluation.tables.items()
        if (row := table.get(task)) is not None and row.get("accuracy") is not None
    ]  # fmt: skip


def _architecture(config: Any, parameters: dict[str, int]) -> str:
    vision, text = config.vision_config, config.text_config
    heads = f"{text.num_attention_heads} heads"
    if text.num_key_value_heads != text.num_attention_heads:
        heads += f" ({text.num_key_value_heads} for keys and values)"
    rows = (
        ("vision encoder", f"ViT, {vision.num_hidden_layers} layers, width {vision.hidden_size}, patches of "
         f"{vision.patch_size[0]} × {vision.patch_size[1]} pixels", parameters["vit"]),
        ("projector", f"pixel shuffle to {config.image_seq_length} tokens a tile, LayerNorm, 2 layers",
         parameters["mlp"]),
        ("language model", f"{text.model_type}, {text.num_hidden_layers} layers, width {text.hidden_size}, {heads}, "
         f"{count(text.vocab_size)} tokens", parameters["language"]),
        ("all", "", sum(parameters.values())),
    )  # fmt: skip
    side = vision.image_size[0]
    return (
        _table(("part", "form", "parameters"), [(name, form, count(n)) for name, form, n in rows])
        + f"\n\nA picture becomes 1 to 12 tiles of {side} × {side} pixels, of the grid nearest to its shape, and a "
        "thumbnail where it has more than one."
    )


def _evaluation(evaluation: Evaluation) -> list[str]:
    prompts = list(evaluation.tables)
    compared = any(evaluation.maximum.values()) and len(prompts) > 1
    titles = ["task", "metric", "questions"]
    for prompt in prompts:
        titles += [prompt, "unreadable"]
    lines = []
    for task in evaluation.tasks:
        rows = [evaluation.tables[prompt].get(task, {}) for prompt in prompts]
        known = next(row for row in rows if row)
        cells = [task, known.get("metric", "exact"), count(known["n"])]
        for row in rows:
            cells += [with_interval(row), share(row.get("unparsable"))]
        best = evaluation.maximum.get(task) if compared else None
        lines.append([*cells, f"{share(best['accuracy'])} ({best['prompt']})"] if best else cells)
    told = "Greedy answers, with the 95 % interval; an unreadable answer is wrong."
    if compared:
        titles.append("maximum")
        told += " The maximum is the better prompt's figure, as many papers print it, and no measurement of its own."
    out = [f"## Evaluation: {evaluation.name}", told, _table(titles, lines)]
    points = [
        (task, row["prompt"], row["method"], f"{row['samples'][-1]:.3g}", count(row["tokens"][-1]),
         with_interval({key: row[key][-1] for key in ("accuracy", "low", "high")}))
        for task, curve in evaluation.curves.items()
        for row in curve
    ]  # fmt: skip
    if points:
        out += [
            "Test-time scaling: what the whole pool of samples gives by each method. Samples and tokens are those of a "
            "question, in the mean.",
            _table(("task", "prompt", "method", "samples", "tokens", "accuracy"), points),
        ]
    return out


def _table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _plain(value: Any) -> str:
    """In one line."""
    return " ".join(str(value).split())
