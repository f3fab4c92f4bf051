"""`eval:` in an experiment file, and what must hold between it and the stages of kind evaluate.

Invariant, as in checks.py: a rule here refuses a file that could only fail later. A set that is absent is no mistake:
planning says so.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling.errors import UserError
from modeling.template import IMAGE, IMG_CONTEXT, VIDEO
from orchestrator.address import check_endpoint
from orchestrator.problems import Problems, suggest
from stages.evaluation import EvalSet
from stages.params import EvaluateParams, ModelParams

if TYPE_CHECKING:
    from orchestrator.spec import Stage

FORMATS = ("mmmu", "tsv", "jsonl")
OF_SAMPLES = ("likelihood", "certainty")  # re-rankers that come with the samples, under these names
MEDIA = (IMAGE, VIDEO, IMG_CONTEXT)
OFFICIAL = ("direct", "cot")  # prompts that have words of their own


def check_set(name: str, params: EvalSet, folder: Path, problems: Problems) -> EvalSet:
    """With its path resolved against the folder of the file."""
    from orchestrator.spec import NAME  # which imports this module

    place, update = ("eval", name), {}
    if not NAME.fullmatch(name):
        problems.add(place, f"{name!r} is not a valid name of a set", "use only a-z, 0-9, _ and -", label=())
    if params.format not in FORMATS and ":" not in params.format:
        remedy = f"{suggest(params.format, FORMATS)} (or name a reader of yours as module:function)"
        problems.add((*place, "format"), f"unknown format '{params.format}'", remedy)
    if "://" not in params.path:
        update["path"] = str((folder / Path(params.path).expanduser()).resolve())
    if params.endpoint_url is not None:
        try:
            update["endpoint_url"] = check_endpoint(params.endpoint_url, f"eval.{name}.endpoint_url")
        except UserError as error:
            problems.add((*place, "endpoint_url"), error.message, error.remedy)
    return params.model_copy(update=update)


def check_evaluations(
    stages: dict[str, "Stage"], sets: dict[str, EvalSet], models: dict[str, ModelParams], default: ModelParams | None,
    problems: Problems,
) -> dict[str, "Stage"]:  # fmt: skip
    """Each evaluation has something to ask and somebody to ask. models, default: as in the file."""
    out = dict(stages)
    for name, stage in stages.items():
        params, place = stage.params, ("stages", name)
        if not isinstance(params, EvaluateParams):
            continue
        bases = [stages[need].kind.base for need in params.needs if need in stages and need not in params.lent]
        for i, one in enumerate(params.sets):
            if one not in sets:
                remedy = suggest(one, sets) if sets else "add it to 'eval:'"
                problems.add((*place, "sets", i), f"unknown set '{one}'", remedy, label=(*place, "sets"))
            elif one in params.sets[:i]:
                problems.add((*place, "sets", i), f"'{one}' is listed twice", "remove one", label=(*place, "sets"))
        if "prepare" not in bases and not params.sets and all(need in stages for need in params.needs):
            problems.add(place, "has nothing to ask", "name a prepare stage under 'needs:', or a set under 'sets:'")
        for reranker, its in params.rerank.items():
            if its.model is not None and (its.model not in stages or not stages[its.model].kind.trains):
                trains = [other for other, its_stage in stages.items() if its_stage.kind.trains]
                at = (*place, "rerank", reranker, "model")
                problems.add(at, f"unknown training stage '{its.model}'", suggest(its.model, trains))
        _check_words(params, place, problems)
        _check_engine(params, place, problems)
        if params.rerank and params.sampling is None:
            problems.add((*place, "rerank"), "has no samples to score", "add 'sampling: {samples: 8}'")
        if all(need in stages for need in params.needs):
            _check_model(name, params, "train" in bases, models, default, problems)
        out[name] = replace(stage, params=params)
    return out


def _check_words(params: EvaluateParams, place: tuple[str, ...], problems: Problems) -> None:
    """Words that no prompt, and scores that no re-ranker can have."""
    for prompt, its in params.prompts.items():
        at = (*place, "prompts", prompt)
        if its.suffix is None and prompt not in OFFICIAL:
            remedy = "give it a 'suffix:', also an empty one; only direct and cot have official words"
            problems.add(at, f"the prompt '{prompt}' has no words", remedy)
        for mark in (one for one in MEDIA if its.suffix is not None and one in its.suffix):
            problems.add((*at, "suffix"), f"holds {mark}, which stands for a picture or video", "take it out")
    for reranker, its in params.rerank.items():
        if reranker in OF_SAMPLES and its.kind != reranker:
            remedy = f"give it another name; '{reranker}' is that of kind {reranker}"
            problems.add((*place, "rerank", reranker), f"the name is reserved, and the kind is {its.kind}", remedy)


def _check_engine(params: EvaluateParams, place: tuple[str, ...], problems: Problems) -> None:
    if params.engine == "transformers" and params.resources.gpus > 1:
        remedy = "give 'gpus: 1' and more workers, or use 'engine: vllm', which splits the model over them"
        problems.add((*place, "resources", "gpus"), "each worker answers on one GPU", remedy)
    for reranker, its in params.rerank.items():
        if params.engine == "vllm" and its.kind == "certainty":
            remedy = "use likelihood, or 'engine: transformers'"
            problems.add((*place, "rerank", reranker), "vllm gives no certainty of its samples", remedy)


def _check_model(
    name: str, params: EvaluateParams, trained: bool, models: dict[str, Any], default: Any, problems: Problems
) -> None:
    place = ("stages", name, "model")
    if params.model is not None and params.model not in models:
        problems.add(place, f"unknown model '{params.model}'", suggest(params.model, models) if models else
                     "add it to 'models:'")  # fmt: skip
        return
    if trained:
        if params.model is not None:
            problems.add(place, "asks the stages it needs, and a model", "remove one: 'model', or the trained stages")
        return
    model = models[params.model] if params.model is not None else default
    if model is None or model.folder is None:
        remedy = "need a training stage, or name a model under 'models:' that has a 'folder:'"
        problems.add(("stages", name), "has no trained model to ask", remedy)
