"""Preemptions and kills of everything, at seeded random moments, on a cluster of two nodes; and what they did.

Invariants: what happened is read from storage, through the product's own readers: an event's cost is what the ledger
says of the attempt that it hit (orchestrator/accounts.py). The moments are drawn before the run begins, as steps of
the stage, so a seed means the same on a fast and on a slow machine; only fractions of a second are left to it.
"""

import json
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
from ceph import Ceph
from harness import Driver, Experiment, assert_lineage, assert_repeats
from nodes import Nodes, RayNode

from orchestrator.accounts import account
from orchestrator.ledger import Entry, Ledger, Token
from orchestrator.plan import plan_experiment
from orchestrator.progress import read_progress
from orchestrator.spec import load_spec
from orchestrator.store import FileStore, Store, open_store

STAGE = "full_finetune"
GOES_ON_S = 15.0  # after a kill, a step of the same attempt shows that it was not hit; Ray has ended it long before
PATIENCE_S = 180.0  # for the next moment; an attempt's start on a busy machine is the longest part of it

Victim = Literal["worker", "raylet", "driver", "gateway", "daemons", "notice"]
Moment = Literal["training", "upload", "start"]
T = TypeVar("T")


@dataclass(frozen=True)
class Kill:
    """One planned event. training: once `step` was trained; upload: at the next upload after that; start: while the
    attempt after the one before it starts; then `delay` seconds more. down_s: until what was killed is started again,
    where that is up to us. pick: which of several."""

    victim: Victim
    moment: Moment
    step: int
    delay: float
    down_s: float
    pick: int


@dataclass(frozen=True)
class Event:
    """Something that was done. time: unix; step: the last one known to have been trained by then; token: of the attempt
    it hit."""

    victim: Victim
    moment: Moment
    time: float
    step: int
    token: Token


@dataclass(frozen=True)
class Outcome:
    """What followed: resumed_from and resume_s (to the first step of the next attempt) are None where the attempt that
    was hit went on, and lost is 0 then."""

    victim: Victim
    moment: Moment
    at_s: float  # since the first claim of the stage
    step: int
    resumed_from: int | None
    lost: int
    resume_s: float | None

    def __str__(self) -> str:
        what = f"{self.at_s:7.1f} s  {self.victim:8} {self.moment:8} step {self.step:5}"
        if self.resume_s is None:
            return f"{what}  went on"
        return f"{what}  resumed from {self.resumed_from:5}, {self.lost:3} lost, {self.resume_s:5.1f} s"


def plan_kills(count: int, steps: int, seed: int) -> list[Kill]:
    """Every victim as often as any other, two in ten times all daemons of the store rather than its gateway; each at a
    step of its own `count`-th part of the first three quarters of the stage."""
    rng = random.Random(seed)
    victims: list[Victim] = []
    while len(victims) < count:
        store: Victim = "daemons" if len(victims) // 4 % 5 == 4 else "gateway"
        block: list[Victim] = ["worker", "raylet", "driver", store]
        rng.shuffle(block)
        victims += block
    first, width = steps / 50, 0.73 * steps / count  # the rest is for uploads that are waited for, step by step later
    at = [int(first + (i + rng.random()) * width) + 1 for i in range(count)]
    kills: list[Kill] = []
    for victim, step in zip(victims, at):
        goes_on = not kills or kills[-1].victim in ("gateway", "daemons")  # then no attempt starts
        moment = rng.choice(("training", "upload") if goes_on else ("training", "training", "upload", "start"))
        delay = rng.uniform(0, 6 if moment == "start" else 0.5)
        kills.append(Kill(victim, moment, step, delay, rng.uniform(1, 5), rng.randrange(2)))
    return kills


class View:
    """What storage says of the stage while a driver runs it. No call waits for training."""

    def __init__(self, experiment: Experiment, store: Store, overrides: Iterable[str] = ()):
        _, plans = plan_experiment(load_spec(str(experiment.path), list(overrides)), store)
        self.store, self.prefix = store, next(plan.prefix for plan in plans if plan.name == STAGE)
        self._ledger = Ledger(store, self.prefix)

    def entries(self) -> list[Entry]:
        return self._ledger.entries()

    def token(self) -> Token:
        return max((entry.token for entry in self.entries()), default=(0, 0))

    def attempt(self) -> Token | None:
        """The newest one, where it was started and has not ended."""
        last = next((e for e in reversed(self.entries()) if e.type not in ("checkpoint", "retired", "started")), None)
        return last.token if last is not None and last.type == "attempt" else None

    def step(self) -> int | None:
        """The last step known to be trained by the newest attempt; None while it has made none."""
        token, note = self.attempt(), read_progress(self.store, self.prefix)
        return note["step"] if note is not None and tuple(note["token"]) == token else None

    def uploading(self) -> bool:
        """A file of a checkpoint is stored, and the checkpoint is not committed yet."""
        committed = {e.fields["manifest"].rpartition("/")[0] for e in self.entries() if e.type == "checkpoint"}
        stored = {key.rpartition("/")[0] for key in self.store.list(f"{self.prefix}/checkpoints/")}
        newest = [folder for folder in stored if folder.endswith(f"e{self.token()[0]:04d}a{self.token()[1]:04d}")]
        return any(folder not in committed for folder in newest)


