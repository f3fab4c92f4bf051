"""Parts of inline SVG that all plots share: a titled figure, text, lines, bars. No script, no style of their own.

Invariant: every text is escaped (page.markup); colours are classes of the page's style; places are in units of the
figure's viewBox, y downwards.
"""

from collections.abc import Iterable

from markupsafe import Markup

from stages.prepare.page import markup


def head(name: str, title: str, note: str, width: float, height: float) -> Markup:
    """The start of a figure, which `</svg>` ends. name: unique in the page. note: for those who do not see it."""
    return markup(
        '<svg class="chart" role="img" aria-labelledby="{name}-title {name}-note" viewBox="0 0 {width} {height}">'
        '<title id="{name}-title">{title}</title><desc id="{name}-note">{note}</desc>'
        '<text class="heading" x="0" y="12">{title}</text>',
        name=name,
        title=title,
        note=note or title,
        width=coordinate(width),
        height=coordinate(height),
    )


def text(x: float, y: float, said: str, anchor: str, kind: str = "tick") -> Markup:
    return markup(
        '<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>',
        kind=kind,
        x=coordinate(x),
        y=coordinate(y),
        anchor=anchor,
        text=said,
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "axis") -> Markup:
    drawn = '<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>'
    return Markup(drawn).format(kind, coordinate(x1), coordinate(y1), coordinate(x2), coordinate(y2))


def bar(kind: str, x: float, y: float, width: float, height: float, title: str) -> Markup:
    return markup(
        '<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}"><title>{title}</title></rect>',
        kind=kind,
        x=coordinate(x),
        y=coordinate(y),
        width=coordinate(width),
        height=coordinate(height),
        title=title,
    )


def path(points: Iterable[tuple[float, float]], kind: str, closed: bool = False) -> Markup:
    """A line through the points, or the area that they enclose."""
    joined = " ".join(f"{coordinate(x)},{coordinate(y)}" for x, y in points)
    name = "polygon" if closed else "polyline"
    return Markup('<{} class="{}" points="{}"/>').format(name, kind, joined)


def coordinate(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
