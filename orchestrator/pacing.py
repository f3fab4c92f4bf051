"""When rank 0 asks all ranks to save, and when to stop: pure decisions between two steps.

Invariants: with a notice of preemption one safety save at once; train on; a last save so early that it is committed
before the deadline, with a margin for what saves and steps have been seen to take at worst; then stop, so that nothing
is trained that will be thrown away (docs/design.md, "Preemption"). Without one, a save every `every` steps, or as often
as the cost of a save and the rate of failures make best: sqrt(2 · cost · time between failures) seconds (Young, 1974;
Daly, 2006); the cost is the stall and a share of the time for which the save goes on beside the training. One save at a
time: what falls due meanwhile is put off.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from stages.io import Signal

FIRST_SAVE_S = 5.0  # assumed cost of a save until one was measured
BESIDE = 0.02  # of the seconds of a save, by which the steps beside it are slower: not seen in 153 s (RESULTS.md)
SHORTEST_S, LONGEST_S = 10.0, 1800.0  # of the interval that `auto` chooses
MARGIN_S = 1.0  # between the end of the last save and the deadline, besides what was seen at worst
MTBF_S = 4 * 3600.0  # time between failures, until the ledger tells of some


def failure_interval(failures: int, seconds: float) -> float:
    """Seconds between failures, from `failures` in `seconds` of this stage and one in MTBF_S assumed beforehand."""
    return (seconds + MTBF_S) / (failures + 1)


class Pacer:
    """Of one attempt, on rank 0. every: optimizer steps, or "auto"; mtbf_s: see failure_interval."""

    def __init__(self, every: int | Literal["auto"], mtbf_s: float, clock: Callable[[], float] = time.monotonic):
        self.every, self.mtbf_s, self.clock = every, mtbf_s, clock
        self.in_flight = False  # a save is asked for, and not yet committed
        self.deadline: float | None = None  # on `clock`
        self.reason = ""
        self._due = False
        self._safe = False  # the safety save of the notice was asked for
        self._steps: deque[float] = deque(maxlen=20)
        self._saves: deque[float] = deque(maxlen=20)
        self._costs: deque[float] = deque(maxlen=20)
        self._last_save = clock()

    def notice(self, in_s: float, reason: str) -> None:
        """The attempt has to be over `in_s` seconds from now; the earliest of several counts."""
        deadline = self.clock() + in_s
        if self.deadline is None or deadline < self.deadline:
            self.deadline, self.reason = deadline, reason

    def saving(self) -> None:
        """A snapshot is being taken."""
        self._last_save = self.clock()

    def saved(self, stall_s: float, seconds: float) -> None:
        """That save is committed. stall_s: training stood still; seconds: from the snapshot to the entry."""
        self.in_flight = False
        self._costs.append(stall_s + BESIDE * seconds)
        self._saves.append(seconds)

    def interval_s(self) -> float:
        """What `auto` waits between two saves."""
        cost = max(self._costs, default=FIRST_SAVE_S)
        return min(max(math.sqrt(2 * cost * self.mtbf_s), SHORTEST_S), LONGEST_S)

    def decide(self, step: int, seconds: float) -> Signal:
        """After `step`, which took `seconds`. The answer holds for the end of the next step."""
        self._steps.append(seconds)
        now, slowest_step = self.clock(), max(self._steps)
        save = 1.2 * max(self._saves, default=FIRST_SAVE_S)
        time_for_another = True
        if self.deadline is not None:
            # the next step, which ends with the save, and one more before this is asked again
            left = self.deadline - now - 2 * slowest_step - MARGIN_S
            if left <= (2 * save if self.in_flight else save):  # one in flight has to end before the last one begins
                return Signal(save=True, stop=True)
            time_for_another = left - slowest_step > 2 * save
            if not self._safe:
                self._safe = self._due = True
        if isinstance(self.every, int):
            self._due = self._due or (step + 1) % self.every == 0
        elif self.deadline is None:
            self._due = self._due or now + seconds - self._last_save >= self.interval_s()
        if not self._due or self.in_flight or not time_for_another:
            return Signal()
        self.in_flight, self._due, self._last_save = True, False, now  # from now on: the snapshot comes a step later
        return Signal(save=True)
