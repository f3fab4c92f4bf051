"""Rank 0's errands while it trains, in one thread: rows and logs to storage, is my token still the newest, has anyone
asked me to stop.

Invariant: the training never waits for any of it. A store that does not answer for a while is told once and waited
for: what must last is the checkpoints' business. A higher token in the ledger, and any bug, reaches the training at its
next step.
"""

import logging
import math
import threading
import time
from collections.abc import Callable

from orchestrator.control import POLL_S, asked_to_stop
from orchestrator.errors import StorageTransient
from orchestrator.ledger import Ledger, Token
from orchestrator.progress import Recorder
from orchestrator.store import Store

FENCE_CHECK_S = 2.0  # between two looks at the ledger for a higher token
ROUND_S = 0.25
SOONER_S = 1.0  # by which a reason's deadline must come nearer to be news

log = logging.getLogger(__name__)
Notice = tuple[float, str]  # (seconds until the end, reason)


class Courier:
    """notices(): a notice of preemption from elsewhere (the cluster), or None; asked once a second."""

    def __init__(
        self, store: Store, prefix: str, token: Token, recorder: Recorder, notices: Callable[[], Notice | None]
    ):
        self._store, self._prefix, self._token = store, prefix, token
        self._ledger: Ledger | None = None
        self._recorder, self._notices = recorder, notices
        self._news: list[Notice] = []
        self._heard: dict[str, float] = {}  # reason -> when it ends, on the monotonic clock
        self._started: int | None = None
        self._error: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)

    def start(self, resumed_from: int | None, ledger: Ledger) -> None:
        """resumed_from: the first training step after that one was made, which goes to `ledger`, one of its own."""
        self._started, self._ledger = resumed_from, ledger
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def news(self) -> list[Notice]:
        """Requests to stop since the last call, with the seconds left. Raises what the errands met."""
        if self._error is not None:
            raise self._error
        news, self._news = self._news, []
        return news

    def _run(self) -> None:
        checked = polled = -1e9
        assert self._ledger is not None, "started"
        while not self._stop.is_set():
            now = time.monotonic()
            try:
                if self._started is not None:
                    self._ledger.append("started", self._token, step=self._started)
                    self._started = None
                if now - polled >= POLL_S:
                    polled = now
                    self._poll(now)
                if now - checked >= FENCE_CHECK_S:
                    checked = now
                    self._ledger.check(self._token)
                self._recorder.write()
            except StorageTransient as error:
                log.warning("storage does not answer, the training goes on: %s", error)
            except Exception as error:
                self._error = error  # raised by news()
                return
            self._stop.wait(ROUND_S)

    def _poll(self, asked_at: float) -> None:
        for notice in (self._notices(), asked_to_stop(self._store, self._prefix, self._token)):
            if notice is None:
                continue
            in_s, reason = notice
            end = asked_at + in_s
            if end < self._heard.get(reason, math.inf) - SOONER_S:
                self._heard[reason] = end
                self._news.append((end - time.monotonic(), reason))
