"""`fraction:` of a training stage: which samples of prepared data it sees.

Invariant: a smaller fraction lies within a larger one, so a scaling study compares more data with less, not with other
data; and preparing knows nothing of it, so all fractions share one prepared mixture. Each dataset gives the samples
whose names hash lowest under a fixed key, round(fraction × n) of n, never none: shares by dataset stay as they are.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

_KEY = b"stageline fraction 1"  # another key is another subset, so another result


def chosen(ids: Iterable[str], dataset: np.ndarray, names: list[str], fraction: float) -> np.ndarray:
    """bool [n]: the samples that belong to the fraction, in (0, 1].

    ids: of each sample; dataset: int [n], the number of its dataset in `names`. Samples of one name stand in the order
    of the index.
    """
    if fraction >= 1:
        return np.ones(len(dataset), bool)
    digests = (
        hashlib.blake2b(f"{names[number]}\0{name}".encode(), digest_size=8, key=_KEY).digest()
        for number, name in zip(dataset, ids, strict=True)
    )
    hashes = np.frombuffer(b"".join(digests), np.dtype("<u8"))
    out = np.zeros(len(dataset), bool)
    for number in np.unique(dataset):
        members = np.flatnonzero(dataset == number)
        count = max(1, int(np.floor(fraction * len(members) + 0.5)))
        out[members[np.argsort(hashes[members], kind="stable")[:count]]] = True
    return out
