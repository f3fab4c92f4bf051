"""The verbs that only look: plan, status, ask; and preempt, which only asks."""

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from modeling.errors import UserError
from orchestrator.accounts import account
from orchestrator.cli import jobs
from orchestrator.cli.costs import bill_lines
from orchestrator.cli.run import UNKNOWN, place
from orchestrator.cli.watch import console_for_output, duration
from orchestrator.control import ask_to_stop
from orchestrator.cost import Bill, priced
from orchestrator.cost import told as told_cost
from orchestrator.drivernote import read_note
from orchestrator.ledger import Ledger
from orchestrator.ledger import state as fold
from orchestrator.liveness import last_beat
from orchestrator.places import read_places
from orchestrator.plan import plan_experiment, read_mappings, stage_prefix
from orchestrator.probe import reach
from orchestrator.progress import read_progress
from orchestrator.report.read import billed_until, heard, word
from orchestrator.sharing import told
from orchestrator.spec import Experiment, load_spec
from orchestrator.store import Store, open_store

PAGES = ("card.html", "rejected.jsonl")  # that prepare leaves beside its stage; the second, too, where it refuses


def reachable(experiment: Experiment) -> Store:
    """The experiment's storage. Raises UserError within seconds where it does not answer."""
    store = open_store(experiment.storage)
    reach(store)
    return store


def plan(options: argparse.Namespace) -> int:
    experiment = load_spec(options.experiment, options.overrides)
    console = console_for_output()
    store, note = None, ""
    try:
        store = reachable(experiment)
    except UserError as error:
        note = f"storage not read: {error}"
    _, plans = plan_experiment(experiment, store)
    table = Table(box=None, pad_edge=False)
    for title in ("stage", "kind", "needs", "action", "fingerprint", "why"):
        table.add_column(title, no_wrap=title not in ("needs", "why"), overflow="fold")
    for item in plans:
        stage = experiment.stages[item.name]
        action = item.action if item.action not in UNKNOWN else "unknown"
        table.add_row(
            item.name, stage.kind_name, _listed(stage.params.needs), action,
            (item.fingerprint or "")[:16], item.reason,
        )  # fmt: skip
    console.print(table)
    for line in told(experiment.sweep, plans) if experiment.sweep else ():
        console.print(line)
    from orchestrator.cli.expected import show_expected
    from orchestrator.cli.mixtures import show_mixtures
    from orchestrator.cli.sizes import shared_vision, show_sizes  # builds the models, on torch's meta device

    if store is not None:
        show_mixtures(console, store, plans)
    for line in shared_vision(experiment):
        console.print(line)
    show_sizes(console, experiment)
    show_expected(console, experiment, plans)
    if note:
        console.print(note)
    return 0


