"""`tracking:` of an experiment: where else its metrics go. Not part of what a stage is."""

from typing import Literal

from pydantic import Field

from stages.base import Params


class WandbParams(Params):
    """`tracking.wandb:` — Weights & Biases; its key comes from WANDB_API_KEY or `wandb login`, never from this file."""

    project: str = Field(default="stageline", min_length=1)
    entity: str | None = Field(default=None, description="a user or team; None: the default of the key")
    mode: Literal["online", "offline"] = Field(
        default="online", description="offline: a folder to send later with `wandb sync`"
    )
    tags: tuple[str, ...] = ()
    folder: str | None = Field(default=None, description="of wandb's files; None: beside the experiment, ./wandb")


class TensorBoardParams(Params):
    """`tracking.tensorboard:` — event files, one folder a stage."""

    folder: str = Field(default="tensorboard", description="beside the experiment unless absolute")


class TrackingParams(Params):
    """`tracking:` — metrics.jsonl in storage is always written; these besides."""

    wandb: WandbParams | None = None
    tensorboard: TensorBoardParams | None = None
