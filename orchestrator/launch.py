"""The only file that imports ray.train: starts one attempt of a stage on Ray.

One attempt is one fit() of a fixed size, under a run name of its own, with Ray's own retries off: Ray retries a
KeyError like a lost node, at once, with budgets in memory only, and its snapshot is no commit.
What Ray returns is only an error to classify; what counts is in the ledger (docs/design.md, "Attempts").
"""

import logging
import os
import tempfile
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

# Read by Ray when it is imported or started: poll the worker group five times a second, not every two seconds
# (a no-op fit() takes 8 s for 11 s), and no usage reports.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Rank 0 hears of a drain itself (_notices); Ray's own watcher would end the group at the deadline, whatever it does
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
# a group that cannot be placed is our policy's business, not Ray's (it would try on for ever in one fit())
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
# a worker that asked for no GPU sees none, so that the same stage runs alike on any machine
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")

from modeling.errors import UserError
from orchestrator import raystart, warmup
from orchestrator.ahead import Ahead
from orchestrator.checkpoints import token_name
from orchestrator.courier import Notice
from orchestrator.dataflow import stream
from orchestrator.errors import Fenced, Preempted, StorageTransient, user_error
from orchestrator.ledger import Ledger
from orchestrator.places import telling
from orchestrator.redaction import guarded
from orchestrator.stageio import StoreIO, Task
from orchestrator.store import open_store
from stages.kinds import KINDS
from stages.params import Resources

NO_DEADLINE_S = 60.0  # a drain that names no deadline: it waits for the work to end
OVER_LOOK_S = 0.05  # between two looks whether a worker group is over
LATE_S = 5.0  # for the last fit() to end when Ray is stopped

log = logging.getLogger(__name__)

_fits: list[Future[None]] = []  # of this process


def stop_ray() -> None:
    wait(_fits, LATE_S)
    raystart.end()


def run_attempt(task: Task, stopping: Callable[[], bool] = lambda: False) -> None:
    """Run one attempt to its end. Raises what ended it: the worker's own exception where there is one.

    stopping(): the driver was asked to stop; what runs in the driver ends at its next item, and training when rank 0
    has learned of it (attendant.py).
    """
    kind = KINDS[task.kind]

    def until_stopped(run: Callable) -> Callable:
        def results(function: Callable[[Any], Any], items: Any, resources: Resources) -> Iterator[Any]:
            for result in run(function, items, resources):
                if stopping():
                    raise Preempted("the driver was asked to stop")
                yield result

        return results

    io = StoreIO(task, mapper=until_stopped(ray_map), streamer=until_stopped(stream))
    try:
        if not kind.trains:
            kind.run(io)
            return
        kind.prepare(io)
    finally:
        io.close()
    if stopping():
        raise Preempted("the driver was asked to stop")
    _fit(task)


def _fit(task: Task) -> None:
    """One fit() to its end, or to that of its worker group where the result is committed by then: all that is left is
    that Ray waits for its own cleaner, half a second on average, and that goes on beside the next stage."""
    folder = tempfile.TemporaryDirectory(prefix="stageline-ray-")
    over, environment = Path(folder.name) / "over", Path(folder.name) / "environment"
    pool = ThreadPoolExecutor(1, "fit")
    fit = pool.submit(_train, task, over, environment)
    pool.shutdown(wait=False)
    _fits.append(fit)
    fit.add_done_callback(_fits.remove)
    fit.add_done_callback(lambda _: folder.cleanup())
    ahead = Ahead(task, environment) if warmup.running() else None
    while not over.exists() and not fit.done():
        wait([fit], OVER_LOOK_S)
        if ahead:
            ahead.look()
    if not fit.done() and _committed(task):
        return fit.add_done_callback(_tell_late)
    try:
        fit.result()
    except Exception as error:
        mistake = user_error(error)
        if mistake is None:
            raise
        raise mistake from None  # `error` holds it: as its cause it would close a ring


def _committed(task: Task) -> bool:
    try:
        return Ledger(open_store(task.storage), task.prefix).state().completed is not None
    except StorageTransient:  # fit() says what there is to say
        return False


def _tell_late(fit: Future[None]) -> None:
    if error := fit.exception():
        log.warning("after its result was committed an attempt ended with %r", error)


