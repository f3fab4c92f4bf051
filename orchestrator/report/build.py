"""The report of an experiment: one HTML file with all that storage knows, to look at, to print, to pass on.

Invariants (issue 6): the file needs no network and no other file; every text is escaped, and the page's policy lets
nothing run (stages/prepare/page.py); a section without data is left out; what it shows comes from storage alone, so it
can be made when the cluster is gone, and while stages run.
"""

import os
import platform
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from orchestrator.address import redact
from orchestrator.cli.watch import duration
from orchestrator.report import dag, figures
from orchestrator.report.costs import Costs, read_costs
from orchestrator.report.curves import Spread, curves, packing
from orchestrator.report.evaluation import read_evaluations
from orchestrator.report.read import NOT_RUN, StageRead, read_stages
from orchestrator.report.scaling import read_studies
from orchestrator.report.timeline import timeline
from orchestrator.sharing import Saving
from orchestrator.spec import Experiment
from orchestrator.store import Store, local_file
from stages.prepare.page import write_page

PAGES = Path(__file__).parent / "pages"
OPEN = 6  # training stages; with more, their curves are folded up
TASKS = 5  # columns of the table of all stages
VERSIONS = ("stageline", "torch", "transformers", "ray", "deepspeed")
CARD = "card.html"


@dataclass(frozen=True)
class Card:
    """A prepared mixture. link: its data card, from the report's folder; '' where that is not on this machine."""

    stage: str
    kept: str
    rejected: str
    tokens: str
    link: str
    place: str


@dataclass(frozen=True)
class Training:
    read: StageRead
    charts: list[Markup]
    packing: list[Spread]
    settings: list[tuple[str, str]]
    cards: list[Card]
    notes: list[str]


def write_report(
    experiment: Experiment, store: Store, output: Path, arguments: Sequence[str] = (), now: float | None = None
) -> None:
    """Writes the page to `output`, whose folders are made. arguments: what stood behind `stageline report`.

    Raises UserError for what cannot be read or written.
    """
    stages = read_stages(experiment, store)
    cards = _cards(store, stages, output)
    evaluations = read_evaluations(experiment, store, stages)
    own = [one for one in stages if not one.shared]
    now = time.time() if now is None else now
    costs = read_costs(experiment, stages, now)
    nodes = [dag.Node(one.name, one.stage.kind_name, ((one.name, one.word),)) for one in stages]
    with local_file(output) as temporary:
        write_page(
            temporary, "report", folder=PAGES,
            title=f"{experiment.name}: report",
            experiment=experiment,
            storage=redact(store.url),
            made=figures.moment(now),
            versions=_versions(),
            headline=_headline(stages),
            tiles=_tiles(stages, own, costs),
            stages=stages,
            graph=dag.draw(nodes, experiment.needs),
            cards=list(cards.values()),
            trainings=[_training(i, one, cards) for i, one in enumerate(own) if one.rows or one.modules],
            few=OPEN,
            sharing=_sharing(experiment, stages),
            attempts=timeline(stages),
            costs=costs,
            goodputs=[one for one in own if one.stage.kind.trains and one.sums.useful_s],
            evaluations=evaluations,
            overviews=_overviews(evaluations),
            studies=read_studies(store, stages),
            commands=_commands(experiment, arguments),
            cwd=str(Path.cwd()),
            f=figures, css=dag.css, duration=duration,
        )  # fmt: skip


def _versions() -> list[tuple[str, str]]:
    """Of this installation, which read the storage."""
    return [("python", platform.python_version()), *((name, version(name)) for name in VERSIONS)]


def _headline(stages: Sequence[StageRead]) -> str:
    """The state of the experiment in one line."""
    words = Counter(one.word for one in stages)
    if words["completed"] == len(stages):
        return f"All {len(stages)} stages are completed."
    told = ", ".join(f"{count} {word}" for word, count in words.most_common())
    failed = [(one.name, one.failure.error_class) for one in stages if one.word == "failed" and one.failure]
    reasons = "".join(f" {name} failed: {why.replace('_', ' ')}." for name, why in failed[:3])
    return f"Of {figures.count(len(stages), 'stage')}: {told}.{reasons}"


def _sharing(experiment: Experiment, stages: Sequence[StageRead]) -> str:
    """What a sweep saved because its runs share stages."""
    if experiment.sweep is None:
        return ""
    sweep, distinct = experiment.sweep, sum(not one.shared for one in stages)
    axes = " × ".join(f"{len(values)} {axis}" for axis, values in sweep.axes.items())
    found = Saving(sweep.naive, len(stages), distinct)
    return (
        f"A sweep of {axes} = {sweep.combinations} combinations. Each by itself would make {found.naive:,} stages in "
        f"all; with what they share made once there are {found.distinct:,}: {found.saved:,} saved."
    )


