"""`tracking:` of an experiment: where else its metrics go. Not part of what a stage is."""

from collections.abc import Callable
from typing import Literal

from pydantic import Field

from stages.base import Params


class WandbParams(Params):
    """`tracking.wandb:` — Weights & Biases; its key comes from WANDB_API_KEY or `wandb login`, never from this file."""

    project: str = Field(default="stageline", min_length=1, description="of Weights & Biases")
    entity: str | None = Field(default=None, description="a user or team; None: the default of the key")
    mode: Literal["online", "offline"] = Field(
        default="online", description="offline: a folder to send later with `wandb sync`"
    )
    tags: tuple[str, ...] = Field(default=(), description="of every run")
    folder: str | None = Field(
        default=None,
        description="where wandb makes its folder `wandb`; None: beside the experiment; as TensorBoard's in a job",
    )


class TensorBoardParams(Params):
    """`tracking.tensorboard:` — event files, in <folder>/<stage>/<run>; in storage too when a stage is over."""

    folder: str = Field(
        default="tensorboard",
        description="beside the experiment unless absolute; of a submitted job, and where it cannot be written, below "
        "the folder for temporary files",
    )


class TrackingParams(Params):
    """`tracking:` — metrics.jsonl in storage is always written; these besides."""

    wandb: WandbParams | None = None
    tensorboard: TensorBoardParams | None = None

    def located(self, resolve: Callable[[str], str]) -> "TrackingParams":
        """With absolute folders. resolve: what a relative path of the file is."""
        update = {}
        if self.wandb:
            update["wandb"] = self.wandb.model_copy(update={"folder": resolve(self.wandb.folder or ".")})
        if self.tensorboard:
            folder = resolve(self.tensorboard.folder)
            update["tensorboard"] = self.tensorboard.model_copy(update={"folder": folder})
        return self.model_copy(update=update)
