"""The stage kinds: an explicit dictionary from the word in the YAML to what runs.

A kind's `version` is part of every identity: raise it when results change. mlp_warmup, vit_incremental,
full_finetune and language_pretrain are settings of `train` (arXiv 2412.05271, §3.2): same code, same identity.
Functions are named by path and imported only when a stage runs, so that planning stays fast.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from stages.io import StageIO
from stages.params import EvaluateParams, ExportParams, PrepareParams, ScalingParams, StageParams, TrainParams


@dataclass(frozen=True)
class Kind:
    base: str  # the folder under stages/ in storage, and the identity
    version: int
    params: type[StageParams]
    function: str  # "module:function", called with a StageIO
    trains: bool = False  # a Ray Train job
    before: str = ""  # run once by the driver before the workers start
    before_reads: str = "*"  # the files of its parents' results that `before` needs
    parents: dict[str, tuple[int, int]] = field(default_factory=dict)  # base kind -> (least, most) parents
    defaults: dict[str, Any] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)  # base kind -> files of such parents that the driver needs
    ordered: bool = False  # whether the order of its parents is part of what it is
    collects: bool = False  # needs every variant of the swept stages that it names (orchestrator/sweep.py)

    def run(self, io: StageIO) -> None:
        _load(self.function)(io)

    def prepare(self, io: StageIO) -> None:
        if self.before:
            _load(self.before)(io)


def _load(path: str) -> Callable[[StageIO], None]:
    module, name = path.split(":")
    return getattr(import_module(module), name)


def _train(*modules: str) -> Kind:
    return Kind(
        "train", 2, TrainParams, "stages.train:train", trains=True, before="stages.plan_packs:plan_packs",
        before_reads="index.parquet", parents={"prepare": (1, 1), "train": (0, 1)},
        defaults={"train": modules} if modules else {},
    )  # fmt: skip


MANY = 10_000

KINDS: dict[str, Kind] = {
    "prepare": Kind("prepare", 2, PrepareParams, "stages.prepare.run:prepare"),
    "train": _train(),
    "language_pretrain": _train("language"),
    "mlp_warmup": _train("mlp"),
    "vit_incremental": _train("vit", "mlp"),
    "full_finetune": _train("vit", "mlp", "language"),
    "evaluate": Kind(
        "evaluate",
        2,
        EvaluateParams,
        "stages.evaluate.run:evaluate",
        parents={"prepare": (0, 1), "train": (0, 8)},
        ordered=True,
        reads={"train": "*.json"},
    ),
    "scaling": Kind(
        "scaling", 2, ScalingParams, "stages.scaling:scaling", parents={"evaluate": (1, MANY)}, collects=True
    ),
    "export": Kind("export", 2, ExportParams, "stages.export:export", parents={"train": (1, 1), "evaluate": (0, MANY)}),
}
