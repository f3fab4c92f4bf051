"""One training stage whose number of workers changes while it trains, on a cluster whose nodes go and come back.

Invariants: the only stage that trains is one of its own, so its losses can be held against those of a run of a fixed
size step by step; every change is read from storage: when it was done is a wall clock of this machine, when the next
attempt made its first step is in the ledger.
"""

import time
from dataclasses import dataclass

import numpy as np
from chaos import STAGE, Run
from harness import Experiment
from nodes import RayNode

from orchestrator.accounts import Attempt, account

SAME, FIRST = 1e-4, 20  # relative difference allowed of the loss, in so many steps after a change
FINAL = 0.01  # of the last step's loss

YAML = """
name: cluster
storage: storage
seed: 0
model: {{vision: micro-vit, language: micro-qwen2}}
data:
  mix: {{meta: {data}/mix.json, system: ""}}
defaults:
  global_batch: 4
  packing: {{max_tokens: 256, max_tiles: 48}}
  precision: fp32
  deepspeed: 1
  checkpoint: {{every: 50, keep: 2}}
  resources: {{workers: 1, cpus: 1}}
stages:
  mix_data: {{kind: prepare, data: mix}}
  full_finetune:
    needs: [mix_data]
    steps: {steps}
    lr: 1e-4
    drop_path: 0.1
    schedule: {{warmup: 20}}
"""  # with lr 1e-3 a weight's last bit changes the loss by 1 % after 300 steps: then two runs say nothing of each other


def overrides(steps: int, workers: int | str, *more: str) -> tuple[str, ...]:
    """Of YAML's stage. workers: a number, or "[least,most]"."""
    return (f"stages.{STAGE}.steps={steps}", f"stages.{STAGE}.resources.workers={workers}", *more)


@dataclass(frozen=True)
class Change:
    """One change of the number of workers. seconds: from the moment that `what` says to the first step of the attempt
    of the new size; parts: of them until the end of the old attempt was recorded, from then until the new one was
    decided on, from then until its first step. resumed_from: its resume point; lost: steps that it trained again."""

    what: str
    workers: int  # of the new attempt
    seconds: float
    parts: tuple[float, float, float]
    resumed_from: int
    lost: int

    def __str__(self) -> str:
        ended, decided, started = self.parts
        return (
            f"{self.what:52} -> {self.workers}: {self.seconds:5.1f} s to the first step ({ended:.1f} ended, "
            f"{decided:.1f} decided, {started:.1f} started), resumed from step {self.resumed_from}, {self.lost} lost"
        )


class Resizing(Run):
    """A driver of a stage with workers [least, most] on `nodes`; the changes are made one after the other."""

    def __enter__(self) -> "Resizing":
        self.changes: list[Change] = []
        return self

    def trained(self, steps: int, workers: int) -> None:
        """Waits until the running attempt, of so many workers, has trained `steps` since it was (re)started."""

        def enough() -> bool:
            return self._running(workers) and (self.view.step() or 0) >= (self.attempts()[-1].resumed_from or 0) + steps

        self._until(enough, f"{steps} steps with {workers} workers")

    def attempts(self) -> list[Attempt]:
        return account(self.view.entries()).attempts

    def node_of_a_worker(self) -> RayNode:
        return next(iter(self.nodes.workers().values()))

    def kill_node(self, workers: int) -> Change:
        """A node goes with its worker, unannounced."""
        known, node = len(self.attempts()), self.node_of_a_worker()
        began = time.time()
        self.nodes.kill_raylet(node)
        return self._changed("a node killed, from its SIGKILL", known, workers, began)

    def announce(self, workers: int, deadline_s: float) -> Change:
        """A node goes with its worker, announced: counts from the commit of the last save, since training goes on
        until then; the node is killed at its deadline."""
        known, node = len(self.attempts()), self.node_of_a_worker()
        told = time.monotonic()
        self.nodes.drain(node, deadline_s)
        time.sleep(max(0.0, told + deadline_s - time.monotonic()))
        self.nodes.kill_raylet(node)
        return self._changed(f"a node announced {deadline_s:g} s ahead, from the last save", known, workers, None)

    def grow(self, workers: int) -> Change:
        """A node comes back: counts from when the cluster knows it."""
        known = len(self.attempts())
        self.nodes.add()
        return self._changed("a node back, from when it counts for Ray", known, workers, time.time())

    def finish(self) -> None:
        """To the end of the experiment, however long that takes."""
        assert self.driver.process.wait() == 0, self.driver.output

    def _running(self, workers: int) -> bool:
        attempts = self.attempts()
        return bool(attempts) and attempts[-1].workers == workers and self.view.step() is not None

    def _changed(self, what: str, known: int, workers: int, began: float | None) -> Change:
        """Waits for the first step of an attempt of the new size after the first `known` ones. began: a wall clock, or
        None for the last checkpoint of the attempt before."""
        self._until(lambda: len(self.attempts()) > known and self._running(workers), f"{workers} workers train")
        attempts = self.attempts()
        old, new = attempts[known - 1], attempts[-1]
        assert new.first_step is not None and new.resumed_from is not None and old.ended is not None
        if began is None:
            began = max(e.time for e in self.view.entries() if e.type == "checkpoint" and e.token == old.token)
        parts = old.ended - began, new.began - old.ended, new.first_step - new.began
        change = Change(what, workers, new.first_step - began, parts, new.resumed_from, old.lost)
        self.changes.append(change)
        self.tell(str(change))
        return change


def differences(changed: Experiment, fixed: Experiment, changes: list[Change]) -> tuple[list[float], float]:
    """Relative differences of the loss: the largest in the FIRST steps after each change, and that of the last step."""
    ours, theirs = changed.losses(STAGE), fixed.losses(STAGE)
    apart = np.abs(ours - theirs) / np.abs(theirs)
    return [float(apart[c.resumed_from : c.resumed_from + FIRST].max()) for c in changes], float(apart[-1])
