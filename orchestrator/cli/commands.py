"""The verbs. Each reads the experiment, opens the storage, and shows what it found; `run` also changes something."""

import argparse
import os
import signal
import sys
import threading
import time
import traceback
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from modeling.errors import UserError
from orchestrator.cli.watch import Watch, duration
from orchestrator.fingerprint import source_digest_of, stage_identities
from orchestrator.ledger import Ledger, StageState
from orchestrator.liveness import alive
from orchestrator.plan import StagePlan, make_plan, read_mappings, read_previous, stage_prefix
from orchestrator.progress import read_logs, read_progress
from orchestrator.spec import Experiment, load_spec
from orchestrator.store import Store, open_store

UNKNOWN = ("unknown", "blocked")


def _console() -> Console:
    """Wide enough for whole rows where nobody's terminal sets a width, so that the output can be searched."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=220)


def _planned(experiment: Experiment, store: Store | None) -> tuple[dict, list[StagePlan]]:
    identities = stage_identities(experiment, source_digest_of(experiment))
    previous = read_previous(store, experiment.name) if store else None
    return identities, make_plan(experiment, identities, store, previous)


def plan(options: argparse.Namespace) -> int:
    experiment = load_spec(options.experiment, options.overrides)
    console = _console()
    store, note = None, ""
    try:
        store = open_store(experiment.storage)
    except UserError as error:
        note = f"storage not read: {error}"
    _, plans = _planned(experiment, store)
    table = Table(box=None, pad_edge=False)
    for title in ("stage", "kind", "needs", "action", "fingerprint", "why"):
        table.add_column(title, no_wrap=title != "why", overflow="fold")
    for item in plans:
        stage = experiment.stages[item.name]
        action = item.action if item.action not in UNKNOWN else "unknown"
        table.add_row(
            item.name, stage.kind_name, ", ".join(stage.params.needs), action,
            (item.fingerprint or "")[:16], item.reason,
        )  # fmt: skip
    console.print(table)
    if note:
        console.print(note)
    return 0


def run(options: argparse.Namespace) -> int:
    began = time.monotonic()
    experiment = load_spec(options.experiment, options.overrides)
    store = open_store(experiment.storage)
    identities, plans = _planned(experiment, store)
    for item in plans:
        if item.action in UNKNOWN:
            raise UserError(
                f"cannot run: {item.reason}",
                where=f"{options.experiment}: stages.{item.name}",
                remedy="provide it; stageline plan shows all stages",
            )
    console = _console()
    by_name = {item.name: item for item in plans}
    done = {item.name for item in plans if item.action == "reuse"}
    for item in plans:
        console.print(f"{item.name}: {item.action}" + (f" ({item.reason})" if item.reason else ""))
    failed: dict[str, BaseException] = {}
    if len(done) < len(plans):
        failed = _run_rest(options, experiment, store, identities, by_name, done, console)
    if failed:
        return _tell_failures(experiment, failed, by_name)
    console.print(f"all {len(plans)} stages done, {len(done)} of them reused, in {duration(time.monotonic() - began)}")
    _results(options, experiment, store, by_name, console)
    return 0


def _run_rest(options, experiment, store, identities, by_name, done, console) -> dict[str, BaseException]:
    from orchestrator.driver import Job, run_stage
    from orchestrator.launch import run_attempt, start_ray, stop_ray
    from orchestrator.scheduler import check_demand, run_all

    stopping = threading.Event()

    def on_sigterm(_number, _frame):
        raise KeyboardInterrupt

    available = start_ray(options.address or os.environ.get("RAY_ADDRESS"))
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray has set one that shuts down under the stages' feet
    try:
        check_demand(experiment, [name for name in experiment.stages if name not in done], available)
        watch = Watch(store, {name: item.prefix for name, item in by_name.items()}, console)

        def start(name: str) -> None:
            stage, item = experiment.stages[name], by_name[name]
            parents = {need: by_name[need].prefix for need in stage.params.needs}
            job = Job(experiment, stage, identities[name], item.fingerprint, item.prefix, parents)
            run_stage(store, job, run_attempt, watch.event, stopping.is_set)

        with watch:
            return run_all(experiment, done, available, partial(start), watch)
    except KeyboardInterrupt:
        stopping.set()
        print("\nstageline: interrupted; run again to go on from the last checkpoints", file=sys.stderr, flush=True)
        stop_ray()
        os._exit(130)  # the threads of the stages wait for workers that are gone
    finally:
        stop_ray()


def _tell_failures(experiment: Experiment, failed: dict[str, BaseException], by_name: dict[str, StagePlan]) -> int:
    from orchestrator.driver import StageFailed
    from orchestrator.errors import ErrorClass
    from orchestrator.graph import blocked_by

    code = 2
    for name, error in failed.items():
        cause = error.error if isinstance(error, StageFailed) else error
        if isinstance(cause, UserError):
            print(f"stageline: stage {name} stopped: {cause}", file=sys.stderr)
        elif isinstance(error, StageFailed) and error.error_class is ErrorClass.fenced:
            print(f"stageline: stage {name} stopped: {error.reason} → run again to reuse its result", file=sys.stderr)
        else:
            code = 1
            traceback.print_exception(cause)
            reason = f" ({error.reason})" if isinstance(error, StageFailed) else ""
            print(f"stageline: stage {name} failed{reason}; see: stageline logs", file=sys.stderr)
    for name, culprit in blocked_by(experiment.needs, failed).items():
        print(f"stageline: stage {name} did not start, it needs {culprit}", file=sys.stderr)
    return code


def _results(options, experiment: Experiment, store: Store, by_name: dict[str, StagePlan], console: Console) -> None:
    """The held-out table over the evaluated stages, where the export lies, and the next command to try."""
    scores, exported = {}, []
    for name, item in by_name.items():
        completed = Ledger(store, item.prefix).state().completed
        if completed is None:
            continue
        if item.kind == "evaluate":
            scores[completed["summary"]["stage"]] = completed["summary"]["scores"]
        if item.kind == "export":
            exported.append((name, completed["manifest"]["folder"]))
    if scores:
        tasks = sorted({task for row in scores.values() for task in row})
        table = Table(title="Held-out accuracy, exact match [95 % interval]", title_justify="left", box=None)
        table.add_column("after stage")
        for task in tasks:
            n = next(row[task]["n"] for row in scores.values() if task in row)
            table.add_column(f"{task} (n={n})", justify="right")
        for stage, row in scores.items():
            cells = [
                f"{s['accuracy']:.3f} [{s['low']:.3f}, {s['high']:.3f}]" if (s := row.get(t)) else "" for t in tasks
            ]
            table.add_row(stage, *cells)
        console.print(table)
    for name, folder in exported:
        local = store.local_path(folder)
        console.print(f"{name}: {os.path.relpath(local) if local else f'{store.url}/{folder}'}")
    trained = [name for name in scores if name in by_name]
    example = _example_question(experiment) if trained else None
    if example:
        images, question = example
        pictures = " ".join(f"--image {os.path.relpath(image)}" for image in images)
        command = f'stageline ask {options.experiment} {trained[-1]} {pictures} "{question}"'
        console.print(f"next: {command}", soft_wrap=True, markup=False)


def _example_question(experiment: Experiment) -> tuple[list[Path], str] | None:
    """Pictures and question of the first multi-tile sample of the last evaluated mixture."""
    from modeling.sources import Rejected, parse_line, read_meta

    stage = [s for s in experiment.stages.values() if s.kind.base == "evaluate"][-1]
    data = next(p for p in experiment.parents(stage) if p.kind.base == "prepare").params.data
    datasets = sorted(read_meta(experiment.data[data].meta), key=lambda d: -(d.max_tiles or 0))
    for dataset in datasets:
        with open(dataset.annotation, "rb") as file:
            sample = parse_line(dataset, 1, file.readline())
        if not isinstance(sample, Rejected) and sample.images:
            text = next(t["value"] for t in sample.conversation if t["from"] == "human")
            if len(sample.images) == 1:
                return [Path(p) for p in sample.images], text.replace("<image>", "").strip()
    return None


def status(options: argparse.Namespace) -> int:
    experiment = load_spec(options.experiment, options.overrides)
    store = open_store(experiment.storage)
    known = read_mappings(store, experiment.name)
    table = Table(box=None, pad_edge=False)
    for title in ("stage", "kind", "status", "step", "loss", "checkpoint", "attempts", "last failure"):
        table.add_column(title, overflow="fold")
    for name, stage in experiment.stages.items():
        if name not in known:
            table.add_row(name, stage.kind_name, "not run yet", "", "", "", "", "")
            continue
        prefix = stage_prefix(stage.kind.base, known[name]["fingerprint"])
        state, note = Ledger(store, prefix).state(), read_progress(store, prefix) or {}
        loss = note.get("row", {}).get("loss")
        failure = state.failures[-1] if state.failures else None
        table.add_row(
            name, stage.kind_name, _status_word(state),
            f"{note['step']:,}/{note['total']:,}" if note else "",
            f"{loss:.4f}" if loss is not None else "",
            f"{state.checkpoints[0].step:,}" if state.checkpoints else "",
            str(state.attempts), f"{failure.error_class}: {failure.message}"[:80] if failure else "",
        )  # fmt: skip
    _console().print(table)
    return 0


def _status_word(state: StageState) -> str:
    """The ledger's word, and 'interrupted' where the driver that was running the stage is known to be gone."""
    if state.status in ("claimed", "running") and state.owner is not None and alive(state.owner) is False:
        return "interrupted"
    return state.status


