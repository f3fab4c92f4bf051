"""Two plots as inline SVG: columns over a scale, and bars side by side. No script, no style of their own.

Invariant: every plot has a title, named axes with units and a sentence for those who do not see it; each bar tells its
figure. Drawn 380 units wide, about the width of a phone, so that its text stays readable there. Colours are classes of
the page's style.
"""

import math
from collections.abc import Sequence

from markupsafe import Markup

from stages.prepare import svg
from stages.prepare.page import markup, number, percent

WIDTH = 380
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 46, 46  # margins around the columns
HEIGHT = 250
CLASSES = ("one", "two")


def columns(
    name: str,
    title: str,
    bars: Sequence[tuple[str, Sequence[int]]],
    ticks: Sequence[tuple[float, str]],
    *,
    x: str,
    y: str,
    series: Sequence[str] = (),
    note: str = "",
) -> Markup:
    """Columns, one beside the other. bars: (what it stands for, parts from the bottom up). ticks: (place, text), where
    bar i reaches from i to i + 1. series: names of the parts. name: unique in the page. note: the sentence."""
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    steps = _steps(max((sum(parts) for _, parts in bars), default=0))
    scale, slot = height / steps[-1], width / max(1, len(bars))
    floor = TOP + height
    out = [svg.head(name, title, note, WIDTH, HEIGHT)]
    for step in steps:
        line = floor - step * scale
        out.append(svg.line(LEFT, line, LEFT + width, line))
        out.append(svg.text(LEFT - 6, line + 4, _short(step), "end"))
    for i, (label, parts) in enumerate(bars):
        base = float(floor)
        for part, kind in zip(parts, CLASSES):
            if not part:
                continue
            tall = max(1.0, part * scale)  # what is there is seen
            base -= tall
            edge = min(1, slot / 10)
            left = LEFT + i * slot + edge
            out.append(
                svg.bar(kind, left, base, slot - 2 * edge, tall, f"{label}: {number(part)} sample{'s' * (part != 1)}")
            )
    for place, text in ticks:
        out.append(svg.text(LEFT + place * slot, floor + 15, text, "middle"))
    out.append(svg.text(LEFT + width / 2, HEIGHT - 8, x, "middle", "label"))
    out.append(svg.text(0, TOP - 14, y, "start"))
    out.append(_legend(series, WIDTH - RIGHT, TOP - 14))
    return Markup().join([*out, Markup("</svg>")])


def side_by_side(
    name: str,
    title: str,
    rows: Sequence[tuple[str, Sequence[float]]],
    *,
    x: str,
    series: Sequence[str],
    note: str = "",
) -> Markup:
    """For each row (what it stands for, shares from 0 to 1) one horizontal bar per series."""
    left, right, thick = 88, 62, 13
    row_height = thick * len(series) + 14
    height = TOP + row_height * len(rows) + 36
    scale = WIDTH - left - right
    top = max((share for _, shares in rows for share in shares), default=0) or 1
    out = [svg.head(name, title, note, WIDTH, height)]
    for i, (label, shares) in enumerate(rows):
        begin = TOP + 6 + i * row_height
        out.append(svg.text(left - 8, begin + row_height / 2 - 3, label, "end", "label"))
        for j, (share, kind, who) in enumerate(zip(shares, CLASSES, series)):
            y = begin + j * thick
            out.append(svg.bar(kind, left, y, share / top * scale, thick - 2, f"{label}, {who}: {percent(share)}"))
            out.append(svg.text(left + share / top * scale + 5, y + thick - 3, percent(share), "start"))
    out.append(svg.line(left, TOP, left, height - 30))
    out.append(svg.text(left, height - 10, x, "start", "label"))
    out.append(_legend(series, WIDTH - RIGHT, TOP - 14))
    return Markup().join([*out, Markup("</svg>")])


def bar(share: float) -> Markup:
    """A bar in a table's cell; share of its width, from 0 to 1. The figure stands in the cell beside it."""
    return markup(
        '<svg class="bar" aria-hidden="true"><rect class="one" width="{share}%" height="100%"/></svg>',
        share=svg.coordinate(100 * share),
    )


def _legend(series: Sequence[str], right: float, y: float) -> Markup:
    """Names of the series beside their colours, ending at `right`. 6 units a character at the size of ticks."""
    out, x = Markup(), right
    for name, kind in reversed(list(zip(series, CLASSES))):
        x -= 6 * len(name)
        out += svg.text(x, y, name, "start")
        out += svg.bar(kind, x - 13, y - 9, 9, 9, name)
        x -= 26
    return out


def _steps(top: float) -> list[float]:
    """Round numbers from 0 to `top` or just above it, three to six of them; of counts, so whole ones."""
    rough = max(1.0, top) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = max(1, next(power * times for times in (1, 2, 5, 10) if power * times >= rough))
    return [step * i for i in range(math.ceil(max(1.0, top) / step) + 1)]


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
