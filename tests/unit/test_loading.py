"""Rows made ahead: the same whoever makes them, failures as themselves, and nobody left when the training is killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from modeling.batches import Batcher, empty_batch
from modeling.epochs import plan_steps
from modeling.errors import DataError
from modeling.loading import Rows
from modeling.shards import ShardReader
from stages.params import TrainParams

TENSORS = ("input_ids", "position_ids", "positions", "targets", "weights", "pixels", "uniforms")


@pytest.fixture(scope="module")
def plan(prepared):
    index = ShardReader(prepared).index
    return plan_steps(
        index["tokens"], index["tiles"], index["repeat"], max_tokens=100, max_tiles=4, global_batch=2, seed=0, epochs=6
    )


def batcher(micro, folder, plan) -> Batcher:
    return Batcher(
        ShardReader(folder), plan, micro.tokenizer, tile_size=32, tokens_per_tile=micro.resolved.tokens_per_tile,
        system="", reduction="square", unit="conversation", seed=0, depth=2,
    )  # fmt: skip


def requests(made: Batcher, first: int = 0):
    return [made.request(step, pack) for step in range(first, made.plan.steps) for pack in made.plan.step(step)]


def same(one, two) -> bool:
    pairs = [(getattr(one, name), getattr(two, name)) for name in TENSORS]
    pairs += [(one.segments.back, two.segments.back), *zip(one.segments.groups, two.segments.groups, strict=True)]
    return one.ids == two.ids and one.counts == two.counts and all(
        (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs
    )  # fmt: skip


@pytest.fixture
def damaged(prepared, tmp_path):
    """flip(sample, column): the same folder with a byte flipped in a member of the sample."""

    def flip(sample: int, column: str) -> Path:
        folder = tmp_path / "damaged"
        shutil.copytree(prepared, folder)
        row = ShardReader(folder).row(sample)
        path = folder / "shards" / row["shard"]
        content = bytearray(path.read_bytes())
        content[int(np.ravel(row[column])[0]) + 5] ^= 1
        path.write_bytes(content)
        return folder

    return flip


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_same_rows_in_the_same_order_whoever_makes_them(micro, prepared, plan, workers):
    """All of them are kept: no row's memory is used again while somebody holds it. The empty row is passed on."""
    made = batcher(micro, prepared, plan)
    text = made.request(0, [int(np.flatnonzero(plan.sample == 3)[0])])
    asked, empty = [*requests(made), text], empty_batch(5, depth=2)
    rows = [row for row, wait in Rows(made.builder, workers).ahead([*asked, empty, asked[0]]) if wait >= 0]
    assert rows[-2] is empty
    expected = [made.builder.build(request) for request in (*asked, asked[0])]
    del rows[-2]
    assert all(same(*pair) for pair in zip(rows, expected, strict=True))
    assert {row.pixels is None for row in rows} == {True, False}, "rows with and without a picture"


def test_memory_is_used_again_when_its_row_is_gone(micro, prepared, plan):
    made = batcher(micro, prepared, plan)
    rows = Rows(made.builder, 1)
    addresses = set()
    for row, _ in rows.ahead(requests(made)):
        if row.pixels is not None:
            addresses.add(row.pixels.data_ptr())
        del row
    assert 1 <= len(addresses) <= 2 * 5 < sum(request.samples != () for request in requests(made))


def test_the_first_row_of_a_resumed_training_is_the_first_that_is_made(micro, prepared, plan):
    made = batcher(micro, prepared, plan)
    first = plan.steps // 2
    row, _ = next(Rows(made.builder, 1).ahead(requests(made, first)))
    assert same(row, made.batch(first, plan.step(first)[0]))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_does_not_decode_is_counted_as_lost(micro, damaged, plan, workers):
    made = batcher(micro, damaged(1, "image_offsets"), plan)
    asked = requests(made)
    rows = [row for row, _ in Rows(made.builder, workers).ahead(asked)]
    lost = [sum(row["id"] == "s1" for _, row in request.samples) for request in asked]
    assert [row.counts.lost for row in rows] == lost and sum(lost) == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_is_raised_as_itself_where_its_row_is_awaited(micro, damaged, plan, workers):
    made = batcher(micro, damaged(3, "json_offset"), plan)
    asked = [made.request(0, [0]), made.request(0, [3]), made.request(0, [0])]
    rows = Rows(made.builder, workers).ahead(asked)
    next(rows)
    with pytest.raises(DataError, match=r"000003.tar: sample s3: bytes .* run the prepare stage again"):
        next(rows)


