"""Ten announced preemptions and forty unannounced kills, each in one run, and what every one of them cost.

    python benchmarks/chaos.py [--events N] [--seed S] [--only announced|kills] [--out FILE]

Announced, on a Ray cluster of two nodes: a notice file, the agent, Ray's drain; the node is killed at the deadline. To
hold: at most one step lost each, by the ledger. Beside it, with the same notices, the pattern that Ray documents
(plain_ray.py), counted from its own log.
Unannounced, with storage on Ceph's S3 gateway: SIGKILL of a worker, of a node (raylet and all below it), of the driver,
of the gateway or all daemons of the store, at seeded moments of training, upload and start. To hold, as after the
announced ones: final weights and losses are those of an undisturbed run, bit for bit, and the surviving lineage holds
every step once, with its own samples. The exit code is 1 where a proof fails.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "cluster"))
# ruff: noqa: E402 (the machinery of the tests is no package)

from ceph import Ceph, missing
from chaos import STAGE, Run, assert_undisturbed, fetched, nearest, on_s3, plan_kills, summary
from harness import COMMAND, Experiment, make_data
from nodes import Nodes

from orchestrator.store import open_store

ANNOUNCED, KILLS = 10, 40
STEPS_EACH = {"announced": 100, "kills": 30}  # of the stage, for every event; a step takes about 0.1 s here
LEAST_STEPS = 400
BATCH = 8  # packs a step
DEADLINE_S = 10.0  # from the notice to the end of the node
EVERY = {"announced": 600, "kills": 20}  # steps between two periodic checkpoints: about a minute, and two seconds
BEFORE_NOTICE = (5, 25)  # steps that an attempt trains before the next notice
PATIENCE_S = 240.0


class Chaos:
    """Everything in `folder`; a cluster and a reference for all parts."""

    def __init__(self, folder: Path, counts: dict[str, int], seed: int):
        self.folder, self.counts, self.seed = folder, counts, seed
        self.steps = max(LEAST_STEPS, *(STEPS_EACH[part] * count for part, count in counts.items()))
        self.failed: list[str] = []
        self.results: dict[str, Any] = {}

    def overrides(self, part: str) -> tuple[str, ...]:
        stage = f"stages.{STAGE}"
        every = f"{stage}.checkpoint.every={EVERY[part]}"
        return "defaults.global_batch=" + str(BATCH), f"{stage}.steps={self.steps}", every

    def prepare(self) -> None:
        tell(f"an undisturbed run of {self.steps} steps")
        data = make_data(self.folder / "digits")
        self.reference = Experiment(self.folder / "undisturbed", data)
        command = [*COMMAND, "run", str(self.reference.path), *self.overrides("announced")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        self.before = self.reference.before_finetune(self.folder / "before")

    def announced(self) -> None:
        """Notices to Stageline, then as many to plain Ray Train."""
        with Nodes() as nodes:
            lost = self._stageline(nodes)
            plain = self._plain(nodes)
        self.results["plain_ray"] = plain
        tell(f"plain Ray Train: steps lost {plain['lost']}, {sum(plain['lost'])} in all; Stageline {lost}")
        mine = self.results["announced"]["stood_still_s"]
        tell(f"seconds without a step: plain Ray Train {plain['stood_still_s']}; Stageline {mine}")

    def _stageline(self, nodes: Nodes) -> int:
        """Steps lost by the ledger."""
        tell(f"{self.counts['announced']} announced preemptions of Stageline, {DEADLINE_S:.0f} s each")
        experiment = self.before.copy(self.folder / "announced")
        store = open_store(str(experiment.storage))
        with Run(experiment, nodes, store, self.overrides("announced"), tell) as run:
            for after, early in self._notices():
                run.preempt(after, DEADLINE_S, early)
            run.finish()
            outcomes = run.outcomes()
        account = experiment.account(STAGE)
        self._report("announced", outcomes, account)
        self._prove("announced: at most one step lost each", lambda: all_true(o.lost <= 1 for o in outcomes))
        causes = {"preempted": len(outcomes)}
        self._prove("announced: every attempt ended as asked", lambda: all_true([account.causes == causes]))
        self._prove("announced: as undisturbed", lambda: assert_undisturbed(experiment, self.reference))
        return account.steps_lost

    def _notices(self) -> list[tuple[int, bool]]:
        """(steps trained before it, the fresh node comes at once): the same for both sides."""
        rng = random.Random(self.seed)
        return [(rng.randint(*BEFORE_NOTICE), rng.random() < 0.5) for _ in range(self.counts["announced"])]

    def _plain(self, nodes: Nodes) -> dict[str, Any]:
        tell(f"{self.counts['announced']} announced preemptions of plain Ray Train, {DEADLINE_S:.0f} s each")
        log, output = self.folder / "plain.jsonl", self.folder / "plain.txt"
        log.touch()
        command = [sys.executable, str(ROOT / "benchmarks" / "plain_ray.py"), str(self.reference.path)]
        command += [*self.overrides("announced"), "--address", nodes.address, "--log", str(log)]
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*command, "--results", str(self.folder / "plain")], stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

        def lines() -> list[dict]:
            return [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]

        def since_start(number: int) -> int:
            starts = [i for i, line in enumerate(lines()) if "from" in line]
            return len([1 for line in lines()[starts[-1] :] if "step" in line]) if len(starts) == number else -1

        def until(holds: Callable[[], bool]) -> None:
            end = time.monotonic() + PATIENCE_S
            while not holds():
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"plain Ray Train does not go on:\n{output.read_text()[-4000:]}")
                time.sleep(0.05)

        try:
            for number, (after, early) in enumerate(self._notices(), 1):
                until(lambda: since_start(number) >= after)  # noqa: B023 (called here)
                tell(f"{number:3} notice   at step {lines()[-1].get('step')}")
                nodes.announce(DEADLINE_S, early)
            until(lambda: since_start(self.counts["announced"] + 1) >= 0)
        finally:
            process.kill()
            process.wait()
        return plain_losses(lines())

    def kills(self) -> None:
        plan = plan_kills(self.counts["kills"], self.steps, self.seed)
        tell(f"{len(plan)} unannounced kills")
        with Ceph(self.folder / "ceph") as ceph:
            os.environ.update(ceph.environment)
            url = f"s3://{ceph.bucket()}/chaos"
            experiment, store = on_s3(self.before, self.folder / "kills", url, ceph.endpoint_url)
            nodes = Nodes(environment=ceph.environment)
            with nodes, Run(experiment, nodes, store, self.overrides("kills"), tell) as run:
                for kill in plan:
                    run.kill(kill, ceph)
                run.finish()
                outcomes = run.outcomes()
            fetched(experiment, store)
        account = experiment.account(STAGE)
        self._report("kills", outcomes, account)
        self._prove("kills: as undisturbed", lambda: assert_undisturbed(experiment, self.reference))

    # -- telling -------------------------------------------------------------------------------------

    def _report(self, part: str, outcomes: list, account: Any) -> None:
        for number, outcome in enumerate(outcomes, 1):
            tell(f"{number:3} {outcome}")
        self.results[part] = found = summary(outcomes) | {
            "attempts": len(account.attempts), "wall_s": account.wall_s(), "goodput": account.goodput(),
            "causes": dict(account.causes), "ledger_steps_lost": account.steps_lost,
            "stood_still_s": [round(seconds, 1) for seconds in account.resumes_s],
        }  # fmt: skip
        tell(f"{part}: {found['events']} events, {found['attempts']} attempts in {found['wall_s']:.0f} s")
        tell(f"{part}: steps lost {found['steps_lost']}, {account.steps_lost} by the ledger")
        tell(f"{part}: seconds to resume {found['resume_s']}")

    def _prove(self, what: str, proof: Callable[[], None]) -> None:
        """A proof that fails is told, and the exit code says so; the others are still tried."""
        try:
            proof()
            tell(f"holds: {what}")
        except AssertionError:
            traceback.print_exc()
            self.failed.append(what)
            tell(f"FAILS: {what}")


def all_true(values: Any) -> None:
    assert all(values)


def plain_losses(lines: list[dict]) -> dict[str, Any]:
    """Of each start but the first: steps that are trained again, and seconds since the last step before it."""
    reached, last, lost, still = 0, 0.0, [], []
    for line in lines:
        if "from" in line:
            lost.append(max(0, reached - line["from"]))
            still.append(round(line["time"] - last, 1))
        elif "step" in line:
            reached, last = line["step"], line["time"]
    ordered = sorted(lost[1:])
    return {"lost": lost[1:], "p50": nearest(ordered, 0.5), "max": nearest(ordered, 1), "stood_still_s": still[1:]}


def tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--events", type=int, help=f"of each part (default: {ANNOUNCED} and {KILLS})")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--only", choices=("announced", "kills"))
    parser.add_argument("--out", type=Path, help="figures as JSON")
    options = parser.parse_args()
    counts = {"announced": options.events or ANNOUNCED, "kills": options.events or KILLS}
    if options.only:
        counts = {options.only: counts[options.only]}
    if "kills" in counts and (reason := missing()):
        print(reason, file=sys.stderr)
        return 2
    machine = {
        "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg(),
        **{name: version(name) for name in ("torch", "ray", "transformers", "deepspeed")},
    }  # fmt: skip
    tell(f"seed {options.seed}, {machine}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        chaos = Chaos(Path(folder), counts, options.seed)
        chaos.prepare()
        for part in counts:
            getattr(chaos, part)()
    wall_s = time.monotonic() - began
    tell(f"{wall_s:.0f} s in all; " + (f"FAILED: {chaos.failed}" if chaos.failed else "all proofs hold"))
    if options.out:
        body = {"seed": options.seed, "machine": machine, "wall_s": wall_s, "failed": chaos.failed, **chaos.results}
        options.out.write_text(json.dumps(body, indent=1, default=str))
    return 1 if chaos.failed else 0


if __name__ == "__main__":
    sys.exit(main())
