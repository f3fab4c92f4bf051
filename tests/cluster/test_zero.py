"""ZeRO 0 to 3 are the same training: same losses, and a checkpoint of one resumes under any other, on any ranks.

Tolerances, set before anything was measured: fp32 1e-5 relative; bf16, whose weights have 8 bits of mantissa, 2e-2
against fp32 and between its stages, which add in other orders. bf16 with ZeRO 0 or 1 runs as ZeRO 2.
"""

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
RTOL = {"fp32": 1e-5, "bf16": 2e-2}
RUNS = ("0 fp32", "1 fp32", "2 fp32", "3 fp32", "2 bf16", "3 bf16")


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_the_command_gives_the_losses_of_zero_1(zero, before_finetune, undisturbed):
    before_finetune.run(f"defaults.deepspeed={zero}")
    assert before_finetune.state("full_finetune").completed["summary"]["zero"] == zero
    assert undisturbed.state("full_finetune").completed["summary"]["zero"] == 1
    np.testing.assert_allclose(before_finetune.losses()[:FIRST], undisturbed.losses()[:FIRST], rtol=1e-5)


def test_an_optimizer_offloaded_by_json_gives_the_losses_of_zero_1(before_finetune, undisturbed):
    config = before_finetune.folder / "zero.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}))
    before_finetune.run(f"stages.full_finetune.deepspeed={config}")
    assert before_finetune.state("full_finetune").completed["summary"]["zero"] == 2
    np.testing.assert_allclose(before_finetune.losses()[:FIRST], undisturbed.losses()[:FIRST], rtol=1e-5)


def ranks(world: int, folder: Path) -> dict:
    """Run engine_ranks.py in `world` processes; what it found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = [sys.executable, str(Path(__file__).with_name("engine_ranks.py")), str(folder)]
    rendezvous = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    built = folder / "built"
    rendezvous |= {"TORCH_EXTENSIONS_DIR": str(built)}
    logs = [folder / f"{world}-{rank}.log" for rank in range(world)]  # a pipe that nobody empties would stop a rank
    group = []
    for rank, log in enumerate(logs):
        environment = os.environ | rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as file:
            group.append(subprocess.Popen(script, env=environment, stdout=file, stderr=file))
    try:
        codes = [process.wait(timeout=1200) for process in group]
    finally:
        for process in group:
            process.kill()
    assert codes == [0] * world, "\n".join(log.read_text() for log in logs)
    assert not built.exists(), "an op was compiled; a rank that is killed meanwhile leaves a lock which all wait for"
    return json.loads((folder / f"{world}.json").read_text())


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> tuple[dict, dict]:
    folder = tmp_path_factory.mktemp("ranks")
    return ranks(2, folder), ranks(1, folder)


def test_the_engine_trains_the_same_under_every_zero_stage(losses):
    whole = losses[0]["whole"]
    assert len(whole["0 fp32"]) == FIRST
    assert whole["1 fp32"][-1] < 0.9 * whole["1 fp32"][0], "nothing was learnt"
    for run in RUNS:
        np.testing.assert_allclose(whole[run], whole["1 fp32"], rtol=RTOL[run.split()[1]], err_msg=run)


@pytest.mark.parametrize("run", RUNS)
def test_a_step_that_is_not_finite_changes_nothing_on_any_rank(run, losses):
    """In the middle of `whole`, which all other tests compare with: so it also leaves AdamW's step count alone."""
    assert losses[0]["unchanged"][run] == [True, True]


@pytest.mark.parametrize("run", RUNS)
def test_the_result_has_the_weights_of_the_masters(run, losses):
    assert losses[0]["weights"][run] == [True]


@pytest.mark.parametrize(("saved", "run"), list(product(RUNS, repeat=2)))
def test_a_checkpoint_of_one_engine_resumes_under_another(saved, run, losses):
    two, one = losses
    whole, pair = two["whole"][saved], f"{saved}->{run}"
    done = len(whole) - len(two["resumed"][pair])
    assert done > 0
    rtol = max(RTOL[name.split()[1]] for name in (saved, run))
    np.testing.assert_allclose(two["resumed"][pair], whole[done:], rtol=rtol)
    if saved == run:
        assert two["resumed"][pair] == whole[done:]  # to the bit
    np.testing.assert_allclose(one["resumed"][pair], whole[done:], rtol=rtol, err_msg="two ranks before, one after")


def test_frozen_parameters_under_zero_3_are_saved_twenty_times_in_a_row(losses):
    for found in losses:
        frozen = found["frozen"]
        assert len(frozen["1 fp32"]) == FIRST and frozen["1 fp32"][-1] < frozen["1 fp32"][0]
        np.testing.assert_allclose(frozen["3 fp32"], frozen["1 fp32"], rtol=RTOL["fp32"])
        np.testing.assert_allclose(frozen["3 bf16"], frozen["1 fp32"], rtol=RTOL["bf16"])
