"""The plan of steps: which packs of which samples every step of a stage trains.

Invariant: a pure function of the index (lengths, repeats), the seed, the budgets and the global batch G; it knows
nothing of ranks. Step s trains packs [s * G, (s + 1) * G), so the data cursor IS the step: a resume at any world size
skips and repeats nothing. Every epoch holds each sample exactly as often as its repeat factor says. The official code
keeps no data cursor and its order changes with the number of ranks and workers (OpenGVLab/InternVL #963, #964).

A longer plan begins with the shorter one: epochs are planned one after the other and concatenated, and a step may
span two. Within an epoch a look-ahead of LOOK_AHEAD steps brings packs of like cost into the same step.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from modeling.errors import CheckpointError
from modeling.packing import Policy, plan_packs

Repeat = Literal["sampled", "official_prefix"]

LOOK_AHEAD = 8  # steps whose packs are sorted by cost together

# The streams of random numbers of one (seed, epoch).
_REPEAT, _PACK, _GROUP = range(3)


@dataclass(frozen=True)
class StepPlan:
    """packs: rows of occurrences, in training order. An occurrence o is copy[o] of sample[o] in epoch[o] (all from 0).

    Occurrences of the last epoch may be in no pack where the stage stops within it.
    """

    packs: list[np.ndarray]
    sample: np.ndarray
    epoch: np.ndarray
    copy: np.ndarray
    global_batch: int
    steps: int

    def step(self, step: int) -> list[np.ndarray]:
        """The packs of one step (from 0): global_batch of them, fewer only in the last. IndexError beyond the plan."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of a plan of {self.steps} steps")
        return self.packs[step * self.global_batch : (step + 1) * self.global_batch]

    def digest(self) -> str:
        """sha256 of the whole plan, the same on every machine."""
        digest = hashlib.sha256()
        for name, values in sorted(self._arrays().items()):
            digest.update(f"{name} {len(values)} ".encode() + values.astype("<i8").tobytes())
        return digest.hexdigest()

    def save(self, path: Path | str) -> None:
        """Write the plan and its digest as an npz file, without pickle."""
        with open(path, "wb") as file:
            arrays = {"digest": np.frombuffer(self.digest().encode(), np.uint8), **self._arrays()}
            np.savez(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path | str) -> "StepPlan":
        """Read a saved plan. CheckpointError if the file is damaged or is no plan."""
        try:
            with np.load(path, allow_pickle=False) as file:
                stored = {name: file[name] for name in file.files}
            expected = stored.pop("digest").tobytes().decode()
            packs = np.split(stored["rows"], stored["ends"][:-1])
            global_batch, steps = stored["shape"].tolist()
            plan = cls(packs, stored["sample"], stored["epoch"], stored["copy"], global_batch, steps)
            whole = plan.digest() == expected
        except FileNotFoundError:
            raise
        except Exception as error:  # zip, npy and zlib each raise their own kinds on damaged bytes
            raise _damaged(path) from error
        if not whole:
            raise _damaged(path)
        return plan

    def _arrays(self) -> dict[str, np.ndarray]:
        return {
            "rows": np.concatenate(self.packs),
            "ends": np.cumsum([len(pack) for pack in self.packs]),
            "sample": self.sample,
            "epoch": self.epoch,
            "copy": self.copy,
            "shape": np.array([self.global_batch, self.steps]),
        }


