"""Command-line overrides: `stages.full_finetune.lr=1e-5`.

Invariant: an override changes the data of the file before anything is checked, so it is checked exactly as if
it stood in the file; messages then name the override instead of a line. It may set any setting, but not
invent a stage or a mixture. Of a stage that a sweep multiplies, the name in the file sets all variants, the name of
one variant that alone.
"""

from collections.abc import Sequence
from typing import Any

from modeling.errors import UserError
from orchestrator.problems import is_secret, suggest
from orchestrator.redaction import found_in
from orchestrator.yamlfile import KeyPath, Marks, parse_value


def apply(data: dict[str, Any], marks: Marks, overrides: list[str] | tuple[str, ...]) -> dict[KeyPath, str]:
    """Sets each `path=value` in `data`, in order. Returns where each path was set, for messages."""
    places: dict[KeyPath, str] = {}
    for text in overrides:
        name, mark, raw = text.partition("=")
        path = tuple(part.strip() for part in name.split("."))
        where = f"override '{name}=...'" if is_secret(path) or found_in(text) else f"override '{text}'"
        if not mark or not all(path):
            raise UserError("expected path=value", where=f"override '{name}'",
                            remedy="write for example stages.full_finetune.lr=1e-5")  # fmt: skip
        try:
            value = parse_value(raw, "value")
        except UserError as error:
            raise UserError(f"the value is not YAML: {error.message}", where=where,
                            remedy="quote the whole override for the shell") from None  # fmt: skip
        _set(data, path, value, where)
        for old in [p for p in (*marks, *places) if p[: len(path)] == path]:
            marks.pop(old, None)
            places.pop(old, None)
        for depth in range(1, len(path)):
            if path[:depth] not in marks:  # a group that this override opened
                places.setdefault(path[:depth], where)
        places[path] = where
    return places


def split(data: dict[str, Any], overrides: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(for the file as it is written, for the names that a sweep makes of it)."""
    later = []
    for text in overrides:
        group, *rest = (part.strip() for part in text.partition("=")[0].split("."))
        names = data.get(group)
        if "sweep" in data and group in ("stages", "models") and rest and isinstance(names, dict):
            later += [text] if rest[0] not in names else []
    return tuple(text for text in overrides if text not in later), tuple(later)


def _set(data: dict[str, Any], path: tuple[str, ...], value: Any, where: str) -> None:
    if len(path) > 1 and path[0] in ("stages", "data"):
        names = data.get(path[0]) or {}
        if isinstance(names, dict) and path[1] not in names:
            noun = "stage" if path[0] == "stages" else "mixture"
            raise UserError(f"unknown {noun} '{path[1]}'", where=where, remedy=suggest(path[1], names))
    inner: Any = data
    for depth, key in enumerate(path[:-1], 1):
        inner = inner.setdefault(key, {})
        if not isinstance(inner, dict):
            raise UserError(f"'{'.'.join(path[:depth])}' has no settings inside it", where=where,
                            remedy="override the value itself")  # fmt: skip
    inner[path[len(path) - 1]] = value
