"""Makes the quickstart's data: real handwritten digits (scikit-learn `load_digits`, 1,797 pictures of 8×8).

Invariant: the source pictures are split by class into train, validation and held-out BEFORE anything is made of
them, and a composed picture uses pictures of its own split only; so the held-out score is about unseen handwriting.
The output is a pure function of (seed, share). A marker is written last, so an interrupted run starts again and a
finished one is not repeated.

    python experiments/digits.py --output runs/digits --seed 0

Mixtures (InternVL meta files): text.json, captions.json, instructions.json (train), validation.json, heldout.json.
Tasks: `digit` one digit; `row` four digits in one 4:1 picture, cut into tiles by dynamic resolution; `larger` two
pictures. The text mixture asks the same with digits typed where the picture's tokens would stand, so that a language
model trained on it knows what is asked before the first picture comes.
"""

import argparse
import json
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

VERSION = 1  # raised when the pictures or texts change
TILE = 32  # pixels: a tile of the tiny vision presets
DIGIT = 28  # pixels of a digit's side inside its tile
TILE_TOKENS = 16  # image tokens of a tile in the tiny presets, for the typed stand-ins of the text mixture
MARKER = "digits.json"
SPLITS = {"validation": 200, "heldout": 397}  # the rest, 1,200, is for training
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
READ_ONE, READ_ROW, LARGER = "Which digit is this?", "Read the digits.", "Which digit is larger?"

Pools = dict[int, np.ndarray]  # digit -> its pictures in one split, [n, 8, 8] uint8
Rng = np.random.Generator


@dataclass
class Example:
    question: str
    answer: str
    pictures: list[Image.Image] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """One dataset of a mixture: `count` examples, the i-th made by make(i, rng)."""

    task: str
    count: int
    make: Callable[[int, Rng], Example]
    max_dynamic_patch: int | None = None
    data_augment: bool = False


