"""Makes the reasoning experiment's data: sums of five handwritten digits, asked directly and step by step.

Invariant: that of digits.py, whose pictures and splits these are: every picture is of its own split alone, so the
held-out score is about unseen handwriting. The output is a pure function of (seed, share).

    python experiments/sums.py --output runs/sums --seed 0

Mixtures (InternVL meta files): text.json, captions.json, instructions.json (train), validation.json, heldout.json.
Tasks: `sum` five digits in one 5:1 picture, answered by their sum at once; `steps` the same with STEPS behind the
question, answered by a chain that reads the digits and adds them one by one, from the left or from the right by chance;
`digit` and `row` as in digits.py; `add` the single additions, in text alone. The splits to be read hold `sum` alone,
and the evaluation puts STEPS behind. In the text mixture digits are typed where the picture's tokens would stand, so
that the language model can read and add before the first picture comes. A chain begins on either side so that samples
differ in how they come to an answer: a vote needs errors that are not always the same (arXiv 2203.11171).
"""

import sys
from functools import partial
from pathlib import Path

import digits
from digits import Example, Part, Pictures, Rng, split_digits, stand_in, text_digit, text_row

VERSION = 1  # raised when the pictures or texts change
MARKER = "sums.json"
COUNT = 5  # digits in a row
ASK = "What is the sum of the digits?"
STEPS = "\nThink step by step."
SIDES = ("From the left:", "From the right:")


def chain(row: list[int], side: int) -> str:
    """The digits as they are read from a side (of SIDES), added one by one, then the sum."""
    total, *rest = read = row if side == 0 else row[::-1]
    lines = [SIDES[side] + " " + "".join(map(str, read))]
    for digit in rest:
        lines.append(f"{total}+{digit}={total + digit}")
        total += digit
    return "\n".join([*lines, f"Answer: \\boxed{{{total}}}"])


def asked(show: str, row: list[int]) -> Example:
    return Example(f"{show}\n{ASK}", str(sum(row)))


def stepwise(show: str, row: list[int], rng: Rng) -> Example:
    return Example(f"{show}\n{ASK}{STEPS}", chain(row, int(rng.integers(len(SIDES)))))


def drawn(rng: Rng) -> list[int]:
    return rng.integers(10, size=COUNT).tolist()


class Sums(Pictures):
    """Examples with pictures, of one split."""

    def sum(self, i: int, rng: Rng) -> Example:
        row = drawn(rng)
        return self._shown(asked("<image>", row), row, rng)

    def steps(self, i: int, rng: Rng) -> Example:
        row = drawn(rng)
        return self._shown(stepwise("<image>", row, rng), row, rng)

    def _shown(self, example: Example, row: list[int], rng: Rng) -> Example:
        example.pictures = [self.wide(row, rng)]
        return example


def typed(row: list[int], rng: Rng) -> str:
    """The digits in the place of their picture; half of them as they are, which is short and soon learned."""
    return "".join(map(str, row)) if rng.random() < 0.5 else stand_in(row, rng)


def text_add(i: int, rng: Rng) -> Example:
    total, digit = int(rng.integers(9 * (COUNT - 1) + 1)), int(rng.integers(10))
    return Example(f"{total}+{digit}=", str(total + digit))


def text_sum(i: int, rng: Rng) -> Example:
    row = drawn(rng)
    return asked(typed(row, rng), row)


def text_steps(i: int, rng: Rng) -> Example:
    row = drawn(rng)
    return stepwise(typed(row, rng), row, rng)


def mixtures(seed: int) -> dict[str, list[Part]]:
    """What is made. The first fraction `share` of each part's count is written."""
    splits = split_digits(seed)
    train, validation, heldout = (Sums(splits[s], s == "train") for s in ("train", "validation", "heldout"))
    tiles = COUNT + 1
    return {
        "text": [
            Part("digit", 500, text_digit),
            Part("row", 6000, partial(text_row, count=COUNT)),
            Part("add", 2000, text_add),
            Part("sum", 3000, text_sum),
            Part("steps", 8000, text_steps),
        ],
        "captions": [
            Part("digit", 6000, train.digit, 1),
            Part("row", 4000, partial(train.row, count=COUNT), tiles),
        ],
        "instructions": [
            Part("digit", 2000, train.digit, 1, True),
            Part("row", 2000, partial(train.row, count=COUNT), tiles, True),
            Part("sum", 4000, train.sum, tiles, True),
            Part("steps", 8000, train.steps, tiles, True),
        ],
        "validation": [Part("sum", 400, validation.sum, tiles)],
        "heldout": [Part("sum", 500, heldout.sum, tiles)],
    }


def make(output: Path, seed: int = 0, share: float = 1.0) -> bool:
    """Writes all mixtures below `output`. False where they are there already, made with the same parameters."""
    return digits.make(output, seed, share, of=mixtures, marker=MARKER, version=VERSION)


def main(arguments: list[str] | None = None) -> int:
    return digits.command(arguments, "runs/sums", make)


if __name__ == "__main__":
    sys.exit(main())
