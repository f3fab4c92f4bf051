"""The weighted loss: weights known from lengths, logits only where a token is supervised.

L = sum of w * ce / sum of w over the WHOLE global batch, w = 1, 1/x or 1/sqrt(x) (arXiv 2412.05271, §4.2 "loss
re-weighting"; official `len2weight`, OpenGVLab/InternVL commit 2410d1dbf208). x counts supervised tokens: of the whole
conversation in the official code (`unit="conversation"`), of the single response in the paper (`unit="response"`).

Invariant: the denominator is the sum of `total_weights` over the samples of the step, known before any is decoded, so
the loss is the same mean at any number of ranks and any accumulation, and a rank without labels adds 0. The official
code normalises every micro-step by itself, which is the same only without accumulation, and is 0/0 without labels.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from modeling.ragged import Ragged

if TYPE_CHECKING:
    import torch

Reduction = Literal["token", "sample", "square"]
Unit = Literal["conversation", "response"]

_EXPONENTS = {"token": 0.0, "sample": 1.0, "square": 0.5}


def sample_weight(supervised_tokens: int, reduction: Reduction) -> float:
    """The weight of each of `supervised_tokens` tokens: 1, 1/x or 1/sqrt(x) for token, sample, square; 0 for none."""
    if reduction not in _EXPONENTS:
        raise ValueError(f"reduction must be one of {', '.join(_EXPONENTS)}, found {reduction!r}")
    if supervised_tokens < 0:
        raise ValueError(f"supervised_tokens must be 0 or more, found {supervised_tokens}")
    if supervised_tokens == 0 or reduction == "token":
        return float(supervised_tokens > 0)
    return 1 / supervised_tokens if reduction == "sample" else 1 / math.sqrt(supervised_tokens)


def _response_weights(span_lengths: Sequence[int], reduction: Reduction, unit: Unit) -> list[float]:
    """The weight of a token of each response."""
    if unit == "conversation":
        return [sample_weight(sum(span_lengths), reduction)] * len(span_lengths)
    if unit == "response":
        return [sample_weight(length, reduction) for length in span_lengths]
    raise ValueError(f"unit must be conversation or response, found {unit!r}")


def token_weights(
    spans: Sequence[Sequence[int]], length: int, reduction: Reduction, unit: Unit = "conversation"
) -> np.ndarray:
    """float32 [length], aligned with the unshifted labels: the weight of each token, 0 where not supervised.

    spans: the sample's supervised [start, end), one per response, as `template.Encoded.answer_spans`.
    """
    weights = np.zeros(length, np.float32)
    span_weights = _response_weights([end - start for start, end in spans], reduction, unit)
    for (start, end), weight in zip(spans, span_weights, strict=True):
        assert 0 < start <= end <= length, f"span [{start}, {end}) in a sample of {length} tokens"
        weights[start:end] = weight
    return weights


def total_weight(span_lengths: Sequence[int], reduction: Reduction, unit: Unit = "conversation") -> float:
    """What one sample adds to the denominator. span_lengths: supervised tokens of each of its responses."""
    weights = _response_weights(span_lengths, reduction, unit)
    return math.fsum(length * weight for length, weight in zip(span_lengths, weights, strict=True))


def total_weights(span_lengths: Ragged, reduction: Reduction, unit: Unit = "conversation") -> np.ndarray:
    """float64 [samples]: the `total_weight` of every sample, to a rounding. Millions at once, so without a loop.

    x tokens that weigh 1, 1/x or 1/sqrt(x) each weigh x, 1 or sqrt(x) together.
    """
    total_weight([0], reduction, unit)  # raises ValueError for what it does not know
    counts = (span_lengths.values if unit == "response" else span_lengths.sums()).astype(np.float64)
    weights = {"token": counts, "sample": np.sign(counts), "square": np.sqrt(counts)}[reduction]
    return span_lengths.sums(weights) if unit == "response" else weights


def weighted_cross_entropy(
    hidden: "torch.Tensor",
    weight_matrix: "torch.Tensor",
    targets: "torch.Tensor",
    weights: "torch.Tensor",
    chunk: int = 4096,
    fused: bool = False,
) -> "torch.Tensor":
    """The fp32 scalar sum of weights * cross-entropy; divide it by the global batch's total weight.

    hidden [n, H]: last hidden states at the positions BEFORE the n supervised tokens; weight_matrix [V, H]: the
    lm_head's; targets [n]: ids of the supervised tokens; weights [n]. For n = 0 it is a 0 that has a gradient.
    Logits exist for `chunk` positions at a time, in the forward pass alone: the gradients are made from them at once
    (as in Liger Kernel, arXiv 2410.10989 §3.2), so that the head is multiplied twice or three times and not four.
    fused: for a GPU, what lies between the products compiled, and the vocabulary padded to what its kernels like.
    """
    if len(hidden) == 0:
        return (hidden.sum() + weight_matrix[:1].sum()).float() * 0
    return _function().apply(hidden, weight_matrix, targets, weights, chunk, fused)


def _in_place(logits: Any, labels: Any, scale: Any, vocabulary: int) -> tuple[Any, Any]:
    """(sum of scale * cross-entropy, its gradient by the logits). logits [n, >= V]; labels, scale [n, 1]."""
    states, dtype = logits[:, :vocabulary].float(), logits.dtype
    norms = states.logsumexp(1, keepdim=True)
    total = ((norms - states.gather(1, labels)) * scale).sum()
    # d loss / d logits = scale * (softmax - one at the label), in the logits' own memory
    states.sub_(norms).exp_().mul_(scale)
    return total, states.scatter_add_(1, labels, -scale).to(dtype)


def _to_compile(logits: Any, labels: Any, scale: Any, vocabulary: int) -> tuple[Any, Any]:
    """The same in one expression each; the gradient of the padding is zero."""
    import torch

    states = logits.float()
    ids = torch.arange(logits.shape[1], device=logits.device)
    norms = states.masked_fill(ids >= vocabulary, -math.inf).logsumexp(1, keepdim=True)
    total = ((norms - states.gather(1, labels)) * scale).sum()
    gradient = ((states - norms).exp() - (ids == labels).float()) * scale
    return total, gradient.masked_fill(ids >= vocabulary, 0.0).to(logits.dtype)


@cache
def _compiled() -> Any:
    import torch

    return torch.compile(_to_compile, dynamic=True)


@cache
def _function() -> Any:
    import torch

    class LinearCrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden, matrix, targets, weights, chunk: int, fused: bool):
            vocabulary, of_loss = len(matrix), _compiled() if fused else _in_place
            of_hidden, of_matrix = ctx.needs_input_grad[:2]
            if fused:
                matrix = torch.nn.functional.pad(matrix, (0, 0, 0, -vocabulary % 64))
            grad_hidden = torch.empty_like(hidden) if of_hidden else None
            grad_matrix = torch.zeros_like(matrix) if of_matrix else None
            total = torch.zeros((), device=hidden.device)
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                states = hidden[part]
                logits = torch.nn.functional.linear(states, matrix)
                loss, gradient = of_loss(logits, targets[part, None], weights[part, None].float(), vocabulary)
                total += loss
                if grad_hidden is not None:
                    torch.mm(gradient, matrix, out=grad_hidden[part])
                if grad_matrix is not None:
                    grad_matrix.addmm_(gradient.T, states)
            ctx.save_for_backward(grad_hidden, None if grad_matrix is None else grad_matrix[:vocabulary])
            return total

        @staticmethod
        def backward(ctx: Any, scale):
            grads = [None if grad is None else grad * scale.to(grad.dtype) for grad in ctx.saved_tensors]
            return *grads, None, None, None, None

    return LinearCrossEntropy
