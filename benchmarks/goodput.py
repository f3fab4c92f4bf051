"""Goodput of one training stage over real minutes, with a notice of preemption every few of them.

    python benchmarks/goodput.py [--minutes 36] [--every 300] [--output FILE.json]

A Ray cluster of a head and two nodes of one CPU, a stage of two workers that would go on for longer than the minutes.
At every notice (a file, read by the node's agent, which has Ray drain the node) a fresh node is added, as a cloud does
that replaces its machines; the training saves, goes on, saves last, stops, and starts again on the nodes that stay. The
announced one is killed with all its workers at the deadline, 30 s after the notice. At the end the driver gets SIGTERM,
and `stageline status` says what the time went into (orchestrator/accounts.py). Prints per notice the steps lost and the
seconds to resume; writes FILE.json and, where matplotlib is installed (the extra `benchmarks`), the timeline of the
attempts as FILE.png. Exit code 1 where the goodput is below 0.90, a step was lost, or an attempt ended for another
cause.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "cluster"))

from chaos import STAGE, Outcome, Run  # noqa: E402
from harness import Experiment, make_data  # noqa: E402
from nodes import Nodes  # noqa: E402

from orchestrator.accounts import Account  # noqa: E402
from orchestrator.ledger import Entry  # noqa: E402
from orchestrator.store import open_store  # noqa: E402

GOODPUT = 0.90
DEADLINE_S = 30.0
RESUME_S = 25.0  # at least, between the last deadline and the end: it has to have resumed
SHORTEST_STEP_S = 0.2  # of this stage: it takes 0.3 s or more, so that it goes on until it is stopped

YAML = """
name: cluster
storage: storage
seed: 0
model: {{vision: tiny-vit, language: tiny-qwen2}}
data:
  mix: {{meta: {data}/mix.json, system: ""}}
defaults:
  global_batch: 4
  packing: {{max_tokens: 1024, max_tiles: 64}}
  precision: fp32
  deepspeed: 1
  resources: {{workers: 2, cpus: 1}}
stages:
  mix_data: {{kind: prepare, data: mix, resources: {{workers: 2}}}}
  full_finetune: {{needs: [mix_data], steps: {steps}, lr: 1e-4, schedule: {{warmup: 20}}}}
"""


def tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def train(experiment: Experiment, minutes: float, every_s: float, steps: int) -> list[Outcome]:
    """The whole time, counted from the first claim of the stage; what every notice cost."""
    store = open_store(str(experiment.storage))
    with Nodes() as nodes, Run(experiment, nodes, store, (f"stages.{STAGE}.steps={steps}",), tell) as run:
        while not run.view.entries():
            rest(run, time.time() + 0.2)
        began = run.view.entries()[0].time
        end, notice = began + 60 * minutes, began + every_s
        while notice + DEADLINE_S + RESUME_S < end:
            rest(run, notice)
            run.preempt(1, DEADLINE_S, fresh_early=True)
            notice += every_s
        rest(run, end)
        run.driver.process.terminate()
        code = run.driver.wait()
        assert code == 130, f"the driver ended with {code}:\n{run.driver.output}"
        return run.outcomes()


def rest(run: Run, until: float) -> None:
    """until: unix time."""
    while (left := until - time.time()) > 0:
        assert run.driver.process.poll() is None, f"the driver ended early:\n{run.driver.output}"
        time.sleep(min(left, 1.0))


def standstills(entries: list[Entry]) -> list[float]:
    """Seconds from the commit of an attempt's last save to the first step of the next attempt."""
    out, saved = [], 0.0
    for entry in entries:
        if entry.type == "checkpoint":
            saved = entry.time
        elif entry.type == "started" and saved:
            out.append(entry.time - saved)
    return out


def plot(account: Account, outcomes: list[Outcome], path: Path) -> None:
    """One bar per attempt: its start, and its training until its end was recorded; a line for every notice."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    began, until = account.began or 0.0, account.until or 0.0
    figure, axes = pyplot.subplots(figsize=(11, 1.5 + 0.3 * len(account.attempts)))
    for row, attempt in enumerate(account.attempts, 1):
        first, ended = attempt.first_step or until, attempt.ended or until
        axes.barh(row, (first - attempt.began) / 60, left=(attempt.began - began) / 60, color="tab:orange")
        axes.barh(row, (ended - first) / 60, left=(first - began) / 60, color="tab:green")
    for outcome in outcomes:
        axes.axvline(outcome.at_s / 60, color="tab:red", linestyle=":")
    axes.set(xlabel="minutes since the stage was first claimed", ylabel="attempt")
    axes.set_title(f"goodput {account.goodput():.3f}; start orange, training green, notices dotted", fontsize=10)
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=36.0)
    parser.add_argument("--every", type=float, default=300.0, metavar="SECONDS", help="between two notices")
    parser.add_argument("--output", type=Path, help="figures as JSON, the timeline as PNG beside it")
    options = parser.parse_args()
    machine = {
        "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg(),
        **{name: version(name) for name in ("torch", "ray", "transformers", "deepspeed")},
    }  # fmt: skip
    tell(f"seed 0, {machine}, {options.minutes:g} min, a notice every {options.every:g} s, {DEADLINE_S:g} s ahead")
    steps = int(60 * options.minutes / SHORTEST_STEP_S)
    with tempfile.TemporaryDirectory(prefix="goodput-") as folder:
        experiment = Experiment(Path(folder) / "run", make_data(Path(folder) / "digits"), YAML)
        outcomes = train(experiment, options.minutes, options.every, steps)
        account = experiment.account(STAGE)
        stood = standstills(experiment.entries(STAGE))
        experiment.without_ray("status")  # prints what it says
    goodput, wall = account.goodput() or 0.0, account.wall_s()
    for number, (outcome, seconds) in enumerate(zip(outcomes, stood), 1):
        tell(f"{number:3} {outcome.at_s:7.1f} s  notice at step {outcome.step}, went on to {outcome.resumed_from}, "
             f"{outcome.lost} lost, {seconds:.1f} s from the last save to the next step")  # fmt: skip
    tell(f"goodput {goodput:.3f} in {wall / 60:.1f} min, {len(outcomes)} notices, {account.useful_s:.0f} s of steps, "
         f"{account.steps_lost} steps lost")  # fmt: skip
    bounds = {
        f"goodput {goodput:.3f} >= {GOODPUT}": goodput >= GOODPUT,
        "at least one notice": bool(outcomes),
        f"no step lost: {account.steps_lost}": account.steps_lost == 0,
        f"every attempt ended as asked: {dict(account.causes)}": {*account.causes} == {"preempted"},
    }
    failed = [what for what, holds in bounds.items() if not holds]
    tell(f"FAILED: {failed}" if failed else "all bounds hold")
    if options.output:
        body = {"seed": 0, "machine": machine, "minutes": options.minutes, "every_s": options.every, "wall_s": wall,
                "goodput": goodput, "useful_s": account.useful_s, "steps_lost": account.steps_lost,
                "standstills_s": stood, "resumes_s": account.resumes_s, "failed": failed,
                "notices": [vars(outcome) for outcome in outcomes],
                "attempts": [vars(attempt) for attempt in account.attempts]}  # fmt: skip
        options.output.write_text(json.dumps(body, indent=1))
        if find_spec("matplotlib"):
            plot(account, outcomes, options.output.with_suffix(".png"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
