"""One loop: stages whose parents are done, as many side by side as the machines hold, in YAML order.

Invariant: a stage starts when everything it needs is done and what it asks for fits beside what runs; a failed stage
blocks only what needs it. Each running stage is one thread of the driver; this loop alone decides.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from modeling.errors import UserError
from orchestrator.graph import ready
from orchestrator.placement import Machine, allows, asked, fits, fitting, shown
from orchestrator.sharing import distinct_needs
from orchestrator.spec import Experiment
from stages.params import Resources

POLL_S = 0.25


def check_demand(experiment: Experiment, stages: Iterable[str], machines: Sequence[Machine]) -> None:
    """Raises UserError for a stage that can never start on these machines: Ray would wait for ever.

    machines: as large as they are in all, those that may still be started too; none: it is not known now, and stages
    wait for room by themselves.
    """
    for name in stages if machines else ():
        resources = experiment.stages[name].params.resources
        if not fits(resources, (), machines):
            raise UserError(
                f"asks for {asked(resources)}, and there are {shown(machines)}",
                where=f"stages.{name}.resources",
                remedy=f"{_remedy(f'stages.{name}.resources', resources, machines)}, connect to a larger cluster, or "
                "declare under 'cluster.nodes' the machines that it may start",
            )


def _remedy(field: str, resources: Resources, machines: Sequence[Machine]) -> str:
    """What to change at `field` so that they would do; where no machine is meant, size is not what is in the way."""
    meant = [machine for machine in machines if allows(machine.labels, resources.selector)]
    if meant or not resources.selector:
        less = _less(resources, meant)
        return f"ask for less, e.g. {field}.{less}" if less else "ask for less"
    wrong = [
        label for label, value in resources.selector.items()
        if not any(allows(machine.labels, {label: value}) for machine in machines)
    ]  # fmt: skip
    if not wrong:
        return f"leave one of {', '.join(resources.selector)} out of {field}: no node has them all"
    parts = []
    for label in wrong:
        setting = "labels" if label in resources.labels else "accelerator"
        there = ", ".join(sorted({machine.labels[label] for machine in machines if label in machine.labels}))
        named = f"{field}.{setting}" + (f" ({label})" if setting == "labels" else "")
        parts.append(f"set {named} to what is there ({there}) or leave it out" if there else f"leave {named} out")
    return ", ".join(parts)


def _less(resources: Resources, machines: Sequence[Machine]) -> str:
    """'workers=2': one setting that is enough to make it fit; '' where no single one is."""
    gpus, cpus = (max((machine.room.get(what, 0.0) for machine in machines), default=0.0) for what in ("GPU", "CPU"))
    tries = [("workers", fitting(resources, machines)), ("gpus", gpus), ("cpus", cpus), ("cpus", 1)]
    for name, value in tries:
        asks = resources.least if name == "workers" else getattr(resources, name)
        possible = value < asks and (value > 0 or name == "gpus")
        if possible and fits(resources.model_copy(update={name: value}), (), machines):
            return f"{name}={value:g}"
    return ""


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
