"""Two drivers on one experiment: one trains, the other waits and reuses; one taken over commits nothing more."""

import signal
import time

import psutil
from harness import EVERY, PATIENCE_S, assert_lineage


def claims(experiment) -> list:
    return [entry for entry in experiment.entries("full_finetune") if entry.type == "claimed"]


def test_started_together_one_trains_and_the_other_reuses(before_finetune, undisturbed, start):
    drivers = [start(before_finetune), start(before_finetune)]
    assert [driver.wait() for driver in drivers] == [0, 0]
    assert len(claims(before_finetune)) == 1 and before_finetune.state("full_finetune").attempts == 1
    waited = [driver for driver in drivers if "made by another driver (pid " in driver.output]
    assert len(waited) == 1
    assert "full_finetune: completed by the other driver, reused" in waited[0].output
    assert_lineage(before_finetune)
    assert before_finetune.weights() == undisturbed.weights()


def test_a_driver_that_slept_through_its_takeover_commits_nothing_and_says_so(before_finetune, undisturbed, start):
    """SIGSTOP to the driver and all that it had started, as when its machine is paused."""
    sleeper = start(before_finetune, "stages.full_finetune.checkpoint.every=5")
    sleeper.wait_for_checkpoint(EVERY)
    asleep = [psutil.Process(sleeper.process.pid), *sleeper.descendants()]
    for process in asleep:
        process.send_signal(signal.SIGSTOP)
    other = start(before_finetune, environment={"STAGELINE_OWNER_TIMEOUT_S": "6"})
    until = time.monotonic() + PATIENCE_S
    while len(claims(before_finetune)) < 2:
        assert other.process.poll() is None and time.monotonic() < until, other.output
        time.sleep(0.05)
    for process in asleep:
        process.send_signal(signal.SIGCONT)
    assert sleeper.wait() == 2
    assert "Traceback" not in sleeper.output
    assert "stage full_finetune stopped: another driver took this stage over → run again to reuse" in sleeper.output
    sleeper.assert_no_orphans()
    assert other.wait() == 0
    entries = before_finetune.entries("full_finetune")
    tokens = [entry.token for entry in entries]
    assert tokens == sorted(tokens), "nothing of the first driver after the claim of the second"
    assert {token[0] for token in tokens} == {1, 2}
    assert_lineage(before_finetune)
    assert before_finetune.weights() == undisturbed.weights()
