"""`evaluate`: every question of a prepared split and of evaluation sets, in every form, greedily and from a pool of
samples; tables, test-time curves and paired comparisons of what came out.

Invariants: every question is asked; an answer that cannot be read is wrong; all methods are counted on one pool of
generations, which is kept (generations.py). The result: evaluation.json (what `report` shows), scores.json (the first
prompt's accuracy by task), predictions.jsonl (greedy answers) and samples.jsonl (the pools), so that anyone can count
again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from modeling.digests import weights_digest
from modeling.remote import model_folder
from stages.evaluate import results
from stages.evaluate.generations import Model, Part
from stages.evaluate.questions import Asked, all_asked, checkpoints, longest
from stages.evaluate.work import Work, part_rows
from stages.io import StageIO
from stages.params import EvaluateParams

FREE = ("likelihood", "certainty")


@dataclass
class Answers:
    """Of one checkpoint to one form of the questions. greedy: (Q, 1), sampled: (Q, n) rows of sampling.Generation, of
    a live ensemble as many as each question took.

    scores: (Q, n) by the name of a re-ranker.
    """

    model: Model
    variant: str
    prompt: str
    asked: list[Asked]
    greedy: list[list[dict[str, Any]]]
    sampled: list[list[dict[str, Any]]] | None = None
    scores: dict[str, list[list[float]]] | None = None
    free: dict[str, str] = field(default_factory=dict)  # names that were given to likelihood and certainty


def evaluate(io: StageIO) -> None:
    """Runs the stage. Raises what readers raise, and DataError for a picture that cannot be read."""
    params: EvaluateParams = io.params
    asked, models, work = list(all_asked(io)), _models(io), Work(io)
    sampled = () if params.sampling is None else params.sampling.prompts or (list(params.prompts)[-1],)
    answers: list[Answers] = []
    free = {name: its.kind for name, its in params.rerank.items() if its.kind in FREE}
    for model in models:
        for variant in dict.fromkeys(one.variant for one, _ in asked):
            chosen = [one for one, _ in asked if one.variant == variant]
            prompt = next(name for one, name in asked if one.variant == variant)
            answers.append(Answers(model, variant, prompt, chosen, [], free=free))
    jobs: list[tuple[Answers, str, list[Part]]] = []
    for its in answers:
        model = its.model
        jobs.append((its, "greedy", work.parts(model, its.asked, _settings(params, its))))
        if params.sampling is not None and its.prompt in sampled:
            jobs.append((its, "sampled", work.parts(model, its.asked, _settings(params, its, sampled=True))))
    losses = {model.name: _loss(work, model, asked) for model in models} if params.loss else {}
    judged = sum(part_rows(part) for _, what, parts in jobs if what == "sampled" for part in parts)
    judges = {name: its for name, its in params.rerank.items() if its.kind not in FREE}
    work.total = sum(part_rows(part) for _, _, parts in jobs for part in parts) + judged * len(judges)
    work.total += sum(part_rows(part) for parts in losses.values() for part in parts)

    generated, measured = [p for _, _, parts in jobs for p in parts], [p for parts in losses.values() for p in parts]
    if params.engine == "transformers":
        work.make(sorted([*generated, *measured], key=lambda part: part.model.fingerprint))
    else:  # in processes of their own: vLLM does not give its memory back
        work.make(generated)
        work.make(measured)
    for its, what, parts in jobs:
        setattr(its, what, work.rows_of(its.asked, parts))
    _judge(io, work, judges, [its for its in answers if its.sampled is not None])
    io.log(f"{work.total} answers, {work.known} of them made before")
    loss = {name: _losses(parts, work) for name, parts in losses.items()}
    folder = io.scratch / "result"
    folder.mkdir()
    told = results.write(folder, io, answers, loss)
    for line in results.lines(told):
        io.log(line)
    io.complete(folder, results.summary(told))


def _settings(params: EvaluateParams, its: Answers, sampled: bool = False) -> dict[str, Any]:
    settings = {"max_new_tokens": longest(params, its.prompt, its.asked), "engine": params.engine}
    if not sampled or params.sampling is None:
        return settings | {"temperature": 0.0, "top_p": 1.0, "samples": [0], "seed": 0}
    how = params.sampling
    samples = list(range(how.samples))
    settings |= {"temperature": how.temperature, "top_p": how.top_p, "samples": samples, "seed": how.seed}
    stop = params.ensemble
    return settings | ({"rule": [how.samples, stop.threshold, stop.posterior]} if stop.live else {})


def _models(io: StageIO) -> list[Model]:
    trained = checkpoints(io)
    if trained:
        return [Model(item.name, item.fingerprint, item.lent) for item in trained]
    folder = model_folder(io.model.folder, io.model.endpoint_url)
    digest = weights_digest(folder)
    assert digest is not None, "planning refuses a folder without weights"
    lent = partial(model_folder, io.model.folder, io.model.endpoint_url, weights=True)  # on each worker's own machine
    return [Model(folder.name, digest, lent)]


def _judge(io: StageIO, work: Work, judges: dict[str, Any], pools: Sequence[Answers]) -> None:
    """Every re-ranker's score of every sample."""
    jobs = []
    for its in pools:
        its.scores = {}
        questions = [replace(one, text=one.item.question) for one in its.asked]
        texts = [tuple(row["text"] for row in rows) for rows in its.sampled or ()]
        for name, how in judges.items():
            model = its.model
            if how.model is not None:
                lent = io.inputs[how.model]
                model = Model(lent.name, lent.fingerprint, lent.lent)
            parts = work.judge_parts(model, questions, {"kind": how.kind, "prompt": how.prompt}, texts)
            jobs.append((its, name, parts))
    if jobs:
        work.make([part for _, _, parts in jobs for part in parts])
    for its, name, parts in jobs:
        assert its.scores is not None
        its.scores[name] = work.rows_of(its.asked, parts)


def _loss(work: Work, model: Model, asked: Sequence[tuple[Asked, str]]) -> list[Part]:
    rows = {one.row: one for one, _ in asked if one.row is not None}
    return work.loss_parts(model, [replace(one, text=one.item.question, variant="loss") for one in rows.values()])


def _losses(parts: Sequence[Part], work: Work) -> dict[str, dict[str, float]]:
    """{task: {nats: mean per token, tokens}} and all together."""
    sums: dict[str, list[float]] = {}
    for part in parts:
        for one, (nats, tokens) in zip(part.questions, work.rows[part.name], strict=True):
            for task in ("all", one.item.task):
                total = sums.setdefault(task, [0.0, 0])
                total[0], total[1] = total[0] + nats, total[1] + tokens
    return {task: {"nats": nats / tokens, "tokens": tokens} for task, (nats, tokens) in sums.items() if tokens}
