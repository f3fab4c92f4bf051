"""Which nodes can take work now, and which will go: what the size of an attempt is chosen from.

Invariant: a node counts only if it is alive for GCS, is not being drained, and its raylet accepts a connection within a
second. Ray counts a machine that vanished for as long as its health checks last (about 15 s with its defaults) and a
draining one until it is gone: sizes chosen from ray.available_resources() would wait for both.

To be called from a connected driver or worker, in any thread; a few milliseconds, or one second while a machine that
vanished is still listed. Stands on cluster/gcs.py, with the client that the process has anyway.
Raises gcs.Unanswered when GCS does not answer within two seconds.
"""

import os
import time
from dataclasses import dataclass

import psutil

from cluster.gcs import Gcs, reachable_nodes

NAMES = ("CPU", "GPU")


@dataclass(frozen=True)
class Place:
    """A node that can take work. total, free: {"CPU": n, "GPU": n}; what a worker group that just ended held is free a
    report (0.1 s) later. labels: Ray's and those it was started with."""

    id: str
    address: str
    head: bool
    labels: dict[str, str]
    total: dict[str, float]
    free: dict[str, float]


def places() -> list[Place]:
    """Nodes that can take work now."""
    gcs = Gcs.of_this_process()
    available, going = gcs.available(), gcs.draining()
    usable = reachable_nodes(node for node in gcs.alive() if node.id not in going)
    return [
        Place(node.id, node.address, node.head, node.labels, _named(node.total), _named(available.get(node.id, {})))
        for node in usable
    ]


def draining() -> dict[str, float]:
    """{node id: seconds left} of every node that is being drained; inf without a deadline, never below zero.

    One request, under a millisecond: rank 0 may ask every second, without the other ranks.
    """
    now = time.time()
    return {node: max(0.0, deadline - now) for node, deadline in Gcs.of_this_process().draining().items()}


def choose_interface(address: str) -> None:
    """Before a process meets others over gloo: it uses the network card that has this address, by which Ray knows it.

    Gloo takes the card of whatever this host's name resolves to: that may be loopback, where no other machine is. What
    the user has set stays.
    """
    cards = psutil.net_if_addrs().items()
    card = next((name for name, its in cards if any(one.address == address for one in its)), None)
    if card is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", card)


def _named(resources: dict[str, float]) -> dict[str, float]:
    return {name: resources.get(name, 0.0) for name in NAMES}
