"""What fails, and what follows: user errors end a stage at once with one message, a lost worker is replaced at once."""

import json
import random

from harness import EVERY, SEED, Experiment, assert_lineage

from orchestrator.errors import ErrorClass

BROKEN = """
name: cluster
storage: storage
model: {{vision: micro-vit, language: micro-qwen2}}
data:
  broken: {{meta: {data}/broken.json, system: ""}}
  heldout: {{meta: {data}/heldout.json, system: ""}}
stages:
  broken_data: {{kind: prepare, data: broken}}
  mlp_warmup: {{needs: [broken_data], steps: 4, lr: 1e-3, global_batch: 4, precision: fp32}}
  export: {{needs: [mlp_warmup]}}
  heldout_data: {{kind: prepare, data: heldout}}
"""


def errors_of(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("stageline: ")]


def test_too_many_broken_samples_end_their_stage_and_no_other(data, tmp_path):
    """One sample in twenty names a picture that is not there: 5 %, and 1 % may be rejected."""
    entry = json.loads((data / "mix.json").read_text())["digit"]
    lines = (data / entry["annotation"]).read_text().splitlines()[:100]
    broken = [line.replace("instructions/digit/", "nowhere/") if i % 20 == 7 else line for i, line in enumerate(lines)]
    (data / "annotations" / "broken.jsonl").write_text("\n".join(broken) + "\n")
    meta = {"digit": entry | {"annotation": "annotations/broken.jsonl", "length": len(lines)}}
    (data / "broken.json").write_text(json.dumps(meta))
    experiment = Experiment(tmp_path / "broken", data, BROKEN)

    done = experiment.command("run")
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    told = errors_of(done.stderr)
    assert told[0].startswith("stageline: stage broken_data stopped: stages.broken_data: ")
    assert "5 rejected" in told[0] and "5.0% of 100 samples, max_rejected is 1.0%" in told[0]
    assert "broken.jsonl:8 " in told[0], "the first broken line is named"
    assert "→ correct the samples" in told[0]
    assert told[1:] == [
        "stageline: stage mlp_warmup did not start, it needs broken_data",
        "stageline: stage export did not start, it needs broken_data",
    ]
    assert experiment.state("heldout_data").status == "completed"
    assert experiment.state("broken_data").status == "failed"
    started = {path.stem for path in (experiment.storage / "experiments/cluster/stages").iterdir()}
    assert started == {"broken_data", "heldout_data"}
    assert len((experiment.prefix("broken_data") / "rejected.jsonl").read_text().splitlines()) == 5


def test_a_users_mistake_found_by_a_worker_is_not_tried_again(before_finetune):
    """DeepSpeed's own JSON is read where DeepSpeed runs."""
    config = before_finetune.folder / "zero.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": "many"}}))
    done = before_finetune.command("run", f"stages.full_finetune.deepspeed={config}")
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    told = errors_of(done.stderr)
    assert told[0].startswith(
        f"stageline: stage full_finetune stopped: {config}: DeepSpeed refuses this configuration: "
    )
    assert "reduce_bucket_size" in told[0] and "→ correct the DeepSpeed JSON" in told[0]
    assert len(told) == 1
    state = before_finetune.state("full_finetune")
    assert state.attempts == 1
    assert [failure.error_class for failure in state.failures] == [ErrorClass.user]


def test_a_killed_worker_is_replaced_at_once(before_finetune, undisturbed, start):
    rng = random.Random(SEED + 1)
    step = rng.randrange(EVERY, 6 * EVERY, EVERY)
    print(f"seed {SEED}: kill -9 of one worker after the checkpoint of step {step}")
    driver = start(before_finetune)
    driver.wait_for_checkpoint(step)
    workers = driver.workers()
    assert len(workers) == 2
    rng.choice(workers).kill()
    assert driver.wait() == 0
    driver.assert_no_orphans()
    state = before_finetune.state("full_finetune")
    assert [failure.error_class for failure in state.failures] == [ErrorClass.lost_node]
    assert state.attempts == 2
    assert "full_finetune: lost_node: " in driver.output and "again in 0 s" in driver.output
    attempts = [row["attempt"] for row in before_finetune.rows()]
    assert list(dict.fromkeys(attempts)) == ["e0001a0001", "e0001a0002"]
    assert attempts.index("e0001a0002") >= step, "it went on from a checkpoint"
    assert_lineage(before_finetune)
    assert before_finetune.weights() == undisturbed.weights()