class Run:
    """One experiment under attack: its driver on `nodes`, and a list of what was done to it."""

    def __init__(
        self,
        experiment: Experiment,
        nodes: Nodes,
        store: Store,
        overrides: tuple[str, ...] = (),
        tell: Callable[[str], None] = print,
    ):
        self.experiment, self.nodes, self.tell = experiment, nodes, tell
        self.view = View(experiment, store, overrides)
        self._overrides = (*overrides, "--address", nodes.address)
        self.events: list[Event] = []
        self._seen: dict[psutil.Process, Token] = {}  # workers that were there at an event, with its token
        self.driver = self._start()

    def _start(self) -> Driver:
        return self.experiment.start(*self._overrides, environment=self.nodes.environment)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.end()

    def outcomes(self) -> list[Outcome]:
        return outcomes(self.events, self.view.entries())

    def finish(self) -> None:
        """To the end of the experiment, undisturbed from now on."""
        assert self.driver.wait() == 0, self.driver.output

    # -- announced -----------------------------------------------------------------------------------

    def preempt(self, after: int, deadline_s: float, fresh_early: bool) -> None:
        """Once the running attempt has trained `after` steps: a notice to one of its nodes, which is killed at the
        deadline. A fresh node comes right after the notice, or at the deadline."""
        known = self.events[-1].token if self.events else (0, 0)
        self._until(lambda: self._trained(known) and self._since_resume() >= after, "training goes on")
        self._note("notice", "training")
        self.nodes.announce(deadline_s, fresh_early)

    def _since_resume(self) -> int:
        started = [e.fields["step"] for e in self.view.entries() if e.type == "started"]
        return (self.view.step() or 0) - started[-1]

    # -- unannounced ---------------------------------------------------------------------------------

    def kill(self, kill: Kill, ceph: Ceph) -> None:
        """Waits for the moment, kills, and starts again what does not come back by itself."""
        last = self.events[-1] if self.events else None
        hit = last is not None and last.victim not in ("gateway", "daemons")
        if last is not None and hit:
            self._until(lambda: self._over(last), "the next attempt starts, or this one goes on")
        if kill.moment == "start":
            self._until(lambda: self.view.attempt() is not None, "an attempt starts")
        else:
            self._until(lambda: (self.view.step() or 0) >= kill.step, f"step {kill.step}")
        if kill.moment == "upload":
            self._until(self.view.uploading, "an upload")
        else:
            time.sleep(kill.delay)
        getattr(self, f"_{kill.victim}")(kill, ceph)

    def _over(self, last: Event) -> bool:
        """Whether the attempt that `last` was aimed at has been replaced, or is known to train on nevertheless: a
        worker or node may have been one that it had no use for."""
        note = read_progress(self.view.store, self.view.prefix)
        goes_on = note is not None and tuple(note["token"]) == last.token and note["time"] > last.time + GOES_ON_S
        return goes_on or (self.view.attempt() or (0, 0)) > last.token

    def _workers(self) -> dict[psutil.Process, RayNode]:
        """Those of the running attempt, not what is left of the one before."""
        token = self.view.token()
        there = self.nodes.workers().items()
        return {process: node for process, node in there if self._seen.get(process, token) == token}

    def _worker(self, kill: Kill, ceph: Ceph) -> None:
        workers = sorted(self._until(self._workers, "workers run"), key=lambda process: process.pid)
        victim = workers[kill.pick % len(workers)]
        self._note(kill.victim, kill.moment)
        victim.kill()

    def _raylet(self, kill: Kill, ceph: Ceph) -> None:
        workers = self._until(self._workers, "workers run")
        nodes = sorted({node.id: node for node in workers.values()}.items())
        node = nodes[kill.pick % len(nodes)][1]
        self._note(kill.victim, kill.moment)
        self.nodes.kill_raylet(node)
        time.sleep(kill.down_s)
        self.nodes.add()

    def _driver(self, kill: Kill, ceph: Ceph) -> None:
        self._note(kill.victim, kill.moment)
        self.driver.process.kill()  # what it had started on the nodes is theirs to end; its claim is dead at once
        self.driver.process.wait()
        self.driver = self._start()

    def _gateway(self, kill: Kill, ceph: Ceph) -> None:
        self._note(kill.victim, kill.moment)
        ceph.kill(everything=kill.victim == "daemons")
        time.sleep(kill.down_s)
        ceph.start()

    _daemons = _gateway

    def _note(self, victim: Victim, moment: Moment) -> None:
        token, step = self.view.token(), self.view.step() or 0
        for process in self.nodes.workers():
            self._seen.setdefault(process, token)
        self.events.append(Event(victim, moment, time.time(), step, token))
        self.tell(f"{len(self.events):3} {victim:8} {moment:8} at step {step} of attempt {token[0]}.{token[1]}")

    # -- waiting -------------------------------------------------------------------------------------

    def _trained(self, after: Token) -> bool:
        """An attempt later than `after` (any, for (0, 0)) runs and has made a step."""
        attempt = self.view.attempt()
        return attempt is not None and attempt > after and self.view.step() is not None

    def _until(self, holds: Callable[[], T], what: str) -> T:
        until = time.monotonic() + PATIENCE_S
        while not (found := holds()):
            code = self.driver.process.poll()
            assert code != 0, f"it was done before this could be seen: {what}; give the stage more steps"
            assert code is None, f"the driver ended with {code}:\n{self.driver.output}"
            assert time.monotonic() < until, f"not seen in {PATIENCE_S:.0f} s: {what}\n{self.driver.output}"
            time.sleep(0.02)
        return found


