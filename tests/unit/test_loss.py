"""The weighted loss against the official one (tests/data/golden/loss.json) and against plain autograd."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling import loss as loss_module
from modeling.loss import sample_weight, token_weights, total_weight, total_weights, weighted_cross_entropy
from modeling.ragged import Ragged

CASES = json.loads((Path(__file__).parents[1] / "data" / "golden" / "loss.json").read_text())["cases"]
REDUCTIONS = ["token", "sample", "square"]


def lengths(sample) -> list[int]:
    return [end - start for start, end in sample["spans"]]


def loss_sum(samples, reduction, unit="conversation") -> float:
    """The samples' sum of w * ce through the real code, by a vocabulary of two whose logits give the stated ce."""
    weights = []
    for sample in samples:
        positions = [position for start, end in sample["spans"] for position in range(start, end)]
        weights.append(token_weights(sample["spans"], sample["len"], reduction, unit)[positions])
        assert weights[-1].all() and len(positions) == len(sample["ce"])
    if not weights:
        return 0.0
    ce = torch.tensor([value for sample in samples for value in sample["ce"]], dtype=torch.float64)
    hidden = torch.stack([torch.zeros_like(ce), torch.log(torch.expm1(ce))], dim=1).float()  # ce = log(1 + exp(z))
    targets = torch.zeros(len(ce), dtype=torch.long)
    return float(weighted_cross_entropy(hidden, torch.eye(2), targets, torch.from_numpy(np.concatenate(weights)), 50))


