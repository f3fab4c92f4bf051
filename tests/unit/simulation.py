"""One stage in a simulated world: the real driver, ledger, checkpoints, heartbeats and gc, and all that may happen.

Real: driver.run_stage with its claim, attempts and policy; Ledger; Checkpoints with its retention; verified();
presumed_dead() and the heartbeat's objects; control requests; gc. Simulated: the store, the clocks, the processes and
what they train (simulation_ranks.py). A world: drivers are submitted again and again beside readers and gc; they die,
halt, lose sight of ranks that go on as zombies, and are taken for dead while they live. From CALM_S on nothing more
goes wrong, and a last driver has to finish what is left, among those that are still there.
"""

import gc
import logging
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from greenlet import getcurrent
from simulation_checks import Call, Checks
from simulation_kernel import LOST, Kernel, Process, SimulatedStore, current
from simulation_ranks import CHAIN, STEPS, Group

from orchestrator import driver, ledger, liveness
from orchestrator.control import ask_to_stop
from orchestrator.errors import ErrorClass, Fenced, LostNode
from orchestrator.fingerprint import fingerprint
from orchestrator.gc import collect
from orchestrator.ledger import Ledger
from orchestrator.plan import stage_prefix
from orchestrator.store import Missing
from stages.params import ModelParams, Resources

MODEL = ModelParams(vision="micro-vit", language="micro-qwen2")
IDENTITY = {"kind": "train", "version": 1, "params": {"steps": STEPS}}
P = stage_prefix("train", fingerprint(IDENTITY))
BEAT_S, TIMEOUT_S, HASTY_S = 3.0, 12.0, 1.0
CALM_S, LIMIT_S = 70.0, 700.0
SUBMISSIONS = 6
EXPECTED = (ErrorClass.fenced, ErrorClass.preempted, ErrorClass.lost_node, ErrorClass.storage_transient)
SCRATCH = Path("/dev/shm") if Path("/dev/shm").is_dir() else None


