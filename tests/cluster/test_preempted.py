"""Asked to stop, by a notice or a signal: saved and stopped at a step, nothing trained is lost, and on from there."""

import json
import random
import re
import time

from harness import EVERY, LONGER, SEED, assert_lineage

from orchestrator.control import POLL_S
from orchestrator.errors import ErrorClass


def assert_nothing_lost(experiment, undisturbed, causes: dict[str, int]) -> None:
    account = experiment.account("full_finetune")
    assert dict(account.causes) == causes
    assert [attempt.lost for attempt in account.attempts] == [0] * len(account.attempts)
    assert_lineage(experiment)
    assert experiment.weights() == undisturbed.weights()


def test_a_notice_with_a_deadline(before_finetune, longer, start):
    """Safety save at once, on with the training, a last save, and a new attempt within the same run."""
    rng = random.Random(SEED + 2)
    driver = start(before_finetune, *LONGER)
    driver.wait_for_checkpoint(EVERY)  # so that it knows what a save takes
    time.sleep(rng.uniform(0, 0.3))
    before, asked = json.loads((before_finetune.prefix("full_finetune") / "progress.json").read_text()), time.time()
    told = before_finetune.without_ray("preempt", "--deadline", "5")
    assert told.returncode == 0 and "told full_finetune: 5 s until the end" in told.stdout
    began = time.time()
    assert driver.wait() == 0
    driver.assert_no_orphans()
    assert_nothing_lost(before_finetune, longer, {"preempted": 1})
    entries = [e for e in before_finetune.entries("full_finetune") if e.type == "checkpoint" and e.token == (1, 1)]
    saves = [e for e in entries if e.time > asked]
    assert saves[-1].time - asked > 2, "it trained on for a while"
    assert saves[-1].time - began < 5 + POLL_S, "it was to be saved by then, counted from when rank 0 looked"
    first, second = before_finetune.account("full_finetune").attempts
    assert first.reached == second.resumed_from > before["step"]
    status = before_finetune.without_ray("status").stdout
    assert re.search(r"^full_finetune .* 2 \(1 preempted\) +0\.\d{3} +0 +\d+\.\d s ", status, re.M)
    assert re.search(r"^training: goodput 0\.\d{3} \(.* 0 steps lost$", status, re.M)


def test_nothing_runs_so_nothing_is_preempted(undisturbed):
    done = undisturbed.without_ray("preempt")
    assert done.returncode == 2 and "no training stage is running" in done.stderr


def test_sigterm_saves_and_stops_and_run_goes_on(before_finetune, longer, start):
    driver = start(before_finetune, *LONGER, "stages.full_finetune.checkpoint.every=1000")
    driver.wait_for_step(random.Random(SEED + 3).randint(3, 60))
    assert driver.terminate() == 130
    assert "the running stages save and stop" in driver.output and "Traceback" not in driver.output
    (failure,) = before_finetune.state("full_finetune").failures
    assert failure.error_class is ErrorClass.preempted and "the driver got SIGTERM" in failure.message
    assert failure.step == failure.reached > 0
    before_finetune.run(*LONGER)
    assert_nothing_lost(before_finetune, longer, {"preempted": 1})


def test_a_worker_that_hangs_is_told_with_stacks_and_replaced(before_finetune, undisturbed, start):
    """One worker is stopped: the other waits for it in a collective, and says where."""
    driver = start(before_finetune, "stages.full_finetune.hang_timeout_s=15")
    driver.wait_for_checkpoint(EVERY)
    workers = driver.workers()
    random.Random(SEED + 4).choice(workers).suspend()
    assert driver.wait() == 0
    driver.assert_no_orphans()
    (failure,) = before_finetune.state("full_finetune").failures
    assert failure.error_class is ErrorClass.hang
    (stacks,) = [text for name, text in before_finetune.logs("full_finetune").items() if "-stacks-" in name]
    assert "no step came to an end for 15 s" in stacks and re.search("all_reduce|all_gather|barrier", stacks)
    assert_lineage(before_finetune)
    assert before_finetune.weights() == undisturbed.weights()


def test_divergence_skips_then_stops_and_names_the_samples(before_finetune):
    done = before_finetune.command("run", "stages.full_finetune.lr=1e30", "stages.full_finetune.schedule.warmup=0")
    assert done.returncode != 0
    (failure,) = before_finetune.state("full_finetune").failures
    assert failure.error_class is ErrorClass.diverged
    log = before_finetune.logs("full_finetune")["e0001a0001.log"]
    skipped = re.findall(r"step (\d+) skipped, (\d) in a row: .* samples (\S.*)", log)
    assert [int(row) for _, row, _ in skipped] == [1, 2, 3]
    reader, plan = before_finetune.reader(), before_finetune.plan()
    for step, _, names in skipped:
        planned = {str(reader.index["id"][plan.sample[o]]) for pack in plan.step(int(step) - 1) for o in pack}
        assert set(names.split(", ")) <= planned
    assert skipped[-1][0] in failure.message
