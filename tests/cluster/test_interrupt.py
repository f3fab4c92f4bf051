"""SIGTERM and Ctrl-C: the driver leaves at once with a message, nothing of it trains on, and `run` goes on."""

import random
import re
import time

import pytest
from harness import EVERY, LONGER, LONGER_STEPS, SEED, assert_lineage

MESSAGE = "stageline: interrupted; run again to go on from the last checkpoints"
AT_ONCE_S = 30  # of which Ray takes a few for its own end


def test_sigterm_then_ctrl_c_then_to_the_end(before_finetune, longer, start):
    experiment = before_finetune

    driver = start(experiment, *LONGER)
    driver.wait_for_checkpoint(EVERY)
    began = time.monotonic()
    assert driver.terminate() == 130
    assert driver.ended - began < AT_ONCE_S
    assert MESSAGE in driver.output
    assert "Traceback" not in driver.output

    driver = start(experiment, *LONGER)
    driver.wait_for_checkpoint(4 * EVERY)
    running = experiment.without_ray("status", *LONGER)  # beside the driver, from storage alone
    assert re.search(r"^full_finetune +full_finetune +running +\d+/400 +\d\.\d{4} +\d+ +2 ", running.stdout, re.M)
    assert driver.interrupt() == 130
    assert MESSAGE in driver.output
    assert "Traceback" not in driver.output
    state = experiment.state("full_finetune")
    assert state.completed is None
    assert state.furthest < LONGER_STEPS
    assert {failure.error_class for failure in state.failures} == {"preempted"}, "an interrupted stage has not failed"

    experiment.run(*LONGER)
    assert experiment.state("full_finetune").attempts == 3
    assert_lineage(experiment)
    attempts = [row["attempt"] for row in experiment.rows()]
    assert list(dict.fromkeys(attempts)) == ["e0001a0001", "e0002a0001", "e0003a0001"]
    assert experiment.weights() == longer.weights()


@pytest.mark.parametrize("within_s", [2.0, 8.0])
def test_sigterm_while_ray_starts(within_s, before_finetune, start):
    """Whatever runs by then: a handler that raises would now and then be lost in an import, or leave agents behind."""
    driver = start(before_finetune)
    while not driver.descendants():  # the fork server, then Ray's processes
        assert driver.process.poll() is None, driver.output
        time.sleep(0.02)
    time.sleep(random.Random(SEED).uniform(0, within_s))
    assert driver.terminate() == 130
    assert MESSAGE in driver.output
    assert "Traceback" not in driver.output
