"""The only file that asks Ray's global control service (GCS) about nodes, and tells it that one will go.

Invariant: every question ends within TIMEOUT_S and raises Unanswered instead of waiting; none needs ray.init(), so an
agent is no Ray driver. It stands on Ray's GcsClient, which Ray's own command line (`ray drain-node`), autoscaler and
preemption watcher use, but which is no public API: hence one file, and Ray pinned below 2.61.
"""

import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

TIMEOUT_S = 2.0
CONNECT_TIMEOUT_S = 1.0  # of a TCP connection to a raylet

T = TypeVar("T")


class Unanswered(Exception):
    """GCS did not answer. Ask again."""


@dataclass(frozen=True)
class Node:
    """A node that GCS counts among the living. id: hex. total: resources by name, e.g. {"CPU": 8.0, "GPU": 1.0}."""

    id: str
    address: str
    port: int  # of its raylet
    head: bool
    total: dict[str, float] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.id[:8]} at {self.address}:{self.port}"


class Gcs:
    """One cluster's GCS. Safe to use from several threads."""

    def __init__(self, address: str, client: Any):
        self.address, self._client = address, client

    @classmethod
    def connect(cls, address: str) -> "Gcs":
        """address: host:port, as `ray start --head` prints it. Raises Unanswered.

        The only call that may take longer than TIMEOUT_S: Ray's client waits 40 seconds for a mute GCS, or
        RAY_gcs_rpc_server_connect_timeout_s + RAY_py_gcs_connect_timeout_s as they were when Ray was imported.
        """
        host, _, port = address.rpartition(":")
        if not reachable(host, int(port)):
            raise Unanswered(f"nobody listens at {address}")
        from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]

        gcs = cls(address, None)
        gcs._client = gcs._ask(lambda: GcsClient(address=address))
        return gcs

    @classmethod
    def of_this_process(cls) -> "Gcs":
        """The one that this driver or worker is connected to. Raises ray.exceptions.RaySystemError without ray.init."""
        import ray
        from ray._private.worker import global_worker

        client = global_worker.gcs_client  # pyright: ignore[reportAttributeAccessIssue]
        return cls(ray.get_runtime_context().gcs_address, client)

    def alive(self) -> list[Node]:
        """Nodes that have not been declared dead; one whose machine is gone stays for up to a health check's time."""
        from ray.core.generated.gcs_pb2 import GcsNodeInfo  # pyright: ignore[reportAttributeAccessIssue]

        return [
            Node(
                info.node_id.hex(),
                info.node_manager_address,
                info.node_manager_port,
                info.is_head_node,
                dict(info.resources_total),
                dict(info.labels),
            )
            for info in self._ask(lambda: self._client.get_all_node_info(timeout=TIMEOUT_S)).values()
            if info.state == GcsNodeInfo.ALIVE
        ]

    def available(self) -> dict[str, dict[str, float]]:
        """Resources not taken by leases and placement groups, by node; as old as the node's last report (0.1 s)."""
        from ray.core.generated.autoscaler_pb2 import GetClusterResourceStateReply  # pyright: ignore[reportAttributeAccessIssue]

        answer = self._ask(lambda: self._client.get_cluster_resource_state(timeout_s=TIMEOUT_S))
        state = GetClusterResourceStateReply.FromString(answer).cluster_resource_state
        return {node.node_id.hex(): dict(node.available_resources) for node in state.node_states}

    def other_jobs(self) -> list[str]:
        """Who else is connected and may hold resources: a job's submission id, or the process of a driver."""
        import ray

        mine = ray.get_runtime_context().get_job_id()
        jobs = self._ask(lambda: self._client.get_all_job_info(timeout=TIMEOUT_S)).values()
        return [
            dict(job.config.metadata).get("job_submission_id") or f"process {job.driver_pid} on {job.driver_ip_address}"
            for job in jobs
            if not job.is_dead and job.job_id.hex() != mine and not job.config.ray_namespace.startswith("_ray_internal")
        ]

    def draining(self) -> dict[str, float]:
        """Unix time of the deadline of every node that is being drained; inf where it has none."""
        deadlines = self._ask(lambda: self._client.get_draining_nodes(timeout=TIMEOUT_S))
        return {node: deadline / 1000 if deadline else float("inf") for node, deadline in deadlines.items()}

    def drain(self, node_id: str, deadline_s: float, message: str) -> None:
        """Announce that the node goes in `deadline_s` seconds. A second call moves the deadline.

        Ray places nothing new there; a node without work leaves the cluster at once, another when its work ends.
        Nobody in Ray kills it at the deadline, and nothing takes a drain back. Raises Unanswered, and LookupError for
        a node that is not alive (GCS itself accepts any id).
        """
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # pyright: ignore[reportAttributeAccessIssue]

        if node_id not in {node.id for node in self.alive()}:
            raise LookupError(f"no node {node_id[:8]} is alive in the cluster at {self.address}")
        accepted, why = self._ask(
            lambda: self._client.drain_node(
                node_id,
                DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
                message,
                int((time.time() + max(0.0, deadline_s)) * 1000),
                timeout=TIMEOUT_S,
            )
        )
        if not accepted:  # Ray says that it never refuses this reason
            raise Unanswered(f"the drain of {node_id[:8]} was refused: {why}")

    def _ask(self, call: Callable[[], T]) -> T:
        from ray.exceptions import RpcError

        try:
            return call()
        except RpcError as error:
            raise Unanswered(f"GCS at {self.address}: {error}") from error


def reachable(host: str, port: int) -> bool:
    """Whether a connection is accepted within CONNECT_TIMEOUT_S: a killed process refuses, a gone machine is mute."""
    try:
        with socket.create_connection((host, port), CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False


def reachable_nodes(nodes: Iterable[Node]) -> list[Node]:
    """Those whose raylet accepts a connection; all are tried at once."""
    nodes = list(nodes)
    if not nodes:
        return []
    with ThreadPoolExecutor(min(64, len(nodes))) as pool:
        answers = list(pool.map(lambda node: reachable(node.address, node.port), nodes))
    return [node for node, answer in zip(nodes, answers) if answer]


def here(nodes: Iterable[Node]) -> list[Node]:
    """The nodes whose address is one of this machine's."""
    import psutil

    addresses: set[Any] = {address.address for card in psutil.net_if_addrs().values() for address in card}
    return [node for node in nodes if node.address in addresses or node.address.startswith("127.")]
