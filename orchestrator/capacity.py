"""What the connected cluster holds and what of it is free: the numbers behind the size of an attempt, and the words
where a stage has to wait.

Invariant: a GCS that does not answer never changes a decision: in all there is what there was at the last look, and
nothing is free.
"""

import logging

from cluster.gcs import Gcs, Unanswered
from cluster.nodes import Place, places
from cluster.shape import ClusterParams
from orchestrator.placement import Machine, allows, asked, fitting, may_come, shown
from stages.params import Resources

log = logging.getLogger(__name__)


class Capacity:
    """grows: the machines that the cluster may start itself, where it is one that starts any."""

    def __init__(self, grows: ClusterParams | None = None):
        self._grows = grows
        self._last: list[Machine] = []

    def machines(self) -> list[Machine]:
        """As large as they are, with those that may still be started."""
        try:
            there = places()
        except Unanswered as error:
            log.warning("the cluster does not answer, it is taken to be as it was: %s", error)
            return self._last
        self._last = [Machine(place.total, place.labels) for place in there]
        self._last += may_come(self._grows, [place.labels for place in there])
        return self._last

    def room(self, resources: Resources) -> int:
        """Workers of this size that fit on what is free now, on nodes that are alive and stay."""
        try:
            return fitting(resources, _free(places()))
        except Unanswered:
            return 0

    def waits(self, resources: Resources) -> tuple[str, bool]:
        """Of a stage without room: why, in words, and whether asking all the same makes the cluster start machines."""
        try:
            there, others = places(), Gcs.of_this_process().other_jobs()
        except Unanswered as error:
            return f"the cluster does not answer: {error}", False
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
        grows = (
            fitting(resources, grown) + fitting(resources, in_all) >= resources.least and fitting(resources, grown) > 0
        )
        return reason + ("; the cluster is asked to start more" if grows else ""), grows


def _free(there: list[Place]) -> list[Machine]:
    return [Machine(place.free, place.labels) for place in there]
