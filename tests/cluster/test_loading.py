"""Rows made in processes of their own: the same training to the bit, and none of them outlives its rank."""

import contextlib
import time

import psutil
from harness import EVERY, assert_lineage

from orchestrator.errors import ErrorClass


def makers(rank: psutil.Process) -> list[psutil.Process]:
    """The processes below a rank that hold the memory of a row."""
    found = []
    for child in rank.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(file.path.startswith("/memfd:stageline-row") for file in child.memory_maps()):
                found.append(child)
    return found


def test_a_rank_is_killed_and_its_makers_go_with_it_and_the_weights_are_the_same(undisturbed, before_finetune, start):
    driver = start(before_finetune, "stages.full_finetune.data_workers=2")
    driver.wait_for_checkpoint(EVERY)
    rank, other = driver.workers()
    below = rank.children(recursive=True)
    assert len(makers(rank)) == len(makers(other)) == 2
    rank.kill()
    until = time.monotonic() + 10
    while left := [p for p in below if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < until, f"left behind: {left}"
        time.sleep(0.05)
    assert driver.wait() == 0
    driver.assert_no_orphans()
    state = before_finetune.state("full_finetune")
    assert [failure.error_class for failure in state.failures] == [ErrorClass.lost_node]
    assert_lineage(before_finetune)
    assert before_finetune.weights() == undisturbed.weights()
    assert before_finetune.losses().tolist() == undisturbed.losses().tolist()
