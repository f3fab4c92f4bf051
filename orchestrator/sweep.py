"""`sweep:` — one file for a grid of runs: templates in, one stage for each combination that makes a difference out.

    sweep: {vision: [tiny-vit-s, tiny-vit], fraction: [0.25, 1.0]}

Under `model`, `models` and `stages`, "${vision}" stands for a value of the axis (as a whole value it keeps its type,
inside text it is written out; "$${" is a plain "${"). Invariant: a stage becomes one stage for each combination of
exactly the axes that it depends on, by references of its own, of its model, or of the stages it needs; what depends on
none stays one. A stage of a kind that collects needs every variant of what it names, and varies only by references of
its own. The work is done on the raw data of the file, lines included, so that every later rule and message is that of a
file in which all stages are written out. Names: the template's, then the values: full_finetune-tiny-vit-0_25.
"""

import itertools
import math
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from orchestrator.graph import find_cycle
from orchestrator.problems import Problems, show, suggest
from orchestrator.yamlfile import KeyPath
from stages.kinds import KINDS, Kind

MAX_STAGES = 5_000
DEFAULT = "model"  # what the variants of a top-level `model:` are called
_REFERENCE = re.compile(r"\$?\$\{([A-Za-z0-9_-]+)\}")  # with a second $ it is none
_AXIS = re.compile(r"[a-z][a-z0-9_]*")

Combination = dict[str, Any]  # axis -> value, in the order of `sweep:`


@dataclass(frozen=True)
class Sweep:
    """axes: values by name. chosen: the values behind every stage; templates: its name in the file. collecting: the
    templates of kinds that collect."""

    axes: dict[str, list[Any]]
    chosen: dict[str, Combination]
    templates: dict[str, str]
    collecting: frozenset[str] = field(default_factory=frozenset)

    @property
    def combinations(self) -> int:
        return math.prod(map(len, self.axes.values()))

    @property
    def naive(self) -> int:
        """Stages if every combination were an experiment of its own, and what collects came after them."""
        each = len(set(self.templates.values()) - self.collecting)
        return self.combinations * each + sum(name in self.collecting for name in self.templates.values())


def expand(raw: dict[str, Any], problems: Problems) -> Sweep | None:
    """Replaces templates in `raw` by their variants, and tells `problems` where these come from. None where the file
    has no sweep. Raises UserError for a mistake in it: nothing after it could be told well."""
    templates = {key: raw[key] for key in ("model", "models", "stages") if key in raw}
    for path in _in_keys(templates, ()):
        problems.add(path, "a key cannot refer to an axis", "write the key out, or refer to the axis in its value")
    if "sweep" not in raw:
        found = {path: axis for path, axis in _references(templates, ())}
        for path, axis in found.items():
            remedy = f"add 'sweep: {{{axis}: [...]}}', or write '$${{{axis}}}' for the text itself"
            problems.add(path, f"refers to an axis '{axis}', and there is no 'sweep:'", remedy)
        if not found:
            raw.update(_filled(templates, {}))  # "$${" is "${" here too
        return None
    axes = _axes(raw["sweep"], problems)
    problems.stop()
    return _Expansion(raw, axes, problems).run()


def word(value: Any) -> str:
    """A value as a part of a name: 0.25 is 0_25, a path its last part."""
    text = str(value).lower() if isinstance(value, bool) else str(value).rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^a-z0-9_-]+", "_", text.lower())


