"""Everything wrong with an experiment file, each with its place, told together.

Invariant: a mistake is reported once, at the line (or command-line override) it was made on, with the nearest
thing that would have been right; values of keys that look like secrets are never repeated.
"""

import difflib
import math
import re
from collections.abc import Iterable
from typing import Any, NoReturn, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from modeling.errors import UserError
from orchestrator.redaction import found_in, redact
from orchestrator.yamlfile import KeyPath, Marks

Place = TypeVar("Place", int, str)

# What people write from other trainers -> our name. Only names that exist where they are written are proposed.
ALIASES = {
    "learning_rate": "lr", "batch_size": "global_batch", "global_batch_size": "global_batch", "packs": "global_batch",
    "epoch": "epochs", "num_train_epochs": "epochs", "num_epochs": "epochs", "max_steps": "steps",
    "total_steps": "steps", "bf16": "precision", "dtype": "precision", "fp32": "precision", "zero": "deepspeed",
    "zero_stage": "deepspeed", "trainable": "train", "freeze": "train", "modules": "train", "depends_on": "needs",
    "depends": "needs", "dependencies": "needs", "parents": "needs", "after": "needs", "type": "kind",
    "wd": "weight_decay", "clip": "max_grad_norm", "grad_clip": "max_grad_norm", "dataset": "data",
    "datasets": "data", "llm": "language", "vit": "vision", "save_steps": "every", "save_total_limit": "keep",
    "warmup_steps": "warmup", "num_workers": "workers", "gpu": "gpus", "cpu": "cpus", "max_seq_length": "max_tokens",
    "max_packed_tokens": "max_tokens", "num_images_expected": "max_tiles", "max_dynamic_patch": "max_tiles",
    "force_image_size": "tile_size", "output": "storage", "output_dir": "storage", "drop_path_rate": "drop_path",
    "lr_scheduler": "schedule", "path": "meta", "meta_path": "meta", "system_prompt": "system",
}  # fmt: skip

_REMEDIES = {
    "int_type": "write a whole number, without quotes",
    "float_type": "write a number such as 2e-4, without quotes",
    "string_type": "write text",
    "bool_type": "write true or false",
    "model_type": "write its settings as 'key: value', indented under it",
    "greater_than": "give a larger number",
    "greater_than_equal": "give a larger number",
    "less_than": "give a smaller number",
    "less_than_equal": "give a smaller number",
    "too_short": "list more",
    "too_long": "list fewer",
}

_SECRET = re.compile(r"(^|_|-)(token|secret|secrets|password|passwd|credential|credentials|(api|access|private)_?key)$")


def nearest(word: str, valid: Iterable[str]) -> str | None:
    """The valid name that was most likely meant: by alias, by spelling, by spelling of an alias."""
    valid = list(valid)
    aliases = {alias: name for alias, name in ALIASES.items() if name in valid}
    candidates = [*valid, *aliases]
    match = difflib.get_close_matches(word.lower().replace("-", "_"), candidates, n=1, cutoff=0.6)
    return None if not match else match[0] if match[0] in valid else aliases[match[0]]


def suggest(word: str, valid: Iterable[str]) -> str:
    """The remedy for a wrong name: the nearest valid one, or all of them."""
    valid = list(valid)
    if (match := nearest(word, valid)) is not None:
        return f"did you mean '{match}'?"
    return f"use one of: {', '.join(valid)}" if valid else "remove it"


SECRET_REMEDY = "remove it, and set it in the environment of every process that needs it"
_NAMES = (("cluster", "secret"),)  # keys that hold the name of a secret


def is_secret(path: KeyPath) -> bool:
    return any(isinstance(key, str) and _SECRET.search(key.lower()) for key in path)


