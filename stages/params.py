"""The parameters of every stage kind: one frozen model per kind, each field documented where it lives.

Fields marked `Run` (workers, ZeRO stage, checkpoint interval ...) say how a stage is run, not what it
is: they are left out of its identity, so changing them resumes or reuses (design.md, "Storage and identity").
Defaults are the paper's (arXiv 2412.05271, Table 3) and the official scripts' (shell/internvl2.5).
"""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from modeling.zero import zero_stage
from stages.base import Late, Params, Run
from stages.curation import Curation
from stages.evaluation import Answers, Ensemble, Prompt, Reranker, Sampling

ACCELERATOR = "ray.io/accelerator-type"  # the label that Ray gives a node whose GPUs it knows

_LABEL = re.compile(r"([a-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_SELECTOR = re.compile(r"!?(in\([A-Za-z0-9._, -]+\)|[A-Za-z0-9._-]+)")

Module = Literal["vit", "mlp", "language"]


class ModelParams(Params):
    """`model:` — which parts the model is built of, or the folder of a whole one. Folders are local or s3://bucket/key."""

    vision: str | None = Field(default=None, description="a preset (presets.py), a Hugging Face or InternViT folder")
    language: str | None = Field(default=None, description="a preset, a Hugging Face or InternLM2 folder")
    folder: str | None = Field(
        default=None, description="a whole InternVL model in Hugging Face layout, as `stageline import` writes it"
    )
    tokenizer: str | None = Field(default=None, description="a preset or a folder; None: the language model's own")
    endpoint_url: Annotated[str | None, Run] = Field(
        default=None, description="the S3 store of its s3:// folders; None: botocore's own choice"
    )
    tile_size: int | None = Field(default=None, gt=0, description="pixels per tile side; None: the vision preset's")
    drop_path: float = Field(
        default=0.0, ge=0, lt=1, description="without effect: a training stage's own `drop_path` counts"
    )


class DataParams(Params):
    """`data.<name>:` — one mixture."""

    meta: str = Field(description="an InternVL meta JSON; paths inside it are relative to it, or s3://")
    endpoint_url: Annotated[str | None, Run] = Field(
        default=None, description="the S3 store of its s3:// paths; None: botocore's own choice"
    )
    system: str | None = Field(default=None, description="system prompt; None: the official one; '' leaves it empty")


class Packing(Params):
    """What one pack, a row of several samples, may hold."""

    max_tokens: int = Field(default=16384, gt=0, description="tokens of a pack")
    max_tiles: int = Field(default=48, gt=0, description="tiles of a pack")
    policy: Literal["best_fit", "official_first_fit"] = Field(
        default="best_fit", description="official_first_fit: the search of the official code, which fills packs less"
    )


class LossParams(Params):
    """How much each supervised token counts."""

    weight: Literal["token", "sample", "square"] = Field(
        default="square", description="of each of x supervised tokens: 1 (token), 1/x (sample) or 1/√x (square)"
    )
    unit: Literal["conversation", "response"] = Field(
        default="conversation", description="whose tokens x counts: the conversation's (official code), or the single "
        "response's (paper)",
    )  # fmt: skip


class Schedule(Params):
    """Cosine with linear warmup. `horizon` is where the cosine ends, apart from where the stage stops."""

    warmup: int = Field(default=0, ge=0, description="optimizer steps")
    horizon: int | None = Field(default=None, gt=0, description="optimizer steps; None: the stage's own length")
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1, description="where the cosine ends, as a share of `lr`")


class CheckpointParams(Params):
    """When work is saved."""

    every: Literal["auto"] | Annotated[int, Field(gt=0)] = Field(
        default="auto",
        description="optimizer steps between checkpoints; auto: from what a save costs and how often attempts fail",
    )
    keep: int = Field(default=3, gt=0, description="checkpoints kept while the stage runs")


Count = Annotated[int, Field(gt=0)]


