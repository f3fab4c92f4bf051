"""Evaluation results as tables, test-time curves and comparisons.

Invariants: figures are taken from the results as they stand, none is computed anew, but that the largest of several
prompts is called a maximum and names its prompt (the paper reports it without saying so); a method has the same colour
and dashes in every chart of the report. Results of the first version hold scores.json alone: one prompt, no curves.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from modeling.errors import UserError
from orchestrator.report.figures import interval, number, real, share
from orchestrator.report.lines import Line, chart
from orchestrator.report.read import StageRead, read_json
from orchestrator.spec import Experiment
from orchestrator.store import Store

FILE, OLD_FILE = "evaluation.json", "scores.json"
OLD_PROMPT = "direct"
# What a task may have beside its accuracy, and its heading.
EXTRA = {"f1": "F1", "precision": "precision", "recall": "recall", "yes_rate": "yes rate", "iou": "mean IoU"}


class _Json(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Score(_Json):
    """One task under one prompt. unparsable, cut: shares of the answers; tokens: mean of a response."""

    n: int
    right: float | None = None
    accuracy: float
    low: float | None = None
    high: float | None = None
    metric: str = ""
    unparsable: float | None = None
    cut: float | None = None
    tokens: float | None = None
    f1: float | None = None
    precision: float | None = None
    recall: float | None = None
    yes_rate: float | None = None
    iou: float | None = None
    circular: "Score | None" = None  # MMBench: right with the options in every order
    categories: dict[str, "Score"] = {}


class Maximum(_Json):
    prompt: str
    accuracy: float
    n: int | None = None
    label: str = "maximum"


class Curve(_Json):
    """samples, tokens: per question, of each point. accuracy, low, high: shares."""

    prompt: str
    checkpoint: str = ""
    method: str
    samples: tuple[float, ...]
    tokens: tuple[float, ...] = ()
    accuracy: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _of_one_length(self) -> "Curve":
        for name in ("samples", "tokens", "low", "high"):
            values = getattr(self, name)
            if len(values) != len(self.accuracy) and (values or name == "samples"):
                raise ValueError(f"{len(values)} {name} for {len(self.accuracy)} accuracies")
        return self


class Comparison(_Json):
    """difference: a − b, paired by question."""

    task: str
    prompt: str = ""
    checkpoint: str = ""
    a: str
    b: str
    difference: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    test: str = ""
    better: int | None = None
    worse: int | None = None
    questions: int | None = None


class Loss(_Json):
    """nats: mean per token."""

    nats: float
    tokens: int = 0


class Result(_Json):
    """evaluation.json, as the stage writes it (stages/evaluate)."""

    stage: str = ""
    checkpoints: tuple[str, ...] = ()
    parameters: dict[str, int] = {}
    tables: dict[str, dict[str, Score]] = {}
    maximum: dict[str, Maximum] = {}
    curves: dict[str, tuple[Curve, ...]] = {}
    comparisons: tuple[Comparison, ...] = ()
    loss: dict[str, Loss] = {}
    losses: dict[str, dict[str, Loss]] = {}  # by checkpoint
    sampling: dict[str, Any] | None = None


@dataclass(frozen=True)
class Evaluated:
    """stage: the evaluate stage; trained: whose model answered."""

    stage: str
    trained: str
    result: Result
    charts: dict[str, list[Markup]] = field(default_factory=dict)  # by task, prompt and checkpoint

    @property
    def prompts(self) -> list[str]:
        return list(self.result.tables)

    @property
    def tasks(self) -> list[str]:
        """In the order in which they stand."""
        return list(dict.fromkeys(task for scores in self.result.tables.values() for task in scores))

    def score(self, prompt: str, task: str) -> Score | None:
        return self.result.tables.get(prompt, {}).get(task)

    def first(self, task: str) -> Score:
        return next(scores[task] for scores in self.result.tables.values() if task in scores)

    @property
    def extras(self) -> list[tuple[str, str, Score, list[tuple[str, str]]]]:
        """(task, prompt, score, [(heading, figure)]) where there is more than an accuracy."""
        out = []
        for task in self.tasks:
            for prompt in self.prompts:
                score = self.score(prompt, task)
                if score is None:
                    continue
                found = [
                    (name, share(value)) for key, name in EXTRA.items() if (value := getattr(score, key)) is not None
                ]
                if score.circular is not None:
                    found.append(("in every order of the options", _figure(score.circular)))
                if found:
                    out.append((task, prompt, score, found))
        return out

    @property
    def categories(self) -> list[tuple[str, list[str], list[tuple[str, list[str]]]]]:
        """(task, prompts, [(category, a figure for each prompt)])."""
        out = []
        for task in self.tasks:
            scores = [(prompt, score) for prompt in self.prompts if (score := self.score(prompt, task)) is not None]
            names = list(dict.fromkeys(name for _, score in scores for name in score.categories))
            if names:
                rows = [(name, [_figure(score.categories.get(name)) for _, score in scores]) for name in names]
                out.append((task, [prompt for prompt, _ in scores], rows))
        return out

    @property
    def loss(self) -> list[str]:
        """A sentence for each checkpoint: nats a token, of all references and of each task."""
        by_checkpoint = self.result.losses or ({"": self.result.loss} if self.result.loss else {})
        out = []
        for checkpoint, losses in by_checkpoint.items():
            told = ", ".join(f"{task} {real(loss.nats)} ({number(loss.tokens)})" for task, loss in losses.items())
            named = f" of {checkpoint}" if len(by_checkpoint) > 1 else ""
            if told:
                out.append(f"Loss{named} on the references, in nats a token (of so many tokens): {told}.")
        return out

    @property
    def facts(self) -> str:
        """The model's size, and how its pool was drawn."""
        sizes = ", ".join(f"{part} {number(count)}" for part, count in self.result.parameters.items())
        drawn = {key: value for key, value in (self.result.sampling or {}).items() if value not in (None, [], ())}
        told = ", ".join(f"{key} {_plain(value)}" for key, value in drawn.items())
        return "; ".join(filter(None, (f"parameters: {sizes}" if sizes else "", f"sampled: {told}" if told else "")))

    @property
    def several(self) -> bool:
        """Whether there are curves or comparisons of more than one checkpoint."""
        return len({row.checkpoint for row in self.result.comparisons if row.checkpoint}) > 1


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else f"{value}"


