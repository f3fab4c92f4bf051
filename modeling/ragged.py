"""Lists of many lengths, flat: 16 million of them cost their items and one offset each, not an object each."""

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np


class Ragged(Sequence[np.ndarray]):
    """Item i is a numpy array, a slice is a Ragged. values: all items end to end; offsets: int64 [n + 1], from 0."""

    def __init__(self, values: np.ndarray, offsets: np.ndarray):
        self.values, self.offsets = values, offsets

    @classmethod
    def of(cls, values: np.ndarray, lengths: np.ndarray | Sequence[int]) -> "Ragged":
        """Cut `values` into items of these lengths, which add up to all of it."""
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        assert offsets[-1] == len(values), f"lengths of {offsets[-1]} for {len(values)} values"
        return cls(values, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, i: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, i: slice) -> "Ragged": ...
    def __getitem__(self, i):
        if isinstance(i, slice):
            first, last, stride = i.indices(len(self))
            assert stride == 1, "take() for any other order"
            offsets = self.offsets[first : max(first, last) + 1]
            return Ragged(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])
        i = range(len(self))[i]
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """[n]: how many values each item has."""
        return np.diff(self.offsets)

    def owners(self) -> np.ndarray:
        """[values]: the item that each value is in."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def take(self, order: np.ndarray) -> "Ragged":
        """The items of these numbers, in this order."""
        lengths = self.lengths[order]
        out = Ragged.of(np.empty(lengths.sum(), self.values.dtype), lengths)
        # where each value comes from: its place in the result, moved by as much as its item was
        source = np.arange(len(out.values)) + np.repeat(self.offsets[:-1][order] - out.offsets[:-1], lengths)
        np.take(self.values, source, out=out.values)
        return out

    def sums(self, weights: np.ndarray | None = None) -> np.ndarray:
        """float64 [n]: the sum of each item's values, or of `weights` (one per value).

        Added from left to right, so that the last bit is the same on every machine, which np.sum does not promise.
        """
        weights = self.values if weights is None else weights
        return np.bincount(self.owners(), weights=weights, minlength=len(self))
