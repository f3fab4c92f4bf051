"""The training loss on an accelerator equals the CPU's: same model, same packed rows, fp32."""

import pytest
import torch

from modeling.attention import Segments
from modeling.batches import Batch, Counts
from modeling.freeze import set_trainable
from modeling.internvl import TrainingLoss, build_model
from modeling.presets import resolve
from modeling.tiles import normalised
from stages.params import ModelParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]


def packed_row(model, lengths: list[int], tiles: int) -> Batch:
    """A row of random text samples behind one image of `tiles` tiles, every token but the image's supervised."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    image = tiles * config.image_seq_length
    total = image + sum(lengths)
    ids = torch.randint(0, 200, (1, total), generator=generator)
    ids[0, :image] = config.image_token_id
    spans = [image + lengths[0], *lengths[1:]]
    positions = torch.arange(image, total - 1)
    return Batch(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(n) for n in spans])[None],
        segments=Segments.of(spans),
        positions=positions,
        targets=ids[0, positions + 1],
        weights=torch.rand(len(positions), generator=generator),
        pixels=torch.randn(tiles, 3, 32, 32, generator=generator),
        uniforms=None,
        counts=Counts(),
    )


def test_loss_and_gradients_equal_the_cpus():
    torch.backends.cuda.matmul.allow_tf32 = False
    resolved = resolve(ModelParams(vision="tiny-vit", language="tiny-qwen2"))
    losses, norms = [], []
    for device in ("cpu", "cuda"):
        model = build_model(resolved, resolved.tokenizer(), seed=0)
        set_trainable(model, ["vit", "mlp", "language"])
        module = TrainingLoss(model, ("vit", "mlp", "language")).to(device)
        batch = packed_row(model, [40, 9, 100, 33], tiles=5).to(torch.device(device))
        loss = module(batch)
        loss.backward()
        losses.append(float(loss))
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


@pytest.mark.parametrize("train", [("mlp",), ("vit", "mlp"), ("vit", "mlp", "language")], ids="+".join)
def test_the_varlen_kernel_is_the_cpus_attention(train):
    """bf16, with and without recomputing: the row's loss within its precision, gradients likewise."""
    resolved = resolve(ModelParams(vision="tiny-vit", language="tiny-qwen2"))
    losses, norms = [], []
    for device, recompute in (("cpu", ()), ("cuda", ()), ("cuda", ("vit", "language"))):
        model = build_model(resolved, resolved.tokenizer(), seed=0).to(torch.bfloat16)
        set_trainable(model, train)
        module = TrainingLoss(model, train, 0.0, recompute).to(device)
        batch = packed_row(model, [40, 9, 100, 33], tiles=5).to(torch.device(device))
        loss = module(batch)
        loss.backward()
        losses.append(float(loss))
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=2e-2)
    assert norms[1:] == pytest.approx([norms[0]] * 2, rel=5e-2)


def test_samples_of_a_row_stay_apart_on_the_kernel():
    from modeling.attention import segment_attention

    torch.manual_seed(0)
    lengths = [7, 130, 1, 64]
    query, key, value = (torch.randn(1, heads, sum(lengths), 64, device="cuda", dtype=torch.bfloat16)
                         for heads in (4, 2, 2))  # fmt: skip
    segments = Segments.of(lengths, "cuda")
    before, _ = segment_attention(torch.nn.Module(), query, key, value, None, segments=segments)
    key[:, :, 7:137] += 1.0
    value[:, :, 7:137] -= 1.0
    after, _ = segment_attention(torch.nn.Module(), query, key, value, None, segments=segments)
    assert torch.equal(before[:, :7], after[:, :7]) and torch.equal(before[:, 137:], after[:, 137:])
    assert not torch.equal(before[:, 7:137], after[:, 7:137])


def test_pixels_are_normalised_to_the_same_bits():
    tiles = torch.arange(256, dtype=torch.uint8).repeat_interleave(3).view(1, 16, 16, 3)
    assert torch.equal(normalised(tiles.cuda()).cpu(), normalised(tiles))
