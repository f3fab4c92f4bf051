"""Which signatures are copies: within a mixture (find_duplicates), or of an evaluation set (find_contaminated).

Invariants: a copy was compared with the sample that it is said to copy, and that one is kept; the result depends on
the signatures and their order alone. What is near: `near_pictures`, `near_texts`.

Candidates come from 32 bands (locality-sensitive hashing, Indyk and Motwani 1998): in each, samples with the same 4
values of their text sketches and the same numbers meet. Copies with both texts at a similarity of .85 meet in one of
them with a chance of 1 - (1 - .85^8)^32 = .9999. Where more than 16 meet (a prompt that half a million pictures share),
they are told apart by further bits (signs of random projections of the first picture; sketch values of a text), so that
a sample has at most 16 comparisons a band, however often a text occurs. benchmarks/duplicates.py measures both.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from stages.curation import Contamination, Duplicates
from stages.prepare.signatures import PICTURE, SKETCH, Signatures, mixed, stream

ROWS = 4  # sketch values a band
BANDS = SKETCH // ROWS
CROWD = 16  # samples that are compared with each other; beyond, they are split
SHIFTS = (32, 24, 16, 8, 0)  # low bits of a key that are left out, so as to split no more than is needed
BLOCK = 1 << 14  # pairs compared at once: they stay in the cache
CHUNK = 1 << 18  # samples looked up at once in an evaluation set
COLOUR, BRIGHTNESS, SHAPE = 12, 32, 3  # tolerances: levels of 255, levels of 255, steps of 1/32 octave
FLAT = 4  # levels of 255 by which pictures of one colour may differ

# -- what is near -------------------------------------------------------------------------------------------------


def near_texts(a: np.ndarray, b: np.ndarray, figures_a: np.ndarray, figures_b: np.ndarray, least: float) -> np.ndarray:
    """bool [n] for sketches uint8 [n, SKETCH] and figures uint64 [n]: alike from `least` on, with the same numbers."""
    return (figures_a == figures_b) & ((a == b).sum(axis=1) >= least * SKETCH)


def near_pictures(a: np.ndarray, b: np.ndarray, most: float) -> np.ndarray:
    """bool [n] for PICTURE [n]: 1 - cosine of the codes at most `most`, and colours, brightness and shape alike."""
    x, y = a["code"].astype(np.float32), b["code"].astype(np.float32)
    dot = np.einsum("ij,ij->i", x, y)  # of whole numbers below 2^24: exact
    squares = np.einsum("ij,ij->i", x, x) * np.einsum("ij,ij->i", y, y)
    flat = a["flat"] & b["flat"]
    alike = np.where(flat, True, (squares > 0) & (dot >= np.float32(1 - most) * np.sqrt(squares) * (1 - 1e-6)))
    luma = np.abs(a["luma"].astype(np.int16) - b["luma"])
    chroma = np.abs(a["chroma"].astype(np.int16) - b["chroma"]).max(axis=1, initial=0)
    shape = np.abs(a["shape"].astype(np.int16) - b["shape"])
    colours = np.where(flat, (luma <= FLAT) & (chroma <= FLAT), (luma <= BRIGHTNESS) & (chroma <= COLOUR))
    return alike & colours & (shape <= SHAPE)


@dataclass(frozen=True)
class _Copies:
    """near(i, j): whether samples i [n] are near copies of samples j [n]."""

    signatures: Signatures
    starts: np.ndarray
    params: Duplicates

    def near(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        out = np.zeros(len(i), bool)
        for start in range(0, len(i), BLOCK):
            block = slice(start, start + BLOCK)
            out[block] = self._near(i[block], j[block])
        return out

    def _near(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        samples, pictures = self.signatures.samples, self.signatures.pictures
        open_ = np.flatnonzero(
            (samples["media"][i] == samples["media"][j]) & (samples["pictures"][i] == samples["pictures"][j])
        )
        # pictures first: those who meet have like texts as a rule
        for number in range(int(samples["pictures"][i[open_]].max(initial=0))):
            has = samples["pictures"][i[open_]] > number
            left, right = pictures[self.starts[i[open_[has]]] + number], pictures[self.starts[j[open_[has]]] + number]
            alike = np.ones(len(open_), bool)
            alike[has] = near_pictures(left, right, self.params.picture_distance)
            open_ = open_[alike]
        for name, column in (("questions", 0), ("answers", 1)):
            left, right = i[open_], j[open_]
            figures = samples["figures"][left, column], samples["figures"][right, column]
            texts = samples[name][left], samples[name][right]
            open_ = open_[near_texts(*texts, *figures, self.params.text_similarity)]
        # A short answer ("positive") tells nothing apart. Without a picture the question then has to be the same, for
        # templates of instructions differ in one slot.
        left, right = i[open_], j[open_]
        tells = ~samples["short"][left] | (samples["media"][left] > 0)
        out = np.zeros(len(i), bool)
        out[open_[tells | (samples["asked"][left] == samples["asked"][right])]] = True
        return out


# -- who meets ----------------------------------------------------------------------------------------------------


def _values(sketches: np.ndarray, band: int) -> np.ndarray:
    """uint32 [n]: the band's values of sketches uint8 [n, SKETCH], in place."""
    start = ROWS * (band % BANDS)
    return sketches[:, start : start + ROWS].view("<u4")[:, 0]


