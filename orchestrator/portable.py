"""What an experiment names that lies on this machine: a cluster's nodes do not see it.

Invariant: every path of an experiment that some stage opens is looked at here, and each is told once, by the field it
was given in. A path that was written absolute is told too: only its user knows whether every node has it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modeling import presets
from orchestrator.spec import Experiment, Stage
from stages.params import ModelParams


def local_paths(experiment: Experiment) -> list[tuple[str, str]]:
    """(field, path) of every folder and file that is not on S3, in the order of the file: storage, models, data, sets,
    and what stages name (DeepSpeed JSON, scores and reviews of curation). A sweep's variants that name the same path
    count once."""
    found: dict[str, str] = {}
    for field, path in _paths(experiment):
        if "://" not in path:
            found.setdefault(path, field)
    return [(field, path) for path, field in found.items()]


def _paths(experiment: Experiment) -> Iterator[tuple[str, str]]:
    yield "storage", experiment.storage
    models: dict[str, ModelParams] = {"model": experiment.model} if experiment.model else {}
    models |= {f"models.{name}": model for name, model in experiment.models.items()}
    for name, model in models.items():
        yield from ((f"{name}.{part}", path) for part, path in presets.given(model).items())
    for name, data in experiment.data.items():
        yield f"data.{name}.meta", data.meta
    for name, its in experiment.sets.items():
        yield f"eval.{name}.path", its.path
    for name, stage in experiment.stages.items():
        yield from ((f"stages.{name}.{field}", path) for field, path in _of(stage))


def _of(stage: Stage) -> Iterator[tuple[str, str]]:
    params: Any = stage.params
    deepspeed, curate = getattr(params, "deepspeed", 0), getattr(params, "curate", None)
    if isinstance(deepspeed, Path):
        yield "deepspeed", str(deepspeed)
    if curate is not None and curate.review is not None:
        yield "curate.review", curate.review
    if curate is not None and curate.scores is not None and curate.scores.local is not None:
        yield "curate.scores.local.model", curate.scores.local.model
