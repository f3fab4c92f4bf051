"""Tells Ray's metrics of a running stage, for Prometheus: a thread of the driver that follows storage.

Invariant: the driver tells all and the ranks nothing, so that it costs no training; it only reads, and a store that
does not answer costs a look. A driver that waits for another one's result tells nothing: sums would count twice. Only
where there is a Ray dashboard, whose head tells Prometheus of the nodes.
"""

import logging
import threading
import time
from functools import cache
from typing import Any

from cluster.monitoring import catalogue
from modeling.errors import UserError
from orchestrator.errors import StorageTransient
from orchestrator.ledger import Ledger
from orchestrator.liveness import owner
from orchestrator.observe.links import dashboard_url
from orchestrator.observe.marker import Marker
from orchestrator.observe.readings import Readings, readings, sentence
from orchestrator.progress import read_progress
from orchestrator.store import Store

LOOK_S = 2.0  # between two looks; Ray forgets a gauge that is not set between two of its reports (catalogue.py)

SAY_S = 10.0  # between two lines in the marker's log

log = logging.getLogger(__name__)


class Meters:
    """Of one stage, until the end of its `with` block. prefix: the stage's folder in the store. Any thread."""

    def __init__(self, store: Store, prefix: str, experiment: str, stage: str, kind: str):
        self._store, self._ledger, self._prefix = store, Ledger(store, prefix), prefix
        self._tags = dict(zip(catalogue.LABELS, (experiment, stage, kind), strict=True))
        self._marker = Marker(experiment, stage)
        self._me = owner()
        self._told: tuple[tuple[int, int], dict[str, float]] = ((0, 0), {})
        self._said = 0.0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Meters":
        if dashboard_url():
            self._thread = threading.Thread(target=self._run, name="meters", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self._marker.close()

    def _run(self) -> None:
        over = False
        while not over:
            over = self._over.wait(LOOK_S)  # one more look at the end, for what came last
            try:
                if not self._ledger.state().owned_by(self._me):
                    continue
                now = readings(self._ledger.seen, read_progress(self._store, self._prefix), time.time())
                self._marker.show(now.token)
                self._tell(now)
                self._say(now)
            except (OSError, StorageTransient, UserError) as error:
                log.warning("storage does not answer, so the metrics of %s stand still: %s", self._prefix, error)

    def _tell(self, now: Readings) -> None:
        for name, value in now.gauges.items():
            _meter(name).set(value, tags=self._tags)
        for error_class, count in now.failures.items():
            _meter(catalogue.FAILURES[0]).set(count, tags=self._tags | {catalogue.FAILURE: error_class})
        token, before = self._told
        for name, total in now.sums.items():
            more = total - (before.get(name, 0.0) if token == now.token else 0.0)
            if more > 0:
                _meter(name).inc(more, tags=self._tags)
        if now.sums:
            self._told = (now.token, now.sums)

    def _say(self, now: Readings) -> None:
        text = sentence(now)
        if text and time.monotonic() - self._said >= SAY_S:
            self._said = time.monotonic()
            self._marker.say(text)


_lock = threading.Lock()


def _meter(name: str) -> Any:
    with _lock:
        return _made(name)


@cache
def _made(name: str) -> Any:
    from ray.util.metrics import Counter, Gauge

    if name in catalogue.SUMS:
        return Counter(name, catalogue.SUMS[name][1], catalogue.LABELS)
    if name == catalogue.FAILURES[0]:
        return Gauge(name, catalogue.FAILURES[1], (*catalogue.LABELS, catalogue.FAILURE))
    text = catalogue.FROM_ROW[name][1] if name in catalogue.FROM_ROW else catalogue.FROM_LEDGER[name]
    return Gauge(name, text, catalogue.LABELS)