@pytest.mark.parametrize(
    "given, resources, expected",
    [
        ("auto", {}, 0), ("auto", {"cpus": 8}, 0), ("auto", {"gpus": 1}, 1), ("auto", {"gpus": 1, "cpus": 8}, 7),
        ("auto", {"gpus": 1, "cpus": 32}, 8), (0, {"gpus": 1, "cpus": 8}, 0), (3, {}, 3),
    ],
)  # fmt: skip
def test_auto_takes_cores_from_nobody(given, resources, expected):
    """Micro models on a laptop decode in a thread; where a GPU trains, the rank's other cores decode."""
    common = {"train": ("mlp",), "lr": 1e-3, "global_batch": 1, "steps": 1}
    params = TrainParams(data_workers=given, resources=resources, **common)
    assert params.decoders == expected and params.identity() == TrainParams(**common).identity()


class Probe:
    """In the place of a Builder: tells of the process it is in."""

    tile_size = 32

    def size(self, request) -> int:
        return 0

    def build(self, request, room):
        told = torch.get_num_threads(), os.environ["CUDA_VISIBLE_DEVICES"], hasattr(sys.modules["__main__"], "__file__")
        return replace(empty_batch(5, depth=0), ids=(*map(str, told), str(os.getpid())))


def test_a_worker_is_another_process_of_one_thread_without_gpus_and_main_program():
    ((row, _),) = Rows(Probe(), 1).ahead([None])  # pyright: ignore[reportArgumentType]
    assert row.ids[:3] == ("1", "", "False") and row.ids[3] != str(os.getpid())


def test_a_killed_worker_is_an_error_and_not_a_hang(micro, prepared, plan):
    made = batcher(micro, prepared, plan)
    before = set(psutil.Process().children(recursive=True))
    rows = Rows(made.builder, 1).ahead(100 * requests(made))
    next(rows)
    (worker,) = [p for p in set(psutil.Process().children(recursive=True)) - before if decodes(p)]
    worker.kill()
    with pytest.raises(Exception, match=r"data worker of this rank was killed .* lower data_workers"):
        for _ in rows:
            pass


def decodes(process: psutil.Process) -> bool:
    """A worker, and not the fork server or the resource tracker."""
    return any(file.path.startswith("/memfd:stageline-row") for file in process.memory_maps())


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it ended between the two questions
        return False


TRAIN = """
import sys, time
from multiprocessing import forkserver

forkserver.set_forkserver_preload(["torch", "transformers.modeling_utils"])
forkserver.ensure_running()  # imports while this process does
from modeling.loading import Rows

sys.path.insert(0, sys.argv[1])
from test_loading import Probe

for number, (row, _) in enumerate(Rows(Probe(), 2).ahead(None for _ in range(10**6))):
    print(row.ids[3], flush=True)
    time.sleep(0.001)
"""


def test_killing_the_training_leaves_no_process_behind():
    command = [sys.executable, "-c", TRAIN, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as training:
        assert training.stdout is not None
        makers: set[int] = set()
        while len(makers) < 2:  # the second may start when the first has made many
            makers.add(int(training.stdout.readline()))
        left = psutil.Process(training.pid).children(recursive=True)
        assert makers < {process.pid for process in left}
        os.kill(training.pid, signal.SIGKILL)
    until = time.monotonic() + 60
    while any(map(runs, left)):
        assert time.monotonic() < until, f"left behind: {left}"
        time.sleep(0.05)
