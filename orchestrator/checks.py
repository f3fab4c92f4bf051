"""What must hold inside a stage beyond the types of its settings, and between stages.

Invariant: each rule here refuses a file that could only fail later, on the cluster (design.md, "What a user
sees"); what could work is not refused, e.g. a schedule whose horizon lies before the last step.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling import presets
from modeling.digests import tokenizer_digest
from modeling.errors import UserError
from orchestrator.graph import find_cycle
from orchestrator.problems import Problems, suggest
from stages.curation import Curation
from stages.kinds import KINDS
from stages.params import ModelParams, PrepareParams, TrainParams

if TYPE_CHECKING:
    from orchestrator.spec import Experiment, Stage

ZERO_STAGES = (0, 1, 2, 3)
MODULES = ("vit", "mlp", "language")
LENDERS = {"vision_from": "vision encoder", "language_from": "language model"}


def check_graph(
    needs: dict[str, list[str]],
    kinds: dict[str, str | None],
    names: list[str],
    lent: dict[str, set[str]],
    problems: Problems,
) -> None:
    """needs, kinds: by stage, as far as they could be read. names: every stage of the file. lent: the stages of which a
    stage takes a part only, which are in its needs too."""
    for name, listed in needs.items():
        place = ("stages", name, "needs")
        for i, need in enumerate(listed):
            if need == name:
                problems.add((*place, i), "a stage cannot need itself", "remove it", label=place)
            elif need not in names:
                problems.add((*place, i), f"unknown stage '{need}'", suggest(need, names), label=place)
            elif need in listed[:i]:
                problems.add((*place, i), f"'{need}' is listed twice", "remove one", label=place)
        kind, parents = kinds.get(name), [n for n in dict.fromkeys(listed) if n != name and n not in lent.get(name, ())]
        if kind is not None and all(kinds.get(need) is not None for need in parents):
            _check_parents(name, kind, {need: KINDS[str(kinds[need])].base for need in parents}, problems)
    known = {name: [n for n in listed if n in needs and n != name] for name, listed in needs.items()}
    if cycle := find_cycle(known):
        problems.add(("stages", cycle[0], "needs"), f"a cycle: {' → '.join(cycle)}", "remove one of these needs")


def _check_parents(name: str, kind_name: str, parents: dict[str, str], problems: Problems) -> None:
    """parents: stage name -> base kind."""
    kind, place = KINDS[kind_name], ("stages", name, "needs")
    for need, base in parents.items():
        if base not in kind.parents:
            takes = " and ".join(kind.parents) or "no other"
            problems.add(place, f"a stage of kind {kind_name} cannot need '{need}', a {base} stage",
                         f"it takes {takes} stages")  # fmt: skip
    for base, (least, most) in kind.parents.items():
        found = [need for need, its in parents.items() if its == base]
        if not least <= len(found) <= most:
            count = f"exactly {least}" if least == most else f"{least} to {most}"
            problems.add(place, f"a stage of kind {kind_name} needs {count} {base} stage{'' if most == 1 else 's'}, "
                         f"found {', '.join(found) or 'none'}",
                         f"list {'one' if len(found) < least else f'at most {most}'} under 'needs:'")  # fmt: skip


def check_models(
    stages: dict[str, "Stage"], models: list[str], default: bool, problems: Problems
) -> dict[str, "Stage"]:
    """The stages with their model's name resolved: a training stage continues that of the one before.

    models: the names under `models:`; default: whether there is a `model:` for stages that name none.
    """
    out = dict(stages)

    def resolved(name: str) -> str | None:
        stage, place = out[name], ("stages", name, "model")
        params, given = stage.params, getattr(stage.params, "model", None)
        if not isinstance(params, TrainParams | PrepareParams):
            return None
        before = None
        if isinstance(params, TrainParams):
            chain = [n for n in params.needs if n in out and out[n].kind.trains and n not in params.lent]
            before = chain[0] if chain else None
        inherited = resolved(before) if before else None
        if given is not None and given not in models:
            problems.add(place, f"unknown model '{given}'", suggest(given, models) if models else "add it to 'models:'")
        elif before and given is not None and given != inherited:
            message = f"trains model '{given}', and '{before}' before it '{inherited or 'model:'}'"
            problems.add(place, message, "leave 'model' out to continue with the same")
        elif given is None and inherited is None and models and not default and not before:
            problems.add(("stages", name), "says no model", f"add 'model:' with one of: {', '.join(models)}")
        for field, part in LENDERS.items():
            if before and getattr(params, field, None):
                problems.add(
                    ("stages", name, field), f"goes on from '{before}', which has a {part}",
                    "set it in the first training stage of the model",
                )  # fmt: skip
        name_of = given or inherited
        if name_of != given:
            out[name] = replace(stage, params=params.model_copy(update={"model": name_of}))
        return name_of

    for name in stages:
        resolved(name)
    return out


def check_lenders(experiment: "Experiment") -> None:
    """Raises UserError where a stage takes a part of a model that has another one in its place.

    Its identity has that stage in the place of what its own model names (fingerprint.py), so the two have to be one.
    What is not known yet, such as the sizes of a folder that is not there, is left to the stage.
    """
    problems = []
    for name, stage in experiment.stages.items():
        for field, part in LENDERS.items():
            source = getattr(stage.params, field, None)
            if source is None:
                continue
            its, own = experiment.model_of(experiment.stages[source]), experiment.model_of(stage)
            if (found := _other_part(part, its, own)) is not None:
                problems.append(
                    f"{experiment.path}:{stage.line}: stages.{name}.{field}: the {part} of '{source}' is another one "
                    f"than this model's: {found} → give a stage whose model has the same, or change this stage's model"
                )
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))


def _other_part(part: str, its: ModelParams, own: ModelParams) -> str | None:
    """What is different: "hidden_size 64, not 128"; None where nothing is known to be."""
    number = list(LENDERS.values()).index(part)
    theirs, ours = presets.sizes(its), presets.sizes(own)
    if theirs is not None and ours is not None:
        given, wanted = _sizes(theirs[number]), _sizes(ours[number])
        for key in sorted(given.keys() & wanted.keys()):
            if given[key] != wanted[key]:
                return f"{key} {given[key]}, not {wanted[key]}"
    if part == "language model":
        words = [_words(model) for model in (its, own)]
        if None not in words and words[0] != words[1]:
            return "its tokenizer is not this one's"
    elif its.tile_size and own.tile_size and its.tile_size != own.tile_size:
        return f"tile_size {its.tile_size}, not {own.tile_size}"
    return None


def _sizes(fields: dict[str, Any]) -> dict[str, Any]:
    """Those that presets have words for; vocab_size is the tokenizer's matter, and a side may be given twice."""
    known = {key for preset in (*presets.VISION.values(), *presets.LANGUAGE.values()) for key in preset}
    known -= {"tokenizer", "vocab_size", "max_position_embeddings"}
    return {
        key: value[0] if isinstance(value, list | tuple) else value for key, value in fields.items() if key in known
    }


