"""ZeRO 0, 1 and 2 are the same training: same losses, and a checkpoint of one resumes under any other, on any ranks."""

import json
import os
import socket
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

FIRST = 20  # steps over which losses must agree


@pytest.mark.parametrize("zero", [0, 2])
def test_the_command_gives_the_losses_of_zero_1(zero, before_finetune, undisturbed):
    before_finetune.run(f"defaults.deepspeed={zero}")
    assert before_finetune.state("full_finetune").completed["summary"]["zero"] == zero
    assert undisturbed.state("full_finetune").completed["summary"]["zero"] == 1
    np.testing.assert_allclose(before_finetune.losses()[:FIRST], undisturbed.losses()[:FIRST], rtol=1e-5)


def ranks(world: int, folder: Path) -> dict:
    """Run engine_ranks.py in `world` processes; what it found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = [sys.executable, str(Path(__file__).with_name("engine_ranks.py")), str(folder)]
    rendezvous = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    group = [
        subprocess.Popen(
            script, env=os.environ | rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=240)[0] for process in group]
    finally:
        for process in group:
            process.kill()
    assert [process.returncode for process in group] == [0] * world, "\n".join(outputs)
    return json.loads((folder / f"{world}.json").read_text())


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> tuple[dict, dict]:
    folder = tmp_path_factory.mktemp("ranks")
    return ranks(2, folder), ranks(1, folder)


def test_the_engine_trains_the_same_under_every_zero_stage(losses):
    whole = losses[0]["whole"]
    assert len(whole["0"]) == FIRST
    assert whole["1"][-1] < 0.9 * whole["1"][0], "nothing was learnt"
    for zero in ("0", "2"):
        np.testing.assert_allclose(whole[zero], whole["1"], rtol=1e-5)


@pytest.mark.parametrize("zero", ["0", "1", "2"])
def test_a_step_that_is_not_finite_changes_nothing_on_any_rank(zero, losses):
    """In the middle of `whole`, which all other tests compare with: so it also leaves AdamW's step count alone."""
    assert losses[0]["unchanged"][zero] == [True, True]


@pytest.mark.parametrize(("saved", "zero"), list(product((0, 1, 2), repeat=2)))
def test_a_checkpoint_of_one_zero_stage_resumes_under_another(saved, zero, losses):
    two, one = losses
    whole, pair = two["whole"][str(saved)], f"{saved}->{zero}"
    done = len(whole) - len(two["resumed"][pair])
    assert done > 0
    np.testing.assert_allclose(two["resumed"][pair], whole[done:], rtol=1e-5)
    if saved == zero:
        assert two["resumed"][pair] == whole[done:]  # to the bit
    np.testing.assert_allclose(one["resumed"][pair], whole[done:], rtol=1e-5, err_msg="two ranks before, one after")
