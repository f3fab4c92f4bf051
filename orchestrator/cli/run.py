"""`stageline run`: bring every stage to completion, then show what the evaluations measured and the next command.

Ray is imported only where a stage has to run: when all are reused nothing heavier than the YAML is read.
"""

import argparse
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from modeling.errors import UserError
from orchestrator.address import redact
from orchestrator.cli.watch import Watch, console_for_output, duration, tell
from orchestrator.drivernote import QUEUED, DriverNote, submitted_as
from orchestrator.fingerprint import Identity
from orchestrator.ledger import Ledger
from orchestrator.plan import StagePlan, plan_experiment, read_mappings, record_mapping
from orchestrator.probe import probe, reach
from orchestrator.sharing import distinct_needs, shared_with
from orchestrator.spec import Experiment, load_spec
from orchestrator.store import Store, open_store
from orchestrator.tracking.follow import Tracking
from stages.evaluate import figures

UNKNOWN = ("unknown", "blocked")
INTERRUPTED = "stageline: interrupted; run again to go on from the last checkpoints"
STOPPED_S = 60.0  # for a job to be stopped by whoever asked it to
LEAVE_S = 600.0  # after which a stage that has not stopped is left behind; a second signal leaves at once


def run(options: argparse.Namespace) -> int:
    began = time.monotonic()
    experiment = load_spec(options.experiment, options.overrides, options.base)
    store = open_store(experiment.storage)
    reach(store)
    identities, plans = plan_experiment(experiment, store)
    for item in plans:
        if item.action in UNKNOWN:
            raise UserError(
                f"cannot run: {item.reason}",
                where=f"{options.experiment}: stages.{item.name}",
                remedy="provide it; stageline plan shows all stages",
            )
    console = console_for_output()
    by_name = {item.name: item for item in plans}
    done = {item.name for item in plans if item.action == "reuse"}
    known = read_mappings(store, experiment.name)
    for item in plans:  # what others made, or make, is this name's too
        if item.action in ("reuse", "share") and known.get(item.name, {}).get("fingerprint") != item.fingerprint:
            identity, digest = identities[item.name], item.fingerprint
            assert identity is not None and digest is not None, "unknown stages are refused above"
            record_mapping(store, experiment.name, item.name, identity, digest)
    tracking = Tracking(experiment, store, by_name, partial(tell, console))
    for item in plans:
        console.print(f"{item.name}: {item.action}" + (f" ({item.reason})" if item.reason else ""))
    failed: dict[str, BaseException] = {}
    with tracking:
        if len(done) < len(plans):
            probe(store)
            failed = _run_rest(options, experiment, store, identities, by_name, done, console, tracking)
    if failed:
        return _tell_failures(experiment, failed, by_name)
    shared, took = sum(item.action == "share" for item in plans), duration(time.monotonic() - began)
    others = f", {shared} shared" if shared else ""
    console.print(f"all {len(plans)} stages done, {len(done)} of them reused{others}, in {took}")
    _results(options, experiment, store, by_name, console)
    return 0


