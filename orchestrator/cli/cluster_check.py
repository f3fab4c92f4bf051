"""`stageline cluster check`: are the nodes of a running cluster fit for an experiment?

From outside it is a Ray job on the head, which prints what it finds; with --here it runs on a machine of the cluster.
"""

import argparse
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from rich.table import Table

from cluster.facts import Facts, Peer, facts
from modeling.errors import UserError
from orchestrator.bundle import EXPERIMENT
from orchestrator.checkup import problems, remarks
from orchestrator.cli.jobs import follow
from orchestrator.cli.watch import console_for_output
from orchestrator.errors import StorageTransient
from orchestrator.jobs import Jobs, address_of
from orchestrator.spec import Experiment, load_spec

ANSWER_S = 120.0  # for a node: a worker process has to start there
MEASURE_S = 180.0
CLOCK_LOOKS = 3

T = TypeVar("T")


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("experiment", nargs="?", help="its storage and its stages' resources are checked, too")
    sub.add_argument("overrides", nargs="*", help="settings on top of the file")
    sub.add_argument("--address", metavar="URL", help="the dashboard of the cluster's head, as for submit")
    sub.add_argument("--here", action="store_true", help="this machine is one of the cluster: look from here")
    sub.add_argument("--megabytes", type=int, default=64, help="of the all-reduce that is timed (default 64)")
    sub.add_argument("--base", metavar="DIR", help="that relative paths in the file count from (default: its folder)")
    sub.add_argument("--python", default="python", help="the cluster's, with Ray in it (default: python of its PATH)")


def run(options: argparse.Namespace) -> int:
    """Exit code 2 where there is a problem, 0 where there are remarks at most."""
    experiment = load_spec(options.experiment, options.overrides, options.base) if options.experiment else None
    if options.here:
        return _look(experiment, options.megabytes)
    jobs = Jobs(address_of(options.address))
    if jobs.open_to_anyone():
        print("remark: this cluster answers without a token → start it with RAY_AUTH_MODE=token", flush=True)
    command = [options.python, "-m", "orchestrator.cli.main", "cluster", "check"]
    command += [EXPERIMENT, *options.overrides] if experiment else []
    if experiment is not None and jobs.here():
        command += ["--base", str(experiment.path.absolute().parent)]
    command += ["--here", "--megabytes", str(options.megabytes)]
    job = jobs.start(f"check-{secrets.token_hex(4)}", command, experiment.path if experiment else None, {})
    return 0 if follow(jobs, job) == 0 else 2


def _look(experiment: Experiment | None, megabytes: int) -> int:
    import ray

    from cluster.nodes import places
    from orchestrator.capacity import Capacity
    from orchestrator.scheduler import check_demand

    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise UserError("no Ray cluster runs on this machine", where="--here",
                        remedy="leave --here out and give --address of the head's dashboard") from error  # fmt: skip
    console = console_for_output()
    try:
        there = places()
        found = [_facts(place, experiment) for place in there]
        table = Table(box=None, pad_edge=False)
        for title in (
            "node",
            "address",
            "CPUs",
            "GPUs",
            "python",
            "ray",
            "torch",
            "code",
            "/dev/shm",
            "clock",
            "storage",
        ):
            table.add_column(title, overflow="fold")
        for place, its in zip(there, found):
            gpus = f"{place.total['GPU']:g}" + (f" {its.gpus[0]}" if its.gpus else "")
            storage = "" if experiment is None else "fit" if not its.storage else "see below"
            table.add_row(
                its.host + (" (head)" if place.head else ""), its.address, f"{place.total['CPU']:g}", gpus,
                *(its.versions[name] for name in ("python", "ray", "torch", "stageline")),
                f"{its.shared / 1e9:.1f} GB", f"{its.time:+.2f} s", storage,
            )  # fmt: skip
        console.print(table)
        workers = [place for place in there if place.total["CPU"] > 0 or place.total["GPU"] > 0]
        told = list(problems(found))
        try:
            console.print(_bandwidth(workers, megabytes), markup=False)
        except Exception as error:  # told as what it is: the nodes cannot train together
            remedy = "open all ports between them; GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the network card"
            told.append(f"an all-reduce between the nodes fails: {str(error).strip().splitlines()[-1]} → {remedy}")
        if experiment is not None:
            try:
                check_demand(experiment, experiment.stages, Capacity(experiment.cluster).machines())
            except UserError as error:
                told.append(str(error))
        for text in told:
            console.print(f"problem: {text}", markup=False)
        for text in remarks(found):
            console.print(f"remark: {text}", markup=False)
        console.print(f"{len(found)} nodes, {len(told)} problems")
        return 2 if told else 0
    finally:
        ray.shutdown()


def _facts(place: Any, experiment: Experiment | None) -> Facts:
    """Its `time` is what its clock shows beyond this machine's."""
    its = _on(place.id, facts, place.address)
    looks = []
    for _ in range(CLOCK_LOOKS):
        before = time.time()
        then, after = _on(place.id, _clock), time.time()
        looks.append((after - before, then - (before + after) / 2))
    skew = min(looks)[1]  # of the quickest answer
    storage = _on(place.id, storage_problem, experiment.storage) if experiment else ""
    return replace(its, time=skew, storage=storage, labels=place.labels)


def _clock() -> float:
    return time.time()


def storage_problem(storage: str) -> str:
    """On a node: why the storage cannot serve a run from here, or an empty text."""
    from orchestrator.probe import probe
    from orchestrator.store import open_store

    try:
        probe(open_store(storage))
        return ""
    except (UserError, StorageTransient) as error:
        return str(error)


def _on(node: str, function: Callable[..., T], *arguments: Any) -> T:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.get(
        ray.remote(num_cpus=0)(function).options(scheduling_strategy=there).remote(*arguments), timeout=ANSWER_S
    )


def _bandwidth(workers: list[Any], megabytes: int) -> str:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if len(workers) < 2:
        return "all-reduce: one node that can work, nothing to measure"
    gpus = all(place.total["GPU"] >= 1 for place in workers)
    peers = [
        ray.remote(num_cpus=0, num_gpus=int(gpus))(Peer)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(place.id, soft=False))
        .remote(place.address, gpus)
        for place in workers
    ]
    meet = ray.get(peers[0].rendezvous.remote(), timeout=ANSWER_S)
    measured = [peer.all_reduce.remote(meet, rank, len(peers), megabytes) for rank, peer in enumerate(peers)]
    speed = min(ray.get(measured, timeout=MEASURE_S))
    name = "NCCL" if gpus else "gloo"
    return f"all-reduce: {name}, {len(peers)} nodes, {megabytes} MiB: {speed / 1e9:.2f} GB/s bus bandwidth"
