"""What a model says about a response: the probability of a word, a mark for each step, the loss of an answer.

Invariant: conversations are encoded as in training (template.py), so that a scorer is asked in the form it was trained
on, and only the logits at the places asked for exist. The words of a scorer's turns are those of the official VisualPRM
data (arXiv 2503.10291; OpenGVLab/InternVL, commit 637c8258a15, visualprm_data_pipeline_postprocess.py, item2conv_prm
and item2conv_orm): each step of a response is a human turn, answered by "+" or "-"; the first one states the question.
All steps are read in one pass, each after "+" for the ones before it; a score is P("+") against P("-").
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from modeling.errors import UserError
from modeling.generate import Question
from modeling.sampling import positions, prompt_batch
from modeling.template import IMAGE, IMG_CONTEXT, IMG_END, IMG_START, VIDEO, Encoded, encode_conversation
from modeling.tiles import split_image, tiles_per_image_limit, to_pixels

MARKS = ("+", "-")
CHUNK = 1024  # positions whose logits exist at once
_PICTURES = (IMAGE, VIDEO, IMG_CONTEXT, IMG_START, IMG_END)

Conversation = list[dict[str, str]]


def plain(text: str) -> str:
    """A response as text to be read: where it says `<image>` it means no picture."""
    for token in _PICTURES:
        text = text.replace(token, token.strip("</>"))
    return text


def steps_of(response: str, separator: str = "\n") -> list[str]:
    """The steps of a response: what stands between separators, blank pieces out, blanks around each stripped."""
    return [step for piece in response.split(separator) if (step := piece.strip())]


def scorer_turns(question: Question, steps: Sequence[str], marks: Sequence[str] | None = None) -> Conversation:
    """The conversation in which a scorer marks each step; one step, the whole response, is an outcome scorer's.

    marks: the answers, one for each step, as training data give them; None: "+" for all, as they are read. The turns
    before the question are kept. Raises ValueError for no step, or not as many marks.
    """
    *before, last = question.conversation
    marks = marks or [MARKS[0]] * len(steps)
    if not steps or len(marks) != len(steps):
        raise ValueError(f"each of at least one step needs a mark: found {len(steps)} steps, {len(marks)} marks")
    texts = [plain(step) for step in steps]
    texts[0] = f"### Question:\n{last['value']}\n\n### Solution Process:\n{texts[0]}"
    turns = [dict(turn) for turn in before]
    for text, mark in zip(texts, marks, strict=True):
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": mark}]
    return turns


@torch.inference_mode()
def choice_probability(
    model: Any, tokenizer: Any, questions: Sequence[Question], words: tuple[str, str] = ("Yes", "No"), *,
    system: str | None,
) -> list[float]:  # fmt: skip
    """P(the answer begins with words[0]) against words[1], for each question: their first tokens, renormalised.

    Raises UserError where both words begin with the same token.
    """
    if not questions:
        return []
    pair = _first_tokens(tokenizer, words)
    ids, mask, pixels = prompt_batch(model, tokenizer, questions, system)
    images = {} if pixels is None else {"pixel_values": pixels}
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False, logits_to_keep=1, **images
    ).logits[:, -1]
    return logits[:, pair].float().softmax(-1)[:, 0].tolist()


@torch.inference_mode()
def step_scores(
    model: Any, tokenizer: Any, questions: Sequence[Question], responses: Sequence[str], *,
    system: str | None, marks: tuple[str, str] = MARKS, separator: str = "\n",
) -> list[list[float]]:  # fmt: skip
    """P(marks[0]) against marks[1] after each step of each response: one row for each (question, response).

    A response without a step has no scores. separator: "\\n" also parts paragraphs; the official one is "\\n\\n".
    Raises UserError where both marks begin with the same token.
    """
    pair = _first_tokens(tokenizer, marks)
    steps = [steps_of(response, separator) for response in responses]
    asked = [i for i, found in enumerate(steps) if found]
    scores: list[list[float]] = [[] for _ in steps]
    if not asked:
        return scores
    turns = [scorer_turns(questions[i], steps[i], marks[:1] * len(steps[i])) for i in asked]
    hidden, encoded = _forward(model, tokenizer, [questions[i] for i in asked], turns, system)
    for i, states, sample in zip(asked, hidden, encoded, strict=True):
        # the marks are the last answers: the question may have answered turns of its own before it
        places = [start - 1 for start, _ in sample.answer_spans[-len(steps[i]) :]]
        logits = model.lm_head(states[places])[:, pair]
        scores[i] = logits.float().softmax(-1)[:, 0].tolist()
    return scores


@torch.inference_mode()
def answer_loss(
    model: Any, tokenizer: Any, questions: Sequence[Question], answers: Sequence[str], *, system: str | None
) -> list[tuple[float, int]]:
    """(negative log-likelihood in nats, supervised tokens) of each answer, teacher-forced: its text and `<|im_end|>`.

    Earlier answers of the question's conversation are context. Their sum over the sum of tokens is the held-out loss.
    """
    if not questions:
        return []
    turns = [
        [*map(dict, question.conversation), {"from": "gpt", "value": answer}]
        for question, answer in zip(questions, answers, strict=True)
    ]
    hidden, encoded = _forward(model, tokenizer, questions, turns, system)
    losses = []
    for states, sample in zip(hidden, encoded, strict=True):
        start, end = sample.answer_spans[-1]
        targets = torch.tensor(sample.input_ids[start:end], device=states.device)
        total = 0.0
        for first in range(0, len(targets), CHUNK):
            part = slice(start - 1 + first, min(start - 1 + first + CHUNK, end - 1))
            logits = model.lm_head(states[part]).float()
            total += float(cross_entropy(logits, targets[first : first + CHUNK], reduction="sum"))
        losses.append((total, len(targets)))
    return losses


def _first_tokens(tokenizer, words: tuple[str, str]) -> list[int]:
    """The first token of each word where it begins an answer."""
    tokens = []
    for word in words:
        turns = [{"from": "human", "value": ""}, {"from": "gpt", "value": word}]
        encoded = encode_conversation(turns, tokenizer, [], 1, system="")
        tokens.append(encoded.input_ids[encoded.answer_spans[0][0]])
    if tokens[0] == tokens[1]:
        raise UserError(
            f"{words[0]!r} and {words[1]!r} begin with the same token {tokenizer.decode(tokens[:1])!r}",
            remedy="choose two words that this tokenizer tells apart at once",
        )
    return tokens


def _forward(
    model, tokenizer, questions: Sequence[Question], conversations: Sequence[Conversation], system: str | None
) -> tuple[list[Tensor], list[Encoded]]:
    """The last hidden states [its length, H] of each whole conversation with its question's pictures, in one pass."""
    config = model.config
    size, per_tile = config.vision_config.image_size[0], config.image_seq_length
    encoded, pixels = [], []
    for question, turns in zip(questions, conversations, strict=True):
        images = question.images
        limit = 1 if question.video else tiles_per_image_limit(question.max_tiles, max(1, len(images)))
        split = [split_image(each.convert("RGB"), limit, tile_size=size, tie=question.tile_tie) for each in images]
        counts = [len(tiles) for tiles in split]
        encoded.append(
            encode_conversation(turns, tokenizer, counts, per_tile, system=system, video=question.video or None)
        )
        if split:
            pixels.append(to_pixels([tile for tiles in split for tile in tiles]))
    lengths = [len(sample.input_ids) for sample in encoded]
    pad, longest = tokenizer.pad_token_id, max(lengths)
    ids = torch.tensor([sample.input_ids + [pad] * (longest - len(sample.input_ids)) for sample in encoded])
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    where = next(model.parameters()).device
    seen = {"pixel_values": torch.cat(pixels).to(where, model.dtype)} if pixels else {}
    hidden = model.model(
        input_ids=ids.to(where), attention_mask=mask.long().to(where), use_cache=False, **seen
    ).last_hidden_state
    return [states[:length] for states, length in zip(hidden, lengths, strict=True)], encoded