def _figure(score: Score | None) -> str:
    return "–" if score is None else f"{interval(score.accuracy, score.low, score.high)} n = {score.n:,}"


def read_evaluations(experiment: Experiment, store: Store, stages: Sequence[StageRead]) -> list[Evaluated]:
    """Of every completed evaluate stage. Raises UserError for a result that cannot be read."""
    out = []
    for one in stages:
        names = {file["name"] for file in one.result["files"]}
        if one.stage.kind.base != "evaluate" or one.shared or not names & {FILE, OLD_FILE}:
            continue
        key = f"{one.result['folder']}/{FILE if FILE in names else OLD_FILE}"
        found = read_json(store, key)
        try:
            result = Result.model_validate(found if FILE in names else {"tables": {OLD_PROMPT: found}})
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise UserError(f"not the result of an evaluation: {place}: {first['msg']}", where=f"{store.url}/{key}",
                            remedy="use the Stageline that wrote it, or run the stage anew") from None  # fmt: skip
        trained = [parent.name for parent in experiment.parents(one.stage) if parent.kind.trains]
        out.append(Evaluated(one.name, result.stage or ", ".join(trained), result))
    kinds = _kinds(curve.method for one in out for curves in one.result.curves.values() for curve in curves)
    return [
        Evaluated(one.stage, one.trained, one.result, _charts(i, one.result.curves, kinds)) for i, one in enumerate(out)
    ]


def _kinds(methods: Iterable[str]) -> dict[str, int]:
    """Colour and dashes of each method, the same for all charts."""
    return {method: i for i, method in enumerate(dict.fromkeys(methods))}


def _charts(number: int, curves: dict[str, tuple[Curve, ...]], kinds: dict[str, int]) -> dict[str, list[Markup]]:
    """For each task, prompt and checkpoint: accuracy over samples, and over generated tokens."""
    several = len({curve.checkpoint for found in curves.values() for curve in found}) > 1
    groups: dict[str, list[Curve]] = {}
    for task, found in curves.items():
        for curve in found:
            title = ", ".join(filter(None, (task, curve.prompt, curve.checkpoint if several else "")))
            groups.setdefault(title, []).append(curve)
    out = {}
    for i, (title, group) in enumerate(groups.items()):
        doubled = sorted({x for curve in group for x in curve.samples if x.is_integer() and not int(x) & int(x) - 1})
        out[title] = [_chart(f"t{number}-{i}s", f"{title}: by samples", group, kinds, "samples", doubled)]
        if any(curve.tokens for curve in group):
            out[title].append(_chart(f"t{number}-{i}t", f"{title}: by tokens", group, kinds, "tokens", ()))
    return out


def _chart(
    name: str, title: str, group: Sequence[Curve], kinds: dict[str, int], over: str, ticks: Sequence[float]
) -> Markup:
    """over: samples or tokens."""
    lines = [_line(curve, getattr(curve, over), over, kinds[curve.method]) for curve in group]
    lines = [line for line in lines if line.x]
    log = all(x > 0 for line in lines for x in line.x)
    ends = "; ".join(f"{line.name} ends at {share(line.y[-1])}" for line in lines)
    axis = "generated tokens a question" if over == "tokens" else "samples a question"
    return chart(
        name, title, lines, x=axis, y="accuracy", log_x=log, x_ticks=ticks if len(ticks) > 1 else (),
        note=f"{title}. {ends}.", y_text=share,
    )  # fmt: skip


def _line(curve: Curve, xs: Sequence[float], over: str, kind: int) -> Line:
    """In the order of its costs."""
    points = sorted(zip_longest(xs, curve.accuracy, curve.low, curve.high))
    bands = bool(curve.low)
    notes = [f"{curve.method}, {real(x)} {over}: {interval(y, low, high)}" for x, y, low, high in points]
    x, y, low, high = ([point[i] for point in points] for i in range(4))
    return Line(x, y, low if bands else (), high if bands else (), curve.method, kind, notes)
