"""wandb and TensorBoard beside a run that is preempted twice and whose driver is killed: one run, every step once."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import EVERY, LONGER, LONGER_STEPS, SEED, assert_lineage
from tensorboardX.proto import event_pb2

OFFLINE = ("tracking.wandb.mode=offline", "tracking.wandb.tags=[a, b]", "tracking.tensorboard.folder=boards")


def records(folder: Path) -> list[dict]:
    """Of an offline folder, by wandb's own reader, which checks lengths and checksums."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    environment = os.environ | {"WANDB_MODE": "offline"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [json.loads(line) for line in done.stdout.splitlines()]


def steps_of_events(file: Path) -> list[int]:
    """The steps of an event file's summaries: records of length, checksum, data, checksum."""
    data, at, steps = file.read_bytes(), 0, []
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])  # pyright: ignore
        steps += [event.step] if event.HasField("summary") else []
        at += 12 + size + 4
    return steps


def preempt(experiment, driver, attempt: int) -> None:
    """A notice to the running attempt, and the next one at work."""
    told = experiment.without_ray("preempt", "--deadline", "1")
    assert told.returncode == 0, told.stderr
    until = time.monotonic() + 120
    while experiment.state("full_finetune").attempts <= attempt:
        assert time.monotonic() < until and driver.process.poll() is None, driver.output
        time.sleep(0.1)


def test_two_preemptions_and_a_killed_driver_are_one_run(before_finetune, start):
    experiment, settings = before_finetune, (*LONGER, *OFFLINE)
    driver = start(experiment, *settings)
    for attempt in (1, 2):
        driver.wait_for_checkpoint(EVERY * attempt)
        preempt(experiment, driver, attempt)
    driver.wait_for_checkpoint(EVERY * 3)
    until = time.monotonic() + 60
    while not list(experiment.storage.glob("**/tracking/wandb.json")):  # 15 s after the first rows: its run has begun
        assert time.monotonic() < until and driver.process.poll() is None, driver.output
        time.sleep(0.1)
    time.sleep(random.Random(SEED + 11).uniform(0, 5))
    driver.kill()
    assert experiment.state("full_finetune").completed is None
    experiment.run(*settings)

    assert experiment.account("full_finetune").causes == {"preempted": 2, "lost_node": 1}
    assert_lineage(experiment)
    folders = sorted(experiment.folder.glob("wandb/offline-run-*"))
    assert len(folders) == 2, "one of each driver"
    (run,) = {folder.name.rsplit("_", 1)[1].split("-", 1)[1] for folder in folders}
    written = [file for folder in folders for file in folder.glob(f"run-{run}.wandb")]  # one at least
    found = [record for file in written for record in records(file.parent)]
    begun = [record["run"] for record in found if record["type"] == "run"]
    assert {its["run_id"] for its in begun} == {run} and len(begun) in (1, 2), (
        "wandb writes 15 s late: or never, if killed"
    )
    history = [record["history"] for record in found if record["type"] == "history"]
    assert [int(its["step"]["num"]) for its in history] == list(range(1, LONGER_STEPS + 1))
    rows = experiment.rows()
    assert [its["item"]["loss"] for its in history] == pytest.approx([row["loss"] for row in rows])
    assert [its["item"]["data/samples"] for its in history] == [row["data/samples"] for row in rows]

    for its in begun:
        assert (its["run_group"], its["job_type"], its["display_name"]) == ("cluster", "full_finetune", "full_finetune")
        assert its["tags"] == ["a", "b"]
        config = its["config"]["update"]
        assert config["fingerprint"].startswith(run[:16]) and config["steps"] == LONGER_STEPS and config["lr"] == 5e-3
    for folder in folders:
        card = folder / "files" / "data-card-mix_data.html"
        assert "<html" in card.read_text()
    for file in written:
        copy = experiment.storage / "experiments" / "cluster" / "wandb" / file.parent.name
        assert (copy / file.name).read_bytes() == file.read_bytes()

    (events,) = experiment.folder.glob("boards/full_finetune/*/events.out.tfevents.*")
    assert steps_of_events(events) == list(range(1, LONGER_STEPS + 1))


def test_a_tracker_that_cannot_serve_is_told_before_anything_starts(before_finetune, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    done = before_finetune.without_ray("run", "tracking.wandb.mode=online")
    assert done.returncode == 2 and "wandb has no key" in done.stderr and "mode: offline" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_does_not_answer_ends_nothing(before_finetune, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody is there
    done = before_finetune.command("run", "tracking.wandb.mode=online")
    assert done.returncode == 0, done.stderr
    assert "full_finetune: tracking does not reach wandb, the stage goes on: CommError" in done.stdout + done.stderr
    assert before_finetune.state("full_finetune").completed is not None
