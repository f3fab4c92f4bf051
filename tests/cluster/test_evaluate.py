"""Evaluation on real Ray: killed half-way it generates nothing again; `eval` runs it alone on an exported folder."""

import base64
import csv
import json
import subprocess
import time

from harness import COMMAND, PATIENCE_S, Experiment

POOLS = (
    "stages.evaluate.needs=[mix_data, full_finetune]",
    "stages.evaluate.sampling={samples: 16, temperature: 2.0}",
    'stages.evaluate.prompts={direct: {}, cot: {suffix: "Think.", max_new_tokens: 48}}',
    "stages.evaluate.resources.workers=2",
)


def parts(experiment: Experiment) -> dict[str, tuple[int, int]]:
    """Inode and time of every part of a pool that is in storage."""
    found = experiment.storage.glob("shared/generations/*/*.jsonl")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def test_killed_half_way_it_resumes_without_repeating_generations(undisturbed, tmp_path, start):
    whole, killed = undisturbed.copy(tmp_path / "whole"), undisturbed.copy(tmp_path / "killed")
    before = set(parts(killed))
    whole.run(*POOLS)
    total, known = len(parts(whole)) - len(before), {}
    assert total > 40
    for share in (0.2, 0.6):
        driver = start(killed, *POOLS)
        deadline = time.monotonic() + PATIENCE_S
        while len(parts(killed)) - len(before) < share * total:
            assert driver.process.poll() is None and time.monotonic() < deadline, driver.output
            time.sleep(0.02)
        driver.kill()
        now = parts(killed)
        assert known.items() <= now.items() and len(now) - len(before) < total
        known = now
    killed.run(*POOLS)
    now = parts(killed)
    assert known.items() <= now.items() and set(now) == set(parts(whole)), "a part was made again"
    for name in ("evaluation.json", "predictions.jsonl", "samples.jsonl"):
        assert (killed.result("evaluate") / name).read_bytes() == (whole.result("evaluate") / name).read_bytes(), name
    told = json.loads((killed.result("evaluate") / "evaluation.json").read_text())
    assert list(told["tables"]) == ["direct", "cot"] and {curve["method"] for curve in told["curves"]["row"]} >= {
        "pass", "majority", "dynamic", "best of, likelihood",
    }  # fmt: skip


def test_eval_asks_an_exported_model_alone(undisturbed, data, tmp_path):
    picture = base64.b64encode(sorted((data / "images").rglob("*.png"))[0].read_bytes()).decode()
    tsv, own = tmp_path / "shapes.tsv", tmp_path / "own.jsonl"
    with tsv.open("w", newline="") as file:
        rows = csv.DictWriter(file, ["index", "image", "question", "A", "B", "answer"], delimiter="\t")
        rows.writeheader()
        rows.writerow({"index": 0, "image": picture, "question": "Which?", "A": "one", "B": "two", "answer": "A"})
    own.write_text(json.dumps({"id": "a", "question": "two plus two?", "answer": "4", "kind": "number"}) + "\n")
    output = tmp_path / "eval"
    command = [
        *COMMAND, "eval", str(undisturbed.result("export")), "--set", f"shapes={tsv}", "--set", f"own={own}",
        "--samples", "2", "--output", str(output),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    print(done.stdout, done.stderr)
    assert done.returncode == 0 and "shapes (n=1)" in done.stdout and "cot" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert again.returncode == 0 and "1 of them reused" in again.stdout
    wrong = subprocess.run([*command[:2], str(tmp_path), *command[3:]], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2 and "no config.json" in wrong.stderr and "Traceback" not in wrong.stderr
