"""Two plots as inline SVG: columns over a scale, and bars side by side. No script, no style of their own.

Invariant: every plot has a title, named axes with units and a sentence for those who do not see it; each bar tells its
figure. Drawn 380 units wide, about the width of a phone, so that its text stays readable there. Colours are classes of
the page's style.
"""

import math
from collections.abc import Sequence

from markupsafe import Markup

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
    out = [_head(name, title, note, HEIGHT)]
    for step in steps:
        line = floor - step * scale
        out.append(_line(LEFT, line, LEFT + width, line))
        out.append(_text(LEFT - 6, line + 4, _short(step), "end"))
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
                _bar(kind, left, base, slot - 2 * edge, tall, f"{label}: {number(part)} sample{'s' * (part != 1)}")
            )
    for place, text in ticks:
        out.append(_text(LEFT + place * slot, floor + 15, text, "middle"))
    out.append(_text(LEFT + width / 2, HEIGHT - 8, x, "middle", "label"))
    out.append(_text(0, TOP - 14, y, "start"))
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
    out = [_head(name, title, note, height)]
    for i, (label, shares) in enumerate(rows):
        begin = TOP + 6 + i * row_height
        out.append(_text(left - 8, begin + row_height / 2 - 3, label, "end", "label"))
        for j, (share, kind, who) in enumerate(zip(shares, CLASSES, series)):
            y = begin + j * thick
            out.append(_bar(kind, left, y, share / top * scale, thick - 2, f"{label}, {who}: {percent(share)}"))
            out.append(_text(left + share / top * scale + 5, y + thick - 3, percent(share), "start"))
    out.append(_line(left, TOP, left, height - 30))
    out.append(_text(left, height - 10, x, "start", "label"))
    out.append(_legend(series, WIDTH - RIGHT, TOP - 14))
    return Markup().join([*out, Markup("</svg>")])


def bar(share: float) -> Markup:
    """A bar in a table's cell; share of its width, from 0 to 1. The figure stands in the cell beside it."""
    return markup(
        '<svg class="bar" aria-hidden="true"><rect class="one" width="{share}%" height="100%"/></svg>',
        share=_f(100 * share),
    )


def _head(name: str, title: str, note: str, height: float) -> Markup:
    return markup(
        '<svg class="chart" role="img" aria-labelledby="{name}-title {name}-note" viewBox="0 0 {width} {height}">'
        '<title id="{name}-title">{title}</title><desc id="{name}-note">{note}</desc>'
        '<text class="heading" x="0" y="12">{title}</text>',
        name=name,
        title=title,
        note=note or title,
        width=WIDTH,
        height=_f(height),
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> Markup:
    return markup(
        '<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>',
        kind=kind,
        x=_f(x),
        y=_f(y),
        anchor=anchor,
        text=text,
    )


def _line(x1: float, y1: float, x2: float, y2: float) -> Markup:
    line = '<line class="axis" x1="{}" y1="{}" x2="{}" y2="{}"/>'
    return Markup(line).format(_f(x1), _f(y1), _f(x2), _f(y2))


def _bar(kind: str, x: float, y: float, width: float, height: float, title: str) -> Markup:
    return markup(
        '<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}"><title>{title}</title></rect>',
        kind=kind,
        x=_f(x),
        y=_f(y),
        width=_f(width),
        height=_f(height),
        title=title,
    )


def _legend(series: Sequence[str], right: float, y: float) -> Markup:
    """Names of the series beside their colours, ending at `right`. 6 units a character at the size of ticks."""
    out, x = Markup(), right
    for name, kind in reversed(list(zip(series, CLASSES))):
        x -= 6 * len(name)
        out += _text(x, y, name, "start")
        out += _bar(kind, x - 13, y - 9, 9, 9, name)
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


def _f(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