def _recorded(experiment: Experiment, store: Store, name: str) -> str:
    """The prefix under which a stage of this experiment was last run. Raises UserError."""
    if name not in experiment.stages:
        raise UserError(
            f"no stage '{name}' in {experiment.path}", remedy=f"choose one of {', '.join(experiment.stages)}"
        )
    known = read_mappings(store, experiment.name)
    if name not in known:
        raise UserError(f"stage '{name}' was not run yet", where=str(experiment.path), remedy="stageline run it first")
    return stage_prefix(experiment.stages[name].kind.base, known[name]["fingerprint"])


def logs(options: argparse.Namespace) -> int:
    experiment = load_spec(options.experiment, options.overrides)
    store = open_store(experiment.storage)
    for name, text in read_logs(store, _recorded(experiment, store, options.stage)).items():
        print(f"--- {name}\n{text}", end="")
    return 0


def ask(options: argparse.Namespace) -> int:
    experiment = load_spec(options.experiment)
    store = open_store(experiment.storage)
    prefix = _recorded(experiment, store, options.stage)
    stage = experiment.stages[options.stage]
    completed = Ledger(store, prefix).state().completed
    if not stage.kind.trains or completed is None:
        what = "is no training stage" if not stage.kind.trains else "is not completed"
        raise UserError(f"stage '{options.stage}' {what}", where=str(experiment.path), remedy="name a trained stage")
    from tempfile import TemporaryDirectory

    from modeling.generate import Question, answer, device
    from modeling.images import ImageError, decode_rgb
    from modeling.internvl import load_model
    from orchestrator.stageio import fetch_folder

    images = []
    for path in options.image:
        try:
            images.append(decode_rgb(Path(path).read_bytes()))
        except (OSError, ImageError) as error:
            raise UserError(f"cannot be read: {error}", where=path, remedy="give a JPEG or PNG file") from error
    question = options.question
    if images and "<image>" not in question:
        tags = [f"Image-{i + 1}: <image>\n" for i in range(len(images))] if len(images) > 1 else ["<image>\n"]
        question = "".join(tags) + question
    data = next(parent for parent in experiment.parents(stage) if parent.kind.base == "prepare")
    system = experiment.data[data.params.data].system
    with TemporaryDirectory() as scratch:
        model, tokenizer = load_model(fetch_folder(store, completed["manifest"]["folder"], Path(scratch)))
        model.to(device())  # pyright: ignore[reportArgumentType]
        turns = [{"from": "human", "value": question}]
        try:
            texts = answer(
                model, tokenizer, [Question(turns, images, options.max_tiles)],
                system=system, max_new_tokens=options.max_new_tokens,
            )  # fmt: skip
        except ValueError as error:
            raise UserError(str(error), where="the question", remedy="one <image> for each --image") from error
    print(texts[0])
    return 0
