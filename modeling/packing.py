"""The plan of packs: which samples share a row of at most max_tokens tokens and max_tiles tiles.

Invariant: a pure function of the lengths, the budgets and the seed; every sample is in exactly one pack and no pack
exceeds a budget (<=, as the official code compares; the paper, arXiv 2412.05271 §4.2, has <).

`best_fit` looks at both budgets: within windows of samples in random order, the largest sample first, into the pack
that it leaves the fullest; the packs are then shuffled, so that no order of size remains.
`official_first_fit` is the search of the public `dataset_packed.py` (OpenGVLab/InternVL, commit 2410d1dbf208) with
overflow off: packs by tiles, first fit, at most `buffer_size` open ones. Unlike there a sample over a budget is an
error and not dropped, and a text sample costs the tiles it is given here (none).
"""

import heapq
from array import array
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import numpy as np

from modeling.ragged import Ragged

Policy = Literal["best_fit", "official_first_fit"]

# benchmarks/packing.py: 130,000 to 200,000 samples/s on one core. More packs than the bound max(sum of tokens /
# max_tokens, sum of tiles / max_tiles): 2.4 % where both budgets bind, official_first_fit 9.5 to 11 %; 0.6 and 1.2 %
# where tiles do; as many as there, 27 %, where most samples fill more than half of a pack.
WINDOW = 4096  # samples sorted by size at a time: large enough to fill packs, small enough to stay fast
CARRIED = 64  # roomiest packs that stay open for the next window


def plan_packs(
    tokens: Sequence[int] | np.ndarray,
    tiles: Sequence[int] | np.ndarray,
    max_tokens: int,
    max_tiles: int,
    seed: int | Sequence[int] = 0,
    policy: Policy = "best_fit",
    buffer_size: int = 20,
    shuffle: bool = True,
) -> Ragged:
    """Packs of sample indices (int64), in the order in which to train them.

    tokens, tiles: one entry per sample. shuffle: take the samples (and under best_fit train the packs) in an order
    drawn from seed; otherwise as they come. buffer_size: open packs of official_first_fit.
    Raises ValueError naming the sample that exceeds a budget alone, and for negative lengths or an unknown policy.
    """
    lengths, counts = _column("tokens", tokens), _column("tiles", tiles)
    if len(lengths) != len(counts):
        raise ValueError(f"tokens and tiles differ in length: {len(lengths)} and {len(counts)}")
    if policy not in get_args(Policy):
        raise ValueError(f"policy must be one of {', '.join(get_args(Policy))}, found {policy!r}")
    for name, column, budget in (("tokens", lengths, max_tokens), ("tiles", counts, max_tiles)):
        if len(column) and column.max() > budget:
            sample = int(column.argmax())
            raise ValueError(f"sample {sample} has {column[sample]} {name}, more than a pack may hold ({budget})")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths)) if shuffle else np.arange(len(lengths))
    if policy == "official_first_fit":
        return _first_fit(order, lengths, counts, max_tokens, max_tiles, buffer_size)
    packs = _best_fit(order, lengths, counts, max_tokens, max_tiles)
    return packs.take(rng.permutation(len(packs))) if shuffle else packs


