"""One loop: stages whose parents are done, as many side by side as the resources hold, in YAML order.

Invariant: a stage starts when everything it needs is done and what it asks for is free; a failed stage blocks only
what needs it. Each running stage is one thread of the driver; this loop alone decides.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from modeling.errors import UserError
from orchestrator.graph import ready
from orchestrator.sharing import distinct_needs
from orchestrator.spec import Experiment, Stage

POLL_S = 0.25


def demand(stage: Stage, most: bool = False) -> dict[str, float]:
    """What a stage needs at least, or occupies at most, while it runs: {CPU, GPU}."""
    resources = stage.params.resources
    workers = resources.most if most else resources.least
    return {"CPU": workers * resources.cpus, "GPU": workers * resources.gpus}


def fits(stage: Stage, running: Iterable[Stage], available: dict[str, float]) -> bool:
    """Whether the stage's demand fits beside those that run. Summed anew: taking off and adding back would drift."""
    beside = [demand(stage), *(demand(other, most=True) for other in running)]
    return all(sum(one[what] for one in beside) <= available.get(what, 0.0) + 1e-9 for what in beside[0])


def check_demand(experiment: Experiment, stages: list[str], available: dict[str, float]) -> None:
    """Raises UserError for a stage that can never start here: Ray would wait for ever."""
    for name in stages:
        for what, amount in demand(experiment.stages[name]).items():
            if amount > available.get(what, 0.0):
                resources = experiment.stages[name].params.resources
                each = resources.cpus if what == "CPU" else resources.gpus
                raise UserError(
                    f"asks for {resources.least} workers × {each:g} {what}, and there are {available.get(what, 0):g}",
                    where=f"stages.{name}.resources",
                    remedy=f"lower it, e.g. stages.{name}.resources.workers=1, or connect to a larger cluster",
                )


def run_all(
    experiment: Experiment,
    done: set[str],
    available: dict[str, float],
    start: Callable[[str], None],
    watch: Callable[[set[str]], Any],
    stopping: Callable[[], bool] = lambda: False,
    shared: Mapping[str, str] | None = None,
) -> dict[str, BaseException]:
    """Run every stage that is not done. start(name) runs one to its end; watch(running) is called between; once
    stopping() says so no other stage starts. shared: stages that others make (sharing.py); these are not started.

    Returns the errors by stage; empty where all are done. Raises UserError before anything starts.
    """
    needs = distinct_needs(experiment.needs, shared or {})
    check_demand(experiment, [name for name in needs if name not in done], available)
    done = set(done)
    failed: dict[str, BaseException] = {}
    running: dict[Future, str] = {}
    pool = ThreadPoolExecutor(max_workers=max(1, len(needs)), thread_name_prefix="stage")
    try:
        while True:
            for name in [] if stopping() else ready(needs, done, set(running.values()), failed):
                beside = [experiment.stages[other] for other in running.values()]
                if fits(experiment.stages[name], beside, available):
                    running[pool.submit(start, name)] = name
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
