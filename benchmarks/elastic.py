"""Fewer workers when a node is gone, more when one is back: seconds to the first step, and what it does to the loss.

    python benchmarks/elastic.py [--steps 4000] [--only stageline|plain] [--output FILE]

Stageline: one training stage with workers [1, 2] on a head and two nodes of one CPU. A node is killed with its worker
(SIGKILL of the raylet and all its workers), one comes back, one is announced 10 s ahead and killed then, one comes
back; the training goes on through all of it. To hold: each shrink at most 20 s to the first step of the smaller
attempt; the same samples in every step as planned; losses within 1e-4 of those of an undisturbed run of two workers in
the first 20 steps after each change, the last one within 1 %. The seconds count from the SIGKILL; from the last save
where the node was announced, since training goes on until then; from when the node counts for Ray where one comes back.

Beside it, on clusters of the same kind: plain Ray Train with its elastic tuple (plain_ray.py: same model, data, step),
with Ray's defaults, and again with RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S=10; a node killed and one added, and, in a
run of its own, a node announced. There the seconds of an announced node count from its end: Ray trains until then.
Exit code 1 where a bound is missed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "cluster"))

from chaos import STAGE  # noqa: E402
from harness import COMMAND, Experiment, assert_lineage, make_data  # noqa: E402
from nodes import Nodes  # noqa: E402
from resizing import FINAL, SAME, YAML, Resizing, differences, overrides  # noqa: E402

from orchestrator.store import open_store  # noqa: E402

SHRINK_S = 20.0
DEADLINE_S = 10.0  # of the announced node
BETWEEN = 100  # steps trained between two changes
PATIENCE_S = 240.0  # for plain Ray Train to start, or to shrink
GROWTH_S = 120.0  # for it to grow; it looks for new nodes once a minute
SETTINGS = {"defaults": {}, "start timeout 10 s": {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10"}}


def tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


class Elastic:
    """Everything in `folder`."""

    def __init__(self, folder: Path, steps: int):
        self.folder, self.steps = folder, steps
        self.failed: list[str] = []
        self.results: dict[str, Any] = {}
        self.data = make_data(folder / "digits")

    def check(self, what: str, holds: bool) -> None:
        tell(f"{'holds' if holds else 'FAILS'}: {what}")
        if not holds:
            self.failed.append(what)

    def undisturbed(self) -> Experiment:
        tell(f"an undisturbed run of {self.steps} steps with 2 workers")
        fixed = Experiment(self.folder / "fixed", self.data, YAML)
        command = [*COMMAND, "run", str(fixed.path), *overrides(self.steps, 2)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return fixed

    def stageline(self, fixed: Experiment) -> None:
        tell("Stageline: workers [1, 2]")
        experiment = Experiment(self.folder / "elastic", self.data, YAML)
        store = open_store(str(experiment.storage))
        with Nodes() as nodes, Resizing(experiment, nodes, store, overrides(self.steps, "[1,2]"), tell) as run:
            run.trained(BETWEEN, 2)
            run.kill_node(1)
            run.trained(BETWEEN, 1)
            run.grow(2)
            run.trained(BETWEEN, 2)
            run.announce(1, DEADLINE_S)
            run.trained(BETWEEN, 1)
            run.grow(2)
            run.trained(BETWEEN, 2)
            run.finish()
            changes = run.changes
        apart, last = differences(experiment, fixed, changes)
        for change, difference in zip(changes, apart):
            tell(f"{change}; losses of the next 20 steps within {difference:.1e}")
        tell(f"last loss {experiment.losses()[-1]:.6f}, undisturbed {fixed.losses()[-1]:.6f}: within {last:.1e}")
        for change in changes:
            if change.workers == 1:
                self.check(f"{change.seconds:.1f} s <= {SHRINK_S:.0f} s: {change.what}", change.seconds <= SHRINK_S)
        self.check(f"losses after each change within {SAME:g}", max(apart) <= SAME)
        self.check(f"last loss within {FINAL:g}", last <= FINAL)
        assert_lineage(experiment)
        tell("holds: every step once, with its own samples")
        self.results["stageline"] = {
            "changes": [vars(change) | {"loss_apart": d} for change, d in zip(changes, apart)],
            "last_loss_apart": last, "goodput": experiment.account(STAGE).goodput(),
        }  # fmt: skip

    def plain(self, fixed: Experiment) -> None:
        for name, settings in SETTINGS.items():
            tell(f"plain Ray Train: workers (1, 2), {name}")
            with Nodes() as nodes, Plain(fixed, nodes, self.folder / f"plain-{len(self.results)}a", settings) as plain:
                plain.wait(lambda: plain.steps(2) >= BETWEEN, PATIENCE_S)
                killed = time.time()
                nodes.kill_raylet(next(iter(nodes.workers().values())))
                shrink = plain.first_step(1, killed, PATIENCE_S)
                tell(f"a node killed -> 1 worker: {told(shrink)}")
                nodes.add()
                grow = plain.first_step(2, time.time(), GROWTH_S) if shrink is not None else None
                tell(f"a node back -> 2 workers: {told(grow)}")
            with Nodes() as nodes, Plain(fixed, nodes, self.folder / f"plain-{len(self.results)}b", settings) as plain:
                plain.wait(lambda: plain.steps(2) >= BETWEEN, PATIENCE_S)
                node = next(iter(nodes.workers().values()))
                nodes.drain(node, DEADLINE_S)
                time.sleep(DEADLINE_S)
                nodes.kill_raylet(node)
                announced = plain.first_step(1, time.time(), PATIENCE_S)
                tell(f"a node announced -> 1 worker: {told(announced)}, from its end")
            self.results[f"plain Ray Train, {name}"] = {
                "killed_s": shrink, "grown_s": grow, "announced_s": announced
            }  # fmt: skip


def told(seconds: float | None) -> str:
    return "not seen" if seconds is None else f"{seconds:.1f} s to the first step"


class Plain:
    """A running plain_ray.py with workers (1, 2), and what its log says. No call outlives the `with` block."""

    def __init__(self, fixed: Experiment, nodes: Nodes, folder: Path, settings: dict[str, str]):
        folder.mkdir()
        self.log, self.output = folder / "log.jsonl", folder / "output.txt"
        self.log.touch()
        steps = fixed.state(STAGE).completed
        assert steps is not None, "its data and plan are read"
        command = [sys.executable, str(ROOT / "benchmarks" / "plain_ray.py"), str(fixed.path)]
        command += [*overrides(steps["summary"]["steps"], "[1,2]"), "--address", nodes.address]
        command += ["--log", str(self.log), "--results", str(folder / "results")]
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | nodes.environment | settings,
            )  # fmt: skip

    def __enter__(self) -> "Plain":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def steps(self, world: int) -> int:
        """Trained since the last start, if that is one of so many workers."""
        lines = self.lines()
        starts = [number for number, line in enumerate(lines) if "from" in line]
        if not starts or lines[starts[-1]]["world"] != world:
            return 0
        return sum("step" in line for line in lines[starts[-1] :])

    def first_step(self, world: int, since: float, within_s: float) -> float | None:
        """Seconds from `since` (unix) to the first step of a later start with so many workers; None: not seen."""

        def found() -> list[float]:
            return [x["time"] for x in self.lines() if "from" in x and x["world"] == world and x["time"] > since]

        return found()[0] - since if self.wait(found, within_s, must=False) else None

    def wait(self, holds: Callable[[], Any], within_s: float, must: bool = True) -> bool:
        until = time.monotonic() + within_s
        while not holds():
            code, late = self.process.poll(), time.monotonic() > until
            if not must and (late or code == 0):  # its steps may be over by then
                return False
            if late or code is not None:
                raise RuntimeError(f"plain Ray Train does not go on ({code}):\n{self.output.read_text()[-4000:]}")
            time.sleep(0.1)
        return True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=4000, help="of the stage; it has to go on through all changes")
    parser.add_argument("--only", choices=("stageline", "plain"))
    parser.add_argument("--output", type=Path, help="figures as JSON")
    options = parser.parse_args()
    machine = {
        "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg(),
        **{name: version(name) for name in ("torch", "ray", "transformers", "deepspeed")},
    }  # fmt: skip
    tell(f"seed 0, {machine}")
    with tempfile.TemporaryDirectory(prefix="elastic-") as folder:
        elastic = Elastic(Path(folder), options.steps)
        fixed = elastic.undisturbed()
        if options.only != "plain":
            elastic.stageline(fixed)
        if options.only != "stageline":
            elastic.plain(fixed)
    tell(f"FAILED: {elastic.failed}" if elastic.failed else "all bounds hold")
    if options.output:
        body = {"seed": 0, "machine": machine, "steps": options.steps, "failed": elastic.failed, **elastic.results}
        options.output.write_text(json.dumps(body, indent=1))
    return 1 if elastic.failed else 0


if __name__ == "__main__":
    sys.exit(main())