def _tiles(stages: Sequence[StageRead], own: Sequence[StageRead], costs: Costs | None) -> list[tuple[str, str, str]]:
    """(what, figure, beside it) for the head of the page. own: without those that have another one's result."""
    done = sum(one.word == "completed" for one in stages)
    out = [("stages completed", f"{done} of {len(stages)}", "")]
    trained = [one.sums for one in own if one.stage.kind.trains and one.sums.began is not None]
    useful, wall = sum(sums.useful_s for sums in trained), sum(sums.wall_s() for sums in trained)
    if wall:
        out.append(("training goodput", figures.share(useful / wall), f"{duration(useful)} of {duration(wall)}"))
        out.append(("steps lost", figures.number(sum(sums.steps_lost for sums in trained)), "trained again"))
    attempts = sum(len(one.sums.attempts) for one in own)
    if attempts:
        causes = sum((one.state.endings for one in own), Counter())
        told = ", ".join(f"{count} {cause.replace('_', ' ')}" for cause, count in causes.most_common())
        out.append(("attempts", figures.number(attempts), told))
    tokens = sum(row.get("tokens", 0) for one in own for row in one.rows)
    if tokens:
        out.append(("tokens trained", figures.number(tokens), "image tokens included"))
    if costs:
        beside = [costs.total.note, f"{costs.total.wasted} wasted", costs.head[0] and f"head: {costs.head[0]}"]
        out.append(("cost of workers", costs.total.cost, "; ".join(filter(None, beside))))
    return out


def _cards(store: Store, stages: Sequence[StageRead], output: Path) -> dict[str, Card]:
    """By prepare stage, of those that have begun to store something."""
    out = {}
    for one in stages:
        if one.stage.kind.base != "prepare" or one.word == NOT_RUN or not one.prefix:
            continue
        key = f"{one.prefix}/{CARD}"
        link, place = "", ""
        if store.exists(key):
            local = store.local_path(key)
            place = str(local) if local else f"{redact(store.url)}/{key}"
            link = quote(os.path.relpath(local, output.absolute().parent)) if local else ""
        summary = one.summary
        tokens = summary.get("shares", {}).get("tokens_per_epoch")
        out[one.name] = Card(
            one.name, _known(summary.get("kept")), _known(summary.get("rejected")), _known(tokens), link, place
        )  # fmt: skip
    return out


def _known(value: float | None) -> str:
    return figures.DASH if value is None else figures.number(value)


def _training(number: int, one: StageRead, cards: dict[str, Card]) -> Training:
    skipped = one.rows[-1].get("skipped", 0) if one.rows else 0
    lost = sum(row.get("data/lost", 0) for row in one.rows)
    notes = [one.planned] if one.planned else []
    if one.rows and one.word != "completed":
        notes.append(f"at step {one.note.get('step', one.rows[-1]['step']):,} of {one.note.get('total', 0):,}")
    if skipped:
        notes.append(f"{figures.count(skipped, 'step')} skipped, loss or gradient not finite")
    if lost:
        notes.append(f"{figures.count(int(lost), 'sample')} lost: a picture that did not decode")
    if one.changed:
        notes.append("the file has changed since: " + ", ".join(text.removeprefix("params.") for text in one.changed))
    own = [cards[need] for need in one.stage.params.needs if need in cards]
    return Training(one, curves(f"c{number}", one.rows), packing(one.rows), _flat(one.settings), own, notes)


def _flat(settings: dict[str, Any], before: str = "") -> list[tuple[str, str]]:
    """[("packing.max_tokens", "1024")], as recorded when the stage was run."""
    out: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, dict):
            out += _flat(value, f"{before}{key}.")
        elif value is not None:
            out.append((before + key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return out


def _overviews(evaluations: Sequence[Any]) -> list[tuple[str, list[str], list[tuple[str, str, list[str]]]]]:
    """(prompt, tasks, [(trained stage, evaluate stage, a figure for each task)]): all stages side by side, a few tasks
    a table."""
    out = []
    prompts = list(dict.fromkeys(prompt for one in evaluations for prompt in one.prompts))
    for prompt in prompts if len(evaluations) > 1 else ():
        having = [one for one in evaluations if prompt in one.result.tables]
        tasks = list(dict.fromkeys(task for one in having for task in one.result.tables[prompt]))
        for start in range(0, len(tasks), TASKS):
            some = tasks[start : start + TASKS]
            rows = [(one.trained, one.stage, [_cell(one.score(prompt, task)) for task in some]) for one in having]
            out.append((prompt, some, rows))
    return out


def _cell(score: Any) -> str:
    return figures.DASH if score is None else figures.interval(score.accuracy, score.low, score.high)


def _commands(experiment: Experiment, arguments: Sequence[str]) -> list[str]:
    """What makes the same stages again, and this page."""
    given = [str(experiment.path), *arguments]
    return [shlex.join(["stageline", verb, *given]) for verb in ("plan", "run", "report")]