def _axes(raw: Any, problems: Problems) -> dict[str, list[Any]]:
    example = "write for example 'vision: [tiny-vit, micro-vit]'"
    if not isinstance(raw, dict) or not raw:
        problems.add(("sweep",), f"must be a mapping of axes to lists, found {show(raw)}", example)
        return {}
    for axis, values in raw.items():
        place = ("sweep", axis)
        if not _AXIS.fullmatch(axis):
            problems.add(place, f"{axis!r} is not a valid name of an axis", "use a-z, 0-9 and _, a letter first")
        if not isinstance(values, list):
            problems.add(place, f"must be a list, found {show(values)}", example)
            continue
        if not values:
            problems.add(place, "has no values", "list at least one, or remove the axis")
        words: dict[str, Any] = {}
        for i, value in enumerate(values):
            if value is None or isinstance(value, dict | list):
                problems.add((*place, i), f"must be text or a number, found {show(value)}", "name mappings elsewhere")
            elif (name := word(value)) in words:
                problems.add((*place, i), f"{show(value)} and {show(words[name])} would both be called '{name}'",
                             "give each value once")  # fmt: skip
            else:
                words[name] = value
    return raw


def _in_keys(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    """Where a key refers to an axis."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if isinstance(key, str) and any(not found[0].startswith("$$") for found in _REFERENCE.finditer(key)):
            yield (*path, key)
        yield from _in_keys(inner, (*path, key))


def _references(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """(place, axis) of everything that is referred to."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _references(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _references(inner, (*path, i))
    elif isinstance(value, str):
        for found in _REFERENCE.finditer(value):
            if not found[0].startswith("$$"):
                yield path, found[1]


def _filled(value: Any, chosen: Combination) -> Any:
    """A copy with the axes' values in the place of references."""
    if isinstance(value, dict):
        return {key: _filled(inner, chosen) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, chosen) for inner in value]
    if not isinstance(value, str):
        return value
    whole = _REFERENCE.fullmatch(value)
    if whole and not value.startswith("$$"):
        return deepcopy(chosen[whole[1]])

    def written(found: re.Match[str]) -> str:
        if found[0].startswith("$$"):
            return found[0][1:]
        inner = chosen[found[1]]
        return str(inner).lower() if isinstance(inner, bool) else str(inner)

    return _REFERENCE.sub(written, value)


