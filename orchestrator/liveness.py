"""Is the driver that claimed a stage still there?

Invariant: liveness decides when to claim, never what is true: a wrong answer costs the old owner its claim
(the ledger fences it), not a result. A heartbeat object per epoch carries a counter; an owner is presumed dead
when a watcher saw no change for `timeout` on its own monotonic clock, at once when it lived on this host and its
pid with its start time is gone, and at once when it signed off. Clocks of two machines are never compared
(design.md, "The ledger").
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from modeling.errors import UserError
from orchestrator.errors import StorageTransient
from orchestrator.store import Missing, Store

# without a sign of life; a beat comes every 5 s. Taking over too early wastes an attempt and breaks nothing.
TIMEOUT_S = float(os.environ.get("STAGELINE_OWNER_TIMEOUT_S", "30"))
START_TOLERANCE_S = 2.0  # the boot time, from which the start of a process is counted, is adjusted by NTP

log = logging.getLogger(__name__)


def owner() -> dict[str, Any]:
    """Who this process is, for a `claimed` entry: host, pid namespace, pid, start time and a nonce."""
    import psutil

    return {
        "host": socket.gethostname(),
        "namespace": _namespace(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "nonce": uuid.uuid4().hex,
    }


def alive(who: dict[str, Any]) -> bool | None:
    """Whether the owner's process runs, where it can be seen from here; None for one of another host."""
    import psutil

    if who["host"] != socket.gethostname() or who["namespace"] != _namespace():
        return None
    try:
        process = psutil.Process(who["pid"])
        return (
            process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - who["started"]) < START_TOLERANCE_S
        )
    except psutil.NoSuchProcess:
        return False


def _namespace() -> str:
    """Two containers of one host name may use the same pid for different processes."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:  # no /proc: not Linux, so no pid namespaces
        return ""


def _key(prefix: str, epoch: int) -> str:
    return f"{prefix}/heartbeat/{epoch}.json"


class Heartbeat:
    """A thread that moves the counter of one epoch every `interval` seconds, until stop() or the end of `with`."""

    def __init__(self, store: Store, prefix: str, epoch: int, interval: float = 5.0):
        self.store, self.key, self.interval = store, _key(prefix, epoch), interval
        self.counter = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"heartbeat-{epoch}", daemon=True)

    def start(self) -> "Heartbeat":
        self._beat()
        self._thread.start()
        return self

    def stop(self) -> None:
        """Joins the thread first, then signs off: others need not wait to claim."""
        self._stop.set()
        self._thread.join()
        self._beat(signed_off=True)

    def __enter__(self) -> "Heartbeat":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            self._beat()

    def _beat(self, signed_off: bool = False) -> None:
        self.counter += 1
        body = {"counter": self.counter, "time": time.time(), "signed_off": signed_off}
        try:
            self.store.put(self.key, json.dumps(body).encode())
        except (OSError, StorageTransient, UserError) as error:  # one missed beat is harmless; a full disk may pass
            log.warning("heartbeat %s not written: %s", self.key, error)


def presumed_dead(
    store: Store,
    prefix: str,
    epoch: int,
    who: dict[str, Any] | None,
    timeout: float = TIMEOUT_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Any] = time.sleep,
    stop: threading.Event | None = None,
) -> bool:
    """Watches for up to `timeout` seconds: True as soon as the owner is known to be gone, or at the end without a
    sign of life; False with the first. A process that is there but stopped (SIGSTOP) gives none.

    who: the owner in the ledger, None where it is not known. stop: ends the watching, with False.
    A store that did not answer for a while took the owner's beats as well: the watch begins anew.
    """
    first, start = _read(store, prefix, epoch), clock()
    if first is not None and first["signed_off"]:  # perhaps by this very process, which still runs
        return True
    while True:
        if who is not None and alive(who) is False:
            return True
        if stop is not None and stop.is_set():
            return False
        sleep(min(1.0, timeout / 20))
        asked = clock()  # before it reads: this process itself may have been stopped for a while
        now = _read(store, prefix, epoch)
        if now != first:
            return now is not None and now["signed_off"]
        if clock() - asked > timeout / 6:
            start = clock()
        elif asked - start >= timeout:
            return True


def last_beat(store: Store, prefix: str, epoch: int) -> float:
    """When the owner last gave a sign of life, in unix seconds of its clock, for people; 0 where it never did."""
    beat = _read(store, prefix, epoch)
    return float(beat["time"]) if beat is not None else 0.0


def _read(store: Store, prefix: str, epoch: int) -> dict[str, Any] | None:
    try:
        return json.loads(store.get(_key(prefix, epoch)))
    except Missing:
        return None
