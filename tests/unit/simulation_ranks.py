"""The ranks of one simulated attempt: a "training" whose state is a chain of digests, saved in pieces by all ranks.

A step that is skipped, repeated, or mixed from two attempts shows in the state. What touches storage is the real code:
Checkpoints, verified(), control requests, the ledger; the order in which it is called is that of stages/train.py,
stages/saving.py, stageio.py and courier.py.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simulation_checks import Checks
from simulation_kernel import LOST, Kernel, Process, SimulatedStore, current

from orchestrator.checkpoints import Checkpoints, token_name, verified
from orchestrator.control import asked_to_stop
from orchestrator.errors import CheckpointError, Fenced, LostNode, Preempted
from orchestrator.ledger import Ledger
from orchestrator.stageio import Task

STEPS, STEP_S = 6, 1.0
COLLECTIVE_S = 40.0  # until a rank that waits for another gives up
CHAIN = ["0" * 64]  # the state after each step
for _step in range(1, STEPS + 1):
    CHAIN.append(hashlib.sha256(f"{CHAIN[-1]} {_step}".encode()).hexdigest())


class Group:
    """One attempt. Its ranks share memory where real ones have collectives. every: steps between checkpoints."""

    def __init__(self, kernel: Kernel, store: SimulatedStore, checks: Checks, uid: int, task: Task, every: int,
                 scratch: Path):  # fmt: skip
        self.kernel, self.store, self.checks = kernel, store, checks
        self.uid, self.task, self.every, self.scratch = uid, task, every, scratch
        self.pieces: dict[int, list[bytes]] = {}  # by step, what each rank has to save
        self.lines: dict[int, dict[int, Any]] = {}  # by step and rank, of the manifest
        self.stored, self.done = 0, False
        self.error: Exception | None = None
        self.ranks = [Process(kernel, f"attempt{uid}/rank{rank}") for rank in range(task.workers)]
        self.leader = self.checkpoints()  # of the thread that saves for rank 0

    @property
    def over(self) -> bool:
        return self.done or self.error is not None

    def start(self) -> None:
        for rank, process in enumerate(self.ranks):
            self.kernel.spawn(process, lambda rank=rank: self._rank(rank))

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()

    def checkpoints(self) -> Checkpoints:
        prefix = self.task.prefix
        return Checkpoints(self.store, prefix, Ledger(self.store, prefix), self.task.token, self.task.keep)

    def _rank(self, rank: int) -> None:
        """A process of the training; what it meets ends it, and its group learns of it."""
        try:
            self._lead() if rank == 0 else self._follow(rank)
        except Exception as error:
            self._fail(error)
            current().alive = False

    def _fail(self, error: Exception) -> None:
        self.error = self.error or error

    def _until(self, condition: Callable[[], bool]) -> None:
        """A collective: raises once another rank failed, or nobody answers for too long."""
        began = self.kernel.now
        while not condition():
            if self.error is not None or self.kernel.now - began > COLLECTIVE_S:
                raise self.error or LostNode("a collective timed out")
            self.kernel.wait(0.8)

    def _newest(self) -> int:
        return max(self.pieces, default=0)

    # -- rank 0 ----------------------------------------------------------------------------------------

    def _lead(self) -> None:
        process, task = current(), self.task
        process.sleep(self.kernel.rng.uniform(0.5, 2))
        ledger = Ledger(self.store, task.prefix)
        first, state = self._resume(ledger)
        if self.kernel.chaos.courier:
            self.kernel.spawn(process, lambda: self._courier(first))
        for step in range(first + 1, STEPS + 1):
            process.sleep(STEP_S)
            if self.error is not None:
                raise self.error
            state = hashlib.sha256(f"{state} {step}".encode()).hexdigest()
            asked = asked_to_stop(self.store, task.prefix, task.token) is not None
            if step < STEPS and (step % self.every == 0 or asked):
                self._saved()
                self._save(step, state)
            if step < STEPS and asked:
                self._saved()
                raise Preempted("asked to stop: saved and stopped")
        self._saved()
        folder = f"{task.prefix}/result/{token_name(task.token)}"
        self.store.put(f"{folder}/model", json.dumps({"attempt": self.uid, "state": state}).encode())
        self.store.put(f"{folder}/config.json", b"{}")
        manifest = {"folder": folder, "files": []}
        ledger.append("completed", task.token, manifest=manifest, summary={}, train_s=0.0)
        self.done = True

    def _resume(self, ledger: Ledger) -> tuple[int, str]:
        step, state = 0, CHAIN[0]
        for known in ledger.state().checkpoints:
            try:
                point = verified(self.store, known.manifest, self.scratch)
            except CheckpointError:
                continue
            files = [point.folder / item["name"] for item in point.manifest["files"]]
            step, state = point.step, "".join(json.loads(path.read_bytes())["piece"] for path in files)
            break
        self.checks.resumed(self.task.token, step, state)
        return step, state

    def _save(self, step: int, state: str) -> None:
        """A snapshot of all ranks; stored and committed behind the training."""
        world = self.task.workers
        cuts = [len(state) * rank // world for rank in range(world + 1)]
        bodies = [{"attempt": self.uid, "step": step, "world": world, "rank": rank,
                   "piece": state[cuts[rank] : cuts[rank + 1]]} for rank in range(world)]  # fmt: skip
        self.lines[step] = {}
        self.pieces[step] = [json.dumps(body).encode() for body in bodies]
        self.kernel.spawn(current(), lambda: self._commit(step))

    def _commit(self, step: int) -> None:
        lines = self.lines[step]
        try:
            self._put_piece(self.leader, step, 0)
            self._until(lambda: len(lines) == self.task.workers)
            self.leader.commit(step, [lines[rank] for rank in sorted(lines)], {}, 1.0)
            self.stored = step
        except Exception as error:
            self._fail(error)

    def _saved(self) -> None:
        self._until(lambda: self.stored == self._newest())

    def _courier(self, first: int) -> None:
        """Tells that the training began, and looks for a higher token."""
        ledger = Ledger(self.store, self.task.prefix)
        try:
            ledger.append("started", self.task.token, step=first)
            while not self.over:
                self.kernel.wait(2.0)
                ledger.check(self.task.token)
        except LOST:
            pass  # told, and the training goes on
        except Fenced as error:
            self._fail(error)

    # -- every rank ------------------------------------------------------------------------------------

    def _follow(self, rank: int) -> None:
        checkpoints, saved = self.checkpoints(), 0
        while not self.over:
            if self._newest() > saved:
                saved = self._newest()
                self._put_piece(checkpoints, saved, rank)
            before = saved
            self._until(lambda: self.over or self._newest() > before)  # noqa: B023  called at once

    def _put_piece(self, checkpoints: Checkpoints, step: int, rank: int) -> None:
        line = checkpoints.put_shard(step, f"shard-{rank}", self.pieces[step][rank])
        self.lines[step][rank] = line
