"""What the page of `stageline demo` asks and shows, without a page: one question, k samples, and their vote.

Invariants: a question is put as in evaluation (prompts.py), answers are read (score.py) and votes counted (match.py,
voting.py) by the same code; one sample is greedy, several are drawn at the temperature, and the same question with the
same seed gives the same samples. A sample that cannot be read has no vote and is counted. Whatever a person can get
wrong is a UserError in one message.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling.errors import UserError
from stages.evaluate.items import AnswerKind, Item
from stages.evaluation import Prompt

# the user's own words, and the official ones for thinking first
FORMS = {"direct": Prompt(suffix=""), "cot": Prompt()}
SHORT, LONG = 64, 1024  # tokens of an answer, direct and otherwise
MOST = 64  # samples of a question


@dataclass(frozen=True)
class Served:
    """A loaded model. system: its system prompt, None is the official one. forms: prompts by name, `direct` first.
    max_tiles: for all pictures of a question together."""

    title: str
    model: Any
    tokenizer: Any
    system: str | None = None
    forms: Mapping[str, Prompt] = field(default_factory=lambda: FORMS)
    max_tiles: int = 12


@dataclass(frozen=True)
class Response:
    """One sample. answer: as it was read, None where it could not be."""

    text: str
    answer: str | None
    tokens: int
    cut: bool


@dataclass(frozen=True)
class Reply:
    """answer: the one that won, None where no sample could be read. votes: (answer, its votes), most first."""

    answer: str | None
    votes: list[tuple[str, int]]
    unreadable: int
    responses: list[Response]


def ask(
    served: Served,
    question: str,
    pictures: Sequence[Path] = (),
    *,
    form: str = "direct",
    kind: AnswerKind = "text",
    samples: int = 1,
    temperature: float = 0.7,
    max_new_tokens: int | None = None,
    seed: int = 0,
) -> Reply:
    """Raises UserError for no question, a file that is no picture, and <image> that does not fit the pictures."""
    from modeling.generate import Question
    from modeling.sampling import sample
    from stages.evaluate.prompts import asked

    if not question.strip():
        raise UserError("there is no question", remedy="write one")
    if not 1 <= samples <= MOST:
        raise UserError(f"{samples} samples", remedy=f"take 1 to {MOST}")
    if samples > 1 and temperature <= 0:
        raise UserError("samples at temperature 0 are all the same", remedy="raise it, or take 1 sample")
    prompt = served.forms[form]
    item = Item("demo", "demo", _placed(question.strip(), len(pictures)), kind, "exact", ())
    text = asked(item, form, prompt)
    longest = max_new_tokens or prompt.max_new_tokens or (SHORT if form == "direct" else LONG)
    put = Question([{"from": "human", "value": text}], [_opened(path) for path in pictures], served.max_tiles)
    try:
        (found,) = sample(
            served.model, served.tokenizer, [put], [text], system=served.system, max_new_tokens=longest,
            temperature=temperature if samples > 1 else 0.0, samples=range(samples), seed=seed,
        )  # fmt: skip
    except ValueError as error:  # the template's words about placeholders
        raise UserError(
            str(error), where="the question", remedy="write one <image> for each picture, or none"
        ) from error
    return reply(item, [(one.text, one.tokens, one.cut) for one in found])


def reply(item: Item, generations: Sequence[tuple[str, int, bool]]) -> Reply:
    """The vote of these (text, tokens, cut)."""
    from stages.evaluate.match import vote_key
    from stages.evaluate.score import answer_of
    from stages.evaluate.voting import winner

    responses = [Response(text, answer_of(item, text, cut), tokens, cut) for text, tokens, cut in generations]
    keys = [
        None if its.answer is None else its.answer if item.kind == "box" else vote_key(its.answer, item.kind)
        for its in responses
    ]
    shown: dict[str, str] = {}
    counts: dict[str, int] = {}
    for key, its in zip(keys, responses, strict=True):
        if key is not None and its.answer is not None:
            shown.setdefault(key, its.answer)  # as it was first written
            counts[key] = counts.get(key, 0) + 1
    won = winner(keys)
    order = sorted(counts, key=lambda key: (key != won, -counts[key]))
    votes = [(shown[key], counts[key]) for key in order]
    return Reply(None if won is None else shown[won], votes, keys.count(None), responses)


def _placed(question: str, pictures: int) -> str:
    """With a placeholder for each picture in front, where the question has none, as training data have them."""
    if not pictures or "<image>" in question:
        return question
    if pictures == 1:
        return f"<image>\n{question}"
    return "".join(f"Image-{i + 1}: <image>\n" for i in range(pictures)) + question


def _opened(path: Path) -> Any:
    from modeling.images import ImageError, decode_rgb

    try:
        return decode_rgb(path.read_bytes())
    except (OSError, ImageError) as error:
        raise UserError(f"cannot be read: {error}", where=path.name, remedy="give a JPEG or PNG file") from error
