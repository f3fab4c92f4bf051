"""The scaling study of experiments/scaling.yaml: what sharing saved, the law, and how well it predicts unseen points.

    python benchmarks/scaling.py [--output FILE.json] [OVERRIDE ...]

Runs the experiment (what is completed already is reused) and reads its storage. Overrides are those of `stageline run`,
e.g. 'sweep.vision=[tiny-vit-s, tiny-vit]' for a smaller grid. Seconds are those of the ledgers, from a stage's first
claim to its completion; what sharing saved is counted with the seconds that each shared stage took. Exit code 1 where
fewer than 27 points were measured, no law was fitted, or its mean error on held-out points is above 10 %.
"""

import argparse
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orchestrator.accounts import account
from orchestrator.cli.main import main as stageline
from orchestrator.ledger import Ledger
from orchestrator.plan import plan_experiment
from orchestrator.sharing import saving, shared_with
from orchestrator.spec import load_spec
from orchestrator.store import open_store

ROOT = Path(__file__).parents[1]
FILE = ROOT / "experiments" / "scaling.yaml"
POINTS, ERROR = 27, 0.10


def measured(overrides: list[str]) -> dict[str, Any]:
    """What storage knows of the finished study."""
    experiment = load_spec(FILE, overrides)
    assert experiment.sweep is not None, f"{FILE} has a sweep"
    store = open_store(experiment.storage)
    _, plans = plan_experiment(experiment, store)
    shared, seconds, summary = shared_with(plans), {}, {}
    for item in plans:
        ledger = Ledger(store, item.prefix)
        done = ledger.state().completed
        assert done is not None, f"{item.name} is not completed"
        if item.name not in shared:
            seconds[item.name] = account(ledger.entries()).wall_s()
        if item.kind == "scaling":
            summary = done["summary"]
    found = saving(experiment.sweep, plans)
    collected = experiment.sweep.collecting
    alone = 0.0  # seconds if each combination had made all of its stages by itself
    for name, template in experiment.sweep.templates.items():
        if template not in collected:
            runs = experiment.sweep.combinations / sum(t == template for t in experiment.sweep.templates.values())
            alone += runs * seconds[shared.get(name, name)]
    return {
        "stages": {"naive": found.naive, "expanded": found.expanded, "distinct": found.distinct, "saved": found.saved},
        "seconds": {"made": sum(seconds.values()), "without_sharing": alone},
        "points": summary["points"], "task": summary["task"], "data": summary["data"], "band": summary["band"],
        "law": summary["law"],
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "torch": version("torch")},
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    stages, seconds, law = found["stages"], found["seconds"], found["law"]
    print(f"stages: {stages['naive']} if each run were by itself, {stages['distinct']} made, {stages['saved']} saved")
    print(f"seconds of stages: {seconds['made']:,.0f} made, {seconds['without_sharing']:,.0f} without sharing")
    print(f"{found['points']} points, loss of {found['task']}, D in {found['data']}")
    if "refused" in law:
        print(f"no law: {law['refused']}")
        return
    print(law["formula"])
    for name, c in law["coefficients"].items():
        print(f"  {name} = {c['value']:.4g} [{c['low']:.4g}, {c['high']:.4g}]")
    for row in law["held_out"]:
        band = f"[{row['low']:.4f}, {row['high']:.4f}]"
        error = f"measured {row['loss']:.4f}, error {row['relative_error']:+.1%}"
        print(f"  held out {row['evaluation']}: predicted {row['predicted']:.4f} {band}, {error}")
    if law["held_out"]:
        count, error = len(law["held_out"]), law["mean_relative_error"]
        print(f"mean error on {count} held-out points: {error:.1%}; {law['inside']} within {found['band']:.0%} bands")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where the figures go as JSON")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    if (code := stageline(["run", str(FILE), *options.overrides])) != 0:
        return code
    found = measured(options.overrides)
    show(found)
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    error = found["law"].get("mean_relative_error")
    return int(found["points"] < POINTS or error is None or error > ERROR)


if __name__ == "__main__":
    sys.exit(main())
