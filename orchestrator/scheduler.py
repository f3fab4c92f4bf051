"""One loop: stages whose parents are done, as many side by side as the machines hold, in YAML order.

Invariant: a stage starts when everything it needs is done and what it asks for fits beside what runs; a failed stage
blocks only what needs it. Each running stage is one thread of the driver; this loop alone decides.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from modeling.errors import UserError
from orchestrator.graph import ready
from orchestrator.placement import Machine, asked, fits, shown
from orchestrator.sharing import distinct_needs
from orchestrator.spec import Experiment

POLL_S = 0.25


def check_demand(experiment: Experiment, stages: Iterable[str], machines: Sequence[Machine]) -> None:
    """Raises UserError for a stage that can never start on these machines: Ray would wait for ever.

    machines: as large as they are in all, those that may still be started too.
    """
    for name in stages:
        resources = experiment.stages[name].params.resources
        if not fits(resources, (), machines):
            lower = "workers" if resources.least > 1 else "gpus" if resources.gpus else "cpus"
            raise UserError(
                f"asks for {asked(resources)}, and there are {shown(machines)}",
                where=f"stages.{name}.resources",
                remedy=f"ask for less, e.g. stages.{name}.resources.{lower}={_less(resources, lower)}, connect to a "
                "larger cluster, or declare under 'cluster.nodes' the machines that it may start",
            )


def _less(resources: Any, name: str) -> str:
    return "1" if name == "workers" else "0" if name == "gpus" else "1"


def run_all(
    experiment: Experiment,
    done: set[str],
    machines: Callable[[], Sequence[Machine]],
    start: Callable[[str], None],
    watch: Callable[[set[str]], Any],
    stopping: Callable[[], bool] = lambda: False,
    shared: Mapping[str, str] | None = None,
    queued: Callable[[str, str], Any] = lambda name, reason: None,
) -> dict[str, BaseException]:
    """Run every stage that is not done. start(name) runs one to its end; watch(running) is called between; once
    stopping() says so no other stage starts. machines(): as they are now, in all. shared: stages that others make
    (sharing.py); these are not started. queued(name, reason): of a stage that is ready and has to wait.

    Returns the errors by stage; empty where all are done. Raises UserError before anything starts.
    """
    needs = distinct_needs(experiment.needs, shared or {})
    check_demand(experiment, [name for name in needs if name not in done], machines())
    done = set(done)
    failed: dict[str, BaseException] = {}
    running: dict[Future, str] = {}
    pool = ThreadPoolExecutor(max_workers=max(1, len(needs)), thread_name_prefix="stage")
    try:
        while True:
            waiting = [] if stopping() else ready(needs, done, set(running.values()), failed)
            there = machines() if waiting else []
            for name in waiting:
                beside = [experiment.stages[other].params.resources for other in running.values()]
                resources = experiment.stages[name].params.resources
                # alone it starts in any case: a node that is away may come back, and the stage itself waits for room
                if not running or fits(resources, beside, there):
                    running[pool.submit(start, name)] = name
                else:
                    others = ", ".join(sorted(running.values()))
                    queued(name, f"asks for {asked(resources)}, which does not fit beside {others} on {shown(there)}")
            watch(set(running.values()))
            if not running:
                break
            finished, _ = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED)
            for future in finished:
                name = running.pop(future)
                error = future.exception()
                if error is None:
                    done.add(name)
                else:
                    failed[name] = error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # nothing runs by now, unless the user interrupted
    return failed