class World(Kernel):
    """One seed. run() returns self; `violations` says what was found, `trace` what happened, `counts` how much."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self.checks = Checks(self, P, CHAIN)
        self.store: Any = SimulatedStore(self, self.checks)
        self.checks.objects = self.store.objects
        self.checks.keep, self.every = self.rng.randint(1, 3), self.rng.randint(1, 2)
        resources = Resources(workers=self.rng.choice((2, 2, 1, (1, 2))))
        checkpoint = SimpleNamespace(keep=self.checks.keep)
        params = SimpleNamespace(resources=resources, checkpoint=checkpoint, hang_timeout_s=1.0, needs=())
        kind = SimpleNamespace(base="train", trains=True)
        stage = SimpleNamespace(name="mlp", kind=kind, kind_name="mlp", params=params)
        self.job: Any = SimpleNamespace(
            experiment=SimpleNamespace(
                name="x", model_of=lambda stage: MODEL, data={}, sets={}, stages={"mlp": stage}
            ),
            stage=stage, identity=IDENTITY, fingerprint=fingerprint(IDENTITY), prefix=P, parents={},
        )  # fmt: skip
        self.left, self.finished = SUBMISSIONS, False

    def run(self) -> "World":
        rng = self.rng
        with tempfile.TemporaryDirectory(dir=SCRATCH, prefix="simulation-") as scratch, installed(self):
            self.scratch = Path(scratch)
            for _ in range(rng.randint(2, 3)):
                self.at(rng.uniform(0, 15), self.submit)
            for _ in range(rng.randint(1, 4)):
                self.at(rng.uniform(5, CALM_S + 20), self.start_gc)
            self.at(rng.uniform(5, CALM_S), lambda: self.spawn(Process(self, "reader"), self._read))
            self.at(CALM_S, self.last)
            try:
                self.schedule(LIMIT_S)
                if not self.violations and not self.finished:
                    self.checks.fail("progress", "the last driver did not finish")
                if not self.violations:
                    self.start_gc()
                    self.schedule(float("inf"))
                if not self.violations:
                    self.checks.at_end()
            finally:
                self.end()
        return self

    # -- drivers ---------------------------------------------------------------------------------------

    def submit(self) -> None:
        """Somebody starts `stageline run`; and again some time after it ended."""
        if self.left > 0 and not self.calm:
            self.left -= 1
            self._driver(Process(self, f"driver{SUBMISSIONS - self.left}"))

    def last(self) -> None:
        self.calm = True
        self._driver(Process(self, "last driver", safe=True))

    def _driver(self, process: Process) -> None:
        stop: Any = Stop(process)
        groups: list[Group] = []

        def again() -> None:
            self.at(self.now + self.rng.uniform(0.5, 15), self.submit)

        def killed() -> None:
            again()
            for group in groups:
                self._orphan(group)

        def attempt(task: driver.Task, stopping: Any) -> None:
            self._attempt(process, task, groups)

        def main() -> None:
            while True:
                try:
                    driver.run_stage(self.store, self.job, attempt, lambda stage, text: None, stop, self._room)
                    self.finished |= process.safe
                    return
                except driver.StageFailed as error:
                    if error.error_class not in EXPECTED:
                        return self.checks.fail("no surprise", f"{process.name}: {error!r} of {error.error!r}")
                except LOST:
                    pass  # told to the user, who runs it again
                if not process.safe:
                    return again()
                self.wait(2.0)

        process.at_end = killed
        self.spawn(process, main)
        if not process.safe and self.rng.random() < 0.1:
            self.at(self.now + self.rng.uniform(5, 40), stop.set)

    def _room(self, resources: Resources) -> int:
        return self.rng.randint(resources.least, resources.most)

    def _attempt(self, process: Process, task: driver.Task, groups: list[Group]) -> None:
        """What launch.run_attempt is to the driver."""
        self.counts["attempts"] += 1
        uid = self.counts["attempts"]
        self.checks.started(task.token, uid)
        if not self.calm and self.rng.random() < self.chaos.damage:
            self.checks.damage()
        group = Group(self, self.store, self.checks, uid, task, self.every, self.scratch / str(uid))
        groups.append(group)
        group.start()
        while not group.over:
            process.sleep(1.0)
            if not all(rank.alive for rank in group.ranks):
                group.error = group.error or LostNode("a rank died")
            elif not self.calm and not group.over and self.rng.random() < self.chaos.cut_off:
                self.counts["zombies"] += 1
                raise LostNode("its ranks cannot be reached")
        group.kill()
        if group.error is not None:
            raise group.error

    def _orphan(self, group: Group) -> None:
        """The driver of these ranks was killed."""
        if group.over:
            return
        if self.rng.random() < self.chaos.orphans:
            self.counts["zombies"] += 1
        else:
            self.at(self.now + self.rng.uniform(0, 3), group.kill)

    # -- beside them -----------------------------------------------------------------------------------

    def start_gc(self) -> None:
        self.spawn(Process(self, "gc", safe=self.calm), self._gc)

    def _gc(self) -> None:
        with suppress(*LOST):  # told to the user
            collect(self.store, [P])

    def _read(self) -> None:
        """`status` and a child stage: reads the ledger, and the result once there is one."""
        book = Ledger(self.store, P)
        for _ in range(5):
            self.wait(self.rng.uniform(3, 20))
            try:
                self.checks.read(book.entries())
                done = book.state().completed
                if done is not None:
                    self.store.get(f"{done['manifest']['folder']}/model")
            except LOST:
                continue
            except Missing as error:
                self.checks.fail("what counts stays", f"a reader misses {error}")


def told(world: World, last: int = 60) -> str:
    """A failing seed, for people: what was seen, and the last operations before it."""
    lines = [f"seed {world.seed}: {violation}" for violation in world.violations]
    for time, who, what, key, wrong in world.trace[-last:]:
        lines.append(f"{time:8.2f} {who:16} {what:6} {key.removeprefix(P + '/'):58} {wrong}")
    return "\n".join(lines)


# -- stand-ins for what of the driver is threads, clocks and processes -----------------------------------


class Stop:
    """attendant.Stop of one driver."""

    in_s, reason = 0.0, "the driver was asked to stop"

    def __init__(self, process: Process):
        self.process, self.flag = process, False

    def is_set(self) -> bool:
        return self.flag

    def set(self) -> None:
        self.flag = True

    def wait(self, seconds: float) -> None:
        self.process.sleep(seconds)


class Heartbeat(liveness.Heartbeat):
    """The real beats; their thread is an actor."""

    def __init__(self, store: Any, prefix: str, epoch: int):
        super().__init__(store, prefix, epoch, BEAT_S)
        self.process, self.over, self.beating = current(), False, False

    def start(self) -> "Heartbeat":
        self._beat()
        self.process.kernel.spawn(self.process, self._beats)
        return self

    def stop(self) -> None:
        self.over = True
        while self.beating:
            self.process.sleep(0.1)
        self._beat(signed_off=True)

    def _beats(self) -> None:
        kernel = self.process.kernel
        while True:
            slow = not kernel.calm and kernel.rng.random() < kernel.chaos.slow_beats
            self.process.sleep(self.interval * (8 if slow else 1))
            if self.over:
                return
            self.beating = True
            self._beat()
            self.beating = False


class Attendant:
    """attendant.Attendant; its thread is an actor, and there is room for more whenever the generator says so."""

    def __init__(self, store: Any, prefix: str, token: Any, workers: int, resources: Any, stop: Stop, room: Any):
        self.ask = lambda reason: ask_to_stop(store, prefix, token, 0.0, reason)
        self.process, self.stop, self.over = current(), stop, False

    def __enter__(self) -> None:
        self.process.kernel.spawn(self.process, self._run)

    def __exit__(self, *_: object) -> None:
        self.over = True

    def _run(self) -> None:
        kernel = self.process.kernel
        while not self.over:
            self.process.sleep(2.0)
            more = not kernel.calm and kernel.rng.random() < kernel.chaos.asked
            if not self.over and (self.stop.is_set() or more):
                try:
                    return self.ask("room for more")
                except LOST:
                    continue  # asked again


def _replace(old: Any, **changes: Any) -> Any:
    """dataclasses.replace without its checks, which take a quarter of all the time."""
    new = object.__new__(type(old))
    new.__dict__.update(old.__dict__, **changes)
    return new


@contextmanager
def installed(world: World) -> Iterator[None]:
    """The clock, the processes and the threads of this world instead of this machine's; every append is watched."""
    append = Ledger._put

    def watched(book: Ledger, kind: str, token_now: Any, fields: dict[str, Any]) -> Any:
        actor: Any = getcurrent()
        call = actor.call = Call(kind, fields, actor.process.name)
        try:
            entry = append(book, kind, token_now, fields)
        except Fenced:
            world.counts["fenced"] += 1
            world.checks.refused(call)
            raise
        finally:
            actor.call = None
        world.checks.returned(call, entry)
        return entry

    def owner() -> dict[str, Any]:
        process = current()
        return {"host": process.host, "namespace": "", "pid": process.pid, "started": 0.0, "nonce": ""}

    def alive(who: dict[str, Any]) -> bool | None:
        return world.processes[who["pid"]].alive if who["host"] == current().host else None

    def presumed_dead(store: Any, prefix: str, epoch: int, who: Any, stop: Any = None) -> bool:
        process, timeout = current(), HASTY_S if world.chaos.hasty and not world.calm else TIMEOUT_S
        return liveness.presumed_dead(store, prefix, epoch, who, timeout, process.clock, process.sleep, stop)

    stand_ins: tuple[tuple[Any, dict[str, Any]], ...] = (
        (Ledger, {"_put": watched}),
        (ledger, {"_parse": cache(ledger._parse), "replace": _replace}),  # the same, only faster
        (liveness, {"alive": alive}),
        (driver, {"owner": owner, "presumed_dead": presumed_dead, "Heartbeat": Heartbeat, "Attendant": Attendant}),
        (driver, {"time": SimpleNamespace(monotonic=lambda: current().clock())}),
    )
    with ExitStack() as stack:
        for target, values in stand_ins:
            stack.enter_context(patch.multiple(target, **values))
        level, collecting = liveness.log.level, gc.isenabled()
        liveness.log.setLevel(logging.CRITICAL)
        stack.callback(liveness.log.setLevel, level)
        if collecting:  # a world is small, and over soon
            gc.disable()
            stack.callback(gc.enable)
        yield
