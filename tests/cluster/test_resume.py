"""kill -9 of the driver at a random step, and on from the last committed checkpoint: the data cursor is the step.

The driver is killed once; what it left in storage is then brought to its end in several ways.
"""

import random
import time

import numpy as np
import pytest
from harness import EVERY, SEED, STEPS, Experiment, assert_lineage, assert_repeats

AFTER = 20  # steps after a change of the number of workers over which losses must agree closely


@pytest.fixture(scope="module")
def killed(undisturbed, tmp_path_factory) -> tuple[Experiment, int]:
    """An experiment whose driver was killed in full_finetune; the step of the checkpoint it left."""
    experiment = undisturbed.before_finetune(tmp_path_factory.mktemp("killed") / "copy")
    rng = random.Random(SEED)
    step, delay = rng.randrange(EVERY, STEPS // 2, EVERY), rng.uniform(0, 0.7)
    driver = experiment.start()
    try:
        driver.wait_for_checkpoint(step)
        assert len(driver.workers()) == 2
        time.sleep(delay)  # about ten steps at most
        driver.kill()
    finally:
        driver.end()
    state = experiment.state("full_finetune")
    assert state.status == "running", "nobody was left to say that it ended"
    checkpoint = state.checkpoints[0].step
    print(f"seed {SEED}: kill -9 {delay:.3f} s after the checkpoint of step {step}; the last one is of {checkpoint}")
    assert step <= checkpoint <= STEPS - AFTER
    return experiment, checkpoint


def resumed(experiment: Experiment, checkpoint: int, *overrides: str) -> Experiment:
    """Run to the end, and check what must hold whatever changed in between."""
    planned = experiment.without_ray("plan", *overrides)
    assert f"from the checkpoint of step {checkpoint}" in planned.stdout
    experiment.run(*overrides)
    state = experiment.state("full_finetune")
    assert state.attempts == 2
    assert [c.token for c in state.checkpoints] == [(2, 1)] * 2
    attempts = [row["attempt"] for row in experiment.rows()]
    assert attempts == ["e0001a0001"] * checkpoint + ["e0002a0001"] * (STEPS - checkpoint)
    assert f"resumed from the checkpoint of step {checkpoint}" in experiment.without_ray("logs", "full_finetune").stdout
    assert_lineage(experiment)
    assert assert_repeats(experiment) >= 2
    return experiment


def same_samples(one: Experiment, other: Experiment) -> None:
    def keys(experiment: Experiment) -> list[tuple]:
        return [(row["step"], row["data/samples"], row["data/checksum"], row["tokens"]) for row in experiment.rows()]

    assert keys(one) == keys(other)


def test_after_kill_9_the_weights_are_bit_identical_to_an_undisturbed_run(killed, undisturbed, tmp_path):
    experiment, checkpoint = killed
    experiment = resumed(experiment.copy(tmp_path / "copy"), checkpoint)
    same_samples(experiment, undisturbed)
    assert (experiment.losses() == undisturbed.losses()).all()
    assert experiment.weights() == undisturbed.weights()


def test_two_workers_before_the_kill_and_one_after(killed, undisturbed, tmp_path):
    experiment, checkpoint = killed
    experiment = resumed(experiment.copy(tmp_path / "copy"), checkpoint, "defaults.resources.workers=1")
    same_samples(experiment, undisturbed)
    assert (experiment.losses()[:checkpoint] == undisturbed.losses()[:checkpoint]).all()
    after = slice(checkpoint, checkpoint + AFTER)
    np.testing.assert_allclose(experiment.losses()[after], undisturbed.losses()[after], rtol=1e-4)
    np.testing.assert_allclose(experiment.losses()[-1], undisturbed.losses()[-1], rtol=0.01)


def test_a_checkpoint_of_zero_1_resumes_under_zero_2(killed, undisturbed, tmp_path):
    experiment, checkpoint = killed
    experiment = resumed(experiment.copy(tmp_path / "copy"), checkpoint, "defaults.deepspeed=2")
    same_samples(experiment, undisturbed)
    after = slice(checkpoint, checkpoint + AFTER)
    np.testing.assert_allclose(experiment.losses()[after], undisturbed.losses()[after], rtol=1e-5)


@pytest.mark.parametrize(("workers", "cpus"), [(1, 1), (4, 0.5)])
def test_accumulation_does_not_change_the_losses(workers, cpus, before_finetune, undisturbed):
    """A global batch of four packs as 1 × 4, 2 × 2 and 4 × 1: workers × micro-steps."""
    stage = "stages.full_finetune.resources"
    before_finetune.run(f"{stage}.workers={workers}", f"{stage}.cpus={cpus}")
    assert before_finetune.state("full_finetune").completed["summary"]["world"] == workers
    same_samples(before_finetune, undisturbed)
    np.testing.assert_allclose(before_finetune.losses()[:AFTER], undisturbed.losses()[:AFTER], rtol=1e-4)
    np.testing.assert_allclose(before_finetune.losses()[-1], undisturbed.losses()[-1], rtol=0.01)
