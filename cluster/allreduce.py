"""How fast nodes reduce together, measured by one actor on each: NCCL between GPU nodes, gloo between others.

Invariant: only nodes that are free take part, so that a measurement waits for nobody's work and disturbs none; which
those are is told by who asks (orchestrator/checkup.py).
"""

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.nodes import Place, choose_interface
from cluster.survey import ANSWER_S, Silent, each, why

MEASURE_S = 180.0
WARM, ROUNDS = 2, 5  # all-reduces before the measured ones, and those


@dataclass(frozen=True)
class Measured:
    """speed: bytes a second of bus bandwidth; None where fewer than two nodes took part, or where it failed: error.
    late: {node id: why it did not take part after all}."""

    nodes: int
    speed: float | None = None
    error: str = ""
    late: dict[str, str] = field(default_factory=dict)


class Peer:
    """One rank; an actor on its node, with one GPU where it measures NCCL."""

    def __init__(self, address: str, gpus: bool):
        self._address, self._gpus = address, gpus

    def rendezvous(self) -> str:
        """host:port on this node, free a moment ago."""
        with socket.create_server((self._address, 0)) as server:
            return f"{self._address}:{server.getsockname()[1]}"

    def all_reduce(self, rendezvous: str, rank: int, world: int, megabytes: int) -> float:
        """Bus bandwidth in bytes a second: 2 (n - 1) / n of the buffer over the median time (nccl-tests' busbw)."""
        import torch
        import torch.distributed as dist

        if not self._gpus:
            choose_interface(self._address)
        backend, device = ("nccl", "cuda") if self._gpus else ("gloo", "cpu")
        dist.init_process_group(backend, init_method=f"tcp://{rendezvous}", rank=rank, world_size=world)
        try:
            buffer = torch.ones(megabytes * 2**20 // 4, device=device)
            seconds = []
            for _ in range(WARM + ROUNDS):
                dist.barrier()
                began = time.perf_counter()
                dist.all_reduce(buffer)
                if self._gpus:
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
                buffer.fill_(1.0)
            median = sorted(seconds[WARM:])[ROUNDS // 2]
            return 2 * (world - 1) / world * buffer.numel() * 4 / median
        finally:
            dist.destroy_process_group()


def measure(nodes: Sequence[Place], gpus: bool, megabytes: int) -> Measured:
    """Of these nodes, one rank on each. megabytes: MiB of the buffer."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if len(nodes) < 2:
        return Measured(len(nodes))
    peers = {
        node.id: ray.remote(num_cpus=0, num_gpus=int(gpus))(Peer)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False))
        .remote(node.address, gpus)
        for node in nodes
    }
    try:
        answers = each(nodes, lambda node: ray.get(peers[node.id].rendezvous.remote(), timeout=ANSWER_S))
        late = {node: answer.reason for node, answer in answers.items() if isinstance(answer, Silent)}
        ready = [node.id for node in nodes if node.id not in late]
        if len(ready) < 2:
            return Measured(len(ready), late=late)
        meet = answers[ready[0]]
        measured = [peers[node].all_reduce.remote(meet, rank, len(ready), megabytes) for rank, node in enumerate(ready)]
        try:
            return Measured(len(ready), min(ray.get(measured, timeout=MEASURE_S)), late=late)
        except RayError as error:
            return Measured(len(ready), error=why(error), late=late)
    finally:
        for peer in peers.values():
            ray.kill(peer)  # pyright: ignore[reportArgumentType]
