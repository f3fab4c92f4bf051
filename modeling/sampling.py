"""Samples of answers: greedy or drawn, many for each question from one prefill, with what re-rankers need to know.

Invariant: sample j of question `key` is the same whatever questions or sample numbers share its batch, up to the
rounding of floats. Its uniform numbers are those of a Philox generator keyed by (seed, key, j), one for each position,
and each picks a token from the distribution by inverse CDF in the order of the vocabulary, which rounding does not
reorder as it would a sorted one. So a pool can be drawn in any parts, and be resumed.

Each question is encoded and run once, pictures too; its cache is then repeated for its samples. Rows that ended leave
the batch. What a batch costs: rows = questions · samples hold 2 · layers · kv heads · head width · bytes of a value for
each of their (longest prompt + generated) tokens; a step needs 24 bytes · rows · vocabulary more, 64 with top_p < 1.
A 0.5B Qwen2.5 in bfloat16 takes 12 KiB a token: 64 rows of 3,000 tokens are 2.3 GB, and 0.24 GB for a step.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeling.generate import Question, encode_question, texts_of

LEAVE = 8  # rows leave once one in eight has ended: taking them out copies the cache once, as any step does


@dataclass(frozen=True)
class Generation:
    """One answer.

    text: as generate.texts_of gives it. tokens: generated, the end included. logprob: natural, summed
    over these tokens, of the model itself (temperature 1, no top_p). certainty: self-certainty (Kang et al. 2025, arXiv
    2502.18581): the mean over these tokens of KL(uniform ‖ p) = −Σ_v log(V · p_v) / V, in nats, 0 for a uniform p; None
    where the engine does not tell (vllm_engine.py). cut: ended by max_new_tokens.
    """

    text: str
    tokens: int
    logprob: float
    certainty: float | None
    cut: bool


def uniforms(seed: int, key: str, sample: int, n: int) -> np.ndarray:
    """The n numbers of [0, 1) of one sample, float64; a longer row starts with the shorter one."""
    digest = hashlib.sha256(f"{seed}\0{sample}\0{key}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random(n)


def pick(logits: Tensor, draws: Tensor, temperature: float, top_p: float) -> Tensor:
    """logits [rows, V] float32, draws [rows] float64 in [0, 1) -> tokens [rows].

    The temperature comes first, then top_p: the fewest most likely tokens whose sum reaches it, at least one.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits / temperature).softmax(-1).double()
    if top_p < 1:
        ranked, order = p.sort(stable=True, dim=-1, descending=True)
        p = p.scatter(-1, order, ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0))
    steps = p.cumsum(-1)
    found = torch.searchsorted(steps, (draws * steps[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
    return found.clamp(max=logits.shape[-1] - 1)  # the largest draw, rounded up to the sum


@torch.inference_mode()
def sample(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    keys: Sequence[str],
    *,
    system: str | None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    samples: Sequence[int] = (0,),
    seed: int = 0,
) -> list[list[Generation]]:
    """One row for each question, one Generation for each of the sample numbers `samples`.

    keys: what names each question, for its draws. temperature: 0 is greedy, where all samples are one. top_p: (0, 1].
    Raises ValueError for settings out of range, and as encode_question does.
    """
    check_settings(questions, keys, max_new_tokens, temperature, top_p)
    if not questions or not samples:
        return [[] for _ in questions]
    drawn = list(samples) if temperature else [0]
    prompt, mask, pixels = prompt_batch(model, tokenizer, questions, system)
    images = {} if pixels is None else {"pixel_values": pixels}
    output = model(
        input_ids=prompt, attention_mask=mask, position_ids=positions(mask), use_cache=True, logits_to_keep=1, **images
    )
    cache, logits = output.past_key_values, output.logits[:, -1]
    if len(drawn) > 1:
        cache.batch_repeat_interleave(len(drawn))
        logits, mask = (each.repeat_interleave(len(drawn), 0) for each in (logits, mask))
    draws = np.zeros((len(mask), max_new_tokens))
    if temperature:
        draws = np.stack([uniforms(seed, key, number, max_new_tokens) for key in keys for number in drawn])
    found = _decode(model, tokenizer, cache, logits, mask, torch.from_numpy(draws).to(mask.device), temperature, top_p)
    rows = [found[i : i + len(drawn)] for i in range(0, len(found), len(drawn))]
    return rows if temperature else [row * len(samples) for row in rows]


def check_settings(questions: Sequence, keys: Sequence, max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raises ValueError for settings that no sample can be drawn with."""
    if len(keys) != len(questions):
        raise ValueError(f"{len(questions)} questions need as many keys, found {len(keys)}")
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise ValueError(
            f"temperature {temperature} must be at least 0, top_p {top_p} in (0, 1], max_new_tokens {max_new_tokens} "
            "at least 1"
        )


def prompt_batch(
    model: Any, tokenizer: Any, questions: Sequence[Question], system: str | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(ids [questions, longest], mask, pixels [tiles, 3, S, S] or None) where the model is, padded on the left."""
    encoded = [encode_question(question, tokenizer, model.config, system) for question in questions]
    longest = max(len(ids) for ids, _ in encoded)
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(ids)) + ids for ids, _ in encoded])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in encoded])
    pixels = [tiles for _, tiles in encoded if tiles is not None]
    where = next(model.parameters()).device
    return ids.to(where), mask.to(where), torch.cat(pixels).to(where, model.dtype) if pixels else None