class _Expansion:
    def __init__(self, raw: dict[str, Any], axes: dict[str, list[Any]], problems: Problems):
        self.raw, self.axes, self.problems = raw, axes, problems
        self.stages = self._group("stages")
        self.models = self._group("models")
        self.default = isinstance(raw.get("model"), dict) and any(_references(raw["model"], ()))
        if self.default and DEFAULT in self.models:
            problems.add(("models", DEFAULT), "'model:' is swept and takes this name", "call this one otherwise")
        self.kinds = {name: self._kind(name, value) for name, value in self.stages.items()}
        self.links = {name: [n for n in _linked(v) if n in self.stages] for name, v in self.stages.items()}
        self.own: dict[str, set[str]] = {}  # axes that a stage refers to itself or by its model
        self.found: dict[str, tuple[str, ...]] = {}

    def _group(self, key: str) -> dict[str, Any]:
        """Its entries that are mappings; what is wrong with others is told when they are read."""
        value = self.raw.get(key)
        return {n: v for n, v in value.items() if isinstance(v, dict)} if isinstance(value, dict) else {}

    def _kind(self, name: str, value: dict[str, Any]) -> Kind | None:
        kind = value.get("kind", name)
        return KINDS.get(kind) if isinstance(kind, str) else None

    def run(self) -> Sweep:
        self._check_references()
        if cycle := find_cycle(self.links):
            self.problems.add(
                ("stages", cycle[0], "needs"), f"a cycle: {' → '.join(cycle)}", "remove one of these needs"
            )
        self.problems.stop()
        models = {name: self._ordered(axis for _, axis in _references(v, ())) for name, v in self.models.items()}
        default = self._ordered(axis for _, axis in _references(self.raw["model"], ())) if self.default else ()
        for name, value in self.stages.items():
            self.own[name] = {axis for _, axis in _references(value, ())}
            if isinstance(named := value.get("model"), str):
                self.own[name] |= {axis for model in self._values(named) for axis in models.get(model, ())}
            elif self._takes_default(name, value):
                self.own[name] |= set(default)
        for name in self.stages:
            self._axes_of(name)
        self._check_names()
        unused = set(self.axes) - {axis for found in self.found.values() for axis in found}
        for axis in unused:
            self.problems.add(("sweep", axis), "no stage depends on it", f'refer to it as "${{{axis}}}", or remove it')
        count = sum(math.prod(len(self.axes[axis]) for axis in axes) for axes in self.found.values())
        if count > MAX_STAGES:
            self.problems.add(("sweep",), f"makes {count:,} stages, more than {MAX_STAGES:,}", "list fewer values")
        self.problems.stop()
        self._make_models(models, default)
        return self._make_stages(models, default)

    def _check_references(self) -> None:
        for key, value in self.raw.items():
            for path, axis in _references(value, (key,)):
                if key not in ("model", "models", "stages"):
                    if axis in self.axes:
                        remedy = "refer to an axis under model, models and stages"
                        self.problems.add(path, f"the axis '{axis}' has no meaning here", remedy)
                elif axis not in self.axes:
                    self.problems.add(path, f"unknown axis '{axis}'", suggest(axis, self.axes))

    def _values(self, value: str) -> list[Any]:
        """All that a value becomes by the axes it refers to."""
        axes = self._ordered(axis for _, axis in _references(value, ()))
        return [_filled(value, chosen) for chosen in self._combinations(axes)]

    def _check_names(self) -> None:
        """A reference may name a stage, but no swept template: the variant would depend on axes not looked at."""
        for name, value in self.stages.items():
            kind, needs = self.kinds[name], value.get("needs")
            listed = needs if isinstance(needs, list) and not (kind and kind.collects) else []
            named = [(("stages", name, "needs", i), need) for i, need in enumerate(listed)]
            named += [(("stages", name, *path), group[key]) for group, key, path in _links(value)]
            for path, text in named:
                if not isinstance(text, str) or not any(_references(text, ())):
                    continue
                swept = next((found for found in self._values(text) if self.found.get(found)), None)
                if swept is not None:
                    remedy = "write its name out, or put the reference into a stage that does not vary"
                    self.problems.add(path, f"'{text}' stands for '{swept}', which is swept itself", remedy)

    def _ordered(self, axes: Any) -> tuple[str, ...]:
        used = set(axes)
        return tuple(axis for axis in self.axes if axis in used)

    def _takes_default(self, name: str, value: dict[str, Any]) -> bool:
        """Whether a stage has the model of `model:`: it says none, and goes on from no training stage."""
        kind, needs = self.kinds[name], value.get("needs")
        if not self.default or kind is None or "model" not in kind.params.model_fields or "model" in value:
            return False
        parents = [self.kinds.get(need) for need in needs] if isinstance(needs, list) else []
        return not any(parent.trains for parent in parents if parent is not None)

    def _axes_of(self, name: str) -> tuple[str, ...]:
        if name not in self.found:
            kind, axes = self.kinds[name], set(self.own[name])
            if kind is None or not kind.collects:
                axes |= {axis for other in self.links[name] for axis in self._axes_of(other)}
            self.found[name] = self._ordered(axes)
        return self.found[name]

    def _combinations(self, axes: tuple[str, ...]) -> Iterator[Combination]:
        for values in itertools.product(*(self.axes[axis] for axis in axes)):
            yield dict(zip(axes, values, strict=True))

    def _named(self, template: str, axes: tuple[str, ...], chosen: Combination) -> str:
        return "-".join([template, *(word(chosen[axis]) for axis in axes)])

    def _variants(self, need: str, chosen: Combination) -> list[str]:
        """Those of a stage that agree with what is chosen already; one where all its axes are."""
        axes = self.found[need]
        agreeing = (c for c in self._combinations(axes) if all(c[a] == chosen[a] for a in axes if a in chosen))
        return [self._named(need, axes, c) for c in agreeing]

    def _make_models(self, models: dict[str, tuple[str, ...]], default: tuple[str, ...]) -> None:
        made: dict[str, Any] = {}
        given = self.raw.get("models")
        for name, value in given.items() if isinstance(given, dict) else ():
            if name not in self.models:
                made[name] = value
                continue
            for chosen in self._combinations(models.get(name, ())):
                self._add(made, "models", name, self._named(name, models.get(name, ()), chosen), _filled(value, chosen))
        if default:
            value = self.raw.pop("model")
            for chosen in self._combinations(default):
                new = self._named(DEFAULT, default, chosen)
                self._add(made, "models", DEFAULT, new, _filled(value, chosen), source=("model",))
        if made:
            self.raw["models"] = made

    def _make_stages(self, models: dict[str, tuple[str, ...]], default: tuple[str, ...]) -> Sweep:
        made: dict[str, Any] = {}
        all_chosen: dict[str, Combination] = {}
        templates: dict[str, str] = {}
        given = self.raw.get("stages")
        for name, value in given.items() if isinstance(given, dict) else ():
            if name not in self.stages:
                made[name] = value
                continue
            for chosen in self._combinations(self.found[name]):
                new = self._named(name, self.found[name], chosen)
                filled = _filled(value if "kind" in value or name not in KINDS else {"kind": name, **value}, chosen)
                if isinstance(named := filled.get("model"), str) and models.get(named):
                    filled["model"] = self._named(named, models[named], chosen)
                elif self._takes_default(name, value):
                    filled["model"] = self._named(DEFAULT, default, chosen)
                self._add(made, "stages", name, new, filled)
                self._rewire(filled, ("stages", new), chosen, self.kinds[name])
                all_chosen[new], templates[new] = chosen, name
        if made:
            self.raw["stages"] = made
        self.problems.stop()
        collecting = frozenset(name for name, kind in self.kinds.items() if kind is not None and kind.collects)
        return Sweep(self.axes, all_chosen, templates, collecting)

    def _rewire(self, value: dict[str, Any], place: KeyPath, chosen: Combination, kind: Kind | None) -> None:
        """Names of templates become those of their variants; lines of listed ones stay theirs."""
        for group, key, _ in _links(value):
            # a kind that collects knows no such key, which is told when it is read
            if isinstance(named := group[key], str) and named in self.stages and not (kind and kind.collects):
                variants = self._variants(named, chosen)
                assert len(variants) == 1, f"{named} is not determined by {chosen}"
                group[key] = variants[0]
        if not isinstance(needs := value.get("needs"), list):
            return
        listed = [
            (new, i) for i, need in enumerate(needs)
            for new in (self._variants(need, chosen) if isinstance(need, str) and need in self.stages else [need])
        ]  # fmt: skip
        self.problems.move_items((*place, "needs"), [i for _, i in listed])
        value["needs"] = [new for new, _ in listed]

    def _add(
        self, made: dict[str, Any], group: str, template: str, new: str, value: Any, source: KeyPath | None = None
    ) -> None:
        source = source or (group, template)
        if new != template and (new in made or new in (self.raw.get(group) or {})):
            message = f"two of them would be called '{new}'"
            self.problems.add(source, message, "rename one, or change a value of 'sweep:'")
        made[new] = value
        if new != template or len(source) == 1:
            self.problems.copy((group, new), source, template)


def _links(value: dict[str, Any]) -> list[tuple[dict[str, Any], str, KeyPath]]:
    """(mapping, key, path inside the stage) of each single stage that it, as it is written, takes something of."""
    rerank = value.get("rerank")
    scorers = (
        [(its, "model", ("rerank", name, "model")) for name, its in rerank.items() if isinstance(its, dict)]
        if isinstance(rerank, dict)
        else []
    )
    places = [(value, key, (key,)) for key in ("vision_from", "language_from")]
    return [(group, key, path) for group, key, path in [*places, *scorers] if key in group]


def _linked(value: dict[str, Any]) -> list[str]:
    needs = value.get("needs")
    named = [*(needs if isinstance(needs, list) else []), *(group[key] for group, key, _ in _links(value))]
    return [name for name in named if isinstance(name, str)]