def split_digits(seed: int) -> dict[str, Pools]:
    """The source pictures by split and class, each class with the same share in every split."""
    from sklearn.datasets import load_digits

    pixels, target = load_digits(return_X_y=True)
    pictures = (np.asarray(pixels).reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    target = np.asarray(target)
    rng = np.random.default_rng(seed)
    rank = np.empty(len(pictures))
    for digit in range(10):
        rows = rng.permutation(np.flatnonzero(target == digit))
        rank[rows] = (np.arange(len(rows)) + rng.random()) / len(rows)
    parts = np.split(np.argsort(rank, kind="stable"), np.cumsum(list(SPLITS.values())))
    return {
        split: {digit: pictures[rows[target[rows] == digit]] for digit in range(10)}
        for split, rows in zip([*SPLITS, "train"], parts, strict=True)
    }


def draw(picture: np.ndarray, rng: Rng | None) -> Image.Image:
    """An 8×8 picture as one gray tile, white on black; with rng: turned, scaled and shifted (up to 2 px) a little."""
    angle, scale, dx, dy = 0.0, 1.0, 0.0, 0.0
    if rng is not None:
        angle, scale = np.deg2rad(rng.uniform(-10, 10)), rng.uniform(0.9, 1.1)
        dx, dy = rng.uniform(-2, 2, size=2)
    side = len(picture)
    step = side / (DIGIT * scale)  # source pixels per tile pixel
    cos, sin, centre = step * np.cos(angle), step * np.sin(angle), TILE / 2
    x0 = side / 2 - cos * (centre + dx) - sin * (centre + dy)
    y0 = side / 2 + sin * (centre + dx) - cos * (centre + dy)
    matrix = (cos, sin, x0, -sin, cos, y0)
    return Image.fromarray(picture).transform((TILE, TILE), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


class Pictures:
    """Examples with pictures, of one split; only training pictures are varied."""

    def __init__(self, pools: Pools, vary: bool):
        self.pools, self.vary = pools, vary
        ordered = [(digit, row) for digit, pool in pools.items() for row in range(len(pool))]
        self.all = [ordered[i] for i in np.random.default_rng(0).permutation(len(ordered))]

    def _draw(self, digit: int, row: int, rng: Rng) -> Image.Image:
        return draw(self.pools[digit][row], rng if self.vary else None)

    def _any(self, digit: int, rng: Rng) -> Image.Image:
        return self._draw(digit, int(rng.integers(len(self.pools[digit]))), rng)

    def digit(self, i: int, rng: Rng) -> Example:
        """Goes round all pictures of the split, so as many examples as pictures use each of them once."""
        digit, row = self.all[i % len(self.all)]
        return Example(f"<image>\n{READ_ONE}", str(digit), [self._draw(digit, row, rng)])

    def wide(self, digits: list[int], rng: Rng) -> Image.Image:
        """A row of digits in one picture, of as many tiles side by side."""
        picture = Image.new("L", (len(digits) * TILE, TILE))
        for place, digit in enumerate(digits):
            picture.paste(self._any(digit, rng), (place * TILE, 0))
        return picture

    def row(self, i: int, rng: Rng, count: int = 4) -> Example:
        digits = rng.integers(10, size=count).tolist()
        return Example(f"<image>\n{READ_ROW}", "".join(map(str, digits)), [self.wide(digits, rng)])

    def larger(self, i: int, rng: Rng) -> Example:
        pair = rng.choice(10, size=2, replace=False).tolist()
        question = f"Image-1: <image>\nImage-2: <image>\n{LARGER}"
        return Example(question, str(max(pair)), [self._any(digit, rng) for digit in pair])


def stand_in(digits: list[int], rng: Rng) -> str:
    """Digits typed in the place of a picture: as they are, or spread over the tokens of tiles and thumbnail."""
    if rng.random() < 0.25:
        return "".join(map(str, digits))
    tiles = []
    for digit in digits:
        tile = np.where(rng.random(TILE_TOKENS) < rng.uniform(0.3, 1), str(digit), ".")
        tile[rng.integers(TILE_TOKENS)] = str(digit)
        tiles.append("".join(tile))
    thumbnail = "." * TILE_TOKENS if len(digits) > 1 else ""
    return f"<img>{''.join(tiles)}{thumbnail}</img>"


def text_digit(i: int, rng: Rng) -> Example:
    digit = i % 10
    return Example(f"{stand_in([digit], rng)}\n{READ_ONE}", str(digit))


def text_row(i: int, rng: Rng, count: int = 4) -> Example:
    digits = rng.integers(10, size=count).tolist()
    return Example(f"{stand_in(digits, rng)}\n{READ_ROW}", "".join(map(str, digits)))


def text_larger(i: int, rng: Rng) -> Example:
    first, second = rng.choice(10, size=2, replace=False).tolist()
    if rng.random() < 0.25:
        return Example(f"Which is larger, {first} or {second}?", str(max(first, second)))
    images = f"Image-1: {stand_in([first], rng)}\nImage-2: {stand_in([second], rng)}"
    return Example(f"{images}\n{LARGER}", str(max(first, second)))


def text_words(i: int, rng: Rng) -> Example:
    digit = int(rng.integers(10))
    if i % 4 == 0:
        return Example(f"Write {WORDS[digit]} as a digit.", str(digit))
    if i % 4 == 1:
        return Example(f"Write {digit} as a word.", WORDS[digit])
    if i % 4 == 2:
        last = int(rng.integers(digit, 10))
        return Example(f"Count from {digit} to {last}.", "".join(map(str, range(digit, last + 1))))
    text = "".join(map(str, rng.integers(10, size=rng.integers(1, 7))))
    return Example(f"Repeat: {text}", text)


def mixtures(seed: int) -> dict[str, list[Part]]:
    """What is made. The first fraction `share` of each part's count is written."""
    splits = split_digits(seed)
    train, validation, heldout = (Pictures(splits[s], s == "train") for s in ("train", "validation", "heldout"))

    def parts(source: Pictures, digit: int, row: int, larger: int, augment: bool = False) -> list[Part]:
        made = [
            Part("digit", digit, source.digit, 1, augment),
            Part("row", row, source.row, 6),
            Part("larger", larger, source.larger, 1),
        ]
        return [part for part in made if part.count]

    return {
        "text": [
            Part("digit", 1000, text_digit),
            Part("row", 2500, text_row),
            Part("larger", 1500, text_larger),
            Part("words", 1000, text_words),
        ],
        "captions": parts(train, 6000, 4000, 0),
        "instructions": parts(train, 8000, 6000, 5000, augment=True),
        "validation": parts(validation, len(validation.all), 300, 300),
        "heldout": parts(heldout, len(heldout.all), 400, 400),
    }


def save(picture: Image.Image, path: Path, i: int) -> str:
    """Writes PNG or JPEG, gray or RGB, by turns. Returns the file's name."""
    if i % 4 >= 2:
        picture = picture.convert("RGB")
    path = path.with_suffix(".jpg" if i % 2 else ".png")
    if i % 2:
        picture.save(path, quality=95)
    else:
        picture.save(path, compress_level=1)
    return path.name


def write_part(output: Path, mixture: str, part: Part, seed: int, share: float) -> dict:
    """Writes one dataset's annotation and pictures; returns its entry for the meta file."""
    name = f"{mixture}_{part.task}"
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    folder = output / "images" / mixture / part.task
    folder.mkdir(parents=True, exist_ok=True)
    count = max(1, round(part.count * share))
    lines = []
    for i in range(count):
        example = part.make(i, rng)
        turns = [{"from": "human", "value": example.question}, {"from": "gpt", "value": example.answer}]
        line: dict = {"id": f"{part.task}-{mixture}-{i:05d}", "task": part.task}
        images = [
            f"{mixture}/{part.task}/" + save(picture, folder / f"{i:05d}-{place}", i)
            for place, picture in enumerate(example.pictures)
        ]
        if images:
            line["image"] = images if len(images) > 1 else images[0]
        lines.append(json.dumps(line | {"conversations": turns}) + "\n")
    annotation = Path("annotations") / f"{name}.jsonl"
    (output / annotation).write_text("".join(lines))
    entry = {
        "root": "images",
        "annotation": annotation.as_posix(),
        "data_augment": part.data_augment,
        "max_dynamic_patch": part.max_dynamic_patch,
        "repeat_time": 1,
        "length": count,
    }
    return {key: value for key, value in entry.items() if value is not None}


Mixtures = Callable[[int], dict[str, list[Part]]]


def make(
    output: Path,
    seed: int = 0,
    share: float = 1.0,
    *,
    of: Mixtures = mixtures,
    marker: str = MARKER,
    version: int = VERSION,
) -> bool:
    """Writes all mixtures below `output`. False where they are there already, made with the same parameters."""
    done = output / marker
    made_with = json.dumps({"version": version, "seed": seed, "share": share})
    if done.is_file() and done.read_text() == made_with:
        return False
    done.unlink(missing_ok=True)
    (output / "annotations").mkdir(parents=True, exist_ok=True)
    for mixture, parts in of(seed).items():
        write = partial(write_part, output, mixture, seed=seed, share=share)
        meta = {f"{mixture}_{part.task}": write(part) for part in parts}
        (output / f"{mixture}.json").write_text(json.dumps(meta, indent=2) + "\n")
    done.write_text(made_with)
    return True


def command(arguments: list[str] | None, output: str, make: Callable[[Path, int, float], bool]) -> int:
    """The command line: where, with which seed, how much of it."""
    parser = argparse.ArgumentParser(description="Makes an experiment's data from scikit-learn's handwritten digits.")
    parser.add_argument("--output", type=Path, default=Path(output))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="make this share of every dataset (for a quick look)")
    options = parser.parse_args(arguments)
    if not 0 < options.share <= 1:
        parser.error("--share is above 0 and at most 1")
    done = make(options.output, options.seed, options.share)
    print(f"{options.output}: {'written' if done else 'already there'}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    return command(arguments, "runs/digits", make)


if __name__ == "__main__":
    sys.exit(main())
