"""Line charts as inline SVG, with bands, marks and names at the ends of their lines.

Invariants: what is drawn is what was given: a value that is not there breaks its line, nothing is smoothed; a line is
told from another by its colour, its dashes and its name, so that it is found without colour too; a scale is linear
unless its axis says "log". Drawn 380 units wide, about the width of a phone (stages/prepare/charts.py).
"""

import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from orchestrator.report.figures import short
from stages.prepare import svg
from stages.prepare.charts import WIDTH
from stages.prepare.page import markup

LEFT, RIGHT, TOP, BOTTOM = 50, 12, 46, 46
HEIGHT = 250
KINDS = 8  # colours in the style, k0 to k7, each with dashes of its own
LABEL_WIDTH, LABEL_LINE = 100, 12  # of names at the ends of lines; 15 characters fit
LABEL_CHARACTERS, LABEL_LINES = 15, 3
TITLE_CHARACTERS = 52


@dataclass(frozen=True)
class Line:
    """y: None where there is no value. low, high: the band around it, or nothing. notes: one for each point, which is
    then drawn as a dot. kind: which colour and dashes. name: empty where the chart has one line."""

    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    name: str = ""
    kind: int = 0
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` onto units from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def chart(
    name: str,
    title: str,
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    from_zero: bool = False,
    x_ticks: Sequence[float] = (),
    y_text: Callable[[float], str] = short,
    marks: Sequence[tuple[float, str]] = (),
    note: str = "",
) -> Markup:
    """Lines over one pair of axes. name: unique in the page. x, y: names of the axes, with units. marks: (x, text) of
    upright lines. log_x, log_y: only where all values are above 0. note: a sentence for those who do not see it."""
    labels = [_wrapped(line.name) for line in lines]
    right = RIGHT + LABEL_WIDTH if any(labels) else RIGHT
    needed = sum(len(label) * LABEL_LINE + 3 for label in labels)
    bottom = max(HEIGHT - BOTTOM, TOP + needed)
    xs = [value for line in lines for value in line.x]
    ys = [value for line in lines for part in (line.y, line.low, line.high) for value in part if value is not None]
    across = Scale(*_limits(xs, log_x, exact=True), LEFT, WIDTH - right, log_x)
    ticks = _ticks(*_limits(ys, log_y, zero=from_zero), log_y)
    low, high = (_limits(ys, log_y, zero=from_zero)) if log_y else (ticks[0], ticks[-1])
    up = Scale(low, high, bottom, TOP, log_y)
    out = [svg.head(name, shortened(title, TITLE_CHARACTERS), note or title, WIDTH, bottom + BOTTOM)]
    for tick in ticks:
        out += [
            svg.line(LEFT, up(tick), WIDTH - right, up(tick)),
            svg.text(LEFT - 6, up(tick) + 4, y_text(tick), "end"),
        ]
    for tick in x_ticks or _ticks(across.low, across.high, log_x):
        if across.low <= tick <= across.high:
            out.append(svg.text(across(tick), bottom + 15, short(tick), "middle"))
    for place, said in marks:
        drawn = svg.line(across(place), TOP, across(place), bottom, "mark-line")
        out.append(markup("<g>{drawn}<title>{said}</title></g>", drawn=drawn, said=said))
    for line in lines:
        out += _band(line, across, up)
    for line in lines:
        out += _drawn(line, across, up)
    out += _names(lines, labels, across, up, WIDTH - right, bottom)
    axis = f"{x}, log scale" if log_x else x
    out.append(svg.text((LEFT + WIDTH - right) / 2, bottom + BOTTOM - 8, axis, "middle", "label"))
    out.append(svg.text(0, TOP - 14, f"{y}, log scale" if log_y else y, "start"))
    return Markup().join([*out, Markup("</svg>")])


def shortened(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"


def _class(kind: int) -> str:
    return f"k{kind % KINDS}"


def _wrapped(name: str) -> list[str]:
    """Over two or three lines, where it is long."""
    return textwrap.wrap(name, LABEL_CHARACTERS, max_lines=LABEL_LINES, placeholder="…")


def _band(line: Line, across: Scale, up: Scale) -> Iterator[Markup]:
    if line.low:
        for part in _runs(zip(line.x, line.low, line.high, strict=True)):
            edge = [(across(x), up(low)) for x, low, _ in part]
            back = [(across(x), up(high)) for x, _, high in reversed(part)]
            yield svg.path([*edge, *back], f"band {_class(line.kind)}", closed=True)


def _drawn(line: Line, across: Scale, up: Scale) -> Iterator[Markup]:
    for part in _runs(zip(line.x, line.y, strict=True)):
        if len(part) > 1:
            yield svg.path(((across(x), up(y)) for x, y in part), f"line {_class(line.kind)}")
        elif not line.notes:
            yield _dot(across(part[0][0]), up(part[0][1]), line.kind, "")
    for x, y, said in zip(line.x, line.y, line.notes):
        if y is not None:
            yield _dot(across(x), up(y), line.kind, said)


def _runs(points: Iterable[tuple]) -> list[list[tuple]]:
    """Neighbours that have all their values."""
    runs: list[list[tuple]] = [[]]
    for point in points:
        if None not in point:
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _dot(x: float, y: float, kind: int, said: str) -> Markup:
    return markup(
        '<circle class="dot {kind}" cx="{x}" cy="{y}" r="2.6"><title>{said}</title></circle>',
        kind=_class(kind), x=svg.coordinate(x), y=svg.coordinate(y), said=said,
    )  # fmt: skip


def _names(
    lines: Sequence[Line], labels: Sequence[list[str]], across: Scale, up: Scale, right: float, bottom: float
) -> Iterator[Markup]:
    """The name of each line beside its end, moved up or down where two would lie on each other."""
    ends = [(line, label, _runs(zip(line.x, line.y, strict=True))) for line, label in zip(lines, labels, strict=True)]
    named = [(line, label, runs[-1][-1]) for line, label, runs in ends if label and runs]
    named.sort(key=lambda item: up(item[2][1]))
    heights = [len(label) * LABEL_LINE + 3 for _, label, _ in named]
    tops = spread([up(end[1]) - height / 2 for (_, _, end), height in zip(named, heights)], heights, TOP - 6, bottom)
    for (line, label, (x, y)), top, height in zip(named, tops, heights, strict=True):
        yield svg.line(across(x) + 3, up(y), right + 6, top + height / 2, f"leader {_class(line.kind)}")
        for i, said in enumerate(label):
            yield svg.text(right + 9, top + 10 + i * LABEL_LINE, said, "start", f"name {_class(line.kind)}")


def spread(wanted: Sequence[float], heights: Sequence[float], top: float, bottom: float) -> list[float]:
    """Places for boxes, in the order of `wanted` and near it, apart from each other; within [top, bottom] where they
    fit."""
    places: list[float] = []
    free = top
    for want, height in zip(wanted, heights, strict=True):
        places.append(max(want, free))
        free = places[-1] + height
    limit = bottom
    for i in reversed(range(len(places))):
        places[i] = min(places[i], max(limit - heights[i], top))
        limit = places[i]
    return places


def _limits(values: Sequence[float], log: bool, zero: bool = False, exact: bool = False) -> tuple[float, float]:
    """Of an axis; never of no width, nor of one that is made of rounding errors."""
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    low = min(0.0, low) if zero and not log else low
    equal = high - low <= 1e-9 * max(abs(low), abs(high))
    if log:
        return (low / 2, high * 2) if equal else (low, high)
    if equal:
        return (low - 1, high + 1) if exact else (low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1))
    return low, high


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers. Linear: from below `low` to above `high`, four to seven. Log: within them, two at least where
    there are such."""
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
            found = [d * 10.0**p for p in range(first, last + 1) for d in digits if low <= d * 10.0**p <= high]
            if len(found) >= 3:
                every = math.ceil(len(found) / 6)
                return found[::every]
        found = [tick for tick in _ticks(low, high, False) if low <= tick <= high]
        return found if len(found) > 1 else [low, high]
    rough = (high - low) / 5
    exponent = math.floor(math.log10(rough))
    power = 10.0**exponent
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 2 - exponent) for i in range(first, last + 1)]
