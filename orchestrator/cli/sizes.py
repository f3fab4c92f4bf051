"""What `plan` tells of every model and training stage before a GPU is touched: parameters, memory, packs, FLOPs.

Rows are taken as full (max_tokens, max_tiles): what a rank must hold at worst, and an upper bound of the work. What
does not fit a GPU is refused by `run` before anything starts, with what would fit.
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from rich.console import Console
from rich.table import Table

from modeling import presets
from modeling.errors import UserError
from modeling.estimate import Memory, Sizes, choose_checkpointing, human, measure, memory, skeleton, step_flops
from modeling.zero import offloaded, zero_stage
from orchestrator.spec import Experiment, Stage
from stages.params import ModelParams

MODULES = ("vit", "mlp", "language")


@cache
def _measured(fields: str) -> Sizes:
    return measure(skeleton(*json.loads(fields)))


def sizes_of(model: ModelParams) -> tuple[Sizes, dict[str, Any], dict[str, Any]] | None:
    """(sizes, vision, language fields); None where a folder is not there and has no known name."""
    fields = presets.sizes(model)
    return None if fields is None else (_measured(json.dumps(fields)), *fields)


@dataclass(frozen=True)
class Need:
    """What one rank of a training stage needs with full rows; checkpointed: None where nothing makes it fit."""

    memory: Memory
    checkpointed: tuple[str, ...] | None


def need(stage: Stage, model: ModelParams, world: int, zero: int | None = None) -> Need | None:
    """Under the stage's own settings, or another ZeRO stage; None where the sizes are unknown."""
    known = sizes_of(model)
    if known is None:
        return None
    sizes, vision, language = known
    params = stage.params
    zero = zero_stage(params.deepspeed) if zero is None else zero

    def cost_of(modules: tuple[str, ...]) -> Memory:
        found = memory(
            sizes, vision, language, params.train, precision=params.precision, zero=zero, world=world,
            max_tokens=params.packing.max_tokens, max_tiles=params.packing.max_tiles, checkpointed=modules,
            fused=params.compile and bool(params.resources.gpus) and zero != 3,
        )  # fmt: skip
        return replace(found, optimizer=0.0) if offloaded(params.deepspeed) else found

    allowed = {"none": [()], "all": [("vit", "language")]}.get(params.checkpointing)
    fits = params.resources.gpu_memory * 1e9
    if allowed is not None:
        cost = cost_of(allowed[0])
        return Need(cost, allowed[0] if cost.total <= fits or not params.resources.gpus else None)
    chosen = choose_checkpointing(fits, cost_of) if params.resources.gpus else ()
    return Need(cost_of(chosen if chosen is not None else ("vit", "language")), chosen)


def check_memory(experiment: Experiment, names: list[str]) -> None:
    """Raises UserError for the first training stage on GPUs that cannot hold a full row, with what would."""
    for name in names:
        stage = experiment.stages[name]
        if not stage.kind.trains or not stage.params.resources.gpus:
            continue
        model, world = experiment.model_of(stage), stage.params.resources.least
        found = need(stage, model, world)
        if found is None or found.checkpointed is not None:
            continue
        raise UserError(
            f"needs {found.memory.total / 1e9:,.0f} GB on each GPU ({_parts(found.memory)}), "
            f"resources.gpu_memory is {stage.params.resources.gpu_memory:g} GB",
            where=f"stages.{name}", remedy=_what_would(stage, model, world),
        )  # fmt: skip


def _parts(memory: Memory) -> str:
    parts = {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer,
             "activations": memory.activations + memory.head}  # fmt: skip
    return ", ".join(f"{name} {value / 1e9:,.0f}" for name, value in parts.items())


