"""Processes, a clock and a store that are simulated, under one seeded generator that decides who runs next.

Every actor is a greenlet that gives way to the scheduler at every operation on the store, and while it sleeps. How long
an operation takes, which one fails before or after its effect, or takes effect when its issuer has long given up, and
who is killed or stopped in the middle of it, is drawn: so a seed is one interleaving, and always the same one.
What real object stores promise is kept: a read sees the last write, and of many creates one succeeds.
"""

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from greenlet import GreenletExit, getcurrent, greenlet

from orchestrator.errors import StorageTransient
from orchestrator.store import Exists, Missing, one_by_one

LOST = (ConnectionError, TimeoutError, StorageTransient)  # what no answer looks like to a caller
WRITES = ("create", "put", "delete")
HARM = ("killed before", "killed after", "stopped before", "stopped after")
NO_ANSWER = ("lost", "unanswered", "late")


class Process:
    """What a kill ends, and a stop (SIGSTOP) halts, as one. Its clock has a rate and a start of its own.

    safe: nothing happens to it.
    """

    def __init__(self, kernel: "Kernel", name: str, safe: bool = False):
        self.kernel, self.name, self.safe = kernel, name, safe
        self.alive, self.paused_until = True, 0.0
        self.rate, self.start = kernel.rng.uniform(0.8, 1.25), kernel.rng.uniform(0, 1e6)
        self.host, self.pid = f"host{kernel.rng.randrange(3)}", len(kernel.processes)
        self.at_end: Callable[[], Any] = lambda: None  # called when it is killed
        kernel.processes.append(self)

    def clock(self) -> float:
        return self.kernel.now * self.rate + self.start

    def sleep(self, seconds: float) -> None:
        self.kernel.wait(seconds / self.rate)

    def kill(self) -> None:
        if self.alive:
            self.alive = False
            self.at_end()


class Actor(greenlet):
    """A thread of a process."""

    process: Process
    call: Any = None  # the append to the ledger that it is in the middle of, for the observer


def current() -> Process:
    actor = getcurrent()
    assert isinstance(actor, Actor), "called from outside the simulation"
    return actor.process


class Chaos:
    """How often what goes wrong in one world: most worlds have some kinds of it and not others."""

    def __init__(self, rng: random.Random):
        self.rates = {  # per operation on the store
            "killed before": rng.choice((0, 0.002, 0.005)),
            "killed after": rng.choice((0, 0.002, 0.005)),
            "stopped before": rng.choice((0, 0.002, 0.006)),
            "stopped after": rng.choice((0, 0.002, 0.006)),
            "lost": rng.choice((0, 0.005, 0.02)),  # no effect and no answer
            "unanswered": rng.choice((0, 0.01, 0.04)),  # an effect and no answer
            "late": rng.choice((0, 0.01, 0.05)),  # an effect after the issuer gave up waiting
            "slow": rng.choice((0, 0.01, 0.05)),
        }
        self.bands = list(zip(itertools.accumulate(self.rates.values()), self.rates))
        self.cut_off = rng.choice((0, 0.03, 0.1))  # per look of a driver: its ranks can no longer be seen, and live on
        self.asked = rng.choice((0, 0, 0.05))  # per look of a driver: it is told to stop its ranks and start again
        self.orphans = rng.choice((0, 0.5, 1))  # of the ranks whose driver died: live on
        self.slow_beats = rng.choice((0, 0, 0.15))
        self.hasty = rng.choice((False, False, True))  # owners are taken for dead long before their next beat
        self.damage = rng.choice(
            (0, 0, 0, 0, 0.5)
        )  # of the attempts: the newest checkpoint is damaged before they start
        self.courier = rng.random() < 0.5

    def draw(self, rng: random.Random) -> str:
        """What goes wrong with this operation, or ""."""
        value = rng.random()
        if value >= self.bands[-1][0]:
            return ""
        return next(name for band, name in self.bands if value < band)


class Observer(Protocol):
    """Sees every effect before it happens, in the order in which they do."""

    def put(self, key: str, data: bytes, call: Any) -> None: ...

    def delete(self, key: str, by: str) -> None: ...


