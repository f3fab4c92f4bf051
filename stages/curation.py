"""`curate:` of a prepare stage: which steps look at samples that are whole, and their limits (arXiv 2412.05271, §4.3).

A step that is not named does not run. Each rejects with reasons of its own (modeling/sources.py); the sets that
`exempt` names pass a step unseen. Nothing but pydantic is imported here, so that planning stays fast.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stages.base import Params, Run


class ImageChecks(Params):
    """Pictures too small or too long to show anything."""

    min_side: int = Field(default=16, ge=1, description="pixels of the shorter side")
    max_ratio: float = Field(default=50.0, ge=1, description="longer side by shorter side")


# Version of prepare/text_checks.py and repetition.py: raise it when a verdict changes.
# 2: neither case nor tags hide a run.
RULES = 2


class TextChecks(Params):
    """Heuristics on answers: abnormal length, zero runs, duplicate lines, repetition, odd characters.

    Bytes are UTF-8 bytes, of letters and digits alone where things repeat: about four a token in any script. Limits
    of repetition were read by hand off the first half of benchmarks/filters.py --choose: of values that tell good from
    bad about as well, one that passes more. Limits of length and of odd characters are judgement. Text is dense where
    it has many symbols, as code, tables and formulas do.
    """

    max_bytes: int = Field(default=48_000, ge=1, description="of an answer; about 12,000 tokens")
    cut_bytes: int = Field(default=16_000, ge=1, description="longer answers must not end with a letter or a comma")
    same_characters: int = Field(default=100, ge=2, description="bytes of one letter or digit in a row")
    same_symbols: int = Field(default=250, ge=2, description="one symbol in a row, such as a line of dashes")
    same_words: int = Field(default=100, ge=2, description="words of one and the same letter or digit: 0, 0.0, 00")
    loop_bytes: int = Field(default=32, ge=4, description="that repeat exactly, three times and more in a row")
    short_bytes: int = Field(default=150, ge=0, description="of an answer that may repeat one word as it likes")
    refrain_bytes: int = Field(default=250, ge=4, description="the same in whole lines, as songs have them")
    counting_bytes: int = Field(
        default=1500, ge=4, description="that repeat but for their numbers; half of it where the answer breaks off"
    )
    dense_counting_bytes: int = Field(default=3000, ge=4, description="the same in dense text")
    copied_bytes: int = Field(default=200, ge=4, description="of lines that stood before, over those of new ones")
    dense_copied_bytes: int = Field(default=300, ge=4, description="the same in dense text")
    echoed_bytes: int = Field(default=1000, ge=4, description="of passages said before, over three times the new ones")
    dense_echoed_bytes: int = Field(default=3000, ge=4, description="the same in dense text")
    same_answers: int = Field(default=300, ge=4, description="bytes of long answers that a dialogue gave before")
    dense: float = Field(default=0.12, ge=0, le=1, description="share of symbols above which text is dense")
    odd_characters: int = Field(default=4, ge=0, description="control, private, invisible or wrongly decoded: a few")
    odd_share: float = Field(default=0.005, ge=0, le=1, description="of odd characters in a text, if more than those")
    symbol_noise: int = Field(default=100, ge=1, description="symbols of many kinds, with hardly a word between")
    mixed_words: int = Field(default=5, ge=0, description="words whose letters are of several scripts")

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"rules": RULES}


class Duplicates(Params):
    """Exact and near copies within the mixture: the first one in its order is kept.

    A near copy has the pictures of another one by one and its questions and its answers, each of them nearly. The same
    picture with another question is none, nor is the same question about another picture.
    """

    text_similarity: float = Field(
        default=0.85,
        ge=0.5,
        le=1,
        description="Jaccard similarity of questions, and of answers, from which they are near; 1: equal but for case, "
        "spacing and punctuation. Texts below 64 characters and all numbers must be equal anyway",
    )
    picture_distance: float = Field(
        default=0.02, ge=0, le=0.2, description="up to which pictures are near; scaled or encoded again: below 0.012"
    )


class Contamination(Params):
    """Samples that stand in an evaluation set: their question, whatever their answer."""

    against: tuple[str, ...] = Field(min_length=1, description="names of mixtures under `data:`")
    match: Literal["both", "image", "text"] = Field(
        default="both",
        description="both: a picture and the question are near an evaluation sample's. image: a picture is, which "
        "rejects more, for sets of charts and documents where a picture has many questions. text: the question is. "
        "A sample without pictures is compared by its question with those without pictures (text: with all)",
    )
    text_similarity: float = Field(default=0.85, ge=0.5, le=1, description="as in `duplicates`, of questions")
    picture_distance: float = Field(default=0.02, ge=0, le=0.2, description="as in `duplicates`")


Domain = Literal["disciplinary", "programming", "mathematics", "general"]
# Version of every text and rule in prepare/scoring.py, and of how scorers.py and endpoint.py frame a prompt and read
# what comes: raise it when one of them changes. 2: an undecided domain is remembered by itself.
PROMPTS = 2
START = "Answer:"  # how a local model's answer begins, so that its first token is the score


class LocalModel(Params):
    """A causal language model that runs on the stage's own workers. Its weights' digest is part of the identity."""

    model: Annotated[str, Run] = Field(description="a folder in Hugging Face layout, or a .gguf file")
    precision: Literal["fp32", "bf16"] = Field(default="bf16", description="of its weights")
    max_new_tokens: int = Field(default=8, ge=1, description="tokens of an answer; its first line is read")
    batch: Annotated[int, Run] = Field(default=16, ge=1, description="prompts at a time")

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"start": START}


class Endpoint(Params):
    """Any service with OpenAI's chat completions: vLLM, SGLang, llama.cpp, a public one."""

    base_url: Annotated[str, Run] = Field(description="such as http://host:8000/v1; /chat/completions is added")
    model: str = Field(min_length=1, description="the model's name there")
    api_key_env: Annotated[str | None, Run] = Field(
        default=None, description="NAME of the environment variable that holds the key, on every worker"
    )
    max_new_tokens: int = Field(default=64, ge=1, description="tokens of an answer; more for a model that thinks first")
    body: dict[str, Any] = Field(
        default={}, description="further keys of the request, such as chat_template_kwargs; null removes one"
    )
    concurrency: Annotated[int, Run] = Field(default=16, ge=1, description="requests in flight, of each worker")
    timeout_s: Annotated[float, Run] = Field(default=120, gt=0, description="seconds without an answer")
    retries: Annotated[int, Run] = Field(default=6, ge=0, description="of a request that met a passing fault")
    patience_s: Annotated[float, Run] = Field(
        default=900, gt=0, description="seconds without any answer, after which the stage fails, to be tried again"
    )

    @model_validator(mode="after")
    def _no_secret(self) -> "Endpoint":
        # raised for the whole group, whose message shows no value: the wrong one may be a key
        if "@" in self.base_url or "?" in self.base_url or "#" in self.base_url:
            raise ValueError("base_url must hold no user, password, key or query: give the key by api_key_env")
        if not re.fullmatch(r"https?://([\w.-]+|\[[0-9a-fA-F:.]+\])(:\d{1,5})?(/[^\s]*)?", self.base_url):
            raise ValueError("base_url must be a URL such as http://host:8000/v1")
        if self.api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", self.api_key_env):
            raise ValueError("api_key_env must be the NAME of an environment variable (A-Z, 0-9, _), never the key")
        if _holds_secret(self.body):
            raise ValueError("body must hold no key: give the key by api_key_env")
        return self

    def __hash__(self) -> int:  # `body` is a dictionary
        return hash(self.model_dump_json())


