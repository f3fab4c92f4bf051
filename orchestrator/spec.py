"""An experiment file, read and checked: YAML in, frozen typed models out, or one message per mistake.

Invariant: an Experiment that exists can be planned: every stage has a known kind, valid parameters and the
parents its kind takes, in a graph without cycles. Reading opens no data and builds nothing, so what the file
names (sources, weights) may be absent. Mistakes are told as "file:line: what was found → what to do"
(checks.py holds the rules between stages).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from cluster.shape import ClusterParams
from modeling import presets
from modeling.errors import UserError
from modeling.files import is_remote
from orchestrator import checks, overrides, yamlfile
from orchestrator.address import KEYS_REMEDY, SECRET, check_endpoint, parse_s3
from orchestrator.evaluations import check_evaluations, check_set
from orchestrator.graph import find_cycle
from orchestrator.problems import Problems, nearest, show, suggest
from orchestrator.sweep import Sweep, expand
from orchestrator.tracking.params import TrackingParams
from orchestrator.yamlfile import KeyPath
from stages.evaluation import EvalSet
from stages.kinds import KINDS, Kind
from stages.params import DataParams, ModelParams, PrepareParams, StageParams, TrainParams

TOP_KEYS = ("name", "storage", "seed", "model", "models", "data", "eval", "sweep", "defaults", "stages", "tracking",
            "cluster")  # fmt: skip
STORAGE_KEYS = ("url", "endpoint_url")
# What `defaults:` may give to every training stage: all its settings but those that make it that stage.
_OF_ONE_STAGE = ("needs", "model", "vision_from", "language_from", "train", "steps", "epochs")
DEFAULT_KEYS = tuple(key for key in TrainParams.model_fields if key not in _OF_ONE_STAGE)
NAME = re.compile(r"[a-z0-9_-]+")

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Stage:
    """One entry of `stages:`. line: where it stands in the file, 0 for one given on the command line."""

    name: str
    kind_name: str
    kind: Kind
    params: Any  # an instance of kind.params
    line: int


@dataclass(frozen=True)
class Experiment:
    """storage: an absolute folder or a URL, as open_store() takes it. stages: in the order of the file."""

    name: str
    path: Path
    storage: str
    seed: int
    model: ModelParams | None  # of the stages that name none
    models: dict[str, ModelParams]
    data: dict[str, DataParams]
    stages: dict[str, Stage]
    sets: dict[str, EvalSet] = field(default_factory=dict)
    sweep: Sweep | None = None
    tracking: TrackingParams = field(default_factory=TrackingParams)
    cluster: ClusterParams | None = None

    @property
    def needs(self) -> dict[str, tuple[str, ...]]:
        return {name: stage.params.needs for name, stage in self.stages.items()}

    def model_of(self, stage: Stage) -> ModelParams:
        """The model that a stage counts tokens for, trains, or takes from the stage before."""
        name = getattr(stage.params, "model", None)
        if name is None and not isinstance(stage.params, TrainParams | PrepareParams):
            before = [p for p in self.parents(stage) if p.kind.base != "prepare" and p.name not in stage.params.lent]
            if before:
                return self.model_of(before[0])
        model = self.model if name is None else self.models[name]
        assert model is not None, "checks.check_models refuses a stage without one"
        return model

    def parents(self, stage: Stage) -> list[Stage]:
        return [self.stages[name] for name in stage.params.needs]


def load_spec(path: str | Path, overrides: Sequence[str] = (), base: str | Path | None = None) -> Experiment:
    """base: the folder that relative paths in it count from; None: its own.

    Raises UserError; where several things are wrong its message has a line for each, in file order.
    """
    return _Reader(Path(path), overrides, base).read()


class _Reader:
    def __init__(self, path: Path, settings: Sequence[str], base: str | Path | None = None):
        self.path, self.folder = path, Path(base or path.absolute().parent)
        self.raw, marks = yamlfile.load(path)
        templates, variants = overrides.split(self.raw, settings)
        self.problems = Problems(str(path), marks, overrides.apply(self.raw, marks, templates))
        self.refuse_secrets()  # before any message repeats a value
        self.sweep = expand(self.raw, self.problems)
        self.problems.overrides.update(overrides.apply(self.raw, marks, variants))
        if variants:
            self.refuse_secrets()

    def refuse_secrets(self) -> None:
        self.problems.add_secrets(self.raw)
        self.problems.stop()

    def read(self) -> Experiment:
        self.problems.add_not_finite(self.raw)
        for key in self.raw:
            if key not in TOP_KEYS:
                self.problems.unknown((key,), TOP_KEYS)
        name = self.name()
        storage = self.storage()
        seed = self.seed()
        models = {key: self.model(("models", key), raw) for key, raw in self.group("models").items()}
        raw = self.group("model", required="" if models else "add 'model: {vision: ..., language: ...}'")
        model = self.model(("model",), raw) if raw else None
        data = self.data()
        sets = self.sets()
        known = {key: model for key, model in models.items() if model is not None}
        stages = self.stages(seed, list(models), bool(raw))
        stages = check_evaluations(stages, sets, known, model, self.problems)
        tracking = self.validate(TrackingParams, self.group("tracking"), ("tracking",))
        raw = self.group("cluster")
        cluster = self.validate(ClusterParams, raw, ("cluster",)) if raw else None
        self.problems.stop()
        assert tracking is not None, "told above"
        more = {"tracking": tracking.located(self.resolve), "cluster": cluster}
        return Experiment(name, self.path, storage, seed, model, known, data, stages, sets, self.sweep, **more)

    def resolve(self, path: str) -> str:
        """URLs as they are; anything else is relative to the file's folder."""
        return path if "://" in path else str((self.folder / Path(path).expanduser()).resolve())

    def text(self, key: str, example: str) -> str:
        value = self.raw.get(key)
        if value is None:
            self.problems.add((key,), f"missing '{key}'", f"add '{key}:' with {example}", label=())
        elif not isinstance(value, str) or not value:
            self.problems.add((key,), f"must be text, found {show(value)}", f"write {example}")
        else:
            return value
        return ""

    def storage(self) -> str:
        """A folder or an address, or a mapping of `url` and `endpoint_url`; keys are refused and never repeated."""
        for path in self.problems.overrides:
            if path[0] == "storage":
                self.problems.overrides[path] = f"override '{'.'.join(map(str, path))}=...'"
        example = "a folder such as ../runs, or s3://bucket/prefix"
        raw = self.raw.get("storage")
        if not isinstance(raw, dict):
            url, endpoint = self.text("storage", example), ""
        else:
            for key in raw:
                if key not in STORAGE_KEYS and SECRET.search(str(key)):
                    self.problems.add(("storage", key), f"'{key}' does not belong in this file", KEYS_REMEDY)
                elif key not in STORAGE_KEYS:
                    self.problems.unknown(("storage", key), STORAGE_KEYS)
            for key in STORAGE_KEYS:
                if not isinstance(raw.get(key, ""), str):
                    self.problems.add(("storage", key), f"must be text, found {show(raw[key])}", "write an address")
                    return ""
            url, endpoint = raw.get("url", ""), raw.get("endpoint_url", "")
            if not url:
                self.problems.add(("storage",), "missing 'url'", f"add 'url:' with {example}")
                return ""
        if not url.startswith("s3:"):
            if endpoint:
                self.problems.add(("storage", "endpoint_url"), "is for s3://bucket/prefix only", "remove it")
            return self.resolve(url)
        try:
            return str(parse_s3(url, endpoint))
        except UserError as error:
            self.problems.add(("storage",), error.message, error.remedy)
            return ""

    def name(self) -> str:
        name = self.text("name", "a short name such as digits-1b")
        if name and not NAME.fullmatch(name):
            self.problems.add(("name",), f"{name!r} is not a valid name", "use only a-z, 0-9, _ and -")
        return name

    def seed(self) -> int:
        seed = self.raw.get("seed", 0)
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            if not isinstance(seed, float) or seed == seed:
                self.problems.add(
                    ("seed",), f"must be an integer, 0 or more, found {show(seed)}", "write for example 'seed: 0'"
                )
            return 0
        return seed

    def group(self, key: str, *, required: str = "") -> dict[str, Any]:
        """The mapping under a top-level key; absent or empty is {} unless it is required."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, dict):
            self.problems.add(
                (key,), f"must be a mapping, found {show(value)}", "write one 'key: value' a line under it"
            )
        elif not value and required:
            self.problems.add((key,), f"missing '{key}'" if value is None else f"'{key}' is empty", required, label=())
        return value if isinstance(value, dict) else {}

    def validate(self, model: type[M], value: Any, path: KeyPath, defaults: KeyPath = ()) -> M | None:
        try:  # by way of JSON: strict (no bool for int, no text for numbers), yet lists for tuples and 1 for 1.0
            return model.model_validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            self.problems.add_invalid(error, model, path, defaults)
            return None

    def model(self, place: KeyPath, raw: Any) -> ModelParams | None:
        model = self.validate(ModelParams, raw, place)
        if model is None:
            return None
        if model.folder is None:
            absent = [part for part in ("vision", "language") if getattr(model, part) is None]
            for part in absent:
                remedy = f"add '{part}: ...'" + (", or 'folder: ...' of a whole model" if len(absent) == 2 else "")
                self.problems.add((*place, part), f"missing '{part}'", remedy, label=place)
            if absent:
                return None
        for part in ("vision", "language", "tokenizer", "tile_size"):
            if model.folder is not None and getattr(model, part) is not None:
                self.problems.add((*place, part), "a whole model is given by 'folder'", f"remove '{part}' or 'folder'")
        found = self.endpoint(model, place)
        known = {"vision": presets.VISION, "language": presets.LANGUAGE, "tokenizer": presets.TOKENIZERS}
        for part, value in presets.given(model).items():
            if is_remote(value):
                found[part] = self.bucket(value, (*place, part))
                continue
            if part == "folder":
                found[part] = self.resolve(value)
                continue
            if "/" not in value and value[:1] not in (".", "~") and not (self.folder / value).exists():
                remedy = f"{suggest(value, known[part])} (or give a folder in Hugging Face layout)"
                self.problems.add((*place, part), f"{value!r} is neither a preset nor a folder", remedy)
            found[part] = self.resolve(value)
        return model.model_copy(update=found)

    def data(self) -> dict[str, DataParams]:
        out = {}
        for name, raw in self.group("data").items():
            if (params := self.validate(DataParams, raw, ("data", name))) is not None:
                update = {"meta": self.resolve(params.meta), **self.endpoint(params, ("data", name))}
                out[name] = params.model_copy(update=update)
        return out

    def bucket(self, url: str, place: KeyPath) -> str:
        """An s3:// address of a folder, as it is used."""
        try:
            address = parse_s3(url)
        except UserError as error:
            self.problems.add(place, error.message, error.remedy)
            return url
        if address.endpoint_url:
            self.problems.add(place, "names an endpoint", "write it beside it, as 'endpoint_url:'")
        return f"s3://{address.bucket}/{address.prefix}"

    def endpoint(self, params: ModelParams | DataParams, place: KeyPath) -> dict[str, str]:
        """Its endpoint_url, where one is given, as it is used."""
        if params.endpoint_url is None:
            return {}
        try:
            return {"endpoint_url": check_endpoint(params.endpoint_url, ".".join(map(str, place)) + ".endpoint_url")}
        except UserError as error:
            self.problems.add((*place, "endpoint_url"), error.message, error.remedy)
            return {}

    def sets(self) -> dict[str, EvalSet]:
        found = {name: self.validate(EvalSet, raw, ("eval", name)) for name, raw in self.group("eval").items()}
        return {name: check_set(name, params, self.folder, self.problems) for name, params in found.items() if params}

    def defaults(self) -> dict[str, Any]:
        raw = self.group("defaults")
        for key in raw:
            if key not in DEFAULT_KEYS:
                self.problems.unknown(("defaults", key), DEFAULT_KEYS)
        return {key: value for key, value in raw.items() if key in DEFAULT_KEYS}

    def stages(self, seed: int, models: list[str], default: bool) -> dict[str, Stage]:
        defaults = self.defaults()
        raw = self.group("stages", required="add at least one stage")
        kinds: dict[str, str | None] = {}
        needs: dict[str, list[str]] = {}
        lent: dict[str, set[str]] = {}
        stages: dict[str, Stage] = {}
        for name, value in raw.items():
            place = ("stages", name)
            if not NAME.fullmatch(name):
                self.problems.add(place, f"{name!r} is not a valid stage name", "use only a-z, 0-9, _ and -", label=())
            value = {} if value is None else value
            if not isinstance(value, dict):
                self.problems.add(place, f"must be a mapping, found {show(value)}", "write 'kind:' and its settings")
                continue
            kinds[name] = kind_name = self.kind(name, value)
            listed = value.get("needs", [])
            if isinstance(listed, list) and all(isinstance(need, str) for need in listed):
                named = [source for source in _lenders(value) if isinstance(source, str) and source in raw]
                lent[name] = set(named)
                for i, need in enumerate(listed):
                    if kind_name == "evaluate" and need in named:
                        remedy = "leave its 'model' out, so that each checkpoint scores its own samples"
                        self.problems.add((*place, "needs", i), f"'{need}' is asked here, and re-ranks", remedy)
                value = {**value, "needs": [*listed, *(source for source in named if source not in listed)]}
                needs[name] = value["needs"]
            if kind_name is None:
                continue
            kind = KINDS[kind_name]
            settings = {key: inner for key, inner in value.items() if key != "kind"}
            params = self.params(name, kind, settings, defaults, seed)
            if params is not None:
                stages[name] = Stage(name, kind_name, kind, params, self.problems.place(place)[0])
        checks.check_graph(needs, kinds, list(raw), lent, self.problems)
        names, trains = list(self.group("data")), [name for name, stage in stages.items() if stage.kind.trains]
        for name, stage in stages.items():
            stages[name] = checks.check_stage(stage, names, trains, self.folder, self.problems)
        if find_cycle({name: [n for n in stage.params.needs if n in stages] for name, stage in stages.items()}) is None:
            stages = checks.check_models(stages, models, default, self.problems)
        return checks.follow_limits(stages, self.problems)

    def kind(self, name: str, raw: dict[str, Any]) -> str | None:
        given = raw.get("kind")
        if given is None:
            if name in KINDS:
                return name
            close = nearest(name, KINDS)
            remedy = f"add 'kind: {close}'" if close else f"add 'kind:' with one of: {', '.join(KINDS)}"
            self.problems.add(("stages", name), "missing 'kind'", remedy)
        elif not isinstance(given, str):
            self.problems.add(("stages", name, "kind"), f"must be text, found {show(given)}", suggest("", KINDS))
        elif given not in KINDS:
            self.problems.add(("stages", name, "kind"), f"unknown kind '{given}'", suggest(given, KINDS))
        else:
            return given
        return None

    def params(
        self, name: str, kind: Kind, raw: dict[str, Any], defaults: dict[str, Any], seed: int
    ) -> StageParams | None:
        common: dict[str, Any] = {"seed": seed} if "seed" in kind.params.model_fields else {}
        if kind.trains:
            common = _merge({**common, **kind.defaults}, defaults)
        params = self.validate(kind.params, _merge(common, raw), ("stages", name), ("defaults",) if kind.trains else ())
        modules = kind.defaults.get("train")
        if isinstance(params, TrainParams) and modules and set(params.train) != set(modules):
            self.problems.add(("stages", name, "train"), f"this kind trains [{', '.join(modules)}]",
                              "leave 'train' out, or write 'kind: train' for another choice")  # fmt: skip
        return params


def _lenders(raw: dict[str, Any]) -> list[Any]:
    """Stages that a stage, as it is written, takes a part of: they are among its needs without being listed there."""
    rerank = raw.get("rerank")
    scorers = [its.get("model") for its in rerank.values() if isinstance(its, dict)] if isinstance(rerank, dict) else []
    return list(dict.fromkeys([*(raw.get(field) for field in checks.LENDERS), *scorers]))


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """A new mapping: `over` wins, mappings inside are merged."""
    out = dict(base)
    for key, value in over.items():
        inner = out.get(key)
        out[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return out
