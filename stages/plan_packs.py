"""The packing plan of a training stage: made by the driver on lengths alone, before any process group exists.

Packing inside ranks ends in collective time-outs (Megatron-Bridge #1505). The plan is a pure function of (index,
repeat factors, seed, budgets, global batch), stored beside the stage, so that what was trained can be looked up later.
A video counts with the frames that its occurrence shows, here and in whatever the ranks are balanced by.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from modeling.epochs import StepPlan, plan_steps
from modeling.errors import DataError
from modeling.frames import FrameChoices, occurrence_lengths
from modeling.loss import Reduction, Unit, total_weights
from modeling.presets import resolve
from modeling.shards import ShardReader
from stages.fraction import chosen
from stages.io import Input, StageIO

PLAN = "plan.npz"


def parent(io: StageIO, kind: str) -> Input | None:
    """The one parent of a base kind, or None. A stage that only gives a part of its model is none."""
    return next((item for item in io.inputs.values() if item.kind == kind and item.name not in io.params.lent), None)


def data_parent(io: StageIO) -> Input:
    found = parent(io, "prepare")
    assert found is not None, "the spec lets no stage pass without its data"
    return found


def plan_packs(io: StageIO) -> None:
    """Write the plan of all steps. Raises DataError where a sample fits no pack."""
    params, data = io.params, data_parent(io)
    index = ShardReader(data.folder).index
    choices = FrameChoices.of(index)
    tokens, tiles = np.asarray(index["tokens"]), np.asarray(index["tiles"])
    budget = params.packing
    too_big = np.flatnonzero((tokens > budget.max_tokens) | (tiles > budget.max_tiles))
    if len(too_big):
        i = int(too_big[0])
        raise DataError(
            f"{len(too_big)} samples fit no pack of {budget.max_tokens} tokens, {budget.max_tiles} tiles; the first, "
            f"{index['id'][i]}, has {tokens[i]} tokens and {tiles[i]} tiles",
            where=f"stages.{io.stage}.packing",
            remedy=f"raise packing, or lower max_tokens or max_tiles_per_sample of stage {data.name}",
        )
    dataset, names = index["dataset"].codes()
    repeats = np.asarray(index["repeat"], dtype=np.float64)
    if params.fraction < 1:
        repeats = np.where(chosen(index["id"], dataset, names, params.fraction), repeats, 0.0)
    plan = plan_steps(
        tokens, tiles, repeats,
        max_tokens=budget.max_tokens, max_tiles=budget.max_tiles, global_batch=params.global_batch,
        seed=params.seed, policy=budget.policy, repeat=data.params["repeat"], steps=params.steps, epochs=params.epochs,
        costs=partial(costs, tokens_per_tile=resolve(io.model).tokens_per_tile), groups=dataset,
        choices=choices,
    )  # fmt: skip
    path = io.scratch / PLAN
    plan.save(path)
    io.keep(PLAN, path)
    trained = plan.packs.values
    lengths, _ = occurrence_lengths(tokens, tiles, choices, plan.sample[trained], plan.frames_of(trained))
    fill = int(lengths.sum()) / (len(plan.packs) * budget.max_tokens)
    io.log(
        f"{len(plan.packs):,} packs of {len(plan.sample):,} samples in {plan.steps:,} steps, "
        f"token fill {fill:.1%}, {int(plan.epoch.max()) + 1} epochs begun"
    )


def costs(tokens: np.ndarray, tiles: np.ndarray, tokens_per_tile: int) -> np.ndarray:
    """float64 [n]: the relative cost of each one's forward and backward, for the plan and for the ranks alike.

    A tile passes the ViT with four patches per token that reaches the language model.
    """
    return tokens + 4.0 * tokens_per_tile * tiles


@dataclass(frozen=True)
class Lengths:
    """What the training loop needs to know of samples without decoding anything."""

    weight: np.ndarray  # float64: what a sample adds to the denominator of the loss
    tokens: np.ndarray  # of samples; a video's occurrences have their own
    tiles: np.ndarray
    choices: FrameChoices | None
    tokens_per_tile: int

    @classmethod
    def of(cls, reader: ShardReader, reduction: Reduction, unit: Unit, tokens_per_tile: int) -> "Lengths":
        index = reader.index
        weight = total_weights(index["answers"], reduction, unit)
        return cls(weight, index["tokens"], index["tiles"], FrameChoices.of(index), tokens_per_tile)

    def of_pack(self, plan: StepPlan, pack: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, tiles) of each occurrence in a pack."""
        return occurrence_lengths(self.tokens, self.tiles, self.choices, plan.sample[pack], plan.frames_of(pack))

    def seen(self, plan: StepPlan) -> dict[str, int]:
        """What the whole plan trains on: different samples, and tokens of all their occurrences."""
        rows = plan.packs.values
        return {"samples": len(np.unique(plan.sample[rows])), "tokens": int(self.of_pack(plan, rows)[0].sum())}

    def costs(self, plan: StepPlan, packs: Sequence[np.ndarray]) -> list[float]:
        """The relative cost of each pack."""
        return [float(costs(*self.of_pack(plan, pack), self.tokens_per_tile).sum()) for pack in packs]


def step_weight(plan: StepPlan, lengths: Lengths, step: int) -> float:
    """The denominator of a step's loss: the weight of the whole global batch, known without any exchange."""
    return float(sum(lengths.weight[plan.sample[pack]].sum() for pack in plan.step(step)))