def _train(task: Task, over: Path, environment: Path) -> None:
    """Ray Train's fit(). On this machine, where Ray runs its controller, it makes two files. environment: the workers'
    runtime environment, once they run; over: once none is left."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.torch.config import _TorchBackend
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback  # the public ones tell of no end

    class Backend(_TorchBackend):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(_meet)
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):
        @property
        def backend_cls(self) -> type:
            return Backend

    class Tell(WorkerGroupCallback):
        def after_worker_group_start(self, worker_group: Any) -> None:
            import ray

            part = environment.with_suffix(".part")
            part.write_text(ray.get_runtime_context().get_runtime_env_string())
            part.rename(environment)

        def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
            over.touch()

    resources: Resources = task.params.resources
    TorchTrainer(
        _work,
        train_loop_config={"task": task},
        torch_config=Config(backend="nccl" if resources.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=task.workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker={"CPU": resources.cpus, **({"GPU": resources.gpus} if resources.gpus else {})},
            label_selector=resources.selector or None,
        ),
        run_config=RunConfig(
            name=f"{task.experiment}-{task.stage}-{task.fingerprint[:16]}-{token_name(task.token)}",
            storage_path=str(over.parent),
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
            callbacks=[Tell()],  # pyright: ignore[reportArgumentType]
        ),
    ).fit()


def _meet() -> None:
    """In a worker, before the process group is made."""
    import ray.util

    from cluster.nodes import choose_interface

    choose_interface(ray.util.get_node_ip_address())


def _work(config: dict[str, Any]) -> None:
    """The body of one worker."""
    with guarded():
        _rank(config)


def _rank(config: dict[str, Any]) -> None:
    import ray.train
    import torch.distributed

    task: Task = config["task"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    # Ray sets CUDA_VISIBLE_DEVICES and the rendezvous; DeepSpeed reads the local rank from the environment
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())
    group = _group()
    io = StoreIO(task, rank, world, notices=_notices({node for node, _ in group}))
    try:
        if rank == 0:
            io.ran_on([labels for _, labels in group])
        KINDS[task.kind].run(io)
    except BaseException as error:
        if rank == 0:
            io.log(f"stopped: {error}" if isinstance(error, UserError | Preempted | Fenced) else traceback.format_exc())
        if isinstance(error, Preempted):  # of all ranks: Ray ends them at the first that it sees, to be rank 0
            io.close()
            torch.distributed.barrier()
        raise
    finally:
        io.close()


def _group() -> list[tuple[str, dict[str, str]]]:
    """All ranks, inside the process group: by rank, the id of its node and the labels that tell its type."""
    import ray
    import torch.distributed as dist

    here = ray.get_runtime_context()
    labels: Any = here.get_node_labels()  # texts, whatever its annotation says
    group: list = [None] * dist.get_world_size()
    dist.all_gather_object(group, (here.get_node_id(), telling(labels)))
    return group


def _notices(nodes: set[str]) -> Callable[[], Notice | None]:
    """A function that asks whether one of these nodes, by id, is being drained.

    It asks GCS, in the thread of rank 0 that calls it: ray.train.get_preemption_info() is a barrier of all ranks.
    """

    def ask() -> Notice | None:
        from cluster.gcs import Unanswered
        from cluster.nodes import draining

        try:
            going = {node: left for node, left in draining().items() if node in nodes}
        except Unanswered:
            return None
        if not going:
            return None
        node, left = min(going.items(), key=lambda item: item[1])
        return min(left, NO_DEADLINE_S), f"node {node[:8]} is being drained"

    return ask


def ray_map(function: Callable[[Any], Any], items: Iterable[Any], resources: Resources) -> Iterator[Any]:
    """Results in the order of the items, at most two tasks per worker in flight."""
    import ray

    where = {"label_selector": resources.selector} if resources.selector else {}
    remote = ray.remote(_call).options(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=3, **where)
    pending: deque = deque()
    for item in items:
        pending.append(remote.remote(function, item))
        if len(pending) >= 2 * resources.most:
            yield _get(pending.popleft())
    while pending:
        yield _get(pending.popleft())


def _call(function: Callable[[Any], Any], item: Any) -> Any:
    with guarded():
        return function(item)


def _get(reference: Any) -> Any:
    import ray
    from ray.exceptions import RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
