"""The parameters of an evaluation: sets, prompts, sampling, re-ranking, and when a vote is settled.

What a field means for the figures is said where it is computed (stages/evaluate/). Defaults are those of the paper's
protocol where it has one (recipe.md §8 of the official code: direct and step by step, `\\boxed{}`).
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stages.base import Params, Run

AnswerKind = Literal["choice", "number", "text", "yes_no", "box"]
Metric = Literal["exact", "vqa", "number", "relaxed", "anls", "choice", "yes_no", "iou"]
Format = Literal["mmmu", "tsv", "jsonl"]


class EvalSet(Params):
    """`eval.<name>:` — one evaluation set, read as it is."""

    format: Format | str = Field(
        description="mmmu (Parquet or JSONL of its schema), tsv (VLMEvalKit), jsonl (docs/evaluation.md), or your own "
        "reader as module:function"
    )
    path: str = Field(description="a file, or a folder of them; relative to the YAML file, or s3://")
    endpoint_url: Annotated[str | None, Run] = Field(
        default=None, description="the S3 store of an s3:// path; None: botocore's own choice"
    )
    kind: AnswerKind | None = Field(default=None, description="how answers are read; None: as the format says")
    metric: Metric | None = Field(default=None, description="None: as the format and the kind say")
    system: str | None = Field(default=None, description="system prompt; None: the official one; '' leaves it empty")
    language: Literal["en", "zh"] = Field(default="en", description="of the words of the prompt")
    max_tiles: int = Field(default=12, gt=0, description="tiles for all pictures of a question together")
    frames: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        default=(16, 32, 48, 64), description="middle frames of a video, each asked in turn"
    )

    @model_validator(mode="after")
    def _frames_once(self) -> "EvalSet":
        _once("frames", self.frames)
        return self


class Answers(Params):
    """How the answers to one task of prepared data are read and compared."""

    kind: AnswerKind = Field(default="text", description="how answers are read")
    metric: Metric | None = Field(default=None, description="None: as the kind says")


class Prompt(Params):
    """Words that ask for a form of answer, behind every question."""

    suffix: str | None = Field(
        default=None, description="None: the official words, by name (direct, cot), kind of question and language"
    )
    max_new_tokens: int | None = Field(default=None, gt=0, description="None: 16 for direct, else 1,024")


class Sampling(Params):
    """A pool of n samples for each question, of which all methods are counted."""

    samples: int = Field(default=8, gt=0, description="of each question")
    temperature: float = Field(default=0.7, gt=0, description="at which they are drawn")
    top_p: float = Field(default=1.0, gt=0, le=1, description="share of probability that tokens are drawn from")
    prompts: tuple[str, ...] = Field(default=(), description="those that are sampled; empty: the last one")
    seed: int = Field(default=0, ge=0, description="of the draws")

    @model_validator(mode="after")
    def _prompts_once(self) -> "Sampling":
        _once("prompts", self.prompts)
        return self


class Ensemble(Params):
    """When the dynamic ensemble stops drawing (stages/evaluate/ensemble.py)."""

    threshold: float = Field(default=0.95, gt=0.5, le=1, description="how sure; 1 stops when nothing can change")
    posterior: Literal["stays", "modal"] = Field(
        default="stays", description="sure that the full vote would say the same, or that no answer is more likely"
    )
    live: bool = Field(
        default=False, description="stop generating where the vote is settled; the pool is then not whole"
    )


class Reranker(Params):
    """A score for every sample: from the samples themselves, or from a model that reads question and response."""

    kind: Literal["likelihood", "certainty", "verifier", "outcome", "process"] = Field(
        description="the first two come with the samples; a verifier is asked; the others are trained scorers"
    )
    model: Annotated[str | None, Run] = Field(
        default=None, description="a training stage whose model scores; None: the checkpoint that answered"
    )
    prompt: str | None = Field(default=None, description="of a verifier: {question} and {response} are filled in")

    @model_validator(mode="after")
    def _has_a_model(self) -> "Reranker":
        if self.kind in ("likelihood", "certainty") and (self.model or self.prompt):
            raise ValueError(f"{self.kind} comes from the samples themselves: leave model and prompt out")
        if self.kind in ("outcome", "process") and self.prompt:
            raise ValueError(f"{self.kind} has the words its scorer was trained with: leave prompt out")
        for name in ("{question}", "{response}") if self.prompt is not None else ():
            if str(self.prompt).count(name) != 1:
                raise ValueError(f"prompt must hold {name} once")
        return self


def _once(field: str, values: tuple[Any, ...]) -> None:
    """The same twice would be counted twice."""
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ValueError(f"{field} names {value} twice: name it once")
