"""Beside one training attempt, in the driver: passes on that it has to stop, asks for a larger one given room.

Invariant: it only asks, through storage; rank 0 saves, stops all ranks, and the driver starts the next attempt of the
size that fits then (docs/design.md, "Attempts"). Growing costs a start, so room has to last for a while.
"""

import logging
import threading
from collections.abc import Callable

from modeling.errors import UserError
from orchestrator.control import ask_to_stop
from orchestrator.errors import StorageTransient
from orchestrator.ledger import Ledger, Token
from orchestrator.store import Store
from stages.params import Resources

LOOK_S = 1.0
GROW_LOOKS = 3  # in a row with room for more

log = logging.getLogger(__name__)


class Stop(threading.Event):
    """Set once for the whole driver. in_s: running stages have to be over by then; reason: why."""

    in_s = 0.0
    reason = "the driver was asked to stop"


class Attendant:
    """Of one attempt with `workers`, until the end of its `with` block. room(resources): workers that would fit now,
    beside all that runs."""

    def __init__(
        self,
        store: Store,
        prefix: str,
        token: Token,
        workers: int,
        resources: Resources,
        stop: Stop,
        room: Callable[[Resources], int],
    ):
        self._store, self._prefix, self._token = store, prefix, token
        self._workers, self._resources = workers, resources
        self._stop, self._room = stop, room
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="attendant", daemon=True)

    def __enter__(self) -> "Attendant":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        ledger, looks = Ledger(self._store, self._prefix), 0
        while not self._over.wait(LOOK_S):
            try:
                if self._stop.is_set():
                    return ask_to_stop(self._store, self._prefix, self._token, self._stop.in_s, self._stop.reason)
                if self._workers < self._resources.most and self._trains(ledger):
                    more = self._room(self._resources)
                    looks = looks + 1 if more > 0 else 0
                    if looks >= GROW_LOOKS:
                        workers = min(self._workers + more, self._resources.most)
                        reason = f"room for {workers} workers, {self._workers} run"
                        return ask_to_stop(self._store, self._prefix, self._token, 0.0, reason, "grown")
            except (OSError, StorageTransient, UserError) as error:  # it asks again: a full disk may pass
                log.warning("storage does not answer: %s", error)

    def _trains(self, ledger: Ledger) -> bool:
        return any(entry.type == "started" and entry.token == self._token for entry in ledger.entries())
