"""The hand-off between two training stages, beside a plain default fit() of a no-op stage, alternating in one run.

    python benchmarks/handoff.py --folder /tmp/handoff --rounds 5

Four programs take turns in every round, each in processes of its own, with Ray on this machine's cores:
  no-op      plain Ray Train with its default settings: two fit() of a function that does nothing, two workers
  imports    the same, of a function that imports what a training stage does
  hand-off   `stageline run` on two stages of a micro model: last step of the first to first step of the second
  cold       the same without the fork server (STAGELINE_FORK_SERVER=0)
A fit() is the call alone, without the driver's own imports and ray.init. The ratios are to the second one of a driver,
the faster one: Ray Train keeps an actor from the first. A hand-off is read from what the run left in storage: its
times are those of the workers and of the driver on this machine. Prints medians, ratios, where a hand-off's time goes,
machine and load; --output writes JSON. Exit code 1 where a hand-off takes more than half of a no-op fit().
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

from orchestrator.ledger import Ledger
from orchestrator.plan import plan_experiment
from orchestrator.progress import read_progress
from orchestrator.spec import load_spec
from orchestrator.store import open_store

ROOT = Path(__file__).parents[1]
MOST = 0.5  # of a default fit() of a no-op stage
YAML = """
name: handoff
storage: storage
seed: 0
model: {{vision: micro-vit, language: micro-qwen2}}
data: {{mix: {{meta: {data}/instructions.json, system: ""}}}}
defaults:
  global_batch: 4
  packing: {{max_tokens: 256, max_tiles: 48}}
  precision: fp32
  deepspeed: 1
  resources: {{workers: 2, cpus: 1}}
stages:
  mix_data: {{kind: prepare, data: mix}}
  mlp_warmup: {{needs: [mix_data], steps: 200, lr: 1e-3}}
  full_finetune: {{needs: [mix_data, mlp_warmup], steps: 4, lr: 1e-3}}
"""
PLAIN = """
import json, sys, tempfile, time
import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

def nothing(config):
    pass

def imports(config):
    import deepspeed, stages.train, torch._dynamo, torch._inductor.compile_fx

ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
seconds = []
for number in range(2):
    with tempfile.TemporaryDirectory() as folder:
        trainer = TorchTrainer(
            globals()[sys.argv[1]], train_loop_config={}, scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(name=f"plain-{number}", storage_path=folder),
        )
        before = time.perf_counter()
        trainer.fit()
        seconds.append(time.perf_counter() - before)
print("\\n" + json.dumps(seconds))
"""
PARTS = (
    "first stage: last step to result committed",
    "driver: result seen, next stage claimed",
    "driver: attempt written, packs planned",
    "second stage: worker group, model, engine, first step",
)


def plain(function: str) -> list[float]:
    """Seconds of the first and of the second default fit() of a driver."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", PLAIN, function], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def handoff(folder: Path, data: Path, fork_server: bool) -> list[float]:
    """Seconds of each of PARTS."""
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text(YAML.format(data=data))
    environment = os.environ | {"STAGELINE_FORK_SERVER": str(int(fork_server))}
    command = [str(Path(sys.executable).with_name("stageline")), "run", str(folder / "experiment.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)

    experiment = load_spec(folder / "experiment.yaml", [])
    store = open_store(experiment.storage)
    prefixes = {plan.name: plan.prefix for plan in plan_experiment(experiment, store)[1]}
    first, second = prefixes["mlp_warmup"], prefixes["full_finetune"]
    progress = read_progress(store, first)
    assert progress is not None and progress["step"] == progress["total"]
    completed = {entry.type: entry.time for entry in Ledger(store, first).entries()}["completed"]
    times = {entry.type: entry.time for entry in Ledger(store, second).entries()}
    planned = store.local_path(f"{second}/plan.npz")
    assert planned is not None, "a folder is its own storage"
    moments = [progress["time"], completed, times["claimed"], planned.stat().st_mtime, times["started"]]
    return [after - before for before, after in pairwise(moments)]


def measure(folder: Path, rounds: int) -> dict[str, list]:
    data = folder / "digits"
    script = [sys.executable, str(ROOT / "experiments" / "digits.py"), "--output", str(data), "--share", "0.02"]
    subprocess.run([*script, "--seed", "0"], check=True, stdout=subprocess.DEVNULL)
    seconds: dict[str, list] = {"no-op": [], "imports": [], "hand-off": [], "cold": []}
    for number in range(rounds):
        seconds["no-op"].append(plain("nothing"))
        seconds["hand-off"].append(handoff(folder / f"{number}-warm", data, True))
        seconds["imports"].append(plain("imports"))
        seconds["cold"].append(handoff(folder / f"{number}-cold", data, False))
        told = ", ".join(f"{name} {values[-1]:.2f} s" for name, values in totals(seconds).items())
        print(f"round {number}: {told}; load {os.getloadavg()[0]:.1f}", flush=True)
    return seconds


def totals(seconds: dict[str, list]) -> dict[str, list[float]]:
    return {
        "no-op, first": [first for first, _ in seconds["no-op"]],
        "no-op": [second for _, second in seconds["no-op"]],
        "imports": [second for _, second in seconds["imports"]],
        "hand-off": [sum(parts) for parts in seconds["hand-off"]],
        "cold": [sum(parts) for parts in seconds["cold"]],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="emptied first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON of all figures")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    print(f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start")
    began = time.monotonic()
    seconds = measure(options.folder.resolve(), options.rounds)
    total = totals(seconds)
    print(f"\n{options.rounds} rounds in {time.monotonic() - began:.0f} s; medians, and the range")
    for name, values in total.items():
        ratio = median(value / noop for value, noop in zip(values, total["no-op"], strict=True))
        print(f"{name:13} {median(values):6.2f} s  [{min(values):.2f}, {max(values):.2f}]  {ratio:.2f} of no-op")
    for name in ("hand-off", "cold"):
        print(f"\n{name}, by part:")
        for part, values in zip(PARTS, zip(*seconds[name], strict=True), strict=True):
            print(f"  {median(values):6.2f} s  {part}")
    if options.output:
        options.output.write_text(json.dumps({"seconds": seconds, "load": os.getloadavg()}, indent=1))
    share = median(mine / noop for mine, noop in zip(total["hand-off"], total["no-op"], strict=True))
    print(f"\n{'holds' if share <= MOST else 'FAILS'}: a hand-off takes {share:.2f} of a no-op fit(), at most {MOST}")
    return 0 if share <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())