def mean_over(samples, reduction, unit="conversation") -> float:
    weight = math.fsum(total_weight(lengths(sample), reduction, unit) for sample in samples)
    return loss_sum(samples, reduction, unit) / weight


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["id"]))
def test_mean_over_the_global_batch_is_exact(case, reduction):
    expected = case["expected"][reduction]
    samples = [sample for micro_step in case["packs"] for rank in micro_step for sample in rank]
    assert mean_over(samples, reduction) == pytest.approx(expected["exact_global_window"], rel=1e-5)
    response = expected["derived_paper_response_unit_exact_global_window"]
    assert mean_over(samples, reduction, "response") == pytest.approx(response, rel=1e-5)
    random.Random(0).shuffle(samples)
    assert mean_over(samples, reduction) == pytest.approx(expected["exact_global_window"], rel=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", [case for case in CASES if case["accum"] == 1], ids=lambda case: str(case["id"]))
def test_without_accumulation_it_is_the_official_loss(case, reduction):
    official = case["expected"][reduction]["official_all_gather"]
    (ranks,) = case["packs"]
    denominator = math.fsum(total_weight(lengths(sample), reduction) for rank in ranks for sample in rank)
    per_rank = [len(ranks) * loss_sum(rank, reduction) / denominator for rank in ranks]
    assert per_rank == pytest.approx(official["per_micro_step_per_rank"][0], rel=1e-5)
    assert sum(per_rank) / len(ranks) == pytest.approx(official["step_mean_over_micro_steps"], rel=1e-5)


def test_golden_cases_cover_accumulation_and_its_absence():
    assert {case["accum"] > 1 for case in CASES} == {True, False}


def test_a_step_without_labels_adds_nothing():
    # Officially 0/0: NaN.
    weights = token_weights([], 5, "square")
    assert weights.tolist() == [0.0] * 5 and total_weight([], "square") == 0.0
    hidden = torch.randn(0, 3, requires_grad=True)
    matrix = torch.randn(4, 3, requires_grad=True)
    loss = weighted_cross_entropy(hidden, matrix, torch.zeros(0, dtype=torch.long), torch.zeros(0))
    loss.backward()
    assert loss.item() == 0.0 and loss.dtype == torch.float32
    assert matrix.grad is not None and not matrix.grad.any()


def test_sample_weights():
    assert [sample_weight(4, reduction) for reduction in REDUCTIONS] == [1.0, 0.25, 0.5]  # type: ignore
    assert [sample_weight(0, reduction) for reduction in REDUCTIONS] == [0.0, 0.0, 0.0]  # type: ignore
    with pytest.raises(ValueError, match="reduction"):
        sample_weight(4, "mean")  # type: ignore
    with pytest.raises(ValueError, match="supervised_tokens"):
        sample_weight(-1, "token")
    with pytest.raises(ValueError, match="unit"):
        total_weight([1], "token", "turn")  # type: ignore


@pytest.mark.parametrize("unit", ["conversation", "response"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@given(samples=st.lists(st.lists(st.integers(0, 3000), max_size=4), max_size=9))
def test_all_samples_at_once_weigh_what_each_does(reduction, unit, samples):
    answers = Ragged.of(np.array([n for sample in samples for n in sample], np.int32), [len(s) for s in samples])
    each = [total_weight(sample, reduction, unit) for sample in samples]
    assert total_weights(answers, reduction, unit).tolist() == pytest.approx(each, rel=1e-13)


def test_all_samples_at_once_refuse_what_one_does():
    answers = Ragged.of(np.zeros(0, np.int32), [])
    with pytest.raises(ValueError, match="reduction"):
        total_weights(answers, "mean")  # type: ignore
    with pytest.raises(ValueError, match="unit"):
        total_weights(answers, "token", "turn")  # type: ignore


@pytest.mark.parametrize("unit", ["conversation", "response"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_denominator_is_the_sum_of_the_token_weights(reduction, unit):
    spans = [[2, 5], [7, 16], [18, 18], [20, 21]]
    weights = token_weights(spans, 25, reduction, unit)
    assert weights.dtype == np.float32 and weights.shape == (25,)
    assert weights.sum() == pytest.approx(total_weight([3, 9, 0, 1], reduction, unit), rel=1e-6)
    supervised = {i for start, end in spans for i in range(start, end)}
    assert set(np.flatnonzero(weights).tolist()) == supervised
    if (reduction, unit) == ("square", "response"):
        assert weights[[2, 7, 20]].tolist() == pytest.approx([1 / math.sqrt(3), 1 / 3, 1.0])
    if (reduction, unit) == ("sample", "conversation"):
        assert weights[[2, 7, 20]].tolist() == pytest.approx([1 / 13] * 3)


@pytest.mark.parametrize("chunk", [1, 5, 17, 100])
def test_chunks_give_the_loss_and_gradients_of_full_logits(chunk):
    torch.manual_seed(0)
    hidden, matrix = torch.randn(17, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets, weights = torch.randint(30, (17,)), torch.rand(17)
    ce = torch.nn.functional.cross_entropy(hidden @ matrix.T, targets, reduction="none")
    expected = torch.autograd.grad((ce * weights).sum(), (hidden, matrix))
    loss = weighted_cross_entropy(hidden, matrix, targets, weights, chunk)
    torch.testing.assert_close(loss, (ce * weights).sum())
    for got, wanted in zip(torch.autograd.grad(loss, (hidden, matrix)), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("chunk", [5, 100])
def test_what_is_compiled_for_a_gpu_is_the_same_loss(chunk, monkeypatch):
    """Without compiling: that takes long, and tests/gpu does it. The vocabulary of 70 is padded to 128 there."""
    monkeypatch.setattr(loss_module, "_compiled", lambda: loss_module._to_compile)
    torch.manual_seed(0)
    hidden, matrix = torch.randn(17, 8, requires_grad=True), torch.randn(70, 8, requires_grad=True)
    targets, weights = torch.randint(70, (17,)), torch.rand(17)
    losses = [weighted_cross_entropy(hidden, matrix, targets, weights, chunk, fused) for fused in (False, True)]
    torch.testing.assert_close(losses[1], losses[0])
    one, two = (torch.autograd.grad(loss, (hidden, matrix)) for loss in losses)
    for plain, fused in zip(one, two, strict=True):
        torch.testing.assert_close(fused, plain)


def test_logits_of_all_positions_never_exist_at_once():
    n, vocabulary, chunk = 64, 512, 8
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    saved = 0

    def pack(tensor):
        nonlocal saved
        saved = max(saved, tensor.numel())
        return tensor

    hidden, matrix = torch.randn(n, 4, requires_grad=True), torch.randn(vocabulary, 4, requires_grad=True)
    targets, weights = torch.zeros(n, dtype=torch.long), torch.ones(n)
    with Watch(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = weighted_cross_entropy(hidden, matrix, targets, weights, chunk)
    assert largest == chunk * vocabulary  # one chunk's logits
    assert saved < chunk * vocabulary  # and none of them are kept for the backward pass
    loss.backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0


def test_bf16_states_give_an_fp32_loss():
    hidden, matrix = torch.randn(6, 4).bfloat16().requires_grad_(), torch.randn(9, 4).bfloat16()
    loss = weighted_cross_entropy(hidden, matrix, torch.arange(6), torch.ones(6))
    loss.backward()
    assert loss.dtype == torch.float32 and hidden.grad is not None and hidden.grad.dtype == torch.bfloat16


def in_float64(samples, matrix, reduction, unit) -> tuple[float, torch.Tensor]:
    """The mean over all samples and its gradient by `matrix`, straight from the formulas of the paper (§4.2)."""
    matrix = matrix.detach().double().requires_grad_()
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for spans, hidden, targets in samples:
        ce = torch.nn.functional.cross_entropy(hidden.double() @ matrix.T, targets, reduction="none")
        counts = [end - start for start, end in spans]
        for part, count in zip(ce.split(counts), counts):
            x = count if unit == "response" else sum(counts)
            of_token = {"token": 1.0, "sample": 1 / x, "square": x**-0.5}[reduction]
            total, weight = total + of_token * part.sum(), weight + of_token * count
    (gradient,) = torch.autograd.grad(total / weight, matrix)
    return float(total.detach()) / weight, gradient


@pytest.mark.parametrize("unit", ["conversation", "response"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@given(
    responses=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=3), min_size=1, max_size=8),
    ranks=st.integers(1, 3), micro_steps=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_order_ranks_and_accumulation_give_the_mean_in_float64(
    reduction, unit, responses, ranks, micro_steps, seed
):
    """What the engine sums over ranks and micro-steps: each row's loss over the weight of the whole global batch."""
    generator, dealer = torch.Generator().manual_seed(seed), random.Random(seed)
    matrix, samples = torch.randn(11, 6, generator=generator, requires_grad=True), []
    for counts in responses:
        starts = np.cumsum([2 + count for count in [0, *counts[:-1]]])
        spans = [(int(start), int(start) + count) for start, count in zip(starts, counts)]
        n = sum(counts)
        targets = torch.randint(11, (n,), generator=generator)
        samples.append((spans, torch.randn(n, 6, generator=generator), targets))
    expected, gradient = in_float64(samples, matrix, reduction, unit)
    dealer.shuffle(samples)
    rows = [[] for _ in range(ranks * micro_steps)]
    for sample in samples:
        dealer.choice(rows).append(sample)
    supervised = Ragged.of(np.array([e - s for spans, *_ in samples for s, e in spans], np.int32),
                           [len(spans) for spans, *_ in samples])  # fmt: skip
    denominator, mean = float(total_weights(supervised, reduction, unit).sum()), 0.0
    for row in rows:
        weights = [token_weights(spans, spans[-1][1], reduction, unit) for spans, *_ in row]
        weights = np.concatenate([w[w > 0] for w in weights]) if row else np.zeros(0, np.float32)
        hidden = torch.cat([hidden for _, hidden, _ in row]) if row else torch.zeros(0, 6)
        targets = torch.cat([targets for *_, targets in row]) if row else torch.zeros(0, dtype=torch.long)
        loss = weighted_cross_entropy(hidden, matrix, targets, torch.from_numpy(weights)) / denominator
        loss.backward()
        mean += float(loss.detach())
    assert mean == pytest.approx(expected, rel=1e-5)
    assert matrix.grad is not None
    torch.testing.assert_close(matrix.grad.double(), gradient, rtol=1e-4, atol=1e-6)
