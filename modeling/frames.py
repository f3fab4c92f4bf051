"""How many frames of a video an occurrence shows: drawn when planning, for it changes the sample's length.

Invariant: the number is a function of (seed, epoch, number of the video among the videos, copy), uniform over those
that fit the limits (8 to 32 in InternVL 2.5, arXiv 2412.05271, Fig. 5), so that adding pictures or text to a
mixture changes none. The official code draws it when it decodes, after lengths were told to the packer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modeling.ragged import Ragged


@dataclass(frozen=True)
class FrameChoices:
    """What the videos of a mixture may be shown with; one entry per sample.

    tokens: a sample's length with least, least + 1, ... frames; empty where it is no video.
    """

    tokens: Ragged
    least: np.ndarray

    @classmethod
    def of(cls, index: Mapping[str, Any]) -> "FrameChoices | None":
        """Of an index of prepared data; None where it has no video."""
        return cls(index["frame_tokens"], index["min_frames"]) if index["min_frames"].any() else None

    def draw(self, sample: np.ndarray, copy: np.ndarray, seed: Sequence[int]) -> np.ndarray:
        """int16 [occurrences]: the frames of copy `copy` of sample `sample`; 0 where that is no video."""
        choices = self.tokens.lengths
        numbers = np.cumsum(choices > 0) - 1  # of each video, from 0
        frames = np.zeros(len(sample), np.int16)
        videos = np.flatnonzero(choices[sample])
        for nth in range(copy[videos].max(initial=-1) + 1):
            of_copy = videos[copy[videos] == nth]
            which = sample[of_copy]
            shares = np.random.default_rng((*seed, nth)).random(numbers[which].max(initial=-1) + 1)[numbers[which]]
            frames[of_copy] = self.least[which] + np.floor(shares * choices[which]).astype(np.int16)
        return frames

    def lengths(self, sample: np.ndarray | int, frames: np.ndarray | int) -> np.ndarray:
        """Tokens of videos shown with so many frames."""
        return self.tokens.values[self.tokens.offsets[sample] + frames - self.least[sample]]


def occurrence_lengths(
    tokens: np.ndarray, tiles: np.ndarray, choices: FrameChoices | None, sample: np.ndarray, frames: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, tiles) of occurrences, from those of the samples and, where there are videos, from the frames drawn."""
    tokens, tiles = tokens[sample], tiles[sample]
    if choices is not None and frames is not None:
        videos = np.flatnonzero(frames)
        tokens[videos] = choices.lengths(sample[videos], frames[videos])
        tiles[videos] = frames[videos]
    return tokens, tiles