def positions(mask: Tensor) -> Tensor:
    """Of each token, [rows, length]: padding on the left counts nothing."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _decode(
    model, tokenizer, cache, logits: Tensor, mask: Tensor, draws: Tensor, temperature: float, top_p: float
) -> list[Generation]:
    """Token by token from the prompt's cache and last logits [rows, V]. draws: [rows, max_new_tokens]."""
    total, most = draws.shape
    here = torch.arange(total, device=mask.device)  # the row of `tokens` that each row of the batch is
    ended = torch.zeros(total, dtype=torch.bool, device=mask.device)  # of the batch
    length = torch.zeros(total, dtype=torch.long, device=mask.device)
    logprob, certainty = (torch.zeros(total, dtype=torch.float64, device=mask.device) for _ in range(2))
    tokens = torch.full((total, most), tokenizer.pad_token_id, device=mask.device)
    for step in range(most):
        logits = logits.float()
        token = pick(logits, draws[here, step], temperature, top_p)
        whole = logits.logsumexp(-1)
        alive, going = here[~ended], ~ended
        tokens[alive, step] = token[going]
        length[alive] += 1
        logprob[alive] += (logits.gather(-1, token.unsqueeze(-1)).squeeze(-1) - whole)[going].double()
        certainty[alive] += (whole - logits.mean(-1) - math.log(logits.shape[-1]))[going].double()
        ended = ended | (token == tokenizer.eos_token_id)
        left = len(ended) - int(ended.sum())
        if left == 0 or step + 1 == most:
            break
        if (len(ended) - left) * LEAVE >= len(ended):
            keep = (~ended).nonzero().squeeze(-1)
            cache.batch_select_indices(keep)
            here, token, mask, ended = here[keep], token[keep], mask[keep], ended[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
        output = model(
            input_ids=token.unsqueeze(-1), attention_mask=mask, position_ids=positions(mask)[:, -1:],
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        cache, logits = output.past_key_values, output.logits[:, -1]
    rows = [row[:n] for row, n in zip(tokens.tolist(), length.tolist(), strict=True)]
    texts = texts_of(tokenizer, rows)
    return [
        Generation(text, len(row), total_logprob, total_certainty / len(row), row[-1] != tokenizer.eos_token_id)
        for text, row, total_logprob, total_certainty in zip(
            texts, rows, logprob.tolist(), certainty.tolist(), strict=True
        )
    ]
