"""When which attempt ran, how it ended and what it saved: one bar for each, on one axis of time.

Invariants: a fold over the ledgers alone (accounts.py). Time in which nothing of the experiment ran is cut short, for
stages that are run days apart would else be slivers; where it was cut is drawn, and durations are the real ones.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from orchestrator.accounts import Attempt
from orchestrator.cli.watch import duration
from orchestrator.report.dag import css
from orchestrator.report.figures import moment
from orchestrator.report.read import INTERRUPTED, StageRead
from stages.prepare import svg
from stages.prepare.page import markup

UNITS = 1000  # the width of a bar's axis
LONGEST_IDLE = 0.05  # of the time in which something ran; what is longer is cut to this
LEAST = 3.0  # units of a bar, so that it is seen


@dataclass(frozen=True)
class Axis:
    """pieces: (from, to) in seconds of wall clock, apart from each other and in order, with their places in units.
    cuts: where idle time was shortened."""

    pieces: tuple[tuple[float, float, float, float], ...]
    cuts: tuple[float, ...]

    def __call__(self, time: float) -> float:
        for begin, end, left, right in self.pieces:
            if time <= end:
                return left + max(0.0, time - begin) / max(end - begin, 1e-9) * (right - left)
        return UNITS


@dataclass(frozen=True)
class Row:
    """bar: the SVG. css: of the class of its end. The other fields as a table shows them."""

    stage: str
    attempt: int
    workers: int
    began: str
    lasted: str
    bar: Markup
    ended: str
    css: str
    message: str
    saves: str
    lost: int


def axis(spans: Iterable[tuple[float, float]]) -> Axis:
    """Of the times in which something ran."""
    busy: list[list[float]] = []
    for begin, end in sorted(spans):
        if busy and begin <= busy[-1][1]:
            busy[-1][1] = max(busy[-1][1], end)
        else:
            busy.append([begin, end])
    ran = sum(end - begin for begin, end in busy)
    pieces, cuts, at = [], [], 0.0
    for i, (begin, end) in enumerate(busy):
        if i:
            idle = begin - busy[i - 1][1]
            at += min(idle, LONGEST_IDLE * ran)
            if idle > LONGEST_IDLE * ran:
                cuts.append(at - LONGEST_IDLE * ran / 2)
        pieces.append((begin, end, at, at + end - begin))
        at += end - begin
    scale = UNITS / (at or 1.0)
    return Axis(
        tuple((begin, end, left * scale, right * scale) for begin, end, left, right in pieces),
        tuple(cut * scale for cut in cuts),
    )


def timeline(stages: Sequence[StageRead]) -> list[Row]:
    """A row for each attempt, stages in the order in which they began."""
    began = [one for one in stages if one.sums.attempts and not one.shared]
    ends = {id(a): _end(one, i) for one in began for i, a in enumerate(one.sums.attempts)}
    scale = axis((a.began, ends[id(a)]) for one in began for a in one.sums.attempts)
    rows = []
    for one in sorted(began, key=lambda one: one.sums.attempts[0].began):
        for number, attempt in enumerate(one.sums.attempts, 1):
            end, cause, ending = ends[id(attempt)], _cause(one, number - 1), _ending(one, number - 1)
            saves = [entry for entry in one.entries if entry.type == "checkpoint" and entry.token == attempt.token]
            rows.append(
                Row(
                    one.name, number, attempt.workers, moment(attempt.began), duration(end - attempt.began),
                    _bar(scale, attempt, end, cause, ending, [entry.time for entry in saves], one.stage.kind.trains),
                    ending, css(cause), attempt.message, _saves([entry.fields["step"] for entry in saves]),
                    attempt.lost,
                )
            )  # fmt: skip
    return rows


def _end(one: StageRead, index: int) -> float:
    """When an attempt ended; where the ledger does not say, when it was last heard of."""
    attempt = one.sums.attempts[index]
    if attempt.ended is not None:
        return max(attempt.ended, attempt.began)
    heard = one.note.get("time", 0.0) if tuple(one.note.get("token", ())) == attempt.token else 0.0
    return max(attempt.began, heard, *(entry.time for entry in one.entries if entry.token == attempt.token))


def _cause(one: StageRead, index: int) -> str:
    cause = one.sums.attempts[index].cause
    if cause:
        return cause
    return "running" if index + 1 == len(one.sums.attempts) and one.word == "running" else INTERRUPTED


def _ending(one: StageRead, index: int) -> str:
    """The cause, in which growth and a stop that was asked for are no preemptions."""
    token = one.sums.attempts[index].token
    of_it = [failure.ending for failure in one.state.failures if failure.token == token]
    return of_it[0] if of_it else _cause(one, index)


def _saves(steps: Sequence[int]) -> str:
    """50, 100, 150; the first ones left out where there are many."""
    if len(steps) <= 4:
        return ", ".join(f"{step:,}" for step in steps)
    return f"{len(steps)}: …, {steps[-2]:,}, {steps[-1]:,}"


def _bar(
    scale: Axis, attempt: Attempt, end: float, cause: str, ending: str, saves: Sequence[float], trains: bool
) -> Markup:
    """From its start to its end; lighter before the first step of training; an upright line for each save."""
    left, right = scale(attempt.began), scale(end)
    right = min(UNITS, max(right, left + LEAST))
    left = min(left, right - LEAST)
    first = end if attempt.first_step is None else attempt.first_step
    started = min(right, max(left, scale(first))) if trains else left
    out = [
        markup('<svg class="span" viewBox="0 0 {w} 14" preserveAspectRatio="none" aria-hidden="true">', w=UNITS),
        *(svg.line(cut, 0, cut, 14, "cut") for cut in scale.cuts),
        svg.bar(f"starts {css(cause)}", left, 1, started - left, 12, "before its first step"),
        svg.bar(css(cause), started, 1, right - started, 12, ending),
        *(svg.line(scale(time), 1, scale(time), 13, "save") for time in saves),
        Markup("</svg>"),
    ]
    return Markup().join(out)