def _listed(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def status(options: argparse.Namespace) -> int:
    if jobs.is_job(options.experiment):
        return jobs.status(options)
    experiment = load_spec(options.experiment, options.overrides)
    store = reachable(experiment)
    known = read_mappings(store, experiment.name)
    note = read_note(store, experiment.name) or {"queued": {}, "links": {}}
    table = Table(box=None, pad_edge=False)
    titles = ("stage", "kind", "status", "step", "loss", "checkpoint", "attempts", "goodput", "steps lost", "resume")
    cluster = priced(experiment.cluster)
    bill = Bill(cluster) if cluster else None
    for title in (*titles, *(("cost",) if bill else ()), "last failure"):
        table.add_column(title, overflow="fold")
    accounts, queued, prepared, now = {}, set(), {}, time.time()
    for name, stage in experiment.stages.items():
        if name not in known:
            if name in note["queued"]:
                queued.add(name)
            table.add_row(name, stage.kind_name, "queued" if name in queued else "not run yet")
            continue
        prefix = stage_prefix(stage.kind.base, known[name]["fingerprint"])
        entries = Ledger(store, prefix).entries()
        state, at, sums = fold(entries), read_progress(store, prefix) or {}, account(entries)
        loss = at.get("row", {}).get("loss")
        failure = state.failures[-1] if state.failures else None
        status = word(state)
        if status == "claimed" and name in note["queued"]:
            status = "queued"
            queued.add(name)
        goodput = sums.goodput(now if status in ("claimed", "queued", "running") else None)
        beat = last_beat(store, prefix, state.token[0]) if status == "running" else 0.0
        until = billed_until(state, sums, at, beat, now)
        if until is not None and until < now:
            status = f"running, last heard {duration(now - heard(sums, at, beat))} ago"
        if stage.kind.base == "prepare" and any(store.exists(f"{prefix}/{page}") for page in PAGES):
            prepared[name] = prefix
        if stage.kind.trains:
            accounts[prefix] = sums  # names that share a result count once
        causes = ", ".join(f"{count} {cause}" for cause, count in state.endings.items())
        cost = []
        if bill:
            cost = [told_cost(bill.add(stage, sums, prefix, read_places(store, prefix), until), bill.currency)]
        table.add_row(
            name, stage.kind_name, status,
            f"{at['step']:,}/{at['total']:,}" if at else "",
            f"{loss:.4f}" if loss is not None else "",
            f"{state.checkpoints[0].step:,}" if state.checkpoints else "",
            f"{state.attempts} ({causes})" if causes else str(state.attempts),
            f"{goodput:.3f}" if goodput is not None else "",
            str(sums.steps_lost) if stage.kind.trains else "",
            f"{sums.resume_s:.1f} s" if sums.resume_s is not None else "",
            *cost,
            f"{failure.ending}: {failure.message}"[:80] if failure else "",
        )  # fmt: skip
    console = console_for_output()
    console.print(table)
    wall, useful = sum(its.wall_s() for its in accounts.values()), sum(its.useful_s for its in accounts.values())
    if wall:
        console.print(
            f"training: goodput {useful / wall:.3f} ({duration(useful)} of steps that count in {duration(wall)} since "
            f"each stage was first claimed), {sum(sums.steps_lost for sums in accounts.values())} steps lost"
        )
    for line in bill_lines(bill) if bill else ():
        console.print(line)
    for name, folder in prepared.items():
        console.print(f"{name}: {place(store, folder)}", markup=False, soft_wrap=True)
    for name, reason in note["queued"].items():
        if name in queued:
            console.print(f"{name} is queued: {reason}", markup=False)
    if note.get("job"):
        console.print(f"submitted as {note['job']}", markup=False)
    for name, url in note["links"].items():
        console.print(f"{name}: {url}", markup=False)
    return 0


def recorded(experiment: Experiment, store: Store, name: str) -> str:
    """The prefix under which a stage of this experiment was last run. Raises UserError."""
    if name not in experiment.stages:
        raise UserError(
            f"no stage '{name}' in {experiment.path}", remedy=f"choose one of {', '.join(experiment.stages)}"
        )
    known = read_mappings(store, experiment.name)
    if name not in known:
        raise UserError(f"stage '{name}' was not run yet", where=str(experiment.path), remedy="stageline run it first")
    return stage_prefix(experiment.stages[name].kind.base, known[name]["fingerprint"])


def preempt(options: argparse.Namespace) -> int:
    """A notice as a cloud gives it, to every training stage that runs: through storage, to try out what follows."""
    experiment = load_spec(options.experiment, options.overrides)
    store = reachable(experiment)
    known, told, asked = read_mappings(store, experiment.name), [], set()
    for name, stage in experiment.stages.items():
        if name not in known or not stage.kind.trains or options.stage not in (None, name):
            continue
        prefix = stage_prefix(stage.kind.base, known[name]["fingerprint"])
        if prefix in asked:
            continue  # another name of a stage that was told
        asked.add(prefix)
        state = Ledger(store, prefix).state()
        if word(state) == "running":
            ask_to_stop(store, prefix, state.token, options.deadline, "preempted by stageline preempt", "notice")
            told.append(name)
    if not told:
        raise UserError("no training stage is running", where=str(experiment.path), remedy="stageline run it first")
    print(f"told {', '.join(told)}: {options.deadline:g} s until the end")
    return 0


def ask(options: argparse.Namespace) -> int:
    experiment = load_spec(options.experiment)
    store = reachable(experiment)
    prefix = recorded(experiment, store, options.stage)
    stage = experiment.stages[options.stage]
    completed = Ledger(store, prefix).state().completed
    if not stage.kind.trains or completed is None:
        what = "is no training stage" if not stage.kind.trains else "is not completed"
        raise UserError(f"stage '{options.stage}' {what}", where=str(experiment.path), remedy="name a trained stage")
    from tempfile import TemporaryDirectory

    from modeling.generate import Question, answer, device
    from modeling.internvl import load_model
    from orchestrator.checkpoints import fetch_folder

    data = next(parent for parent in experiment.parents(stage) if parent.kind.base == "prepare")
    if options.frames is not None and (options.frames < 1 or options.video is None):
        raise UserError(f"--frames {options.frames}", where="ask", remedy="give 1 or more of a --video")
    images, question = _pictures(options.image), options.question
    video = None if options.video is None else _Video(options.video, options.frames or data.params.max_frames)
    if images and "<image>" not in question:
        tags = [f"Image-{i + 1}: <image>\n" for i in range(len(images))] if len(images) > 1 else ["<image>\n"]
        question = "".join(tags) + question
    system = experiment.data[data.params.data].system
    with TemporaryDirectory() as scratch:
        model, tokenizer = load_model(fetch_folder(store, completed["manifest"]["folder"], Path(scratch)))
        model.to(device())  # pyright: ignore[reportArgumentType]
        if video is not None:
            config: Any = model.config
            images = video.frames(config.vision_config.image_size[0])
        turns = [{"from": "human", "value": question}]
        try:
            texts = answer(
                model, tokenizer, [Question(turns, images, options.max_tiles, video=video is not None)],
                system=system, max_new_tokens=options.max_new_tokens,
            )  # fmt: skip
        except ValueError as error:
            remedy = "one <image> for each --image" if video is None else "one <video>, or none, and no <image>"
            raise UserError(str(error), where="the question", remedy=remedy) from error
    print(texts[0])
    return 0


def _pictures(paths: list[str]) -> list[Any]:
    from modeling.images import ImageError, decode_rgb

    images = []
    for path in paths:
        try:
            images.append(decode_rgb(Path(path).read_bytes()))
        except (OSError, ImageError) as error:
            raise UserError(f"cannot be read: {error}", where=path, remedy="give a JPEG or PNG file") from error
    return images


class _Video:
    """The middle frames of a video, as `evaluate` shows them. Raises UserError for a file that is none, at once."""

    def __init__(self, path: str, most: int):
        from modeling.tiles import frame_indices
        from modeling.video import probe

        self.path = path
        with self._told():
            self.data = Path(path).read_bytes()
            self.indices = frame_indices(most, probe(self.data).frames)

    def frames(self, size: int) -> list[Any]:
        """As tiles of so many pixels a side."""
        from modeling.video import read_frames

        with self._told():
            return read_frames(self.data, self.indices, size)

    @contextmanager
    def _told(self) -> Iterator[None]:
        from modeling.video import FORMATS, VideoError

        try:
            yield
        except (OSError, VideoError) as error:
            remedy = f"give a video that is whole: {FORMATS.replace(',', ', ')}, gif"
            raise UserError(f"cannot be read: {error}", where=self.path, remedy=remedy) from error
