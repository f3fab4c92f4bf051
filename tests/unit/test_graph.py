"""The DAG: any graph is either ordered correctly or shown to have a cycle."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.graph import ancestors, blocked_by, descendants, find_cycle, ready, topological_order

DIAMOND = {"d": ("b", "c"), "a": (), "c": ("a",), "b": ("a",), "e": ()}


def test_order_is_that_of_the_file_where_needs_allow():
    assert topological_order(DIAMOND) == ["a", "c", "b", "d", "e"]
    assert topological_order({"x": (), "y": (), "z": ()}) == ["x", "y", "z"]


def test_the_cycle_is_shown():
    assert find_cycle(DIAMOND) is None
    assert find_cycle({"a": ("b",), "b": ("c",), "c": ("b",)}) == ["b", "c", "b"]
    assert find_cycle({"a": ("a",)}) == ["a", "a"]


def test_ready_and_blocked():
    assert ready(DIAMOND, done=[], running=[], failed=[]) == ["a", "e"]
    assert ready(DIAMOND, done=["a"], running=["e"], failed=["c"]) == ["b"]
    assert ready(DIAMOND, done=["a", "b", "c"], running=[], failed=[]) == ["d", "e"]
    assert blocked_by(DIAMOND, failed=["a"]) == {"d": "a", "c": "a", "b": "a"}
    assert blocked_by(DIAMOND, failed=["c"]) == {"d": "c"}


def test_ancestors_and_descendants():
    assert ancestors(DIAMOND, "d") == ["a", "c", "b"]
    assert descendants(DIAMOND, "a") == ["d", "c", "b"]


@given(st.integers(1, 8).flatmap(lambda n: st.lists(st.sets(st.integers(0, n - 1)), min_size=n, max_size=n)))
def test_a_graph_has_an_order_or_a_cycle(edges):
    needs = {str(i): tuple(map(str, sorted(found))) for i, found in enumerate(edges)}
    cycle = find_cycle(needs)
    if cycle is None:
        order = topological_order(needs)
        assert sorted(order) == sorted(needs)
        assert all(order.index(need) < order.index(name) for name in needs for need in needs[name])
    else:
        assert len(cycle) > 1 and cycle[0] == cycle[-1]
        assert all(after in needs[before] for before, after in pairwise(cycle))
