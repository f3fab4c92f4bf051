"""The plan of steps: which packs of which samples every step of a stage trains, and how many frames of each video.

Invariant: a pure function of the index (lengths, repeats), the seed, the budgets and the global batch G; it knows
nothing of ranks. Step s trains packs [s * G, (s + 1) * G), so the data cursor IS the step: a resume at any world size
skips and repeats nothing. Every epoch holds each sample exactly as often as its repeat factor says. The official code
keeps no data cursor and its order changes with the number of ranks and workers (OpenGVLab/InternVL #963, #964).

A longer plan begins with the shorter one: epochs are planned one after the other and concatenated, and a step may
span two. Within an epoch a look-ahead of LOOK_AHEAD steps brings packs of like cost into the same step, and shuffles
those steps, so that cost follows no order. Everything is flat: 16.3 million samples are planned in 2.6 GB.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from modeling.errors import CheckpointError
from modeling.frames import FrameChoices, occurrence_lengths
from modeling.packing import Policy, plan_packs
from modeling.ragged import Ragged

Repeat = Literal["sampled", "official_prefix"]

# Steps whose packs are sorted by cost together. With one pack a rank, 64 of them, the slowest rank takes 1.004, 1.009
# and 1.002 of the mean in the mixtures of benchmarks/packing.py; with 8 steps 1.011, 1.030, 1.006; with 1 up to 1.31.
LOOK_AHEAD = 32

_CHUNK = 1 << 20  # values hashed at a time

# The streams of random numbers of one (seed, epoch).
_REPEAT, _PACK, _GROUP, _FRAMES = range(4)


@dataclass(frozen=True)
class StepPlan:
    """packs: rows of occurrences, in training order. An occurrence o is copy[o] of sample[o] in epoch[o] (all from 0).

    Occurrences of the last epoch may be in no pack where the stage stops within it. All arrays are flat and int32 as
    far as that reaches: 16 bytes an occurrence and 8 a pack.
    frames: int16, that an occurrence of a video shows, 0 for others; None where the mixture has no video.
    """

    packs: Ragged
    sample: np.ndarray
    epoch: np.ndarray
    copy: np.ndarray
    global_batch: int
    steps: int
    frames: np.ndarray | None = None

    def step(self, step: int) -> list[np.ndarray]:
        """The packs of one step (from 0): global_batch of them, fewer only in the last. IndexError beyond the plan."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of a plan of {self.steps} steps")
        return list(self.packs[step * self.global_batch : (step + 1) * self.global_batch])

    def frames_of(self, occurrences: np.ndarray) -> np.ndarray | None:
        """The frames of these occurrences; None where the mixture has no video."""
        return None if self.frames is None else self.frames[occurrences]

    def digest(self) -> str:
        """sha256 of the whole plan, the same on every machine."""
        digest = hashlib.sha256()
        for name, values in sorted(self._arrays().items()):
            digest.update(f"{name} {len(values)} ".encode())
            for start in range(0, len(values), _CHUNK):
                digest.update(values[start : start + _CHUNK].astype("<i8").tobytes())
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
            packs = Ragged(stored["rows"], np.concatenate([[0], stored["ends"]]))
            global_batch, steps = stored["shape"].tolist()
            sample, epoch, copy = (stored[name] for name in ("sample", "epoch", "copy"))
            plan = cls(packs, sample, epoch, copy, global_batch, steps, stored.get("frames"))
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
            "rows": self.packs.values,
            "ends": self.packs.offsets[1:],
            "sample": self.sample,
            "epoch": self.epoch,
            "copy": self.copy,
            "shape": np.array([self.global_batch, self.steps]),
        } | ({} if self.frames is None else {"frames": self.frames})


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
    costs: Sequence[float] | np.ndarray | Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    groups: Sequence[int] | np.ndarray | None = None,
    choices: FrameChoices | None = None,
) -> StepPlan:
    """Plan a stage of exactly `steps` full steps, or of `epochs` passes (of which the last step may be short).

    tokens, tiles, repeats: one entry per sample; repeats as in the meta JSON, 1.5 is once and a half.
    repeat: who gets the copy beyond the whole ones: a share drawn anew each epoch, or the first ones of the dataset.
    costs: compute per sample in any unit, or a function that gives it from arrays of tokens and tiles; default: the
    shares of the tile budget and, squared, of the token budget.
    groups: the dataset of each sample, of which a fraction is taken; default: samples of one factor are one.
    choices: the lengths of videos, of which each occurrence draws one; costs must then be a function.
    Raises ValueError as `plan_packs` does, for negative or only zero repeats, and unless one of steps and epochs is
    given.
    """
    token_column, tile_column = np.asarray(tokens, np.int64), np.asarray(tiles, np.int64)
    factors = np.asarray(repeats, np.float64)
    group_column = np.zeros(len(factors), np.int64) if groups is None else np.asarray(groups, np.int64)
    cost_column = None if costs is None or callable(costs) else np.asarray(costs, np.float64)
    if choices is not None and not len(choices.tokens.values):
        choices = None
    columns = (token_column, tile_column, factors, group_column, cost_column, choices and choices.tokens)
    if len({len(column) for column in columns if column is not None}) > 1:
        raise ValueError("tokens, tiles, repeats, costs, groups and choices must have one entry per sample")
    if choices is not None and cost_column is not None:
        raise ValueError("where the lengths of videos are drawn, costs must be a function of them")
    if not np.isfinite(factors).all() or (factors < 0).any():
        raise ValueError("a repeat factor must be a number, 0 or more")
    if (steps is None) == (epochs is None):
        raise ValueError("give either steps or epochs")
    length = steps if epochs is None else epochs
    if length is None or not 0 < length < math.inf or global_batch < 1:
        raise ValueError(f"steps or epochs and global_batch must be positive, found {length} and {global_batch}")
    if repeat not in get_args(Repeat):
        raise ValueError(f"repeat must be one of {', '.join(get_args(Repeat))}, found {repeat!r}")
    cost_of = costs if callable(costs) else lambda n, tiles: tiles / max(max_tiles, 1) + (n / max_tokens) ** 2
    datasets = _datasets(group_column, factors)
    parts: list[Ragged] = []
    samples, epoch_of, copies, frames = [], [], [], []
    packs = occurrences = epoch = 0
    while (packs < steps * global_batch) if steps is not None else (epoch < math.ceil(length)):
        sample, copy = _occurrences(factors, datasets, repeat, (seed, epoch, _REPEAT))
        if not len(sample):  # how many there are is the same in every epoch
            raise ValueError("no sample is repeated at all: every repeat factor is 0 or too small to give one copy")
        shown = choices and choices.draw(sample, copy, (seed, epoch, _FRAMES))
        lengths, counts = occurrence_lengths(token_column, tile_column, choices, sample, shown)
        rows = plan_packs(lengths, counts, max_tokens, max_tiles, (seed, epoch, _PACK), policy)
        cost = cost_of(lengths, counts) if cost_column is None else cost_column[sample]
        pack_costs = rows.sums(cost[rows.values])
        order = _group(pack_costs, global_batch, packs, (seed, epoch, _GROUP))
        if epochs is not None and epochs - epoch < 1:  # a last part of an epoch
            order = order[: math.ceil((epochs - epoch) * len(order))]
        if steps is not None:
            order = order[: steps * global_batch - packs]
        rows = rows.take(order)
        parts.append(Ragged(_narrow(rows.values + occurrences), rows.offsets))
        samples.append(_narrow(sample))
        copies.append(_narrow(copy))
        frames.append(shown)
        epoch_of.append(np.full(len(sample), epoch, np.int32))
        packs += len(rows)
        occurrences += len(sample)
        epoch += 1
    return StepPlan(
        packs=Ragged.of(
            np.concatenate([part.values for part in parts]), np.concatenate([part.lengths for part in parts])
        ),
        sample=np.concatenate(samples),
        epoch=np.concatenate(epoch_of),
        copy=np.concatenate(copies),
        global_batch=global_batch,
        steps=-(-packs // global_batch),
        frames=np.concatenate(frames) if choices else None,
    )


def _narrow(values: np.ndarray) -> np.ndarray:
    """Non-negative numbers as int32, as int64 only where they need it."""
    return values.astype(np.int64 if len(values) and values.max() > np.iinfo(np.int32).max else np.int32)


def _datasets(groups: np.ndarray, factors: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """The (factor, members) of each group and factor, in their order."""
    by_group = np.lexsort((factors, groups))
    group, factor = groups[by_group], factors[by_group]
    borders = np.flatnonzero((group[1:] != group[:-1]) | (factor[1:] != factor[:-1])) + 1
    return [(float(factors[part[0]]), part) for part in np.split(by_group, borders) if len(part)]


def _occurrences(
    factors: np.ndarray, datasets: list[tuple[float, np.ndarray]], repeat: Repeat, seed: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(sample, copy) of one epoch: floor(r) copies of every sample, one more for a fraction of each dataset."""
    counts = np.floor(factors).astype(np.int64)
    rng = np.random.default_rng(seed)
    for factor, members in datasets:
        fraction = factor - math.floor(factor)
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