def show(value: Any, path: KeyPath = ()) -> str:
    """A value as a message may repeat it: short, as YAML would write it."""
    if is_secret(path):
        return "a value not shown"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = redact(repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


class Problems:
    """Collects; `stop()` raises them all as one UserError, one per line, in the order of the file."""

    def __init__(self, file: str, marks: Marks, overrides: dict[KeyPath, str]):
        self.file, self.marks, self.overrides = file, marks, overrides
        self.found: list[tuple[int, UserError]] = []
        self.written: dict[str, str] = {}  # names that a sweep made -> the one in the file

    def copy(self, new: KeyPath, source: KeyPath, written: str) -> None:
        """What stands at `new` was made of what stands at `source`, under the name `written`: mistakes are told there,
        and once for all that were made of it."""
        _copy(self.marks, new, source)
        _copy(self.overrides, new, source)
        self.written[str(new[-1])] = written

    def move_items(self, path: KeyPath, before: list[int]) -> None:
        """The list at `path` was made anew; before: where each of its items stood."""
        _move_items(self.marks, path, before)
        _move_items(self.overrides, path, before)

    def _as_written(self, text: str) -> str:
        return re.sub(r"[\w-]+", lambda found: self.written.get(found[0], found[0]), text) if self.written else text

    def depth(self, path: KeyPath) -> int:
        """How many keys of `path` are really written down, in the file or an override."""
        return next(n for n in range(len(path), -1, -1) if path[:n] in self.marks or path[:n] in self.overrides)

    def place(self, path: KeyPath) -> tuple[int, str]:
        """(line, "file:line"), or (0, the override) for the closest written thing at or above `path`."""
        for n in range(len(path), -1, -1):
            if path[:n] in self.overrides:
                return 0, self.overrides[path[:n]]
            if path[:n] in self.marks:
                return self.marks[path[:n]], f"{self.file}:{self.marks[path[:n]]}"
        raise AssertionError("the top of the file always has a line")

    def add(self, path: KeyPath, message: str, remedy: str = "", *, label: KeyPath | None = None) -> None:
        """label: what the message is about, where that is not the value at `path` itself."""
        line, where = self.place(path)
        name = self._as_written(".".join(map(str, path if label is None else label)))
        message = self._as_written(message)
        error = UserError(f"{name}: {message}" if name else message, where=where, remedy=remedy)
        if str(error) not in {str(e) for _, e in self.found}:
            self.found.append((line, error))

    def unknown(self, path: KeyPath, valid: Iterable[str]) -> None:
        self.add(path, f"unknown key '{path[-1]}'", suggest(str(path[-1]), valid), label=path[:-1])

    def stop(self) -> None:
        if self.found:
            self.fail()

    def fail(self) -> NoReturn:
        first, *rest = [error for _, error in sorted(self.found, key=lambda item: item[0])]
        if not rest:
            raise first
        lines = [f"{first.message} → {first.remedy}" if first.remedy else first.message, *map(str, rest)]
        raise UserError("\n".join(lines), where=first.where)

    def add_invalid(
        self, error: ValidationError, model: type[BaseModel], base: KeyPath, defaults: KeyPath = ()
    ) -> None:
        """What pydantic found in the value at `base`, parts of which may have come from `defaults`."""
        groups: dict[KeyPath, list[Any]] = {}
        for item in error.errors(include_url=False):
            loc: KeyPath = tuple(item["loc"])
            names = _real(model, loc)
            groups.setdefault(names, []).append(item)
        for loc, items in groups.items():
            top = base
            if defaults and self.depth(defaults + loc) - len(defaults) > self.depth(base + loc) - len(base):
                top = defaults
            item, path = items[0], top + loc
            if item["type"] == "extra_forbidden":
                self.unknown(path, _fields(model, loc[:-1]))
            elif item["type"] == "missing":
                self.add(path, f"missing '{loc[-1]}'", f"add '{loc[-1]}: ...'", label=path[:-1])
            elif not (item["type"] == "finite_number" or _infinite(item["input"])):  # told by add_not_finite
                first, *rest = dict.fromkeys(_expected(i) for i in items)
                message = " or ".join([first, *(text.removeprefix("must be ") for text in rest)])
                remedy = _REMEDIES.get(item["type"], "correct this value")
                if item["type"] == "literal_error" and isinstance(item["input"], str):
                    remedy = suggest(item["input"], re.findall(r"'([^']*)'", item["ctx"]["expected"]))
                elif item["type"] == "tuple_type" and not isinstance(item["input"], dict):
                    remedy = f"write [{item['input']}]" if not is_secret(path) else "write a list"
                found = "" if item["type"] in ("too_short", "too_long") else f", found {show(item['input'], path)}"
                self.add(path, f"{message}{found}", remedy)

    def add_secrets(self, value: Any, path: KeyPath = ()) -> None:
        """Every secret in the file, by the name of its key or by what it looks like; no message repeats one. Where keys
        of a store go, storage's own check says."""
        if path == ("storage",):
            return
        if isinstance(value, dict):
            for key, inner in value.items():
                if what := found_in(str(key)):
                    self.add(path, f"a key of it holds {what}", SECRET_REMEDY)
                else:
                    self.add_secrets(inner, (*path, key))
        elif isinstance(value, list):
            for i, inner in enumerate(value):
                self.add_secrets(inner, (*path, i))
        elif isinstance(value, str | int | float) and not isinstance(value, bool) and path not in _NAMES:
            named = [key for key in path if isinstance(key, str)][-1:]
            if is_secret(tuple(named)) and value != "":
                self.add(path, f"'{named[0]}' does not belong in this file", SECRET_REMEDY, label=path[:-1])
            elif what := found_in(str(value)):
                self.add(path, f"holds {what}, which does not belong in this file", SECRET_REMEDY)

    def add_not_finite(self, value: Any, path: KeyPath = ()) -> None:
        """Every nan and infinity in the file: none is a setting that can be meant."""
        if isinstance(value, dict):
            for key, inner in value.items():
                self.add_not_finite(inner, (*path, key))
        elif isinstance(value, list):
            for i, inner in enumerate(value):
                self.add_not_finite(inner, (*path, i))
        elif _infinite(value):
            self.add(path, f"must be a finite number, found {value}", "write a number")


def _copy(places: dict[KeyPath, Place], new: KeyPath, source: KeyPath) -> None:
    inner = {path[len(source) :]: place for path, place in places.items() if path[: len(source)] == source}
    places.update({(*new, *rest): place for rest, place in inner.items()})


def _move_items(places: dict[KeyPath, Place], path: KeyPath, before: list[int]) -> None:
    old = {key[-1]: places.pop(key) for key in list(places) if len(key) == len(path) + 1 and key[:-1] == path}
    places.update({(*path, i): old[was] for i, was in enumerate(before) if was in old})


def _infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _fields(model: type[BaseModel], loc: KeyPath) -> list[str]:
    """The keys that are valid under `loc`."""
    for key in loc:
        inner = _group(model.model_fields[str(key)].annotation)
        assert isinstance(inner, type) and issubclass(inner, BaseModel), f"{loc} is not a group of settings"
        model = inner
    return list(model.model_fields)


def _real(model: type[BaseModel], loc: KeyPath) -> KeyPath:
    """`loc` without what pydantic appends to tell the members of a union apart."""
    out: list[str | int] = []
    inner: Any = model
    for key in loc:
        if isinstance(key, int):
            out.append(key)
        elif isinstance(inner, type) and issubclass(inner, BaseModel):
            out.append(key)
            inner = _group(inner.model_fields[key].annotation) if key in inner.model_fields else None
    return tuple(out)


def _group(annotation: Any) -> Any:
    """The model behind `X | None`."""
    members = [member for member in get_args(annotation) if member is not type(None)]
    return members[0] if len(members) == 1 else annotation


def _expected(item: Any) -> str:
    text = item["msg"]
    for old, new in (("Input should", "must"), ("Tuple should", "must"), (" after validation", ""),
                     ("Value error, ", ""), ("array", "list"), ("an object", "a mapping"),
                     ("dictionary", "mapping")):  # fmt: skip
        text = text.replace(old, new)
    return text if item["type"] != "string_type" else "must be text"