def outcomes(events: list[Event], entries: list[Entry]) -> list[Outcome]:
    """Joins what was done with what the ledger says came of it. What ended an attempt is the last event that hit it."""
    lost = {attempt.token: attempt.lost for attempt in account(entries).attempts}
    out = []
    for event in events:
        resumed = next(
            (e for e in entries if e.time > event.time and e.type == "started" and e.token > event.token), None
        )
        hit = [other for other in events if other.token == event.token]
        if event is not hit[-1]:  # its attempt was there to be hit again
            resumed = None
        steps = lost.get(event.token, 0) if resumed is not None else 0
        out.append(
            Outcome(
                event.victim, event.moment, event.time - entries[0].time, event.step,
                resumed.fields["step"] if resumed else None, steps, resumed.time - event.time if resumed else None,
            )
        )  # fmt: skip
    return out


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Percentiles over those that had to resume, counts over all."""
    lost = sorted(outcome.lost for outcome in outcomes if outcome.resume_s is not None)
    seconds = sorted(outcome.resume_s for outcome in outcomes if outcome.resume_s is not None)
    return {
        "events": len(outcomes),
        "resumed": len(seconds),
        "steps_lost": {
            "total": sum(lost),
            "p50": nearest(lost, 0.5),
            "p95": nearest(lost, 0.95),
            "max": nearest(lost, 1),
        },
        "resume_s": {"p50": nearest(seconds, 0.5), "p95": nearest(seconds, 0.95), "max": nearest(seconds, 1)},
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }


def nearest(ordered: list, share: float) -> Any:
    """The nearest-rank percentile of sorted values; None of none."""
    return ordered[max(0, -(-int(share * 100) * len(ordered) // 100) - 1)] if ordered else None


def assert_undisturbed(experiment: Experiment, reference: Experiment) -> None:
    """The same losses and weights bit for bit, and every step once in the surviving lineage, with its own samples."""
    assert_lineage(experiment)
    assert assert_repeats(experiment) >= 1
    assert (experiment.losses() == reference.losses()).all()
    assert experiment.weights() == reference.weights()


def on_s3(experiment: Experiment, folder: Path, url: str, endpoint_url: str) -> tuple[Experiment, Store]:
    """The same experiment with a copy of its storage at `url`, which is returned opened."""
    text = experiment.path.read_text().replace(
        "\nstorage: storage\n", f"\nstorage: {json.dumps({'url': url, 'endpoint_url': endpoint_url})}\n"
    )
    other = Experiment(folder, experiment.data, text.replace("{", "{{").replace("}", "}}"))
    store = open_store(load_spec(str(other.path), []).storage)
    _copy(FileStore(experiment.storage), store)
    return other, store


def fetched(experiment: Experiment, store: Store) -> None:
    """Everything in `store` to where the readers of `experiment` look."""
    _copy(store, FileStore(experiment.storage))


def _copy(source: Store, target: Store) -> None:
    for key in source.list():
        target.put(key, source.get(key))
