"""What thinking longer brings, over several trainings: direct against step by step, one sample against votes.

Runs experiments/digits_reasoning.yaml once for each seed (what is done is reused), reads the pools of the last stage's
evaluation, and compares all methods question by question over all seeds (stages/evaluate/statistics.py: questions are
resampled, and the spread of the seeds is added by Student's t).

    python experiments/sums.py --output runs/sums
    python benchmarks/reasoning.py --seeds 0 1 2 [data.heldout.meta=../runs/sums/validation.json]

Settings were chosen with the override, on the validation split. Prints the tables, and writes
reasoning.json to --output; the curves of each training are in its `stageline report`.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.ledger import Ledger
from orchestrator.plan import read_mappings, stage_prefix
from orchestrator.spec import load_spec
from orchestrator.store import open_store
from stages.evaluate import figures
from stages.evaluate.match import vote_key
from stages.evaluate.pools import pools_of, study
from stages.evaluate.statistics import compare, interval

EXPERIMENT = Path("experiments/digits_reasoning.yaml")
STAGE = "evaluate_full_finetune"


def results(seed: int, overrides: list[str]) -> dict[str, Path]:
    """Runs the experiment; the folder of every evaluation's result, by stage."""
    given = [f"seed={seed}", *overrides]
    done = subprocess.run([str(Path(sys.executable).with_name("stageline")), "run", str(EXPERIMENT), *given])
    if done.returncode:
        sys.exit(done.returncode)
    experiment = load_spec(EXPERIMENT, given)
    store, out = open_store(experiment.storage), {}
    for name, note in read_mappings(store, experiment.name).items():
        if name in experiment.stages and experiment.stages[name].kind.base == "evaluate":
            completed = Ledger(store, stage_prefix("evaluate", note["fingerprint"])).state().completed
            assert completed is not None, f"{name} has run"
            out[name] = store.local_path(completed["manifest"]["folder"])
    return out


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pool(folder: Path, task: str) -> tuple[list[str], list[list[dict[str, Any]]]]:
    """(keys of the questions, rows of their samples)."""
    by_question: dict[str, list[dict[str, Any]]] = {}
    for row in lines(folder / "samples.jsonl"):
        if row["task"] == task:
            by_question.setdefault(row["key"], []).append(row)
    keys = sorted(by_question)
    return keys, [by_question[key] for key in keys]


def greedy(folder: Path, task: str, prompt: str) -> np.ndarray:
    """(Q,) values of greedy answers, in the order of the questions' ids."""
    rows = [row for row in lines(folder / "predictions.jsonl") if row["task"] == task and row["prompt"] == prompt]
    return np.array([row["value"] for row in sorted(rows, key=lambda row: row["id"])])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--task", default="sum")
    parser.add_argument("--output", type=Path, default=Path("runs/reasoning"))
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    print(f"seeds {options.seeds}, {platform.machine()}, Python {platform.python_version()}")
    found = [results(seed, options.overrides) for seed in options.seeds]

    print("\naccuracy after each stage, greedy, mean over the seeds [95 % interval]")
    told: dict[str, Any] = {"seeds": options.seeds, "stages": {}, "task": options.task}
    for stage in found[0]:
        tables = [json.loads((folders[stage] / "evaluation.json").read_text())["tables"] for folders in found]
        for prompt in tables[0]:
            values = np.stack([greedy(folders[stage], options.task, prompt) for folders in found])
            bounds = interval(values)
            each = ", ".join(figures.share(table[prompt][options.task]["accuracy"]) for table in tables)
            row = {"accuracy": bounds.mean, "low": bounds.low, "high": bounds.high}
            told["stages"].setdefault(stage, {})[prompt] = row
            print(f"{stage:32} {prompt:8} {figures.with_interval(row)}  n={values.shape[1]}  by seed {each}")

    last = [folders[STAGE] for folders in found]
    direct, cot = (np.stack([greedy(folder, options.task, form) for folder in last]) for form in ("direct", "cot"))
    gain = compare(cot, direct)
    print("\nstep by step − direct, greedy: " + difference(vars(gain)))
    pools, order = [], None
    for folder in last:
        keys, rows = pool(folder, options.task)
        order = order or keys
        assert keys == order, "all seeds were asked the same questions"
        values = [{row["answer"]: row["value"] for row in its} for its in rows]
        pools.append(
            pools_of([rows], lambda _, answer: vote_key(answer, "number"), lambda i, a, values=values: values[i][a])
        )
    stored = json.loads((last[0] / "evaluation.json").read_text())
    experiment = load_spec(EXPERIMENT, options.overrides)
    rerank = {name: its.kind for name, its in experiment.stages[STAGE].params.rerank.items()}
    curves, comparisons = study(pools, rerank, stored["ensemble"]["threshold"], stored["ensemble"]["posterior"])
    print(f"\n{len(order or [])} questions, {pools[0][0].size} samples each, temperature "
          f"{stored['sampling']['temperature']}")  # fmt: skip
    for curve in curves:
        points = [
            f"{k}: {figures.share(a)} [{figures.share(low)}, {figures.share(high)}] {samples:.1f} samples, "
            f"{tokens:.0f} tokens"
            for k, a, low, high, samples, tokens in zip(
                *(curve[key] for key in ("k", "accuracy", "low", "high", "samples", "tokens")), strict=True
            )
        ]
        print(f"{curve['method']}\n  " + "\n  ".join(points))
    print()
    for row in comparisons:
        print(f"{row['a']} ({row['samples_a']:.1f} samples) − {row['b']} ({row['samples_b']:.1f}): {difference(row)}")
    options.output.mkdir(parents=True, exist_ok=True)
    told |= {"cot_minus_direct": vars(gain), "curves": curves, "comparisons": comparisons}
    (options.output / "reasoning.json").write_text(json.dumps(told, indent=1))


def difference(row: dict[str, Any]) -> str:
    low, high = figures.share(row["low"]), figures.share(row["high"])
    return f"{figures.share(row['difference'])} [{low}, {high}], p {row['p']:.2g} ({row['test']})"


if __name__ == "__main__":
    main()
