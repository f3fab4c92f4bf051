"""Patience with a store that does not answer: full-jitter back-off around one action.

Invariant: only what the caller calls transient is tried again, and never for longer than `patience` after the first
failure; then StorageTransient is raised from the last one. Delays are drawn from [0, min(10 s, 0.1 s · 2^n)], so that
clients that failed together do not come back together (Brooker, "Exponential Backoff And Jitter", AWS, 2015).
"""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from orchestrator.errors import StorageTransient

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Retries:
    """patience: seconds. sleep, clock and draw (uniform over a range) are replaced in tests."""

    patience: float = 120.0
    base: float = 0.1
    cap: float = 10.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    draw: Callable[[float, float], float] = field(default_factory=lambda: random.SystemRandom().uniform)

    def run(self, action: Callable[[], T], reason: Callable[[Exception], str], what: str) -> T:
        """Calls action() until it returns or raises something that is not transient.

        reason: a few words on a transient fault, "" for any other error. what: "put of s3://bucket/key", for messages.
        Counting starts with the first failure, not with the call: a process that was suspended, or an upload that
        took long before it broke, still has all its patience. Waiting is told after 2 s, 4 s, 8 s and so on.
        """
        started, told, failures = 0.0, 2.0, 0
        while True:
            try:
                return action()
            except Exception as error:
                if not (why := reason(error)):
                    raise
                now = self.clock()
                started = now if failures == 0 else started
                delay = self.draw(0, min(self.cap, self.base * 2**failures))
                failures += 1
                if now - started + delay > self.patience:
                    message = f"{what}: no success in {failures} tries over {now - started:.0f} s: {why}"
                    raise StorageTransient(message) from error
                if now - started >= told:
                    told *= 2
                    log.warning("%s: waiting for the store since %.0f s: %s", what, now - started, why)
            self.sleep(delay)
