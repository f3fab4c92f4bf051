"""The only file that imports ray.train: starts one attempt of a stage on Ray.

One attempt is one fit() of a fixed size, under a run name of its own, with Ray's own retries off: Ray retries a
KeyError like a lost node, at once, with budgets in memory only, and its snapshot is no commit.
What Ray returns is only an error to classify; what counts is in the ledger (docs/design.md, "Attempts").
"""

import os
import tempfile
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

# Read by Ray when it is imported or started: poll the worker group five times a second, not every two seconds
# (a no-op fit() takes 8 s for 11 s), and no usage reports.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# a worker that asked for no GPU sees none, so that the same stage runs alike on any machine
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")

from modeling.errors import UserError
from orchestrator.errors import user_error
from orchestrator.progress import token_name
from orchestrator.stageio import StoreIO, Task
from stages.kinds import KINDS
from stages.params import Resources


def start_ray(address: str | None) -> dict[str, float]:
    """Connect to `address`, or start a Ray of our own on loopback; returns the cluster's resources."""
    import ray

    if not ray.is_initialized():
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if address:
            ray.init(address=address, **common)
        else:
            ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **common)
    return dict(ray.cluster_resources())


def stop_ray() -> None:
    import ray

    ray.shutdown()


def run_attempt(task: Task) -> None:
    """Run one attempt to its end. Raises what ended it: the worker's own exception where there is one."""
    kind = KINDS[task.kind]
    io = StoreIO(task, mapper=ray_map)
    try:
        if not kind.trains:
            kind.run(io)
            return
        kind.prepare(io)
    finally:
        io.close()
    _fit(task)


def _fit(task: Task) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources: Resources = task.params.resources
    with tempfile.TemporaryDirectory(prefix="stageline-ray-") as folder:
        trainer = TorchTrainer(
            _work,
            train_loop_config={"task": task},
            torch_config=TorchConfig(backend="nccl" if resources.gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=resources.workers,
                use_gpu=resources.gpus > 0,
                resources_per_worker={"CPU": resources.cpus, **({"GPU": resources.gpus} if resources.gpus else {})},
            ),
            run_config=RunConfig(
                name=f"{task.stage}-{task.fingerprint[:16]}-{token_name(task.token)}",
                storage_path=folder,
                failure_config=FailureConfig(max_failures=0),
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            mistake = user_error(error)
            if mistake is None:
                raise
            raise mistake from None  # `error` holds it: as its cause it would close a ring


def _work(config: dict[str, Any]) -> None:
    """The body of one worker."""
    import ray.train

    task: Task = config["task"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    # Ray sets CUDA_VISIBLE_DEVICES and the rendezvous; DeepSpeed reads the local rank from the environment
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())
    io = StoreIO(task, rank, world)
    try:
        KINDS[task.kind].run(io)
    except BaseException as error:
        if rank == 0:
            io.log(f"stopped: {error}" if isinstance(error, UserError) else traceback.format_exc())
        raise
    finally:
        io.close()


def ray_map(function: Callable[[Any], Any], items: Iterable[Any], resources: Resources) -> Iterator[Any]:
    """Results in the order of the items, at most two tasks per worker in flight."""
    import ray

    remote = ray.remote(_call).options(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=3)
    pending: deque = deque()
    for item in items:
        pending.append(remote.remote(function, item))
        if len(pending) >= 2 * resources.workers:
            yield _get(pending.popleft())
    while pending:
        yield _get(pending.popleft())


def _call(function: Callable[[Any], Any], item: Any) -> Any:
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
