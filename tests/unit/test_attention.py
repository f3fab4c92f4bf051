"""Samples of a packed row are alone with themselves: outputs, hidden states and gradients."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from modeling.attention import WASTE, Segments, segment_attention
from modeling.batches import Batch, Counts
from modeling.internvl import TrainingLoss

lengths_of_rows = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(lengths_of_rows)
def test_every_position_comes_back_to_itself(lengths):
    segments = Segments.of(lengths)
    flat = torch.cat([group.flatten() for group in segments.groups])
    assert torch.equal(flat[segments.back], torch.arange(sum(lengths)))


@settings(max_examples=60, deadline=None)
@given(lengths_of_rows)
def test_padding_is_bounded_and_behind_every_sample(lengths):
    """Each row of a group is one whole sample from its first token on; what fills it up stays below WASTE."""
    segments = Segments.of(lengths)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = []
    for group in segments.groups:
        for row in group:
            sample = int(owner[row[0]])
            seen.append(sample)
            assert (owner[row] == sample).all() and len(row) <= max(WASTE * lengths[sample], 8)
            assert torch.equal(row[: lengths[sample]], sum(lengths[:sample]) + torch.arange(lengths[sample]))
    assert sorted(seen) == list(range(len(lengths)))


def random_qkv(lengths, heads=4, kv_heads=2, size=8):
    torch.manual_seed(0)
    n = sum(lengths)
    return [torch.randn(1, h, n, size, requires_grad=True) for h in (heads, kv_heads, kv_heads)]


def test_equals_causal_attention_of_each_sample_alone():
    lengths = [7, 30, 1, 9, 31, 64]
    query, key, value = random_qkv(lengths)
    packed, weights = segment_attention(torch.nn.Module(), query, key, value, None, segments=Segments.of(lengths))
    assert packed.shape == (1, sum(lengths), 4, 8) and weights is None
    alone = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=2e-6, rtol=1e-5)


def test_gradients_stay_in_their_sample():
    lengths = [5, 6, 40, 20]
    inputs = random_qkv(lengths)
    out, _ = segment_attention(torch.nn.Module(), *inputs, None, segments=Segments.of(lengths))
    out.split(lengths, dim=1)[1].square().sum().backward()
    for tensor in inputs:
        parts = [part.abs().sum().item() for part in tensor.grad.split(lengths, dim=2)]
        assert parts[1] > 0 and parts[0] == parts[2] == parts[3] == 0


@pytest.mark.parametrize(
    ("segments", "mask", "batch"),
    [(None, None, 1), (Segments.of([4]), torch.ones(1, 1, 4, 4), 1), (Segments.of([4]), None, 2)],
)
def test_what_might_leak_is_refused(segments, mask, batch):
    x = torch.zeros(batch, 2, 4, 8)
    with pytest.raises(ValueError, match="one packed row with segments="):
        segment_attention(torch.nn.Module(), x, x, x, mask, segments=segments)


def test_a_language_model_without_segments_is_an_error(micro):
    """The library forgetting to hand segments on must be heard, not read from the loss."""
    loss = TrainingLoss(micro.build(), ("language",))
    with pytest.raises(ValueError, match="segments="):
        loss.internvl.model.language_model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)


LENGTHS = [30, 26, 12]


@pytest.fixture(scope="module")
def row(micro):
    """A row of three samples; the first and second have a tile each."""
    torch.manual_seed(1)
    ids = torch.randint(0, 250, (sum(LENGTHS),))
    per_tile, image = micro.resolved.tokens_per_tile, micro.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    for start in (3, 33):
        ids[start : start + per_tile] = image
    return Batch(
        input_ids=ids[None], position_ids=torch.cat([torch.arange(n) for n in LENGTHS])[None],
        segments=Segments.of(LENGTHS), positions=torch.arange(67), targets=ids[1:], weights=torch.ones(67),
        pixels=torch.randn(2, 3, 32, 32), uniforms=None, counts=Counts(),
    )  # fmt: skip


def hidden_states(loss, batch):
    """[L, hidden] of the last layer."""
    caught = []
    handle = loss.internvl.model.language_model.register_forward_hook(lambda _m, _i, out: caught.append(out[0]))
    loss(batch)
    handle.remove()
    return caught[0][0]


def test_changing_one_sample_moves_no_other(micro, row):
    loss = TrainingLoss(micro.build(), ("vit", "mlp", "language")).eval()
    before = hidden_states(loss, row).split(LENGTHS)
    tokens = row.input_ids.clone()
    tokens[0, 28] = (tokens[0, 28] + 1) % 250
    pixels = row.pixels.clone()
    pixels[0] += 0.5
    for changed in (replace(row, input_ids=tokens), replace(row, pixels=pixels)):
        after = hidden_states(loss, changed).split(LENGTHS)
        assert not torch.equal(before[0], after[0])
        assert torch.equal(before[1], after[1]) and torch.equal(before[2], after[2])


def test_a_samples_loss_gives_no_other_sample_a_gradient(micro, row):
    """Only the second sample is supervised: neither the first one's tile nor its tokens get a gradient."""
    model = micro.build()
    loss = TrainingLoss(model, ("vit", "mlp", "language"))
    weights = torch.zeros(67)
    weights[30:55] = 1.0
    pixels = row.pixels.clone().requires_grad_()
    loss(replace(row, weights=weights, pixels=pixels)).backward()
    assert pixels.grad is not None
    assert pixels.grad[1].abs().sum() > 0 and pixels.grad[0].abs().sum() == 0
    rows = model.model.language_model.embed_tokens.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert set(rows) <= set(row.input_ids[0, 30:56].tolist())


def test_a_row_without_borders_would_be_noticed(micro, row):
    """The control: one segment over all three samples does change what follows."""
    loss = TrainingLoss(micro.build(), ("vit", "mlp", "language")).eval()
    apart = hidden_states(loss, row)
    joined = hidden_states(loss, replace(row, segments=Segments.of([sum(LENGTHS)])))
    torch.testing.assert_close(apart[:30], joined[:30])
    assert (apart[30:] - joined[30:]).abs().max() > 1e-3