def _run_rest(
    options: argparse.Namespace,
    experiment: Experiment,
    store: Store,
    identities: dict[str, Identity | None],
    by_name: dict[str, StagePlan],
    done: set[str],
    console: Console,
    tracking: Tracking,
) -> dict[str, BaseException]:
    """Start Ray and run what is not done; the errors by stage.

    SIGTERM or Ctrl-C: the running stages save and stop, then the process leaves with 130; at once on a second one.
    """
    from orchestrator.attendant import Stop
    from orchestrator.capacity import Capacity
    from orchestrator.driver import Job, run_stage
    from orchestrator.errors import StorageTransient
    from orchestrator.launch import run_attempt, stop_ray
    from orchestrator.observe.links import links
    from orchestrator.observe.meters import Meters
    from orchestrator.raystart import abandon, start_ray
    from orchestrator.scheduler import run_all

    on_gpus = [n for n, s in experiment.stages.items() if n not in done and s.kind.trains and s.params.resources.gpus]
    if on_gpus:
        from orchestrator.cli.sizes import check_memory  # imports torch, so not without need

        check_memory(experiment, on_gpus)
    stop = Stop()
    stop.in_s = options.grace

    def on_signal(number, _frame):
        if not running.is_set():
            tell(INTERRUPTED)
            abandon()
        if leaving.is_set():
            raise KeyboardInterrupt
        leaving.set()
        if not stop.is_set():  # by a request through storage
            stop.reason = f"the driver got {signal.Signals(number).name}"
            stop.set()
        tell("stageline: the running stages save and stop; again to leave at once")
        leave_in(options.grace + LEAVE_S)

    def tell(message: str) -> None:
        with suppress(OSError):  # the terminal is gone
            os.write(2, f"\n{message}\n".encode())

    def leave_in(seconds: float) -> None:
        def leave() -> None:
            leaving.set()
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Timer(seconds, leave).start()

    def take_signals() -> None:
        signal.signal(signal.SIGTERM, on_signal)
        signal.signal(signal.SIGINT, on_signal)

    running, leaving = threading.Event(), threading.Event()  # leaving: the next signal ends the process at once
    take_signals()
    try:
        address = options.address or os.environ.get("RAY_ADDRESS")
        start_ray(address)
        watch = Watch(store, {name: item.prefix for name, item in by_name.items()}, console)
        capacity = Capacity(experiment.cluster if address else None)
        told: dict[str, str] = {}
        note = DriverNote(store, experiment.name, submitted_as(), links(experiment.name))

        def event(name: str, message: str) -> None:
            watch.event(name, message)
            note.event(name, message)

        def start(name: str) -> None:
            stage, item, identity = experiment.stages[name], by_name[name], identities[name]
            assert identity is not None and item.fingerprint is not None, "unknown stages are refused above"
            parents = {need: by_name[need].prefix for need in stage.params.needs}
            job = Job(experiment, stage, identity, item.fingerprint, item.prefix, parents)
            note.event(name, "starts")
            meters = Meters(store, item.prefix, experiment.name, name, stage.kind_name)
            with meters, tracking.following(name, identity):
                run_stage(store, job, run_attempt, event, stop, capacity.room, capacity.waits, capacity.wish)

        def queued(name: str, reason: str) -> None:
            if told.get(name) != reason:
                told[name] = reason
                event(name, f"{QUEUED}{reason}")

        def look(names: set[str]) -> None:
            try:
                watch(names)
                if not stop.is_set() and (asked := note.asked_to_stop()):
                    stop.in_s, stop.reason = asked
                    stop.set()
                    event("driver", f"the running stages save and stop: {stop.reason}")
                    leave_in(stop.in_s + LEAVE_S)
            except (StorageTransient, UserError) as error:  # one refused look ends nothing
                watch.event("storage", f"does not answer; what runs goes on: {error}")

        with watch:
            running.set()
            failed = run_all(
                experiment, done, capacity.machines, start, look, stop.is_set, shared_with(by_name.values()), queued
            )
        if not stop.is_set():
            return failed
        others = {name: error for name, error in failed.items() if not _stopped(error)}
        if others:
            _tell_failures(experiment, others, by_name)
        if note.asked:
            tracking.close()  # SIGTERM reaches what is below this process, too
            leaving.set()
            note.stopped()
            time.sleep(STOPPED_S)  # whoever asked has Ray stop the job, which then counts as stopped, not as failed
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stop.set()
        print(f"\n{INTERRUPTED}", file=sys.stderr, flush=True)
        tracking.close()
        stop_ray()
        os._exit(130)  # the threads of the stages wait for workers that are gone
    finally:
        stop_ray()


def _stopped(error: BaseException) -> bool:
    from orchestrator.driver import StageFailed
    from orchestrator.errors import ErrorClass

    return isinstance(error, StageFailed) and error.error_class is ErrorClass.preempted


