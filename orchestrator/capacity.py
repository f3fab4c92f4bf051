"""What the connected cluster holds and what of it is free: the numbers behind the size of an attempt, and the words
where a stage has to wait.

Invariants: a GCS that does not answer never changes a decision: in all there is what there was at the last look, and
nothing is free; before the first look nothing is known, so nothing can be refused. A cluster that starts machines on
demand hears of nothing but requests, so a wish for more workers is a placement group that waits; it is let go once Ray
could place it, and dies with this driver, so that no machine is held for nobody.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cluster.gcs import Gcs, Unanswered
from cluster.nodes import Place, places
from cluster.shape import ClusterParams
from orchestrator.placement import Machine, allows, asked, each, fitting, may_come, shown
from stages.params import Resources

FIRST_LOOK_S = 15.0  # that a GCS is given to answer for the first time
AGAIN_S = 0.5

log = logging.getLogger(__name__)


class Capacity:
    """grows: the machines that the cluster may start itself, where it is one that starts any."""

    def __init__(self, grows: ClusterParams | None = None):
        self._grows = grows
        self._last: list[Machine] = []
        self._patient_until = time.monotonic() + FIRST_LOOK_S
        self._lock = threading.Lock()
        self._wishes: list[Any] = []  # placement groups

    def machines(self) -> list[Machine]:
        """As large as they are, with those that may still be started; none while it is not known."""
        while True:
            try:
                there = places()
                break
            except Unanswered as error:
                if self._last or time.monotonic() > self._patient_until:
                    log.warning("the cluster does not answer, it is taken to be as it was: %s", error)
                    return self._last
                time.sleep(AGAIN_S)
        self._last = [Machine(place.total, place.labels) for place in there]
        self._last += may_come(self._grows, [place.labels for place in there])
        return self._last

    def room(self, resources: Resources) -> int:
        """Workers of this size that fit on what is free now, on nodes that are alive and stay."""
        with self._lock:
            for wish in [wish for wish in self._wishes if wish.wait(0)]:
                self._drop(wish)
        try:
            return fitting(resources, _free(places()))
        except Unanswered:
            return 0

    @contextmanager
    def wish(self, resources: Resources, together: int, more: int) -> Iterator[bool]:
        """Within it the cluster is asked for `together` workers at once, and for each of `more` by itself, as far as it
        may start machines for them: an autoscaler passes over a group that never fits as a whole.

        Yields whether it was asked for anything: not where no machine may come now, which another look may find.
        """
        wishes: list[Any] = []
        if self._grows:
            come = fitting(resources, [machine for machine in self.machines() if not machine.there])
            sizes = [together] * (together > 0) + [1] * min(more, come)
            wishes = [self._make(resources, workers) for workers in sizes if come]
        try:
            yield bool(wishes)
        finally:
            with self._lock:
                for wish in wishes:
                    if wish in self._wishes:
                        self._drop(wish)

    def _make(self, resources: Resources, workers: int) -> Any:
        from ray.util import placement_group

        bundle = {what: amount for what, amount in each(resources).items() if amount > 0}
        selectors: Any = [resources.selector] * workers if resources.selector else None
        with self._lock:
            self._wishes.append(placement_group([bundle] * workers, "PACK", bundle_label_selector=selectors))
            return self._wishes[-1]

    def _drop(self, wish: Any) -> None:
        from ray.util import remove_placement_group

        self._wishes.remove(wish)
        remove_placement_group(wish)

    def waits(self, resources: Resources) -> str:
        """Of a stage without room: why, in words."""
        try:
            there, others = places(), Gcs.of_this_process().other_jobs()
        except Unanswered as error:
            return f"the cluster does not answer: {error}"
        meant = [place for place in there if allows(place.labels, resources.selector)]
        in_all = [Machine(place.total, place.labels) for place in meant]
        reason = f"asks for {asked(resources)}; "
        if not in_all:
            reason += f"no such node is there now (there are {shown(Machine(p.total, p.labels) for p in there)})"
        else:
            reason += f"there are {shown(in_all)}, of which free {shown(_free(meant))}"
        if others:
            reason += f"; other Ray jobs: {', '.join(others)}"
        grown = may_come(self._grows, [place.labels for place in there])
        return reason + ("; the cluster is asked to start more" if fitting(resources, grown) else "")


def _free(there: list[Place]) -> list[Machine]:
    return [Machine(place.free, place.labels) for place in there]
