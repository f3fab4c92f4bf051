"""What a stage IS, as canonical JSON, and the digest of that.

Invariant (design.md, "Storage and identity"): two stages have one fingerprint exactly when they would make the
same result: kind and its version, parameters that matter, data by content, parents by fingerprint. Not: names of
stages and mixtures, paths, workers, ZeRO stage, checkpoint interval. Equal numbers are written alike (1 and 1.0),
in the manner of RFC 8785.
"""

import hashlib
import json
import math
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

from modeling import presets
from modeling.digests import language_digest, tokenizer_digest, weights_digest
from modeling.errors import DataError
from orchestrator.checks import check_lenders
from orchestrator.graph import topological_order
from orchestrator.spec import Experiment, Stage
from stages.curation import Curation
from stages.params import EvaluateParams, ModelParams, PrepareParams

Identity = dict[str, Any]


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces. TypeError for what JSON has no word for, ValueError for nan and inf."""
    return json.dumps(_plain(value, "value"), sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(identity: Any) -> str:
    """64 hexadecimal digits: the sha256 of the canonical form."""
    return hashlib.sha256(canonical(identity).encode()).hexdigest()


def fp16(digest: str) -> str:
    """The part of a fingerprint that names a folder."""
    return digest[:16]


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"cannot fingerprint {where}: {value} is not a number")
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, list | tuple):
        return [_plain(inner, f"{where}[{i}]") for i, inner in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"cannot fingerprint {where}: its key {key!r} is not text")
        return {key: _plain(inner, f"{where}.{key}") for key, inner in value.items()}
    raise TypeError(
        f"cannot fingerprint {where}: a {type(value).__name__}; turn it into text, numbers, lists or mappings first"
    )


SourceDigest = Callable[[str], dict[str, Any] | None]  # of a mixture, by its name under `data:`


def absent_source(meta: str, endpoint: str | None = None) -> str | None:
    """The first file a mixture cannot do without and that is not there: its meta file or an annotation."""
    if "://" in meta:
        from modeling.files import state

        return meta if state(meta, endpoint) is None else None  # its annotations are looked at by source_digest
    path = Path(meta)
    if not path.is_file():
        return meta
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
        given = [entry["annotation"] for entry in entries.values()]
        listed = [one for each in given for one in (each if isinstance(each, list) else [each])]
        named = [path.absolute().parent / one for one in listed if not any(mark in one for mark in ("://", "*", "?"))]
    except (ValueError, TypeError, KeyError, AttributeError):
        return None  # malformed is not absent: source_digest says what is wrong with it
    return next((str(annotation) for annotation in named if not annotation.is_file()), None)


def source_digest_of(experiment: Experiment) -> SourceDigest:
    """The digest of what a mixture's sources hold; None where one is absent. DataError for a malformed one, or where
    the store of one does not answer."""
    cache: dict[tuple[str, str | None], dict[str, Any] | None] = {}

    def digest(mixture: str) -> dict[str, Any] | None:
        from modeling.files import Unavailable
        from stages.prepare.digest import source_digest

        data = experiment.data[mixture]
        key = (data.meta, data.endpoint_url)
        if key not in cache:
            try:
                absent = absent_source(data.meta, data.endpoint_url)
                cache[key] = None if absent else source_digest(data.meta, data.endpoint_url)
            except PermissionError as error:
                remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, of someone who may read it"
                raise DataError(str(error), where=f"data.{mixture}", remedy=remedy) from error
            except Unavailable as error:
                message, remedy = f"its store does not answer: {error}", "check the network, and endpoint_url"
                raise DataError(message, where=f"data.{mixture}", remedy=remedy) from error
        return cache[key]

    return digest


def stage_identities(experiment: Experiment, source_digest: SourceDigest) -> dict[str, Identity | None]:
    """The identity of every stage; None where its sources or weights are absent, or a parent is unknown. UserError
    where a part of a model is to be taken from another one (an identity holds it as that stage alone)."""
    check_lenders(experiment)
    out: dict[str, Identity | None] = {}
    sets: dict[str, Identity | None] = {}
    for name in topological_order(experiment.needs):
        stage = experiment.stages[name]
        lent = stage.params.lent
        parents = [(lent.get(p.name, p.kind.base), out[p.name]) for p in experiment.parents(stage)]
        identity = _identity(experiment, stage, parents, source_digest)
        if identity is not None and isinstance(stage.params, EvaluateParams):
            identity = _evaluation(identity, experiment, stage, out, sets)
        out[name] = identity
    return {name: out[name] for name in experiment.stages}


def _identity(
    experiment: Experiment, stage: Stage, parents: list[tuple[str, Identity | None]], source_digest: SourceDigest
) -> Identity | None:
    lineage: dict[str, list[str]] = {}
    for base, parent in parents:
        if parent is None:
            return None
        lineage.setdefault(base, []).append(fingerprint(parent))
    params = stage.params.identity()
    identity: Identity = {"kind": stage.kind.base, "version": stage.kind.version, "params": params}
    ordered = stage.kind.ordered
    identity["parents"] = {base: digests if ordered else sorted(digests) for base, digests in lineage.items()}
    if isinstance(stage.params, PrepareParams):
        sources, measure = source_digest(stage.params.data), _measuring_parts(experiment.model_of(stage))
        curation = _curation(stage.params.curate, source_digest)
        if sources is None or measure is None or curation is None:
            return None
        params["curate"] = curation
        mixture = experiment.data[params.pop("data")].identity()  # by content: neither its name nor its path
        del mixture["meta"]
        identity |= {"sources": sources, "mixture": mixture, "model": measure}
    elif stage.kind.trains and "train" not in lineage:
        model = _starting_model(experiment.model_of(stage), {"vision", "language"} & lineage.keys())
        if model is None:
            return None
        identity["model"] = model
    return identity


def _evaluation(
    identity: Identity, experiment: Experiment, stage: Stage, out: dict[str, Identity | None],
    sets: dict[str, Identity | None],
) -> Identity | None:  # fmt: skip
    """With its sets by content, which model scores for which re-ranker, and the model where no stage gives one. sets:
    those that were read."""
    params: EvaluateParams = stage.params
    for name in params.sets:
        if name not in sets:
            from stages.evaluate.readers import set_digest

            found = experiment.sets[name].identity()
            del found["path"]
            content = set_digest(experiment.sets[name])
            sets[name] = None if content is None else found | {"content": content}
    scorers = {name: out[its.model] for name, its in params.rerank.items() if its.model}
    if any(sets[name] is None for name in params.sets):
        return None
    if len(params.prompts) > 1:  # the first is what others are compared with, the last what is sampled
        identity["order"] = list(params.prompts)
    if params.sets:
        identity["sets"] = {name: sets[name] for name in params.sets}
    if scorers:
        identity["scorers"] = {name: fingerprint(parent) for name, parent in scorers.items()}
    if "train" not in identity["parents"]:
        identity["model"] = _starting_model(experiment.model_of(stage))
        return None if identity["model"] is None else identity
    return identity


def _curation(curate: Curation, source_digest: SourceDigest) -> Identity | None:
    """The steps of curation, with what they name by content. A step that does not run is left out."""
    identity = {key: value for key, value in curate.identity().items() if value is not None}
    if curate.contamination:
        against = [source_digest(name) for name in curate.contamination.against]
        if None in against:
            return None
        identity["contamination"] |= {"against": against}
    if curate.review:
        identity["review"] = hashlib.sha256(Path(curate.review).read_bytes()).hexdigest()
    if curate.scores and curate.scores.local:
        identity["scores"]["local"]["model"] = language_digest(Path(curate.scores.local.model))
    return identity


def _measuring_parts(model: ModelParams) -> Identity | None:
    """Of the model, only what decides the length of a sample: tokenizer, tile size, tokens per tile."""
    folders = presets.folders(model)
    fields = presets.sizes(model)
    tile = None if fields is None else [fields[0].get("image_size", 448), fields[0].get("patch_size", 14)]
    part = "folder" if model.folder else "tokenizer" if model.tokenizer else "language"
    language = model.language or ""
    words: str | None = model.tokenizer or presets.LANGUAGE.get(language, {}).get("tokenizer") or language
    if part in folders:
        words = tokenizer_digest(folders[part])
    if tile is None or words is None:
        return None
    return {"tile": tile, "tokenizer": words, "tile_size": model.tile_size}


def _starting_model(model: ModelParams, lent: Set[str] = frozenset()) -> Identity | None:
    """What the first training stage of a chain starts from: presets by name, folders by content. lent: parts (vision,
    language) that another stage gives: they are that parent."""
    identity = {key: value for key, value in model.identity().items() if value is not None or key != "folder"}
    folders = presets.folders(model)
    for part in () if model.folder else lent:
        del identity[part]
        folders.pop(part, None)
    for field, folder in folders.items():
        digest = tokenizer_digest(folder) if field == "tokenizer" else weights_digest(folder)
        if digest is None:
            return None
        identity[field] = digest
    return identity