class SimulatedStore:
    """orchestrator.store.Store over a dictionary; what becomes of every operation is the kernel's to say."""

    url = "memory://simulated"

    def __init__(self, kernel: "Kernel", observer: Observer):
        self.kernel, self.observer = kernel, observer
        self.objects: dict[str, bytes] = {}

    def put(self, key: str, data: Any, create: bool = False) -> None:
        data, call = bytes(data), getattr(getcurrent(), "call", None)

        def effect() -> None:
            if create and key in self.objects:
                raise Exists(key)
            self.observer.put(key, data, call)
            self.objects[key] = data

        self.kernel.operate("create" if create else "put", key, effect)

    def get(self, key: str) -> bytes:
        if "/ledger/" in key and key in self.objects and self.kernel.rng.random() < 0.8:
            return self.objects[key]  # never changed, so what others do meanwhile would make no difference; not counted

        def effect() -> bytes:
            if key not in self.objects:
                raise Missing(key)
            return self.objects[key]

        return self.kernel.operate("get", key, effect)

    def get_run(self, keys: Sequence[str]) -> list[bytes]:
        return one_by_one(self, keys)

    def list(self, prefix: str = "") -> list[str]:
        return self.kernel.operate("list", prefix, lambda: sorted(k for k in self.objects if k.startswith(prefix)))

    def exists(self, key: str) -> bool:
        return self.kernel.operate("exists", key, lambda: key in self.objects)

    def size(self, key: str) -> int:
        return len(self.get(key))

    def delete(self, key: str) -> None:
        by = current().name

        def effect() -> None:
            if key in self.objects:
                self.observer.delete(key, by)
                del self.objects[key]

        self.kernel.operate("delete", key, effect)

    def put_file(self, key: str, path: Path) -> None:
        self.put(key, path.read_bytes())

    def get_file(self, key: str, path: Path) -> None:
        data = self.get(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def local_path(self, key: str) -> Path | None:
        return None


class Kernel:
    """calm: nothing goes wrong any more. trace: (time, process, operation, key, what went wrong)."""

    def __init__(self, seed: int):
        self.seed, self.rng = seed, random.Random(seed)
        self.now, self.calm, self.over = 0.0, False, False
        self.chaos = Chaos(self.rng)
        self.processes: list[Process] = []
        self.counts: Counter[str] = Counter()
        self.trace: list[tuple[float, str, str, str, str]] = []
        self.violations: list[str] = []
        self._queue: list[tuple[float, int, Any]] = []
        self._order = itertools.count()
        self._actors: list[Actor] = []
        self._hub = getcurrent()

    def at(self, time: float, what: "Actor | Callable[[], Any]") -> None:
        heapq.heappush(self._queue, (time, next(self._order), what))

    def spawn(self, process: Process, function: Callable[[], Any]) -> None:
        actor = Actor(function, self._hub)
        actor.process = process
        self._actors.append(actor)
        self.at(self.now, actor)

    def wait(self, seconds: float) -> None:
        """The running actor's: others run meanwhile."""
        if self.over:
            raise GreenletExit
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), getcurrent()))
        self._hub.switch()

    def schedule(self, until: float) -> None:
        """Runs whoever is next until nobody is left, the time is up, or something wrong was seen."""
        queue = self._queue
        while queue and not self.violations:
            time, _, what = heapq.heappop(queue)
            if time > until:
                return
            if isinstance(what, Actor):
                process = what.process
                if not process.alive:
                    continue
                if process.paused_until > time:
                    heapq.heappush(queue, (process.paused_until, next(self._order), what))
                    continue
                self.now = time
                what.switch()
            else:
                self.now = time
                what()

    def end(self) -> None:
        """Unwinds the actors that are left; no operation of theirs has an effect any more."""
        self.over = True
        for actor in self._actors:
            if not actor.dead:
                actor.throw()

    def operate(self, operation: str, key: str, effect: Callable[[], Any]) -> Any:
        """One operation of the running actor on the store: others first, then what the generator says."""
        rng = self.rng
        self.wait(rng.random() * 0.1)
        process = current()
        wrong = "" if self.calm else self.chaos.draw(rng)
        if wrong in HARM and process.safe:
            wrong = ""
        if wrong in NO_ANSWER and operation not in WRITES and rng.random() < 0.9:
            wrong = ""  # nothing new comes of a read that fails, and too many end every driver early
        self.counts["operations"] += 1
        self.trace.append((self.now, process.name, operation, key, wrong))
        if not wrong:
            return effect()
        if wrong == "slow":
            self.wait(rng.uniform(0, 12))
            return effect()
        if wrong == "lost":
            raise rng.choice(LOST)("no answer")
        if wrong == "late":
            if operation in WRITES:
                self.counts["ambiguous"] += 1
                self.at(self.now + rng.uniform(0, 30), lambda: self._late(operation, key, effect))
            raise rng.choice(LOST)("no answer")
        return self._interrupted(wrong, operation, process, effect)

    def _interrupted(self, wrong: str, operation: str, process: Process, effect: Callable[[], Any]) -> Any:
        rng = self.rng
        result = effect() if wrong.endswith(("after", "unanswered")) else None
        if wrong == "unanswered":
            self.counts["ambiguous"] += operation in WRITES
            raise rng.choice(LOST)("no answer")
        if wrong.startswith("killed"):
            self.counts["kills"] += 1
            process.kill()
            self._hub.switch()  # for ever
        self.counts["stops"] += 1
        process.paused_until = self.now + rng.uniform(3, 60)
        self.wait(0)
        return result if wrong.endswith("after") else effect()

    def _late(self, operation: str, key: str, effect: Callable[[], Any]) -> None:
        try:
            effect()
            self.trace.append((self.now, "the store", operation, key, "late"))
        except Exists:
            self.trace.append((self.now, "the store", operation, key, "late, and refused"))
