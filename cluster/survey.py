"""Asks all nodes of a connected cluster at once; each is asked by tasks that run on it.

Invariant: a node that is gone, hangs or lacks what a task needs takes nothing from the answers of the others: in the
place of its own stands why there is none.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.nodes import Place

ANSWER_S = 120.0  # for a node: a worker process has to start there
THREADS = 256  # nodes that are asked at once

T = TypeVar("T")


@dataclass(frozen=True)
class Silent:
    """In place of an answer. reason: one line."""

    reason: str


def each(nodes: Sequence[Place], look: Callable[[Place], T]) -> dict[str, T | Silent]:
    """{node id: look(node)}, every node in a thread of its own; Silent where Ray raised an error."""
    from ray.exceptions import RayError

    def safely(node: Place) -> T | Silent:
        try:
            return look(node)
        except RayError as error:
            return Silent(why(error))

    with ThreadPoolExecutor(max(1, min(len(nodes), THREADS))) as pool:
        return dict(zip((node.id for node in nodes), pool.map(safely, nodes)))


def on(node: str, function: Callable[..., T], *arguments: Any) -> T:
    """function(*arguments) in a task on the node with this id, which takes no CPU. Raises RayError."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.get(
        ray.remote(num_cpus=0)(function).options(scheduling_strategy=there).remote(*arguments), timeout=ANSWER_S
    )


def why(error: BaseException) -> str:
    """An error of Ray's in one line: the last, for the lines above are where it happened."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
