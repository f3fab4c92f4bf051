"""The plots of a scaling study as SVG files that stand alone: points, laws with their bands, what was held out.

Invariant: a point of the fit is filled, one that was held out is a ring; a band is drawn wherever a law is; colours are
told apart in print too (Okabe and Ito's), and every series is named. No script, no fonts, no style of the page's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np

from stages.scaling_fit import Law

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("", "6 3", "2 2", "8 3 2 3")
PANEL, HEIGHT = 300, 260  # of one panel, margins included
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 44, 44
AT = 30  # points of a drawn law
LEGEND = 200  # units of a column of it: room for "weighted, likelihood, direct"


@dataclass(frozen=True)
class Scale:
    """From values to places along one side of a panel. logarithmic: of base 10."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, logarithmic: bool = False) -> "Scale":
        """With a margin around the values, also where they are equal or differ by a rounding error."""
        found = np.log10(values) if logarithmic else np.asarray(values, float)
        low, high = float(found.min()), float(found.max())
        equal = high - low <= 1e-9 * max(1.0, abs(low), abs(high))
        margin = 0.5 if equal else 0.06 * (high - low)
        return cls(low - margin, high + margin, start, end, logarithmic)

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.logarithmic else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values, about five."""
        low, high = (10**self.low, 10**self.high) if self.logarithmic else (self.low, self.high)
        if self.logarithmic and high > 4 * low:
            steps = (1, 2, 5) if self.high - self.low < 2 else (1,)
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            found = [step * 10.0**power for power in decades for step in steps]
            return [value for value in found if low <= value <= high]
        rough = (high - low) / 5
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * n for n in (1, 2, 5, 10) if unit * n >= rough)
        return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


class Figure:
    """An SVG with panels side by side and a legend under them."""

    def __init__(self, title: str, panels: int):
        self.width, self.series = max(1, panels) * PANEL, 0
        self.root = ElementTree.Element(
            "svg",
            {"xmlns": "http://www.w3.org/2000/svg", "role": "img", "font-family": "sans-serif", "font-size": "11"},
        )
        self.add("title", title)
        self.text(0, 13, title, "start", weight="bold")

    def add(self, tag: str, text: str = "", **attributes: Any) -> ElementTree.Element:
        named = {
            key.replace("_", "-"): f"{value:.2f}" if isinstance(value, float) else str(value)
            for key, value in attributes.items()
        }
        element = ElementTree.SubElement(self.root, tag, named)
        if text:
            element.text = text
        return element

    def text(self, x: float, y: float, said: str, anchor: str = "middle", weight: str = "normal") -> None:
        self.add("text", said, x=float(x), y=float(y), text_anchor=anchor, font_weight=weight, fill="#222222")

    def axes(self, panel: int, heading: str, x: Scale, y: Scale, x_name: str, y_name: str) -> None:
        for value in y.ticks():
            self.add("line", x1=x.start, x2=x.end, y1=y(value), y2=y(value), stroke="#dddddd")
            self.text(x.start - 5, y(value) + 4, short(value), "end")
        for value in x.ticks():
            self.add("line", x1=x(value), x2=x(value), y1=y.start, y2=y.start + 4, stroke="#888888")
            self.text(x(value), y.start + 16, short(value))
        self.add("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, stroke="#888888")
        self.text((x.start + x.end) / 2, y.start + 32, x_name)
        self.text(panel * PANEL, TOP - 8, y_name, "start")
        self.text((x.start + x.end) / 2, TOP - 8, heading, weight="bold")

    def band(self, places: Sequence[tuple[float, float, float]], colour: str) -> None:
        """places: (x, low, high)."""
        outline = [(x, low) for x, low, _ in places] + [(x, high) for x, _, high in reversed(places)]
        self.add("polygon", points=joined(outline), fill=colour, fill_opacity=0.15, stroke="none")

    def line(self, places: Sequence[tuple[float, float]], colour: str, dash: str = "") -> None:
        dashed = {"stroke_dasharray": dash} if dash else {}
        self.add("polyline", points=joined(places), fill="none", stroke=colour, stroke_width=1.5, **dashed)

    def dot(self, x: float, y: float, colour: str, ring: bool, said: str) -> None:
        fill = {"fill": "#ffffff", "stroke": colour, "stroke_width": 2.0} if ring else {"fill": colour}
        mark = self.add("circle", cx=x, cy=y, r=4.0 if ring else 3.0, **fill)
        ElementTree.SubElement(mark, "title").text = said

    def legend(self, name: str, colour: str, dash: str = "", ring: bool | None = None) -> None:
        """ring: a point, as a ring or filled; None: a line."""
        column, row = self.series % self._columns, self.series // self._columns
        x, y = 8.0 + column * LEGEND, HEIGHT + 14.0 + row * 16
        if ring is None:
            self.line([(x, y - 4), (x + 22, y - 4)], colour, dash)
        else:
            self.dot(x + 11, y - 4, colour, ring, name)
        self.text(x + 28, y, name, "start")
        self.series += 1

    @property
    def _columns(self) -> int:
        return max(1, self.width // LEGEND)

    def done(self) -> str:
        height = HEIGHT + 10 + 16 * math.ceil(self.series / self._columns)
        self.root.set("viewBox", f"0 0 {self.width} {height}")
        self.root.set("width", str(self.width))
        self.root.set("height", str(height))
        return ElementTree.tostring(self.root, encoding="unicode") + "\n"


def joined(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in places)


def short(value: float) -> str:
    """1500 is 1.5k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _panel(panel: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """(start, end) of the x side and of the y side."""
    return (panel * PANEL + LEFT, (panel + 1) * PANEL - RIGHT), (HEIGHT - BOTTOM, TOP)


def draw_losses(points: Sequence[dict[str, Any]], law: Law | None, unit: str) -> str:
    """Loss against D, a panel for each vision encoder, a colour for each language model."""
    visions, languages = (sorted({point[axis] for point in points}) for axis in ("vision", "language"))
    figure = Figure("Loss against data, with the law and its band", len(visions))
    losses, reach = [point["loss"] for point in points], [point["data"] for point in points]
    for panel, vision in enumerate(visions):
        across, up = _panel(panel)
        x, y = Scale.over(reach, *across, True), Scale.over(losses, *up, True)
        figure.axes(panel, f"vision {short(vision)}", x, y, f"D, {unit}", "nats per token" if panel == 0 else "")
        for i, language in enumerate(languages):
            colour = COLOURS[i % len(COLOURS)]
            mine = [point for point in points if (point["vision"], point["language"]) == (vision, language)]
            if law is not None and mine:
                at = np.geomspace(min(reach), max(reach), AT).tolist()
                values = [law.predict({"vision": vision, "language": language, "data": d}, measured=False) for d in at]
                figure.band([(x(d), y(low), y(high)) for d, (_, low, high) in zip(at, values)], colour)
                figure.line([(x(d), y(value)) for d, (value, _, _) in zip(at, values)], colour, DASHES[i % 4])
            for point in mine:
                ring = point["part"] == "held out"
                figure.dot(x(point["data"]), y(point["loss"]), colour, ring, f"{point['stage']}: {point['loss']:.4f}")
    for i, language in enumerate(languages):
        figure.legend(f"language {short(language)}", COLOURS[i % len(COLOURS)], DASHES[i % 4])
    figure.legend("held out of the fit", "#666666", ring=True)
    return figure.done()


def draw_predictions(points: Sequence[dict[str, Any]], law: Law) -> str:
    """Measured against predicted; the held-out points with the band that was given for them."""
    figure = Figure("Measured loss against predicted", 1)
    across, up = _panel(0)
    both = [value for point in points for value in (point["loss"], point["predicted"])]
    bands = [point[key] for point in points if point["part"] == "held out"
             for key in ("predicted_low", "predicted_high")]  # fmt: skip
    x, y = Scale.over([*both, *bands], *across, True), Scale.over(both, *up, True)
    figure.axes(0, "", x, y, "predicted, nats per token", "measured")
    ends = (min(both), max(both))
    figure.line([(x(end), y(end)) for end in ends], "#888888", "4 3")
    for point in sorted(points, key=lambda one: one["part"] == "held out"):
        ring = point["part"] == "held out"
        place, colour = y(point["loss"]), COLOURS[1] if ring else COLOURS[0]
        if ring:
            figure.line([(x(point["predicted_low"]), place), (x(point["predicted_high"]), place)], colour)
        said = f"{point['stage']}: measured {point['loss']:.4f}, predicted {point['predicted']:.4f}"
        figure.dot(x(point["predicted"]), place, colour, ring, said)
    figure.legend("in the fit", COLOURS[0], ring=False)
    figure.legend(f"held out, {law.band:.0%} band", COLOURS[1], ring=True)
    return figure.done()


def draw_test_time(curves: Sequence[dict[str, Any]]) -> str:
    """Accuracy against samples of a question, a panel for each task, of the last evaluation that has curves."""
    last = curves[-1]["evaluation"]
    mine = [curve for curve in curves if curve["evaluation"] == last]
    tasks = list(dict.fromkeys(curve["task"] for curve in mine))
    figure = Figure(f"Accuracy against samples of a question: {curves[-1]['stage']}", len(tasks))
    named: dict[str, int] = {}
    shares = [value for curve in mine for value in (*curve["low"], *curve["high"])]
    for panel, task in enumerate(tasks):
        across, up = _panel(panel)
        of_task = [curve for curve in mine if curve["task"] == task]
        reach = [n for curve in of_task for n in (*curve["samples"], *curve["fit"].get("samples", ()))]
        x, y = Scale.over(reach, *across, True), Scale.over(shares, *up)
        figure.axes(panel, task, x, y, "samples", "accuracy" if panel == 0 else "")
        for curve in of_task:
            i = named.setdefault(f"{curve['method']}, {curve['prompt']}", len(named))
            colour, fit = COLOURS[i % len(COLOURS)], curve["fit"]
            if "refused" not in fit:
                clipped = [(x(n), *(y(min(max(v, min(shares)), max(shares))) for v in (a, b, c)))
                           for n, a, b, c in zip(fit["samples"], fit["accuracy"], fit["low"], fit["high"])]  # fmt: skip
                figure.band([(n, low, high) for n, _, low, high in clipped], colour)
                figure.line([(n, value) for n, value, _, _ in clipped], colour, DASHES[i % 4])
            for n, share in zip(curve["samples"], curve["accuracy"]):
                figure.dot(x(n), y(share), colour, False, f"{curve['method']}, {n:g} samples: {share:.3f}")
    for name, i in named.items():
        figure.legend(name, COLOURS[i % len(COLOURS)], DASHES[i % 4])
    return figure.done()
