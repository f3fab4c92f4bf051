"""What a driver tells of itself in storage, and how it is asked to stop from outside the cluster.

Invariant: none of it is truth. The note says where the newest driver of an experiment runs, where it can be watched and
which stages wait for machines; a request names one Ray job, so that it never stops a later one. Requests give seconds,
not a time of day: the driver counts from when it reads it.
"""

import json
import logging
import os
import socket
import threading
import time
from typing import Any

from modeling.errors import UserError
from orchestrator.errors import StorageTransient
from orchestrator.store import Missing, Store

QUEUED = "queued: "  # how such an event of a stage begins (driver.py)
POLL_S = 2.0  # between two looks for a request

log = logging.getLogger(__name__)


class DriverNote:
    """Of this driver. job: the id under which it was submitted; links: what to open in a browser, by name."""

    def __init__(self, store: Store, experiment: str, job: str | None, links: dict[str, str]):
        self._store, self._experiment, self._job = store, experiment, job
        self._lock, self._looked = threading.Lock(), time.monotonic()
        self._note: dict[str, Any] = {
            "job": job, "host": socket.gethostname(), "pid": os.getpid(), "started": time.time(), "links": links,
            "queued": {}, "stopped": False,
        }  # fmt: skip
        self.asked = False  # to stop
        self._write()

    def event(self, stage: str, message: str) -> None:
        """Of any stage; only where it stands in the queue is kept, until it says anything else."""
        queued: dict[str, str] = self._note["queued"]
        with self._lock:
            before = dict(queued)
            queued.pop(stage, None)
            if message.startswith(QUEUED):
                queued[stage] = message.removeprefix(QUEUED)
            if before != queued:
                self._write()

    def asked_to_stop(self) -> tuple[float, str] | None:
        """(seconds, reason) of a request to this job; looks every POLL_S."""
        if self._job is None or time.monotonic() - self._looked < POLL_S:
            return None
        self._looked = time.monotonic()
        try:
            body = json.loads(self._store.get(_request(self._experiment, self._job)))
            self.asked = True
            return float(body["in_s"]), str(body["reason"])
        except Missing:
            return None

    def stopped(self) -> None:
        """All stages have saved and stopped, as was asked."""
        with self._lock:
            self._note |= {"stopped": True, "queued": {}}
            self._write()

    def _write(self) -> None:
        try:
            self._store.put(_note(self._experiment), json.dumps(self._note).encode())
        except (OSError, StorageTransient, UserError) as error:  # no stage may fail for it
            log.warning("the note of this driver could not be stored: %s", error)


def submitted_as() -> str | None:
    """The id of the Ray job that this process is the driver of, however it was submitted."""
    about = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata") or {}
    return about.get("job_submission_id")


def read_note(store: Store, experiment: str) -> dict[str, Any] | None:
    """Of the newest driver of this experiment, alive or not."""
    try:
        return json.loads(store.get(_note(experiment)))
    except Missing:
        return None


def ask_job_to_stop(store: Store, experiment: str, job: str, in_s: float, reason: str) -> None:
    """All stages of this job train on for at most `in_s` seconds, save, and stop; then the driver ends."""
    store.put(_request(experiment, job), json.dumps({"in_s": in_s, "reason": reason}).encode())


def job_is_asked_to_stop(store: Store, experiment: str, job: str) -> bool:
    return store.exists(_request(experiment, job))


def _note(experiment: str) -> str:
    return f"experiments/{experiment}/driver.json"


def _request(experiment: str, job: str) -> str:
    return f"experiments/{experiment}/stop/{job}.json"
