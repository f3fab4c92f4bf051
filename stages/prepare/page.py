"""Pages about a mixture, from text and pictures that nobody vouches for: one HTML file, no network, no foreign markup.

Invariants: every text is escaped, because the template engine escapes whatever is not `Markup`; characters that act on
the page instead of showing (controls, reversals of direction, invisible ones) are written out; a picture is decoded and
encoded anew, so that no byte of its file is passed on; and the Content-Security-Policy, by digest, lets nothing run or
load but our own style and script. The same input gives the same bytes.
"""

import base64
import hashlib
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, SupportsFloat

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from modeling.images import ImageError, decode_rgb
from modeling.template import SPECIAL_TOKENS

FOLDER = Path(__file__).parent / "pages"  # templates, style and script
SIDE = 256  # pixels of a thumbnail's longer side
PICTURES = 8  # shown of a sample
TURNS = 20  # shown of a sample, and as many more that hold a mark
SCANNED = 200_000  # characters of a sample's answers searched for repeated parts

# A part of this many characters that comes this often is marked. It finds runs of one character, loops, and lines that
# come again, in any script; in a language without spaces too. Only a hint for the eye: it rejects nothing.
PART, OFTEN = 20, 3
CONTROL = re.compile(r"<\|[^|<>\s]{1,40}\|>|" + "|".join(map(re.escape, SPECIAL_TOKENS)))
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufdd0-\ufdef\ufeff\ufff9-\uffff\U000e0000-\U000e0fff]"
)


@dataclass(frozen=True)
class Example:
    """A sample to show. pictures: encoded images, which may be damaged; the other fields as in verdicts.parquet."""

    dataset: str
    id: str
    key: str
    digest: str
    type: str
    verdict: str
    step: str
    reason: str
    detail: str
    conversation: Sequence[Mapping[str, str]]  # {from, value}
    pictures: Sequence[bytes]


@dataclass(frozen=True)
class Picture:
    """A thumbnail as a data URI; '' where there is none, and `note` says why."""

    uri: str
    width: int
    height: int
    note: str


@dataclass(frozen=True)
class Turn:
    """A turn of which `before` and `after` characters are left out."""

    role: str
    text: Markup
    before: int
    after: int


def visible(value: Any) -> Any:
    """Text in which characters without a shape of their own are written out; anything else as it is."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return UNSEEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", value)


def markup(template: str, **values: Any) -> Markup:
    """`template` is ours; the values are escaped, and visible."""
    return Markup(template).format(**{name: visible(value) for name, value in values.items()})


def thumbnail(data: bytes) -> Picture:
    """The picture at most SIDE pixels wide and high, or the reason why it does not decode."""
    try:
        image = decode_rgb(data)
    except ImageError as error:
        return Picture("", 0, 0, f"does not decode: {error}")
    note = f"{image.width} × {image.height} pixels"
    if not image.width or not image.height:
        return Picture("", 0, 0, note)
    image.thumbnail((SIDE, SIDE))
    image.info.clear()  # comments and colour profiles would be written again
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    uri = "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
    return Picture(uri, image.width, image.height, note)


def turns(conversation: Sequence[Mapping[str, str]], characters: int) -> tuple[list[Turn], int]:
    """The turns to show, about `characters` in all, and how many are left out. What comes again and again, and control
    tokens, are marked; a long turn is cut around its first mark."""
    often = _often([turn["value"] for turn in conversation if turn["from"] == "gpt"])
    spans = [_spans(turn["value"], often if turn["from"] == "gpt" else set()) for turn in conversation]
    marked = [i for i, found in enumerate(spans) if found][:TURNS]
    chosen = sorted({*range(min(TURNS, len(conversation))), *marked})
    each = max(200, characters // max(1, len(chosen)))
    shown = []
    for i in chosen:
        text, start = conversation[i]["value"], 0
        if spans[i] and spans[i][0][1] > each:
            start = max(0, spans[i][0][0] - each // 8)
        end = min(len(text), start + each)
        shown.append(Turn(conversation[i]["from"], _marked(text, start, end, spans[i]), start, len(text) - end))
    return shown, len(conversation) - len(chosen)


def _often(texts: list[str]) -> set[str]:
    counts: Counter[str] = Counter()
    left = SCANNED
    for text in texts:
        counts.update(text[i : i + PART] for i in range(min(left, len(text)) - PART + 1))
        left -= min(left, len(text))
    often = (part for part, count in counts.items() if count >= OFTEN)
    return {part for part in often if len("".join(part.split())) >= PART // 2}  # the indents of code are not meant


def _spans(text: str, often: set[str]) -> list[tuple[int, int]]:
    """[start, end) of what is marked, in order and apart from each other."""
    found = [match.span() for match in CONTROL.finditer(text)]
    if often:
        starts = range(min(SCANNED, len(text)) - PART + 1)
        found += [(i, i + PART) for i in starts if text[i : i + PART] in often]
    merged: list[tuple[int, int]] = []
    for start, end in sorted(found):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _marked(text: str, start: int, end: int, spans: list[tuple[int, int]]) -> Markup:
    out, position = Markup(), start
    for left, right in spans:
        left, right = max(left, start), min(right, end)
        if left < right:
            out += markup("{plain}<mark>{part}</mark>", plain=text[position:left], part=text[left:right])
            position = right
    return out + markup("{rest}", rest=text[position:end])


def write_page(path: Path, name: str, *, title: str, folder: Path = FOLDER, **values: Any) -> None:
    """Writes the page of <name>.html in `folder`, with <name>.css and <name>.js where there are such, on top of the
    page.html and page.css of all pages."""
    style = _constant(FOLDER / "page.css") + _constant(folder / f"{name}.css")
    script = _constant(folder / f"{name}.js")
    template = _environment(folder).get_template(f"{name}.html")
    text = template.render(
        title=title,
        style=Markup(style),
        style_digest=_digest(style),
        script=Markup(script),
        script_digest=_digest(script),
        **values,
    )
    path.write_text(text, encoding="utf-8", newline="\n")


def _constant(path: Path) -> str:
    return path.read_text("utf-8") if path.exists() else ""


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def number(value: SupportsFloat) -> str:
    """1234567 as 1,234,567; a number with a fraction to a whole one."""
    return f"{float(value):,.0f}"


def percent(share: SupportsFloat) -> str:
    """0.4592 as 45.92 %."""
    return f"{100 * float(share):.2f} %"


def score(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


@lru_cache
def _environment(folder: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([folder, FOLDER]),
        autoescape=True,
        finalize=visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, percent=percent, score=score)
    return environment


def shown(example: Example, *, characters: int, pictures: int = PICTURES) -> dict[str, Any]:
    """What the macros of "parts" take: the example's fields, thumbnails, and cut and marked turns."""
    said, more_turns = turns(example.conversation, characters)
    names = ("dataset", "id", "key", "digest", "type", "verdict", "step", "reason", "detail")
    return {name: getattr(example, name) for name in names} | {
        "pictures": [thumbnail(data) for data in example.pictures[:pictures]],
        "more_pictures": max(0, len(example.pictures) - pictures),
        "turns": said,
        "more_turns": more_turns,
    }