def _what_would(stage: Stage, model: ModelParams, world: int) -> str:
    """The nearest settings that fit: a higher ZeRO stage, more workers, shorter rows."""
    if stage.params.checkpointing == "none":
        return "allow it to recompute: 'checkpointing: auto'"
    for workers in (world, *(world * 2**power for power in range(1, 8))):
        for zero in (1, 2, 3):
            found = need(stage, model, workers, zero)
            if found is not None and found.checkpointed is not None:
                more = f" on {workers} workers" if workers != world else ""
                return f"it fits with 'deepspeed: {zero}'{more}"
    return "lower packing.max_tokens and max_tiles, or offload by a DeepSpeed JSON"


def show_sizes(console: Console, experiment: Experiment) -> None:
    """Two tables: the models, and the training stages with full rows."""
    models = dict(experiment.models) or ({"model": experiment.model} if experiment.model else {})
    table = Table(title="Parameters", title_justify="left", box=None, pad_edge=False)
    for title in ("model", "vision", "language", *MODULES, "all"):
        table.add_column(title, justify="right" if title in (*MODULES, "all") else "left")
    for name, model in models.items():
        known = sizes_of(model)
        named = (model.vision or model.folder or "", model.language or model.folder or "")
        words = [name, *(part.rsplit("/", 1)[-1] for part in named)]
        if known is None:
            table.add_row(*words, *["unknown until its folders are there"])
        else:
            sizes = known[0]
            table.add_row(*words, *(f"{sizes.parameters[m]:,}" for m in MODULES), human(sizes.total))
    console.print(table)
    table = Table(title="Training, with full rows", title_justify="left", box=None, pad_edge=False)
    for title in ("stage", "trains", "steps", "packs", "tokens", "FLOPs", "ZeRO", "memory of a rank", "recomputes"):
        table.add_column(title, no_wrap=title != "memory of a rank")
    for stage in experiment.stages.values():
        if stage.kind.trains:
            table.add_row(stage.name, *_training(stage, experiment.model_of(stage)))
    console.print(table)


def pack_flops(stage: Stage, model: ModelParams) -> float | None:
    """Useful floating-point operations of a full row, forward and backward; None where the sizes are unknown."""
    known, budget = sizes_of(model), stage.params.packing
    if known is None:
        return None
    return step_flops(
        known[0], stage.params.train, tokens=budget.max_tokens, squares=budget.max_tokens**2,
        supervised=budget.max_tokens, tiles=budget.max_tiles,
    )  # fmt: skip


def _training(stage: Stage, model: ModelParams) -> list[str]:
    params, known = stage.params, sizes_of(model)
    budget, packs = params.packing, params.steps * params.global_batch if params.steps else None
    row = [f"{params.steps:,}" if params.steps else f"{params.epochs:g} epochs"]
    row += [
        f"{packs:,}" if packs else "unknown until prepare",
        f"<= {human(packs * budget.max_tokens)}" if packs else "",
    ]
    if known is None:
        return ["", *row, "", str(zero_stage(params.deepspeed)), "unknown", ""]
    sizes, flops = known[0], pack_flops(stage, model)
    found = need(stage, model, params.resources.least)
    assert found is not None and flops is not None, "the sizes are known"
    fits = found.checkpointed is not None
    place = "" if not params.resources.gpus else f" of {params.resources.gpu_memory:g}"
    cost = f"{found.memory.total / 1e9:,.1f}{place} GB: {_parts(found.memory)}" + ("" if fits else " DOES NOT FIT")
    return [
        human(sizes.trained(params.train)), *row, f"<= {flops * packs:.1e}" if packs else "",
        str(zero_stage(params.deepspeed)), cost, ", ".join(found.checkpointed or ()) or "nothing",
    ]  # fmt: skip


def shared_vision(experiment: Experiment) -> list[str]:
    """Which stage gives its vision encoder to which models, and what they therefore skip."""
    lent: dict[str, list[str]] = {}
    for stage in experiment.stages.values():
        if source := getattr(stage.params, "vision_from", None):
            lent.setdefault(source, []).append(stage.params.model or "model")
    return [
        f"{source} makes the vision encoder of {', '.join(models)}: they skip ViT incremental learning"
        for source, models in lent.items()
    ]
