"""A sample's signature: small arrays of fixed width by which copies of it are known (duplicates.py compares them).

Invariants: it depends on the sample's turns and media alone, and comes out the same on every machine (integers and
single roundings, no BLAS); it holds no text and no picture. 301 bytes a sample and 178 a picture.

digest     exact copies: sha256 over the turns and the media's bytes, cut to 16 bytes.
questions, answers   MinHash sketches (Broder 1997) of 128 times 8 bits over character 5-grams, so that Chinese needs
           no words. Texts are compared without case, spacing and sentence punctuation. One of less than 64 characters
           counts as a single piece: it is equal to another or it is not, for in "7" or "left" all is meaning.
figures    a digest of all numbers with the sign before them: templated questions often differ in nothing else.
pictures   the 143 lowest frequencies of the 64 × 64 grey picture as signed square roots in 8 bits, with coarse colour
           and shape. `imagehash`'s 256 bits of the same frequencies were measured beside it (Fashion-MNIST, digits,
           pages, charts): copies lie up to 52 bits apart in smooth pictures, others from 46 on, a row of digits with
           one exchanged from 8 on; here copies lie up to .011 apart, others from .07 on, that row from .009 on (half
           of them above .1). It brings scipy and PyWavelets. `datasketch` brings scipy, took 8 times as long for a
           sketch, and 3,400 bytes and 150 µs for each sample that its LSH index holds.

What is not seen: a change of the picture in less than about a thirtieth of its area (one line of a page), and copies
of pictures so small (below some 50 pixels) that scaling or encoding destroys them.
"""

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modeling.images import to_rgb

SKETCH = 128  # values of a text sketch, a byte each: the similarity's standard error is .03 at .85
SHINGLE = 5  # characters
SHORT = 64  # characters
SIDE, FREQUENCIES = 64, 12
FRAMES = 8  # pictures of a sample that are looked at, evenly over all
FAINT = 0.5  # standard deviation (of 255 levels) below which the 64 × 64 picture is noise
OCTAVE = 32  # steps of the shape between w : h and 2 w : h

SAMPLE = np.dtype(
    [
        ("digest", "u1", 16),
        ("questions", "u1", SKETCH),
        ("answers", "u1", SKETCH),
        ("figures", "<u8", 2),  # of the questions, of the answers
        ("asked", "<u8"),  # a digest of the questions, normalized
        ("short", "?"),  # the answers together have less than SHORT characters
        ("media", "<u2"),  # pictures that the sample has
        ("pictures", "<u2"),  # those that are looked at
    ]
)
PICTURE = np.dtype(
    [
        ("code", "i1", FREQUENCIES**2 - 1),
        ("flat", "?"),  # one colour all over: the code is 0
        ("chroma", "u1", 32),  # Cb and Cr of 4 × 4 fields
        ("luma", "u1"),  # mean
        ("shape", "i1"),  # OCTAVE * log2(width / height)
    ]
)


@dataclass(frozen=True)
class Signatures:
    """samples: SAMPLE [n]; pictures: PICTURE [sum of samples["pictures"]], those of a sample side by side."""

    samples: np.ndarray
    pictures: np.ndarray

    def __len__(self) -> int:
        return len(self.samples)

    @classmethod
    def concat(cls, parts: Sequence["Signatures"]) -> "Signatures":
        samples = [np.empty(0, SAMPLE), *(part.samples for part in parts)]
        return cls(np.concatenate(samples), np.concatenate([np.empty(0, PICTURE), *(p.pictures for p in parts)]))

    def starts(self) -> np.ndarray:
        """int64 [n]: where a sample's pictures begin."""
        counts = self.samples["pictures"].astype(np.int64)
        return np.cumsum(counts) - counts

    def save(self, path: Path) -> None:
        """An .npz of two arrays."""
        np.savez(path, samples=self.samples, pictures=self.pictures)

    @classmethod
    def load(cls, path: Path) -> "Signatures":
        with np.load(path, allow_pickle=False) as file:
            out = cls(file["samples"], file["pictures"])
        assert (out.samples.dtype, out.pictures.dtype) == (SAMPLE, PICTURE), path
        return out


def signature(
    conversation: Sequence[dict[str, str]],
    pictures: Sequence[Image.Image],
    raw: Sequence[bytes],
    clip: tuple[float, float] | None = None,
) -> Signatures:
    """One sample's. conversation: turns {from, value}; pictures: decoded, any mode; raw: its files, byte for byte.

    A video is one file and as many pictures as it has frames; clip: the part of it that is shown, in seconds.
    """
    said = [[turn["from"], turn["value"]] for turn in conversation]
    digest = hashlib.sha256(json.dumps([said, clip]).encode())
    for data in raw:
        digest.update(hashlib.sha256(data).digest())
    out = np.zeros(1, SAMPLE)
    out["digest"] = np.frombuffer(digest.digest()[:16], np.uint8)
    for position, (name, role) in enumerate((("questions", "human"), ("answers", "gpt"))):
        text = "\n".join(turn["value"] for turn in conversation if turn["from"] == role)
        text = unicodedata.normalize("NFKC", _PLACEHOLDER.sub(" ", text))
        plain = normalized(text)
        out[name], out["figures"][0, position] = sketch(plain), _figures(text)
        if name == "questions":
            out["asked"] = _digest(plain)
        else:
            out["short"] = len(plain) < SHORT
    taken = sorted({round(at) for at in np.linspace(0, len(pictures) - 1, min(FRAMES, len(pictures)))})
    out["media"], out["pictures"] = min(len(pictures), 65535), len(taken)
    return Signatures(out, np.concatenate([np.empty(0, PICTURE), *(picture_code(pictures[at]) for at in taken)]))


