"""SIGTERM and Ctrl-C: the driver leaves at once with a message, nothing of it trains on, and `run` goes on."""

import contextlib
import random
import re
import secrets
import shutil
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from harness import EVERY, LONGER, LONGER_STEPS, SEED, assert_lineage, runs

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


MARK = "STAGELINE_TEST_STARTED_BY"


def marked(mark: str) -> list[str]:
    """Processes that inherited this mark, whoever is their parent by now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and runs(process):
                found.append(f"{process.name()} {process.pid}")
    return found


@pytest.mark.parametrize(("seen", "within_s", "signals"), [
    ("", 2.0, 1), ("", 0.5, 2), ("gcs_server", 1.0, 1), ("raylet", 0.5, 1), ("raylet", 0.5, 2),
])  # fmt: skip
def test_sigterm_while_ray_starts(seen, within_s, signals, before_finetune, start):
    """So long after such a process was seen (the first of all is the fork server); a handler that raised would now and
    then be lost in an import, Ray would leave agents behind, and a second signal comes in the handler of the first."""
    mark, folder = secrets.token_hex(8), Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))  # short, for Ray's sockets
    driver = start(before_finetune, environment={MARK: mark, "TMPDIR": str(folder)})
    while not (driver.descendants() and any(seen in name for name in driver.names())):
        assert driver.process.poll() is None, driver.output
        time.sleep(0.01)
    time.sleep(random.Random(f"{SEED} {seen} {signals}").uniform(0, within_s))
    for _ in range(signals - 1):
        driver.process.terminate()
        time.sleep(0.005)
    assert driver.terminate() == 130
    assert MESSAGE in driver.output
    assert "Traceback" not in driver.output
    until = time.monotonic() + 20
    while left := marked(mark):
        assert time.monotonic() < until, left
        time.sleep(0.1)
    assert not list(folder.glob("stageline-fork-*"))
    shutil.rmtree(folder)
