"""Workers come from the fork server, and train to the same bits as those that start as plain Python.

How long a hand-off takes is measured in benchmarks/handoff.py, beside Ray's own.
"""

import contextlib
import sys
import time

import psutil
import pytest
from harness import PATIENCE_S

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fork server is Linux only")


def server_of(driver) -> psutil.Process:
    """The fork server that the driver has started, or is about to."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        assert driver.process.poll() is None, driver.output
        for process in driver.descendants():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.ppid() == driver.process.pid and "orchestrator.forkserver" in process.cmdline():
                    return process
        time.sleep(0.05)
    raise AssertionError(f"no fork server:\n{driver.output}")


def test_workers_are_forked(start, before_finetune, undisturbed):
    driver = start(before_finetune)
    driver.wait_for_checkpoint(10)
    workers = driver.workers()
    assert len(workers) == 2 and {worker.ppid() for worker in workers} == {server_of(driver).pid}
    assert driver.wait() == 0
    driver.assert_no_orphans()
    assert before_finetune.weights() == undisturbed.weights()


def test_without_the_fork_server_the_same_comes_out(start, before_finetune, undisturbed):
    driver = start(before_finetune)
    server_of(driver).kill()
    driver.wait_for_checkpoint(10)
    assert len(driver.workers()) == 2
    assert driver.wait() == 0
    assert "the fork server had ended with -9" in driver.output
    assert before_finetune.weights() == undisturbed.weights()
