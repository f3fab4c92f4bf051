"""Plots and tables of scaling studies, as their stage made them.

Invariant: a plot is a file from storage, so nothing in it may run or load: it must be one plain SVG whose elements and
attributes draw and do nothing else, it is written anew from what was parsed, and the page shows it as an image
(`<img src="data:...">`), in which a browser runs no script and loads nothing.
"""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from orchestrator.report.figures import DASH, number, real
from orchestrator.report.read import StageRead, read_json
from orchestrator.store import Store

SVG = "http://www.w3.org/2000/svg"
FILE = "scaling.json"
LARGEST = 4_000_000  # bytes of a plot
ELEMENTS = frozenset(
    {
        "svg", "g", "title", "desc", "defs", "style", "rect", "line", "circle", "ellipse", "path", "polyline",
        "polygon", "text", "tspan", "clipPath", "use", "symbol", "marker", "linearGradient", "radialGradient", "stop",
        "pattern",
    }
)  # fmt: skip
ROWS = 200  # of a table
LISTED = 4  # of a list of names
ESTIMATE = {"value", "low", "high"}


@dataclass(frozen=True)
class Plot:
    """uri: '' for a file that is not shown, and `note` says why."""

    name: str
    title: str
    uri: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A list of like records: cells as text. Values that are themselves lists or records are left to the file."""

    name: str
    columns: list[str]
    rows: list[tuple[str, ...]]
    left_out: int


@dataclass(frozen=True)
class Study:
    """facts: (name, figure) of single values."""

    stage: str
    plots: list[Plot]
    facts: list[tuple[str, str]]
    tables: list[Table]


def read_studies(store: Store, stages: Sequence[StageRead]) -> list[Study]:
    """Of every completed scaling stage. Raises UserError for a result that cannot be read."""
    out = []
    for one in stages:
        if one.stage.kind.base != "scaling" or one.shared or not one.result["files"]:
            continue
        folder, names = one.result["folder"], [file["name"] for file in one.result["files"]]
        plots = [plot(name, store.get(f"{folder}/{name}")) for name in names if name.endswith(".svg")]
        found = read_json(store, f"{folder}/{FILE}") if FILE in names else {}
        facts, tables = told(found)
        out.append(Study(one.name, plots, facts, tables))
    return out


def plot(name: str, data: bytes) -> Plot:
    """A file of a result as an image; left out where it is more than a drawing."""
    title = name.removesuffix(".svg").replace("_", " ").replace("-", " ")
    try:
        if len(data) > LARGEST:
            raise ValueError(f"{len(data):,} bytes, {LARGEST:,} at most")
        if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
            raise ValueError("it has a document type")
        root = ElementTree.fromstring(data)
        if root.tag != f"{{{SVG}}}svg":
            raise ValueError("it is no SVG")
        for element in root.iter():
            _check(element)
    except (ElementTree.ParseError, ValueError) as error:
        return Plot(name, title, note=f"not shown: {error}")
    ElementTree.register_namespace("", SVG)
    uri = "data:image/svg+xml;base64," + base64.b64encode(ElementTree.tostring(root, "utf-8")).decode()
    return Plot(name, root.findtext(f"{{{SVG}}}title") or title, uri)


def _check(element: ElementTree.Element) -> None:
    space, _, name = str(element.tag).removeprefix("{").rpartition("}")
    if space != SVG or name not in ELEMENTS:
        raise ValueError(f"it has the element {name}")
    for key, value in element.attrib.items():
        local = key.rpartition("}")[2].lower()
        if local.startswith("on") or (local in ("href", "src") and not value.startswith("#")) or _loads(value):
            raise ValueError(f"it has the attribute {local}={value[:40]}")
    if name == "style" and _loads(element.text or ""):
        raise ValueError("its style names what lies outside")


def _loads(style: str) -> bool:
    """Whether it names anything outside the drawing."""
    return bool(re.search(r"@import|url\(\s*['\"]?(?![\s'\"#])|\\|javascript:|data:", style, re.I))


def told(found: Any) -> tuple[list[tuple[str, str]], list[Table]]:
    """What scaling.json says, as (single figures, tables): its lists of records are tables, the rest is listed."""
    facts: list[tuple[str, str]] = []
    tables: list[Table] = []

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict) and set(value) == ESTIMATE:
            facts.append((name, "{value} [{low}, {high}]".format(**{key: _cell(value[key]) for key in ESTIMATE})))
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}" if name else str(key))
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            tables.extend(_table(name, value))
        elif value not in (None, [], ""):
            facts.append((name, _cell(value)))

    walk(found, "")
    return facts, tables


def _table(name: str, records: Sequence[dict[str, Any]]) -> list[Table]:
    """Nothing where the records hold no number of their own."""
    plain = [{k: v for k, v in record.items() if not isinstance(v, dict | list)} for record in records]
    if not any(isinstance(value, int | float) for record in plain for value in record.values()):
        return []
    columns = list(dict.fromkeys(key for record in plain for key in record))
    rows = [tuple(_cell(record.get(column)) for column in columns) for record in plain]
    return [Table(name, columns, rows[:ROWS], max(0, len(rows) - ROWS))]


def _cell(value: Any) -> str:
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < 1e15):
        return number(value)
    if isinstance(value, float):
        return real(value)
    if isinstance(value, list):
        more = f", and {len(value) - LISTED} more" if len(value) > LISTED else ""
        return ", ".join(map(_cell, value[:LISTED])) + more
    return str(value)