def _hash(chosen: np.ndarray, columns: Iterable[np.ndarray]) -> np.ndarray:
    """uint64 [chosen], of these rows of the columns."""
    out = np.zeros(len(chosen), np.uint64)
    for column in columns:
        out = mixed(out + column[chosen].astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return out


@cache
def _planes(band: int) -> np.ndarray:
    """float32 [code, 32] of -1 and 1."""
    size = PICTURE["code"].shape[0]
    return np.where(stream(size * 32, 100 + band) >> np.uint64(63), 1, -1).astype(np.float32).reshape(size, 32)


def _sides(pictures: np.ndarray, chosen: np.ndarray, band: int) -> np.ndarray:
    """uint64 [chosen] below 2^32: on which sides of 32 planes the codes lie (sums of whole numbers: exact)."""
    out = np.empty(len(chosen), np.uint64)
    for start in range(0, len(chosen), BLOCK):
        codes = pictures["code"][chosen[start : start + BLOCK]].astype(np.float32)
        out[start : start + BLOCK] = np.packbits(codes @ _planes(band) > 0, axis=1).view("<u4")[:, 0]
    return out


def _keys(
    signatures: Signatures, chosen: np.ndarray, first: np.ndarray, band: int, texts: tuple[str, ...], figures: int
) -> np.ndarray:
    """uint64 [chosen]: above, what must be equal to meet; below 2^32, what tells a crowd apart. first: picture, -1."""
    samples, pictured = signatures.samples, first >= 0
    columns = [_values(samples[name], band) for name in texts]
    columns += [samples["figures"][:, column] for column in range(figures)]
    keys = mixed(_hash(chosen, columns) + pictured) << np.uint64(32)
    tail = _hash(chosen, [_values(samples[name], band + 1) for name in texts]) & np.uint64(0xFFFFFFFF)
    tail[pictured] = _sides(signatures.pictures, first[pictured], band)
    return keys | tail


def _groups(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(members, group of each, ascending): items with the same key, by no more of its low bits than splits a crowd."""
    open_ = np.argsort(keys, kind="stable")
    for shift in SHIFTS:
        prefix = keys[open_] >> np.uint64(shift)
        number = np.cumsum(np.concatenate([[0], prefix[1:] != prefix[:-1]])) if len(prefix) else prefix
        size = np.bincount(number.astype(np.int64))[number.astype(np.int64)]
        crowded = (size > CROWD) & (shift > 0)
        meet = (size > 1) & ~crowded
        # members in the order of the mixture, which the low bits have changed
        order = np.lexsort((open_[meet], number[meet]))
        yield open_[meet][order], number[meet][order]
        open_ = open_[crowded]


def _led(members: np.ndarray, groups: np.ndarray, copies: _Copies) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(sample, earlier sample that it is near): all are compared with the first of their group, the rest with the next.

    At most CROWD rounds, which only groups with equal keys reach.
    """
    for _ in range(CROWD):
        head = np.concatenate([[True], groups[1:] != groups[:-1]]) if len(groups) else np.zeros(0, bool)
        leader = members[head][np.cumsum(head) - 1][~head]
        members, groups = members[~head], groups[~head]
        if not len(members):
            return
        near = copies.near(members, leader)
        yield members[near], leader[near]
        members, groups = members[~near], groups[~near]


# -- within a mixture ---------------------------------------------------------------------------------------------


def find_duplicates(signatures: Signatures, params: Duplicates) -> np.ndarray:
    """int64 [n]: the earlier sample that each is a copy of, itself kept; -1: it is kept."""
    samples, n = signatures.samples, len(signatures)
    copies = _Copies(signatures, signatures.starts(), params)
    of = np.arange(n)

    # Equal samples first: what is left differs, so that no crowd of the same is compared with each other.
    halves = samples["digest"].view("<u8")
    kept, inverse = _first_of(halves[:, 0], halves[:, 1])
    of = kept[inverse]
    whole = _fingerprints(signatures, copies.starts, kept)
    first, inverse = _first_of(whole)
    near = copies.near(kept, kept[first[inverse]])
    to = np.where(near, kept[first[inverse]], kept)
    of = to[np.searchsorted(kept, of)]

    alive = np.unique(of)
    starts = np.where(samples["pictures"][alive] > 0, copies.starts[alive], -1)
    pairs = np.empty(0, np.int64)  # sample << 32 | earlier one that it is near
    for band in range(BANDS):
        keys = _keys(signatures, alive, starts, band, ("questions", "answers"), 2)
        for members, groups in _groups(keys):
            found = [sample << 32 | earlier for sample, earlier in _led(alive[members], groups, copies)]
            pairs = np.unique(np.concatenate([pairs, *found]))  # most are found in many bands
    for sample, root in _settle(pairs, copies).items():
        of[sample] = root
    of = of[of]  # equal samples go with the one that stood for them
    return np.where(of == np.arange(n), -1, of)


def _first_of(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first row of every distinct value, ascending; which of these each row has)."""
    order = np.lexsort(columns)
    new = np.zeros(len(order), bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[order][1:] != column[order][:-1]
    heads = order[new]  # lexsort is stable: the first of equals
    inverse = np.empty(len(order), np.int64)
    inverse[order] = np.cumsum(new) - 1
    rank = np.argsort(heads)
    places = np.empty(len(heads), np.int64)
    places[rank] = np.arange(len(heads))
    return heads[rank], places[inverse]


def _fingerprints(signatures: Signatures, starts: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """uint64 [chosen]: of all that a signature says but the digest."""
    samples = signatures.samples
    words = [samples[name] for name in ("media", "pictures", "asked", "short")]
    words += [column for name in ("questions", "answers") for column in samples[name].view("<u8").T]
    words += list(samples["figures"].T)
    out = _hash(chosen, words)
    for number in range(int(samples["pictures"].max(initial=0))):
        has = np.flatnonzero(samples["pictures"][chosen] > number)
        for start in range(0, len(has), CHUNK):
            block = has[start : start + CHUNK]
            pictures = signatures.pictures[starts[chosen[block]] + number]
            octets = pictures.view(np.uint8).reshape(len(pictures), PICTURE.itemsize)
            padded = np.pad(octets, ((0, 0), (0, -PICTURE.itemsize % 8))).view("<u8")
            out[block] = _hash(np.arange(len(block)), [out[block], *padded.T])
    return out


def _settle(pairs: np.ndarray, copies: _Copies) -> dict[int, int]:
    """Copy -> the kept sample, from pairs (sample << 32 | earlier one that it is near) in ascending order.

    A pair's earlier sample may be a copy itself; then the later one is compared with what that copies.
    """
    root: dict[int, int] = {}
    for pair in pairs:
        sample, earlier = int(pair) >> 32, int(pair) & 0xFFFFFFFF
        if sample in root:
            continue
        kept = root.get(earlier, earlier)
        if kept == earlier or copies.near(np.array([sample]), np.array([kept]))[0]:
            root[sample] = kept
    return root


# -- against an evaluation set ------------------------------------------------------------------------------------


class _Entries(NamedTuple):
    """What is looked up: a question, with one picture each where pictures count. picture: its number, or -1."""

    sample: np.ndarray
    picture: np.ndarray

    @classmethod
    def of(cls, signatures: Signatures, match: str) -> "_Entries":
        counts = signatures.samples["pictures"].astype(np.int64)
        alone = np.flatnonzero(counts == 0) if match != "text" else np.arange(len(counts))
        owners = np.repeat(np.arange(len(counts)), counts) if match != "text" else alone[:0]
        return cls(np.concatenate([alone, owners]), np.concatenate([np.full(len(alone), -1), np.arange(len(owners))]))

    def keys(self, signatures: Signatures, band: int, match: str) -> np.ndarray:
        keys = _keys(signatures, self.sample, self.picture, band, ("questions",), 1)
        if match == "image":  # the picture alone
            keys[self.picture >= 0] &= np.uint64(0xFFFFFFFF)
        return keys


def find_contaminated(signatures: Signatures, evaluation: Signatures, params: Contamination) -> np.ndarray:
    """int64 [n]: the first sample of the evaluation set (of those compared) that each is in by `match`, or -1."""
    held = _Entries.of(evaluation, params.match)
    out = np.full(len(signatures), len(evaluation), np.int64)
    tables = []
    for band in range(BANDS):
        keys = held.keys(evaluation, band, params.match)
        order = np.argsort(keys, kind="stable")
        tables.append((keys[order], order))
    entries = _Entries.of(signatures, params.match)
    for start in range(0, len(entries.sample), CHUNK):
        chunk = _Entries(*(column[start : start + CHUNK] for column in entries))
        for band, (keys, order) in enumerate(tables):
            for i, j in _met(chunk.keys(signatures, band, params.match), keys, order):
                here, there = _Entries(*(c[i] for c in chunk)), _Entries(*(c[j] for c in held))
                found = _contained(signatures, here, evaluation, there, params)
                np.minimum.at(out, here.sample[found], there.sample[found])
    return np.where(out == len(evaluation), -1, out)


def _met(wanted: np.ndarray, keys: np.ndarray, order: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(i, j) in blocks: entry i wants the key that entry j of the ascending `keys` has; at most CROWD to an i."""
    open_ = np.arange(len(wanted))
    for shift in SHIFTS:
        prefixes, prefix = keys >> np.uint64(shift), wanted[open_] >> np.uint64(shift)
        begin, end = (np.searchsorted(prefixes, prefix, side) for side in ("left", "right"))
        crowded = (end - begin > CROWD) & (shift > 0)
        count = np.where(crowded, 0, np.minimum(end - begin, CROWD))
        for rank in range(int(count.max(initial=0))):
            has = np.flatnonzero(count > rank)
            for start in range(0, len(has), BLOCK):
                block = has[start : start + BLOCK]
                yield open_[block], order[begin[block] + rank]
        open_ = open_[crowded]


def _contained(a: Signatures, i: _Entries, b: Signatures, j: _Entries, params: Contamination) -> np.ndarray:
    out = (i.picture >= 0) == (j.picture >= 0)
    texts = out & ~((params.match == "image") & (i.picture >= 0))
    left, right = a.samples[i.sample[texts]], b.samples[j.sample[texts]]
    figures = left["figures"][:, 0], right["figures"][:, 0]
    out[texts] = near_texts(left["questions"], right["questions"], *figures, params.text_similarity)
    pictured = out & (i.picture >= 0)
    out[pictured] = near_pictures(
        a.pictures[i.picture[pictured]], b.pictures[j.picture[pictured]], params.picture_distance
    )
    return out