def balance(costs: Sequence[float] | np.ndarray, world: int) -> list[list[int]]:
    """Deal positions 0..n-1 to `world` ranks: at most ceil(n / world) each, their summed costs near each other.

    Costliest first to the rank with the least so far, ties to the lower position and rank. A rank's list keeps
    that order, so that ranks work on like costs at the same micro-step.
    """
    if world < 1:
        raise ValueError(f"world must be at least 1, found {world}")
    most = -(-len(costs) // world)
    ranks: list[list[int]] = [[] for _ in range(world)]
    open_ranks = [(0.0, rank) for rank in range(world)]  # a heap: the least loaded first
    for position in sorted(range(len(costs)), key=lambda position: (-costs[position], position)):
        load, rank = heapq.heappop(open_ranks)
        ranks[rank].append(position)
        if len(ranks[rank]) < most:
            heapq.heappush(open_ranks, (load + float(costs[position]), rank))
    return ranks


def _column(name: str, values: Sequence[int] | np.ndarray) -> np.ndarray:
    column = np.asarray(values, dtype=np.int64)
    if len(column) and column.min() < 0:
        raise ValueError(f"sample {int(column.argmin())} has negative {name}: {column.min()}")
    return column


def _best_fit(samples: np.ndarray, tokens: np.ndarray, tiles: np.ndarray, max_tokens: int, max_tiles: int) -> Ragged:
    """Best-fit decreasing in two dimensions, each measured as a share of its budget, window by window."""
    most_tiles = max(max_tiles, 1)
    placed, into = np.empty_like(samples), np.empty_like(samples)  # every sample in turn, and its pack
    packs = 0
    # The open packs: their numbers and what is free in them.
    numbers, free_tokens, free_tiles = (np.empty(0, np.int64) for _ in range(3))
    for start in range(0, len(samples), WINDOW):
        window = samples[start : start + WINDOW]
        token_share, tile_share = tokens[window] / max_tokens, tiles[window] / most_tiles
        share = token_share + tile_share
        by_size = np.lexsort((-share, -np.maximum(token_share, tile_share)))
        window = window[by_size]
        n_carried = n_open = len(numbers)
        room = np.zeros(len(window), np.int64)  # a window opens at most one pack per sample
        free_tokens, free_tiles = np.concatenate([free_tokens, room]), np.concatenate([free_tiles, room])
        slack = free_tokens / max_tokens + free_tiles / most_tiles
        chosen = []
        for length, count, part in zip(tokens[window].tolist(), tiles[window].tolist(), share[by_size].tolist()):
            fits = ((free_tokens[:n_open] >= length) & (free_tiles[:n_open] >= count)).nonzero()[0]
            if len(fits):
                pack = fits[slack[fits].argmin()]
            else:
                pack, n_open = n_open, n_open + 1
                free_tokens[pack], free_tiles[pack], slack[pack] = max_tokens, max_tiles, 2.0
            chosen.append(pack)
            free_tokens[pack] -= length
            free_tiles[pack] -= count
            slack[pack] -= part
        numbers = np.concatenate([numbers, packs + np.arange(n_open - n_carried)])
        packs += n_open - n_carried
        placed[start : start + WINDOW], into[start : start + WINDOW] = window, numbers[chosen]
        least_free = np.minimum(free_tokens[:n_open] / max_tokens, free_tiles[:n_open] / most_tiles)
        carried = np.argsort(-least_free, kind="stable")[:CARRIED]
        numbers, free_tokens, free_tiles = numbers[carried], free_tokens[carried], free_tiles[carried]
    return Ragged.of(placed[np.argsort(into, kind="stable")], np.bincount(into, minlength=packs))


def _first_fit(
    samples: np.ndarray, tokens: np.ndarray, tiles: np.ndarray, max_tokens: int, max_tiles: int, buffer_size: int
) -> Ragged:
    rows, lengths = array("q"), array("q")
    for pack in _official_packs(samples, tokens, tiles, max_tokens, max_tiles, buffer_size):
        rows.extend(pack)
        lengths.append(len(pack))
    return Ragged.of(np.array(rows, np.int64), np.array(lengths, np.int64))


def _official_packs(
    samples: np.ndarray, tokens: np.ndarray, tiles: np.ndarray, max_tokens: int, max_tiles: int, buffer_size: int
) -> Iterator[list[int]]:
    """The official packer: open packs by tiles, most first and older first among equals; yields full ones."""
    if buffer_size < 1:
        raise ValueError(f"buffer_size must be at least 1, found {buffer_size}")
    buffers: list[tuple[int, int, list[int]]] = []  # (tiles, tokens, samples)
    for sample in samples.tolist():
        length, count, pack = int(tokens[sample]), int(tiles[sample]), []
        for index, (used_tiles, used_tokens, _) in enumerate(buffers):
            if used_tiles + count <= max_tiles and used_tokens + length <= max_tokens:
                used_tiles, used_tokens, pack = buffers.pop(index)
                count, length = used_tiles + count, used_tokens + length
                break
        pack.append(sample)
        if length == max_tokens:
            yield pack
        else:
            place = next((i for i, (used_tiles, _, _) in enumerate(buffers) if used_tiles < count), len(buffers))
            buffers.insert(place, (count, length, pack))
        while buffers and (buffers[0][0] >= max_tiles or len(buffers) > buffer_size):
            yield buffers.pop(0)[2]
    yield from (pack for _, _, pack in buffers)
