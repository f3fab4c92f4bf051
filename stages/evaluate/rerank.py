"""Scores for samples: from the samples themselves, or from a model that reads question and response.

Invariant: a pool of Q questions with their samples becomes as many scores, higher is better, comparable within one
question; responses of a question that read the same are judged once and score the same.

likelihood: log-probability per token. certainty: Kang et al. 2025 (arXiv 2502.18581). verifier: any model, asked
whether the response is right, P(Yes) against P(No). outcome and process: a trained scorer in VisualPRM's form
(arXiv 2503.10291; modeling/judging.py), P("+") after the whole response, or after each step: their mean, which the
paper finds best (recipe: mean 41.1, min 40.4, max 35.9). A response without a step scores 0.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from modeling.errors import UserError

if TYPE_CHECKING:
    from modeling.generate import Question

Judged = Literal["verifier", "outcome", "process"]

PROMPT = "{question}\n\nA response to it:\n{response}\n\nIs the response right? Answer Yes or No."
WORDS = ("Yes", "No")
AGGREGATES = {"mean": fmean, "min": min, "max": max}


def judged(
    kind: Judged,
    prompt: str | None,
    model: Any,
    tokenizer: Any,
    questions: Sequence["Question"],
    responses: Sequence[Sequence[str]],
    system: str | None,
    batch: int,
    *,
    aggregate: Literal["mean", "min", "max"] = "mean",
) -> list[list[float]]:
    """Scores in [0, 1] of each question's responses, `batch` (question, response) pairs in one pass.

    prompt: of a verifier, None: PROMPT. aggregate: of the steps of a process scorer. system: as the model was trained.
    Raises UserError for a prompt without {question} or {response}, and for words that a tokenizer cannot tell apart.
    """
    from modeling.judging import MARKS, choice_probability, scorer_turns, step_scores

    pairs = list(dict.fromkeys((i, text) for i, row in enumerate(responses) for text in row))
    scores: dict[tuple[int, str], float] = {}
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        asked = [questions[i] for i, _ in part]
        if kind == "process":
            steps = step_scores(model, tokenizer, asked, [text for _, text in part], system=system)
            found = [AGGREGATES[aggregate](row) if row else 0.0 for row in steps]
        else:
            turns = [
                scorer_turns(questions[i], [text])[:-1] if kind == "outcome" else verifier_turns(
                    questions[i].conversation, text, PROMPT if prompt is None else prompt
                )
                for i, text in part
            ]  # fmt: skip
            asked = [replace(question, conversation=each) for question, each in zip(asked, turns, strict=True)]
            words = MARKS if kind == "outcome" else WORDS
            found = choice_probability(model, tokenizer, asked, words, system=system)
        scores.update(zip(part, found, strict=True))
    return [[scores[i, text] for text in row] for i, row in enumerate(responses)]


def check_prompt(prompt: str) -> None:
    """Raises UserError for a verifier's prompt that does not hold {question} and {response} once each."""
    for name in ("{question}", "{response}"):
        if prompt.count(name) != 1:
            raise UserError(
                f"the verifier's prompt must hold {name} once, found {prompt.count(name)}", where="rerank.prompt",
                remedy=f"write for example {PROMPT!r}",
            )  # fmt: skip


def verifier_turns(conversation: Sequence[dict[str, str]], response: str, prompt: str) -> list[dict[str, str]]:
    """The conversation with its last question put as the prompt puts it; the pictures stay where the question had them.

    What a response says is text: neither `<image>` nor {question} in it means anything.
    """
    from modeling.judging import plain

    check_prompt(prompt)
    *before, last = conversation
    parts = {"{question}": last["value"], "{response}": plain(response)}
    text = re.sub(r"\{question\}|\{response\}", lambda found: parts[found[0]], prompt)
    return [*map(dict, before), {"from": "human", "value": text}]
