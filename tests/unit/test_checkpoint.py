"""Fragments: whoever wrote them, in whatever pieces, whoever reads them."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling.checkpoint import PARTS, Fragment, FragmentReader, Snapshot
from modeling.errors import CheckpointError

SIZES = {"a.weight": 30, "b": 1, "c|odd": 17}


def state():
    """Every number of the whole state is another one."""
    numbers = torch.arange(3 * sum(SIZES.values()), dtype=torch.float32)
    whole, at = {}, 0
    for name, size in SIZES.items():
        whole[name] = {part: numbers[at + i * size : at + (i + 1) * size] for i, part in enumerate(PARTS)}
        at += 3 * size
    return whole


def pieces(whole, cuts):
    """Fragments of `whole`, each parameter cut at the given places: views, as the engine gives them."""
    for name, parts in whole.items():
        edges = sorted({0, SIZES[name], *(cut % SIZES[name] for cut in cuts)})
        for start, end in pairwise(edges):
            yield Fragment(name, start, *(parts[part][start:end] for part in PARTS))


def write(path, fragments):
    path.write_bytes(Snapshot(fragments).take(fragments))


def empty():
    return {name: {part: torch.full((size,), -1.0) for part in PARTS} for name, size in SIZES.items()}


splits = st.lists(st.integers(0, 29), max_size=6)


@settings(max_examples=60, deadline=None)
@given(splits, splits, st.integers(1, 5), st.randoms())
def test_any_split_loads_into_any_other(tmp_path_factory, written, read, ranks, random):
    folder = tmp_path_factory.mktemp("c")
    fragments = list(pieces(state(), written))
    random.shuffle(fragments)
    for rank in range(ranks):
        write(folder / f"{rank}.safetensors", fragments[rank::ranks])
    reader = FragmentReader(folder.iterdir())
    target = empty()
    reader.load(pieces(target, read))
    for name, parts in state().items():
        for part in PARTS:
            assert torch.equal(target[name][part], parts[part]), (name, part)
    assert reader.names() == set(SIZES)


@settings(max_examples=40, deadline=None)
@given(splits, splits, st.integers(0, 200))
def test_a_piece_that_no_file_holds_is_an_error(tmp_path_factory, written, read, lost):
    folder = tmp_path_factory.mktemp("c")
    fragments = list(pieces(state(), written))
    gone = fragments.pop(lost % len(fragments))
    write(folder / "0.safetensors", fragments)
    with pytest.raises(CheckpointError, match="is not in the checkpoint") as caught:
        FragmentReader(folder.iterdir()).load(pieces(empty(), read))
    assert gone.name in str(caught.value)


def test_overlapping_pieces_do_no_harm(tmp_path):
    whole = state()
    for rank, (start, end) in enumerate([(0, 20), (10, 30), (5, 8)]):
        views = (whole["a.weight"][part][start:end] for part in PARTS)
        write(tmp_path / f"{rank}", [Fragment("a.weight", start, *views)])
    target = {"a.weight": empty()["a.weight"]}
    FragmentReader(tmp_path.iterdir()).load(pieces(target, [3, 12]))
    assert all(torch.equal(target["a.weight"][part], whole["a.weight"][part]) for part in PARTS)


def test_other_trained_modules_are_an_error(tmp_path):
    write(tmp_path / "0", [Fragment("x", 0, *(torch.zeros(3) for _ in PARTS))])
    with pytest.raises(CheckpointError, match="parameter y"):
        FragmentReader([tmp_path / "0"]).load([Fragment("y", 0, *(torch.zeros(3) for _ in PARTS))])


def test_what_is_written_is_a_snapshot_without_graph(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(4))
    write(tmp_path / "0", [Fragment("p", 0, parameter, torch.ones(4), torch.ones(4))])
    with torch.no_grad():
        parameter.zero_()
    FragmentReader([tmp_path / "0"]).load([Fragment("p", 0, parameter, torch.zeros(4), torch.zeros(4))])
    assert parameter.requires_grad and torch.equal(parameter.detach(), torch.ones(4))
