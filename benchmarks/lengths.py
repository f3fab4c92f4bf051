"""Stated distributions of sample lengths for the benchmarks: tokens and tiles, no data, everything seeded.

The mixtures of the paper are not released, so this is a statement, not a measurement. From the paper (arXiv 2412.05271)
and the official scripts: the fine-tuning mixture's token shares (single image 45.92 %, multi-image 9.37 %, video
39.79 %, text 4.92 %), 256 tokens a tile, tile limits 6 to 36 for one picture and 12 to 36 for several, which share it,
a thumbnail beside every grid, 8 to 32 frames of one tile. Ours: sizes of pictures, log-normal lengths of text, and how
often each limit occurs, so that both budgets nearly bind and a sample has 3,100 tokens (the paper: 44 G tokens of
16.3 M samples, so 2,700). Tiles come from the sizes by the project's own rule (modeling/tiles.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from modeling.tiles import count_tiles

TOKENS_PER_TILE = 256
TEMPLATE = 60  # tokens of system prompt and turns around the text
FRAME = 9  # of "Frame-1: <img></img>\n"
SHARES = {"single": 0.4592, "multi": 0.0937, "video": 0.3979, "text": 0.0492}  # of the tokens, paper §4.1

Lengths = tuple[np.ndarray, np.ndarray]  # tokens and tiles, one entry per sample


@dataclass(frozen=True)
class Mixture:
    """tokens, tiles: int64 [n]; text: bool [n], without any picture; budgets as in `packing:`."""

    name: str
    tokens: np.ndarray
    tiles: np.ndarray
    text: np.ndarray
    max_tokens: int
    max_tiles: int


@lru_cache(maxsize=64)
def _pictures(limit: int) -> np.ndarray:
    """Tiles of 2,000 pictures: sides about 900 pixels (log-normal, 0.6), width / height about 1.15 (0.45)."""
    rng = np.random.default_rng(limit)
    side, shape = rng.lognormal(np.log(900), 0.6, 2000), rng.lognormal(np.log(1.15), 0.45, 2000) ** 0.5
    sizes = zip(np.maximum(side * shape, 32).astype(int).tolist(), np.maximum(side / shape, 32).astype(int).tolist())
    return np.array([count_tiles(width, height, limit) for width, height in sizes])


def _text(rng: np.random.Generator, n: int, median: float, spread: float, most: int) -> np.ndarray:
    return TEMPLATE + np.minimum(rng.lognormal(np.log(median), spread, n), most).astype(np.int64)


def _single(rng: np.random.Generator, n: int, limits=(6, 12, 24, 36), odds=(0.6, 0.3, 0.07, 0.03)) -> np.ndarray:
    limit, tiles = rng.choice(limits, n, p=odds), np.zeros(n, np.int64)
    for value in limits:
        chosen = limit == value
        tiles[chosen] = rng.choice(_pictures(value), chosen.sum())
    return tiles


def single(rng: np.random.Generator, n: int) -> Lengths:
    tiles = _single(rng, n)
    return TOKENS_PER_TILE * tiles + _text(rng, n, 400, 0.9, 4000), tiles


def multi(rng: np.random.Generator, n: int) -> Lengths:
    """Two to six pictures, of which each gets limit // pictures tiles."""
    pictures, limit, tiles = rng.integers(2, 7, n), rng.choice([12, 24, 36], n), np.zeros(n, np.int64)
    for count in range(2, 7):
        for value in (12, 24, 36):
            chosen = (pictures == count) & (limit == value)
            tiles[chosen] = rng.choice(_pictures(value // count), (chosen.sum(), count)).sum(axis=1)
    return TOKENS_PER_TILE * tiles + _text(rng, n, 400, 0.9, 4000), tiles


def video(rng: np.random.Generator, n: int) -> Lengths:
    frames = rng.integers(8, 33, n)
    return (TOKENS_PER_TILE + FRAME) * frames + _text(rng, n, 500, 0.8, 4000), frames


def text(rng: np.random.Generator, n: int) -> Lengths:
    return _text(rng, n, 500, 1.0, 16000), np.zeros(n, np.int64)


KINDS: dict[str, Callable[[np.random.Generator, int], Lengths]] = {
    "single": single, "multi": multi, "video": video, "text": text,
}  # fmt: skip


def sft(n: int, seed: int) -> Mixture:
    """The fine-tuning mixture: kinds so often that they have the paper's shares of the tokens."""
    means = {name: KINDS[name](np.random.default_rng(1), 20_000)[0].mean() for name in SHARES}
    often = np.array([share / means[name] for name, share in SHARES.items()])
    rng = np.random.default_rng(seed)
    kind = rng.choice(len(SHARES), n, p=often / often.sum())
    tokens, tiles = np.zeros(n, np.int64), np.zeros(n, np.int64)
    for number, name in enumerate(SHARES):
        chosen = np.flatnonzero(kind == number)
        tokens[chosen], tiles[chosen] = KINDS[name](rng, len(chosen))
    return Mixture("SFT 16384/48", tokens, tiles, kind == list(SHARES).index("text"), 16384, 48)


def captions(n: int, seed: int, max_tokens: int, max_tiles: int, limit: int) -> Mixture:
    """One picture of up to `limit` tiles and its thumbnail, and a short text."""
    rng = np.random.default_rng(seed)
    tiles = _single(rng, n, (limit,), (1.0,))
    tokens = TOKENS_PER_TILE * tiles + _text(rng, n, 60, 0.7, 900)
    return Mixture(f"captions {max_tokens}/{max_tiles}", tokens, tiles, np.zeros(n, bool), max_tokens, max_tiles)


def mixtures(n: int, seed: int) -> list[Mixture]:
    """The three of the benchmark. A pack of 12 tiles holds a grid of 11 and its thumbnail, so there the limit is 11."""
    return [sft(n, seed), captions(n, seed, 4096, 12, 11), captions(n, seed, 16384, 48, 12)]