def plan_steps(
    tokens: Sequence[int] | np.ndarray,
    tiles: Sequence[int] | np.ndarray,
    repeats: Sequence[float] | np.ndarray,
    *,
    max_tokens: int,
    max_tiles: int,
    global_batch: int,
    seed: int,
    policy: Policy = "best_fit",
    repeat: Repeat = "sampled",
    steps: int | None = None,
    epochs: float | None = None,
    costs: Sequence[float] | np.ndarray | None = None,
    groups: Sequence[int] | np.ndarray | None = None,
) -> StepPlan:
    """Plan a stage of exactly `steps` full steps, or of `epochs` passes (of which the last step may be short).

    tokens, tiles, repeats: one entry per sample; repeats as in the meta JSON, 1.5 is once and a half.
    repeat: who gets the copy beyond the whole ones: a share drawn anew each epoch, or the first ones of the dataset.
    costs: compute per sample in any unit; default: its shares of the tile budget and, squared, of the token budget.
    groups: the dataset of each sample, of which a fraction is taken; default: samples of one factor are one.
    Raises ValueError as `plan_packs` does, for negative or only zero repeats, and unless one of steps and epochs is
    given.
    """
    token_column, tile_column = np.asarray(tokens, np.int64), np.asarray(tiles, np.int64)
    factors = np.asarray(repeats, np.float64)
    group_column = np.zeros(len(factors), np.int64) if groups is None else np.asarray(groups, np.int64)
    if not len(token_column) == len(tile_column) == len(factors) == len(group_column):
        raise ValueError("tokens, tiles, repeats and groups must have one entry per sample")
    if not np.isfinite(factors).all() or (factors < 0).any():
        raise ValueError("a repeat factor must be a number, 0 or more")
    if (steps is None) == (epochs is None):
        raise ValueError("give either steps or epochs")
    length = steps if epochs is None else epochs
    if length is None or not 0 < length < math.inf or global_batch < 1:
        raise ValueError(f"steps or epochs and global_batch must be positive, found {length} and {global_batch}")
    if repeat not in get_args(Repeat):
        raise ValueError(f"repeat must be one of {', '.join(get_args(Repeat))}, found {repeat!r}")
    if costs is None:
        cost_column = tile_column / max(max_tiles, 1) + (token_column / max_tokens) ** 2
    else:
        cost_column = np.asarray(costs, np.float64)

    packs: list[np.ndarray] = []
    samples, epoch_of, copies = [], [], []
    occurrences = epoch = 0
    while (len(packs) < steps * global_batch) if steps is not None else (epoch < math.ceil(length)):
        sample, copy = _occurrences(factors, group_column, repeat, (seed, epoch, _REPEAT))
        if not len(sample):  # how many there are is the same in every epoch
            raise ValueError("no sample is repeated at all: every repeat factor is 0 or too small to give one copy")
        rows = plan_packs(
            token_column[sample], tile_column[sample], max_tokens, max_tiles, (seed, epoch, _PACK), policy
        )
        pack_costs = np.array([cost_column[sample[row]].sum() for row in rows])
        order = _group(pack_costs, global_batch, len(packs), (seed, epoch, _GROUP))
        if epochs is not None and epochs - epoch < 1:  # a last part of an epoch
            order = order[: math.ceil((epochs - epoch) * len(order))]
        packs += [rows[index] + occurrences for index in order]
        samples.append(sample)
        copies.append(copy)
        epoch_of.append(np.full(len(sample), epoch, np.int64))
        occurrences += len(sample)
        epoch += 1
    if steps is not None:
        packs = packs[: steps * global_batch]
    return StepPlan(
        packs=packs,
        sample=np.concatenate(samples),
        epoch=np.concatenate(epoch_of),
        copy=np.concatenate(copies),
        global_batch=global_batch,
        steps=-(-len(packs) // global_batch),
    )


def _occurrences(
    factors: np.ndarray, groups: np.ndarray, repeat: Repeat, seed: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(sample, copy) of one epoch: floor(r) copies of every sample, one more for a fraction of each dataset."""
    counts = np.floor(factors).astype(np.int64)
    rng = np.random.default_rng(seed)
    for group, factor in sorted(set(zip(groups.tolist(), factors.tolist()))):
        fraction = factor - math.floor(factor)
        members = np.flatnonzero((groups == group) & (factors == factor))
        if repeat == "sampled":
            counts[rng.permutation(members)[: math.floor(fraction * len(members) + 0.5)]] += 1
        else:
            counts[members[: int(len(members) * fraction)]] += 1
    sample = np.repeat(np.arange(len(factors)), counts)
    copy = np.arange(len(sample)) - np.repeat(np.cumsum(counts) - counts, counts)
    return sample, copy


def _group(costs: np.ndarray, global_batch: int, before: int, seed: Sequence[int]) -> np.ndarray:
    """An order of one epoch's packs in which those of like cost share a step.

    before: packs of earlier epochs. The first packs fill the step that they left open; what is left over at the end
    opens the next one.
    """
    rng = np.random.default_rng(seed)
    order = np.arange(len(costs))
    start = -before % global_batch
    while len(costs) - start >= global_batch:
        n_steps = min(LOOK_AHEAD, (len(costs) - start) // global_batch)
        end = start + n_steps * global_batch
        by_cost = order[start:end][np.argsort(-costs[start:end], kind="stable")]
        order[start:end] = by_cost.reshape(n_steps, global_batch)[rng.permutation(n_steps)].reshape(-1)
        start = end
    return order


def _damaged(path: Path | str) -> CheckpointError:
    return CheckpointError(
        "the plan of steps is damaged", where=str(path), remedy="delete it: it is planned again from the data"
    )