class Resources(Params):
    """What a stage asks of the cluster."""

    workers: Count | tuple[Count, Count] = Field(
        default=1,
        description="ranks of a training stage, parallel tasks of another; [min, max]: as many as there is room for, "
        "fewer when a node is gone, more when it is back",
    )
    cpus: float = Field(default=1, gt=0, description="CPU cores per worker")
    gpus: float = Field(default=0, ge=0, description="GPUs per worker")
    gpu_memory: float = Field(default=80, gt=0, description="GB of each GPU")
    accelerator: str | None = Field(
        default=None, min_length=1, description="Ray's name of the GPUs to run on, e.g. H100, A100-80G, L4; None: any"
    )
    labels: dict[str, str] = Field(
        default_factory=dict,
        description="of the nodes to run on, as Ray's label selectors: {ray.io/market-type: on-demand}; a value may be "
        "'!value', 'in(a,b)' or '!in(a,b)'",
    )

    @field_validator("workers")
    @classmethod
    def _in_order(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        if not isinstance(workers, int) and workers[0] > workers[1]:
            raise ValueError(f"must be [min, max], so [{workers[1]}, {workers[0]}]")
        return workers

    def __hash__(self) -> int:  # pydantic's own cannot hash a mapping
        return hash(self.model_dump_json())

    @field_validator("labels")
    @classmethod
    def _selectors(cls, labels: dict[str, str]) -> dict[str, str]:
        for name, text in labels.items():
            if not _LABEL.fullmatch(name) or not _SELECTOR.fullmatch(text):
                raise ValueError(f"{name}: {text} is no label selector of Ray's: name: value, !value or in(a,b)")
        return labels

    @property
    def least(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def selector(self) -> dict[str, str]:
        """`accelerator` and `labels` as one label selector of Ray's."""
        return {**({ACCELERATOR: self.accelerator} if self.accelerator else {}), **self.labels}


class StageParams(Params):
    """What every stage has."""

    needs: Annotated[tuple[str, ...], Run] = Field(
        default=(), description="the stages whose results it takes; what they are is part of what it is"
    )
    resources: Annotated[Resources, Run] = Resources()

    @property
    def lent(self) -> dict[str, str]:
        """Stages of which it takes a part only, and what they are to it. They are among its `needs`."""
        return {}


class PrepareParams(StageParams):
    """`kind: prepare` — a mixture read, checked, measured and written as shards (docs/data.md)."""

    model: Annotated[str | None, Run] = Field(
        default=None, description="a name under `models:`, whose tokens it counts"
    )
    data: str = Field(description="the name of a mixture under `data:`")
    max_tokens: int = Field(default=16384, gt=0, description="longer samples are rejected")
    max_tiles_per_sample: int = Field(default=48, gt=0, description="samples with more tiles are rejected")
    max_tiles: int = Field(default=12, gt=0, description="tiles per image where the meta gives no max_dynamic_patch")
    min_frames: int = Field(default=8, gt=0, description="fewest frames of a video; as many are drawn at each use")
    max_frames: int = Field(default=32, gt=0, description="most frames of a video, where they fit")
    max_rejected: Annotated[float, Run] = Field(
        default=0.01, ge=0, le=1, description="share of samples that may be damaged; what `curate` rejects is not"
    )
    verify: Literal["full", "header"] = Field(
        default="full", description="full: each picture and video is decoded once; header: its header is looked at"
    )
    repeat: Literal["sampled", "official_prefix"] = Field(
        default="sampled", description="which samples the fraction of a `repeat_time` takes: drawn anew each epoch, or "
        "always the first ones (official code)",
    )  # fmt: skip
    tile_tie: Literal["strict", "inclusive"] = Field(
        default="strict", description="between grids that fit a picture equally, the largest whose area is less than "
        "twice the picture's (official code), or at most twice (inclusive: the paper)",
    )  # fmt: skip
    shard_megabytes: float = Field(default=64, gt=0, description="of a file of shards, about")
    curate: Curation = Curation()

    @model_validator(mode="after")
    def _frames_in_order(self) -> "PrepareParams":
        if self.min_frames > self.max_frames:
            raise ValueError(f"min_frames {self.min_frames} is more than max_frames {self.max_frames}")
        return self


class TrainParams(StageParams):
    """`kind: train` — `language_pretrain`, `mlp_warmup`, `vit_incremental` and `full_finetune` are this kind with
    their own `train`."""

    model: Annotated[str | None, Run] = Field(
        default=None, description="a name under `models:`; None: that of the training stage before, or `model:`"
    )
    vision_from: Annotated[str | None, Run] = Field(
        default=None,
        description="a training stage, of any model, whose vision encoder the first stage of this one starts with",
    )
    language_from: Annotated[str | None, Run] = Field(
        default=None,
        description="a training stage whose language model the first stage of this model starts with: what was learned "
        "of text alone serves every vision encoder",
    )
    train: tuple[Module, ...] = Field(min_length=1, description="the modules that learn; the others are frozen")
    fraction: Annotated[float, Late] = Field(
        default=1.0, gt=0, le=1, description="of the samples of each dataset; a smaller one lies within a larger one"
    )
    lr: float = Field(gt=0, description="peak learning rate")
    global_batch: int = Field(gt=0, description="packs per optimizer step, whatever the number of workers")
    steps: int | None = Field(default=None, gt=0, description="where the stage stops; exclusive with epochs")
    epochs: float | None = Field(default=None, gt=0, description="times through the data; exclusive with steps")
    packing: Packing = Packing()
    loss: LossParams = LossParams()
    schedule: Schedule = Schedule()
    weight_decay: float = Field(default=0.01, ge=0, description="of AdamW; biases and norms have none")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="of AdamW")
    eps: float = Field(default=1e-8, gt=0, description="of AdamW")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are scaled down to this norm")
    drop_path: float = Field(
        default=0.0, ge=0, lt=1, description="of the ViT where it trains: the rate of its last layer"
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="bf16", description="of weights and arithmetic; bf16 keeps fp32 masters"
    )
    seed: int = Field(default=0, ge=0, description="of all that is drawn; default: the experiment's")
    max_lost: float = Field(
        default=0.001, ge=0, le=1, description="share of samples that may fail to decode in training"
    )
    max_skipped: Annotated[int, Run] = Field(
        default=3, gt=0, description="steps in a row whose loss or gradient is not finite before the stage stops"
    )
    hang_timeout_s: Annotated[float, Run] = Field(
        default=600.0, gt=0, description="seconds without the end of a step before the stacks are told"
    )
    data_workers: Annotated[Literal["auto"] | Annotated[int, Field(ge=0)], Run] = Field(
        default="auto",
        description="processes of each rank that decode ahead; 0: a thread of its own; auto: the rank's other `cpus`, "
        "from 1 to 8 (as many as in the official scripts), or 0 where it trains on the CPU itself",
    )
    deepspeed: Annotated[int | Path, Run] = Field(
        default=1, description="a ZeRO stage (0 to 3), or a DeepSpeed JSON; relative to the YAML file"
    )
    checkpointing: Annotated[Literal["auto", "none", "all"], Run] = Field(
        default="auto",
        description="layers run again for the backward pass: those that memory asks for (auto), none or all",
    )
    compile: Annotated[bool, Run] = Field(
        default=True, description="on GPUs, except under ZeRO 3: compiled layers and loss (torch.compile)"
    )
    checkpoint: Annotated[CheckpointParams, Run] = CheckpointParams()

    @property
    def lent(self) -> dict[str, str]:
        parts = {"vision": self.vision_from, "language": self.language_from}
        return {source: part for part, source in parts.items() if source is not None}

    @property
    def fused(self) -> bool:
        """Whether `compile` takes effect on the GPUs it asks for."""
        return self.compile and bool(self.resources.gpus) and zero_stage(self.deepspeed) != 3

    @property
    def decoders(self) -> int:
        """`data_workers` as a number."""
        if self.data_workers != "auto":
            return self.data_workers
        return min(max(1, int(self.resources.cpus) - 1), 8) if self.resources.gpus else 0


class EvaluateParams(StageParams):
    """`kind: evaluate` — prepared data (`needs:`), evaluation sets (`sets:`), or both, asked of trained stages or of a
    whole `model:`; where several stages are needed, their samples are voted on together too."""

    model: Annotated[str | None, Run] = Field(
        default=None, description="a name under `models:` with a `folder:`, where no training stage is needed"
    )
    sets: Annotated[tuple[str, ...], Run] = Field(default=(), description="names under `eval:`")
    answers: dict[str, Answers] = Field(
        default_factory=dict, description="how answers to a task of prepared data are read; others: as text, exact"
    )
    limit: int | None = Field(default=None, gt=0, description="questions per task; None: all")
    prompts: dict[str, Prompt] = Field(
        default_factory=lambda: {"direct": Prompt()}, min_length=1,
        description="each question is asked with each of these, greedily",
    )  # fmt: skip
    max_new_tokens: int = Field(default=16, gt=0, description="of the prompt `direct`")
    sampling: Sampling | None = Field(default=None, description="None: greedy answers only")
    rerank: dict[str, Reranker] = Field(
        default_factory=dict, description="scores of samples, by a name of yours; likelihood and certainty are free"
    )
    ensemble: Ensemble = Ensemble()
    fallback: Literal["none", "random"] = Field(
        default="none", description="random: an unreadable choice is drawn, as the parsers of old benchmarks do"
    )
    fallback_seed: int = Field(default=0, ge=0, description="of what `fallback: random` draws")
    loss: bool = Field(default=True, description="of the references of prepared data, in nats per token")
    engine: Literal["transformers", "vllm"] = Field(
        default="transformers", description="vllm: where it is installed on every node; other draws, no certainty"
    )
    batch: Annotated[int, Field(gt=0), Run] = Field(default=64, description="responses that are generated at a time")

    @property
    def lent(self) -> dict[str, str]:
        return {its.model: "scorer" for its in self.rerank.values() if its.model}

    @model_validator(mode="after")
    def _prompts_named(self) -> "EvaluateParams":
        for name in self.sampling.prompts if self.sampling else ():
            if name not in self.prompts:
                raise ValueError(f"sampling.prompts names '{name}', and there are {', '.join(self.prompts)}")
        return self


class Holdout(Params):
    """Points that the fit does not see, and that it has to predict: at most a quarter of all."""

    largest: bool = Field(default=True, description="the point with the largest models and the most data")
    random: int = Field(default=3, ge=0, description="others, drawn by the seed")


class ScalingParams(StageParams):
    """`kind: scaling` — a law over the evaluations it needs (stages/scaling.py)."""

    task: str = Field(default="all", description="whose loss is fitted")
    prompt: str | None = Field(default=None, description="whose accuracies are listed; None: the first one")
    data: Literal["samples", "tokens"] = Field(
        default="samples", description="what D counts: different samples that were trained on, or tokens seen"
    )
    holdout: Holdout = Holdout()
    huber_delta: float = Field(default=1e-3, gt=0, description="of the loss on residuals of log L (Hoffmann et al.)")
    starts: int = Field(default=64, gt=0, description="from which the fit is tried")
    refits: int = Field(default=200, ge=20, description="bootstrap samples behind a band")
    band: float = Field(default=0.95, gt=0, lt=1, description="share of outcomes that a band is to hold")
    seed: int = Field(default=0, ge=0, description="of starts, refits, held-out points; default: the experiment's")


class ExportParams(StageParams):
    """`kind: export` — the model of a training stage as a folder, with a model card of the evaluations it needs."""

    layout: Literal["hf", "official"] = Field(
        default="hf", description="Hugging Face's (transformers, vLLM), or that of the official internvl_chat code"
    )