def _tell_failures(experiment: Experiment, failed: dict[str, BaseException], by_name: dict[str, StagePlan]) -> int:
    from orchestrator.driver import StageFailed
    from orchestrator.errors import ErrorClass, classify, one_line
    from orchestrator.graph import blocked_by

    code = 2
    for name, error in failed.items():
        cause = error.error if isinstance(error, StageFailed) else error
        if isinstance(cause, UserError):
            print(f"stageline: stage {name} stopped: {cause}", file=sys.stderr)
        elif isinstance(error, StageFailed) and error.error_class is ErrorClass.fenced:
            print(f"stageline: stage {name} stopped: {error.reason} → run again to reuse its result", file=sys.stderr)
        else:
            code, kind = 1, classify(cause)
            reason = f" ({error.reason})" if isinstance(error, StageFailed) else ""
            logs = f"stageline logs {experiment.path} {name}"
            print(f"stageline: stage {name} failed: {kind}: {one_line(cause, kind)}{reason} → {logs}", file=sys.stderr)
            if kind is ErrorClass.bug:
                traceback.print_exception(cause)
    shared = shared_with(by_name.values())
    for name, maker in shared.items():
        if maker in failed:
            print(f"stageline: stage {name} is the same one as {maker}", file=sys.stderr)
    for name, culprit in blocked_by(distinct_needs(experiment.needs, shared), failed).items():
        print(f"stageline: stage {name} did not start, it needs {culprit}", file=sys.stderr)
    return code


def _results(options, experiment: Experiment, store: Store, by_name: dict[str, StagePlan], console: Console) -> None:
    """The tables of the evaluated stages, where the export lies, and the next command to try."""
    rows: list[tuple[str, str, dict]] = []
    trained, exported = [], []
    for name, item in by_name.items():
        completed = Ledger(store, item.prefix).state().completed
        if completed is None:
            continue
        if item.kind == "evaluate":
            summary = completed["summary"]
            trained.append(summary["stage"])
            rows += [(summary["stage"], form, scores) for form, scores in summary["tables"].items()]
        if item.kind == "export":
            exported.append((name, completed["manifest"]["folder"]))
    if rows:
        console.print(_table(rows))
    for name, folder in exported:
        console.print(f"{name}: {place(store, folder)}", markup=False)
    trained = [name for name in trained if name in by_name]
    example = _example_question(experiment) if trained else None
    if example:
        images, question = example
        pictures = " ".join(f"--image {os.path.relpath(image)}" for image in images)
        command = f'stageline ask {options.experiment} {trained[-1]} {pictures} "{question}"'
        console.print(f"next: {command}", soft_wrap=True, markup=False)


def place(store: Store, folder: str) -> str:
    """Where a folder of the store lies: a path of this machine, or s3://bucket/prefix/..., without keys."""
    local = store.local_path(folder)
    return os.path.relpath(local) if local else f"{redact(store.url)}/{folder}"


def _table(rows: list[tuple[str, str, dict]]) -> Table:
    """A row for each evaluated stage and form of the questions, a column for each task."""
    tasks = sorted({task for _, _, scores in rows for task in scores})
    forms = {form for _, form, _ in rows}
    table = Table(title="Accuracy [95 % interval]", title_justify="left", box=None)
    table.add_column("after stage")
    if len(forms) > 1:
        table.add_column("asked")
    for task in tasks:
        n = next(scores[task]["n"] for _, _, scores in rows if task in scores)
        table.add_column(f"{task} (n={n})", justify="right")
    for stage, form, scores in rows:
        cells = [figures.with_interval(scores[task]) if task in scores else "" for task in tasks]
        table.add_row(stage, *([form] if len(forms) > 1 else []), *cells)
    return table


def _example_question(experiment: Experiment) -> tuple[list[Path], str] | None:
    """Pictures and question of the first multi-tile sample of the last evaluated mixture."""
    from modeling.meta import read_meta
    from modeling.sources import Sample, read_samples

    prepared = [
        parent.params.data
        for stage in experiment.stages.values() if stage.kind.base == "evaluate"
        for parent in experiment.parents(stage) if parent.kind.base == "prepare"
    ]  # fmt: skip
    if not prepared:
        return None
    data = experiment.data[prepared[-1]]
    if "://" in data.meta:
        return None
    datasets = sorted(read_meta(data.meta, data.endpoint_url), key=lambda d: -(d.max_tiles or 0))
    for dataset in datasets:
        if not dataset.file.endswith(".jsonl"):
            continue
        sample = next(read_samples(dataset), None)
        if isinstance(sample, Sample) and len(sample.images) == 1 and os.path.isfile(sample.images[0].path):
            text = next(t["value"] for t in sample.conversation if t["from"] == "human")
            return [Path(sample.images[0].path)], text.replace("<image>", "").strip()
    return None
