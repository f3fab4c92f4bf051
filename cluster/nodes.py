"""Which nodes can take work now, and which will go: what the size of an attempt is chosen from.

Invariant: a node counts only if it is alive for GCS, is not being drained, and its raylet accepts a connection within a
second. Ray counts a machine that vanished for as long as its health checks last (about 15 s with its defaults) and a
draining one until it is gone: sizes chosen from ray.available_resources() would wait for both.

To be called from a connected driver or worker, in any thread; a few milliseconds, or one second while a machine that
vanished is still listed. Stands on cluster/gcs.py, with the client that the process has anyway.
Raises gcs.Unanswered when GCS does not answer within two seconds.
"""

import time

from cluster.gcs import Gcs, Node, reachable_nodes

NAMES = ("CPU", "GPU")


def free_by_node() -> dict[str, dict[str, float]]:
    """{node id: {"CPU": n, "GPU": n}} that nobody holds, on nodes that can take work.

    What a worker group that just ended held is free a report (0.1 s) later.
    """
    gcs = Gcs.of_this_process()
    available = gcs.available()
    return {node.id: _named(available.get(node.id, {})) for node in _usable(gcs)}


def total_by_node() -> dict[str, dict[str, float]]:
    """{node id: {"CPU": n, "GPU": n}} in all, on nodes that can take work."""
    return {node.id: _named(node.total) for node in _usable(Gcs.of_this_process())}


def draining() -> dict[str, float]:
    """{node id: seconds left} of every node that is being drained; inf without a deadline, never below zero.

    One request, under a millisecond: rank 0 may ask every second, without the other ranks.
    """
    now = time.time()
    return {node: max(0.0, deadline - now) for node, deadline in Gcs.of_this_process().draining().items()}


def _usable(gcs: Gcs) -> list[Node]:
    going = gcs.draining()
    return reachable_nodes(node for node in gcs.alive() if node.id not in going)


def _named(resources: dict[str, float]) -> dict[str, float]:
    return {name: resources.get(name, 0.0) for name in NAMES}