_SECRET = re.compile(r"(?i)(key|secret|password|passwd|token|auth|authorization|bearer|credentials?|cookie)$")


def _holds_secret(value: Any, name: str = "") -> bool:
    """Whether a text or number anywhere in it has a name as secrets have. A group of that name may be a schema's."""
    if isinstance(value, dict):
        return any(_holds_secret(inner, str(key)) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return any(_holds_secret(inner, name) for inner in value)
    return value is not None and not isinstance(value, bool) and bool(_SECRET.search(name))


class Scores(Params):
    """Domain, quality and repetition scores by a language model, 0 to 10 each: prepare/scoring.py.

    Samples of text get quality and repetition, those with pictures repetition alone (§4.3). A sample that still has no
    score after `attempts` is rejected: nobody knows that it is good, the paper's finding is that few bad ones suffice
    to do harm, and `max_rejected` stops the stage where a model cannot do the task at all.
    """

    local: LocalModel | None = None
    endpoint: Endpoint | None = None
    quality: float = Field(default=7, ge=0, le=10, description="samples below it are rejected (low_quality)")
    repetition: float = Field(default=3, ge=0, le=10, description="samples below it are rejected (repetitive)")
    multimodal: Literal["repetition", "both"] = Field(
        default="repetition", description="what is asked about samples with pictures, which the model does not see"
    )
    classify: bool = Field(
        default=True, description="ask for the domain of each sample of a set not in `domains`; false: it is general"
    )
    domains: dict[str, Domain] = Field(default={}, description="the domain of a whole set, by its name")
    attempts: int = Field(default=2, ge=1, description="times a question is put until its answer can be read")
    not_scored: Literal["reject", "keep"] = Field(default="reject", description="a sample without a readable score")
    max_characters: int = Field(default=8000, ge=1000, description="longer conversations lose their middle")

    @model_validator(mode="after")
    def _one_scorer(self) -> "Scores":
        if (self.local is None) == (self.endpoint is None):
            raise ValueError("must name one scorer: either `local` or `endpoint`")
        return self

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"prompts": PROMPTS}

    def __hash__(self) -> int:  # `domains` is a dictionary
        return hash(self.model_dump_json())


class Exempt(Params):
    """Names of datasets that pass a step unseen."""

    images: tuple[str, ...] = Field(default=(), description="datasets of the mixture, by name")
    text: tuple[str, ...] = Field(default=(), description="as above")
    duplicates: tuple[str, ...] = Field(default=(), description="as above")
    contamination: tuple[str, ...] = Field(default=(), description="as above")
    scores: tuple[str, ...] = Field(default=(), description="as above")


class Curation(Params):
    """Steps over whole samples; a step that is not named does not run (docs/curation.md)."""

    images: ImageChecks | None = None
    text: TextChecks | None = None
    duplicates: Duplicates | None = None
    contamination: Contamination | None = None
    scores: Scores | None = None
    exempt: Exempt = Exempt()
    review: str | None = Field(default=None, description="verdicts of a review (JSON), as the review page saves them")