def _words(model: ModelParams) -> tuple[str, str] | None:
    """The tokenizer: (preset, its name) or (folder, digest of its content). None: not known."""
    folders = presets.folders(model)
    part = "folder" if model.folder else "tokenizer" if model.tokenizer else "language"
    if part in folders:
        digest = tokenizer_digest(folders[part])
        return None if digest is None else ("folder", digest)
    name = model.tokenizer or presets.LANGUAGE[str(model.language)]["tokenizer"]
    return None if name is None else ("preset", name)


def check_stage(stage: "Stage", mixtures: list[str], trains: list[str], folder: Path, problems: Problems) -> "Stage":
    """Returns the stage with paths resolved and modules in their fixed order. mixtures: the names under `data:`;
    trains: those of the training stages."""
    params, place = stage.params, ("stages", stage.name)
    if isinstance(params, PrepareParams):
        if params.data not in mixtures:
            problems.add((*place, "data"), f"unknown mixture '{params.data}'", suggest(params.data, mixtures))
        curate = _curation(params, mixtures, (*place, "curate"), folder, problems)
        return replace(stage, params=params.model_copy(update={"curate": curate}))
    if not isinstance(params, TrainParams):
        return stage
    for i, module in enumerate(params.train):
        if module in params.train[:i]:
            problems.add((*place, "train", i), f"'{module}' is listed twice", "remove one", label=(*place, "train"))
    if params.steps is not None and params.epochs is not None:
        problems.add((*place, "epochs"), "'steps' and 'epochs' are both given", "keep one of them", label=place)
    elif params.steps is None and params.epochs is None:
        problems.add(place, "neither 'steps' nor 'epochs' is given", "say how long to train: 'steps: 1000'")
    for field in LENDERS:
        if (source := getattr(params, field)) is not None and source not in trains:
            problems.add((*place, field), f"unknown training stage '{source}'", suggest(source, trains))
    if params.vision_from is not None and params.vision_from == params.language_from:
        problems.add((*place, "language_from"), f"'{params.language_from}' gives the vision encoder already",
                     "take one of them from another stage, or go on from the whole model with 'needs:'")  # fmt: skip
    for i, beta in enumerate(params.betas):
        if not 0 <= beta < 1:
            problems.add((*place, "betas", i), f"must be at least 0 and less than 1, found {beta}", "use 0.9 and 0.999")
    update: dict[str, Any] = {"train": tuple(m for m in MODULES if m in params.train)}
    update["deepspeed"] = _deepspeed(params.deepspeed, place, folder, problems)
    return replace(stage, params=params.model_copy(update=update))


