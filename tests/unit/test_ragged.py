"""Flat lists of lists behave as the lists they hold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling.ragged import Ragged

LISTS = st.lists(st.lists(st.integers(-9, 9), max_size=5), max_size=12)


def flat(items: list[list[int]]) -> Ragged:
    return Ragged.of(np.array([value for item in items for value in item], np.int32), [len(item) for item in items])


def listed(ragged) -> list[list[int]]:
    return [item.tolist() for item in ragged]


@given(LISTS, st.integers(-15, 15), st.integers(-15, 15), st.randoms(use_true_random=False))
def test_items_slices_orders_and_sums(items, first, last, random):
    ragged = flat(items)
    assert listed(ragged) == items and len(ragged) == len(items)
    assert [ragged[i].tolist() for i in range(-len(items), len(items))] == items * 2
    part = ragged[first:last]
    assert listed(part) == items[first:last] and part.offsets[0] == 0
    assert listed(part[1:]) == items[first:last][1:]
    order = random.choices(range(len(items)), k=7) if items else []
    taken = ragged.take(np.array(order, np.int64))
    assert listed(taken) == [items[i] for i in order] and taken.values.dtype == np.int32
    assert ragged.sums().tolist() == [sum(item) for item in items]
    assert part.sums(part.values * 2.5).tolist() == [2.5 * sum(item) for item in items[first:last]]
    assert ragged.owners().tolist() == [i for i, item in enumerate(items) for _ in item]


def test_what_is_not_there():
    with pytest.raises(IndexError):
        flat([[1], [2, 3]])[2]
    with pytest.raises(AssertionError, match="lengths of 3 for 2 values"):
        Ragged.of(np.zeros(2), [1, 2])
