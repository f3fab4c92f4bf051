"""YAML text to plain data, together with the line that every value stands on.

Invariant: what comes out is dict, list, str, int, float, bool or None, and `marks` has a 1-based line for each
of them, keyed by its path of keys. Scalars follow the core schema of YAML 1.2 rather than PyYAML's 1.1:
`1e-3` is a number (PyYAML reads a string), `no` and `12:30` are strings. Tags, duplicate keys and
documents that refer to themselves are refused.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from modeling.errors import UserError

KeyPath = tuple[str | int, ...]
Marks = dict[KeyPath, int]

MAX_NODES = 100_000  # aliases can multiply a small file without end

_INTEGER = re.compile(r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


class _Loader(yaml.SafeLoader):
    """SafeLoader that leaves every plain scalar a string; _scalar() gives it its type."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - PyYAML's own way to switch them off


def load(path: str | Path) -> tuple[dict[str, Any], Marks]:
    """Reads a file whose top level is a mapping. Returns (data, marks); UserError with file:line."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError("no such file", where=str(path), remedy="give the path of an experiment file") from None
    except IsADirectoryError:
        raise UserError("is a folder", where=str(path), remedy="give the path of a YAML file in it") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError("not UTF-8 text", where=f"{path}:{line}", remedy="save the file as UTF-8") from None
    return parse(text, str(path))


def parse(text: str, name: str) -> tuple[dict[str, Any], Marks]:
    """The same from text; `name` stands for the file in messages."""
    marks: Marks = {}
    node = _compose(text, name)
    data = None if node is None else _Builder(name, marks).build(node, ())
    if data is None:
        raise UserError("the file is empty", where=f"{name}:1", remedy="start from experiments/quickstart.yaml")
    if not isinstance(data, dict):
        line = marks[()]
        found = "a list" if isinstance(data, list) else f"the {type(data).__name__} {data!r:.40}"
        raise UserError(
            f"expected a mapping of keys to values, found {found}",
            where=f"{name}:{line}",
            remedy="start with 'name:', 'storage:', 'model:', 'data:' and 'stages:'",
        )
    return data, marks


def parse_value(text: str, name: str) -> Any:
    """One value of any kind, as on the right of a command-line override."""
    node = _compose(text, name)
    return None if node is None else _Builder(name, {}).build(node, ())


def _compose(text: str, name: str) -> Any:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        message = (error.problem or "not valid YAML").replace("\t", "\\t")
        remedy = (
            "indent with spaces, not tabs" if "\\t" in message else "check the indentation, quotes and brackets here"
        )
        if "${" in "".join(text.splitlines()[line - 1 : line]):
            remedy = "put a reference inside { } or [ ] in quotes"
        if error.context:
            message = f"{message} ({error.context})"
        raise UserError(message, where=f"{name}:{line}", remedy=remedy) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise UserError(f"character {error.character!r} is not allowed in YAML", where=f"{name}:{line}",
                        remedy="remove it or write it escaped inside double quotes") from None  # fmt: skip
    except RecursionError:
        raise UserError("nested too deeply", where=f"{name}:1", remedy="an experiment needs five levels") from None


class _Builder:
    def __init__(self, name: str, marks: Marks):
        self.name, self.marks = name, marks
        self.open: set[int] = set()  # nodes being built: an alias to one of them would never end
        self.nodes = 0

    def fail(self, node: yaml.Node, message: str, remedy: str) -> UserError:
        return UserError(message, where=f"{self.name}:{node.start_mark.line + 1}", remedy=remedy)

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self.fail(node, f"more than {MAX_NODES} values once aliases are expanded", "use fewer aliases")
        if id(node) in self.open:
            raise self.fail(node, "an anchor that contains itself", "remove the alias inside its own anchor")
        core = {"ScalarNode": "str", "SequenceNode": "seq", "MappingNode": "map"}[type(node).__name__]
        if node.tag != f"tag:yaml.org,2002:{core}":
            raise self.fail(node, f"tag {node.tag!r} is not supported", "write the plain value without a tag")
        self.marks.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
            assert isinstance(node, yaml.MappingNode)
            return self.mapping(node, path)
        finally:
            self.open.discard(id(node))

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        out: dict[str, Any] = {}
        merged: list[yaml.Node] = []
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.fail(key, "a key must be plain text", "write 'key: value'")
            if key.value == "<<" and key.style is None:
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                place = ".".join(map(str, path)) + ": " if path else ""
                raise self.fail(key, f"{place}duplicate key '{key.value}', first at line {lines[key.value]}",
                                "rename or remove one of the two")  # fmt: skip
            lines[key.value] = line
            self.marks[(*path, key.value)] = line
            out[key.value] = self.build(value, (*path, key.value))
        for source in merged:
            if not isinstance(source, yaml.MappingNode):
                raise self.fail(source, "'<<' takes a mapping or a list of mappings", "point it at an anchored mapping")
            part = _Builder(self.name, marks := {})
            part.open, part.nodes = self.open, self.nodes
            values = part.build(source, path)
            self.nodes = part.nodes
            for key, value in values.items():
                if key not in out:  # a key written out wins over a merged one
                    out[key] = value
                    depth = len(path)
                    self.marks.update({p: line for p, line in marks.items() if len(p) > depth and p[depth] == key})
        return out

    def scalar(self, node: yaml.ScalarNode) -> Any:
        text = node.value
        if node.style is not None:  # quoted or block: a string
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INTEGER.fullmatch(text):
            digits = text.replace("_", "")
            if (
                len(digits) > 19
                or abs(value := int(digits, 16 if "x" in digits else 8 if "o" in digits else 10)) >= 2**63
            ):
                raise self.fail(node, "an integer beyond 64 bits", "quote it if it is meant as text")
            return value
        return float(text.replace("_", "")) if _FLOAT.fullmatch(text) else text