# -- texts --------------------------------------------------------------------------------------------------------

_PLACEHOLDER = re.compile("<image>|<video>")
_FIGURE = re.compile(r"(?:[-+*/^=<>×÷√]\s*)?\d+(?:[.,:]\d+)*")
_IDEOGRAPH = "[\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"  # written without spaces
_BESIDE_IDEOGRAPH = re.compile(f"(?<={_IDEOGRAPH}) | (?={_IDEOGRAPH})")
_MEANINGFUL = set("%&*/\\@#^")  # punctuation that is more than a pause or a quote


class _Characters(dict):
    """Code point -> what it is compared as; filled as characters turn up."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if category == "Pd" or character == "\N{MINUS SIGN}":
            self[code] = "-"
        elif character == "`" or (category[0] in "ZCP" and category != "Pc" and character not in _MEANINGFUL):
            self[code] = " "
        else:
            self[code] = character
        return self[code]


_CHARACTERS = _Characters()


def normalized(text: str) -> str:
    """The text without case, width, spacing and sentence punctuation; itself where it is nothing else ("?")."""
    text = unicodedata.normalize("NFKC", text)
    words = " ".join(unicodedata.normalize("NFKC", text.casefold()).translate(_CHARACTERS).split())
    return _BESIDE_IDEOGRAPH.sub("", words) or "".join(text.split())


def _figures(text: str) -> int:
    found = " ".join("".join(figure.split()) for figure in _FIGURE.findall(text))
    return _digest(found) if found else 0


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def mixed(values: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, every bit of the input in every bit of the output (the finalizer of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def stream(count: int, seed: int) -> np.ndarray:
    """uint64 [count]: random constants that no release of numpy changes."""
    return mixed((np.arange(count, dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(0x9E3779B97F4A7C15))


_SHINGLE = stream(SHINGLE, 1) | np.uint64(1)
_FACTORS = stream(SKETCH, 2).astype(np.uint32) | np.uint32(1)
_SUMMANDS = stream(SKETCH, 3).astype(np.uint32)


def sketch(text: str) -> np.ndarray:
    """uint8 [SKETCH] of a normalized text: the share of equal values estimates the Jaccard similarity of 5-grams."""
    if len(text) < SHORT:
        hashes = np.frombuffer(hashlib.sha256(text.encode()).digest()[:4], "<u4")
    else:
        codes = np.zeros(len(text) + 2 * (SHINGLE - 1), np.uint64)  # so that the ends weigh as much as the middle
        codes[SHINGLE - 1 : 1 - SHINGLE] = np.frombuffer(text.encode("utf-32-le"), "<u4")
        last = len(codes) - SHINGLE + 1
        sums = sum(codes[at : at + last] * factor for at, factor in enumerate(_SHINGLE))
        hashes = np.unique((mixed(np.asarray(sums)) >> np.uint64(32)).astype(np.uint32))
    least = np.full(SKETCH, 0xFFFFFFFF, np.uint32)
    for start in range(0, len(hashes), 4096):
        block = hashes[start : start + 4096, None] * _FACTORS + _SUMMANDS
        np.minimum(least, block.min(axis=0), out=least)
    return (mixed(least.astype(np.uint64)) >> np.uint64(56)).astype(np.uint8)


# -- pictures -----------------------------------------------------------------------------------------------------

_at = np.arange(SIDE)
_WAVES = np.rint(4096 * np.cos(np.pi * np.outer(np.arange(FREQUENCIES), 2 * _at + 1) / (2 * SIDE))).astype(np.int64)


def picture_code(picture: Image.Image) -> np.ndarray:
    """PICTURE [1]."""
    picture = to_rgb(picture)
    small = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0).convert("YCbCr")
    pixels = np.asarray(small).astype(np.int64)
    grey = pixels[..., 0]
    out = np.zeros(1, PICTURE)
    out["luma"] = grey.sum() // SIDE**2
    out["chroma"] = pixels[..., 1:].reshape(4, SIDE // 4, 4, SIDE // 4, 2).sum((1, 3)).ravel() // (SIDE // 4) ** 2
    out["shape"] = max(-127, min(127, round(OCTAVE * math.log2(picture.width / picture.height))))
    if SIDE**2 * (grey**2).sum() - grey.sum() ** 2 >= (FAINT * SIDE**2) ** 2:
        waves = (_WAVES @ (grey - int(out["luma"][0])) @ _WAVES.T).ravel()[1:]
        roots = np.sign(waves) * np.sqrt(np.abs(waves))
        out["code"] = np.rint(roots * (127 / np.abs(roots).max()))
    elif all(high - low <= 8 for low, high in _extrema(picture)):
        out["flat"] = True
    else:  # next to nothing on it, such as one word on a page: only the very same pixels are a copy
        out["code"] = np.frombuffer(hashlib.shake_256(picture.tobytes()).digest(FREQUENCIES**2 - 1), np.int8)
    return out


def _extrema(picture: Image.Image) -> Any:
    return picture.getextrema()