def _curation(
    params: PrepareParams, mixtures: list[str], place: tuple[str, ...], folder: Path, problems: Problems
) -> Curation:
    """With its paths resolved. That a review and a model are there is checked, for they are read late."""
    curate, update = params.curate, {}
    for i, name in enumerate(curate.contamination.against if curate.contamination else ()):
        at = (*place, "contamination", "against", i)
        if name not in mixtures:
            problems.add(at, f"unknown mixture '{name}'", suggest(name, mixtures), label=at[:-1])
        elif name == params.data:
            problems.add(at, "the mixture is compared with itself", "name evaluation sets", label=at[:-1])
    if curate.review is not None:
        update["review"] = str((folder / Path(curate.review).expanduser()).resolve())
        if not Path(update["review"]).is_file():
            remedy = "give the file that the review page has saved, or leave it out"
            problems.add((*place, "review"), f"no such file: {update['review']}", remedy)
    if curate.scores and curate.scores.local:
        path = str((folder / Path(curate.scores.local.model).expanduser()).resolve())
        if not Path(path).exists():
            remedy = "give a folder in Hugging Face layout, or a .gguf file"
            problems.add((*place, "scores", "local", "model"), f"no such folder or file: {path}", remedy)
        local = curate.scores.local.model_copy(update={"model": path})
        update["scores"] = curate.scores.model_copy(update={"local": local})
    return curate.model_copy(update=update)


def _deepspeed(value: int | Path, place: tuple[str, ...], folder: Path, problems: Problems) -> int | Path:
    at = (*place, "deepspeed")
    if isinstance(value, int):
        if value not in ZERO_STAGES:
            remedy = f"use a ZeRO stage from {ZERO_STAGES[0]} to {ZERO_STAGES[-1]}, or the path of a DeepSpeed JSON"
            problems.add(at, f"ZeRO stage {value} is not supported", remedy)
        return value
    path = (folder / value.expanduser()).resolve()
    if not path.is_file():
        problems.add(at, f"no such file: {path}", "give a ZeRO stage or the path of a DeepSpeed JSON")
        return path
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        problems.add(at, f"{path} is not JSON: {error}", "give a DeepSpeed configuration in JSON")
    else:
        if not isinstance(content, dict):
            problems.add(at, f"{path} is not a JSON object", "give a DeepSpeed configuration in JSON")
    return path


def follow_limits(stages: dict[str, "Stage"], problems: Problems) -> dict[str, "Stage"]:
    """The longest sample `prepare` lets through must fit the packs of every stage that trains on it.

    Where prepare does not say, its limits become those of the smallest packs that use it.
    """
    out = dict(stages)
    for name, stage in stages.items():
        if not isinstance(stage.params, PrepareParams):
            continue
        users = {n: s.params.packing for n, s in stages.items()
                 if isinstance(s.params, TrainParams) and name in s.params.needs}  # fmt: skip
        update = {}
        for ours, theirs in (("max_tokens", "max_tokens"), ("max_tiles_per_sample", "max_tiles")):
            if not users:
                continue
            user = min(users, key=lambda n, limit=theirs: getattr(users[n], limit))
            least = getattr(users[user], theirs)
            if ours not in stage.params.model_fields_set:
                update[ours] = least
            elif (mine := getattr(stage.params, ours)) > least:
                message = f"{mine} is more than the {least} of stages.{user}.packing.{theirs}: such samples fit no pack"
                remedy = f"lower it to {least}, raise the other, or leave it out to follow"
                problems.add(("stages", name, ours), message, remedy)
        out[name] = replace(stage, params=stage.params.model_copy(update=update))
    return out
