"""In the last seconds of a training stage, the worker processes of the one that follows it.

Ray starts every actor of a fit() with two Python processes, one that sets up the environment of the other, and each
imports ray: two thirds of a hand-off. Idle workers that wait when the next fit() asks have that behind them
(benchmarks/handoff.py). Nothing depends on it: one that nobody takes ends after KEEP_S, one that is missing is started
when it is asked for. Only where all workers are on this machine and forked (warmup.py), so that idle ones are small.
"""

import logging
import time
from pathlib import Path

from cluster.gcs import Gcs, Unanswered, here
from cluster.raylet import start_idle
from modeling.errors import UserError
from orchestrator.errors import StorageTransient
from orchestrator.progress import read_progress
from orchestrator.stageio import Task
from orchestrator.store import open_store

BEFORE_S = 10.0  # that are left of the stage: on two busy cores it takes seven
LOOK_S = 0.5  # between two looks at the progress
KEEP_S = 60  # before one that nobody took is ended
OF_RAY = 4  # Ray Train's controller, cleaner, synchronization actor and dataset manager

log = logging.getLogger(__name__)


class Ahead:
    """Beside one attempt, in the driver. environment: file with the serialized runtime environment of its workers."""

    def __init__(self, task: Task, environment: Path):
        self._task, self._environment = task, environment
        self._store = open_store(task.storage)
        self._looked = 0.0
        self.started = not task.followers

    def look(self) -> None:
        """Start the processes once the attempt is about to end."""
        now = time.monotonic()
        if self.started or now - self._looked < LOOK_S:
            return
        self._looked = now
        try:
            note = read_progress(self._store, self._task.prefix)
        except (OSError, StorageTransient, UserError) as error:  # nothing depends on it; it looks again
            log.warning("storage does not answer: %s", error)
            return
        if note is None or tuple(note["token"]) != self._task.token or note["eta_s"] is None:
            return
        if note["eta_s"] <= BEFORE_S and self._environment.exists():
            self.started = True
            self._start()

    def _start(self) -> None:
        try:
            address, job = self._address()
            start_idle(address, job, self._environment.read_text(), self._task.followers + OF_RAY, KEEP_S)
        except Unanswered as error:
            log.warning("the next stage will start slowly: %s", error)

    def _address(self) -> tuple[str, str]:
        """Of this machine's raylet; and this job's id."""
        import ray

        nodes = here(Gcs.of_this_process().alive())
        if not nodes:
            raise Unanswered("no node of the cluster is on this machine any more")
        return f"{nodes[0].address}:{nodes[0].port}", ray.get_runtime_context().get_job_id()
