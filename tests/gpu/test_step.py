"""The training loss on an accelerator equals the CPU's: same model, same packed rows, fp32."""

import math
import socket

import pytest
import torch
import torch.distributed as dist

from modeling.attention import Segments
from modeling.batches import Batch, Counts
from modeling.engine import Engine
from modeling.freeze import set_trainable
from modeling.internvl import TrainingLoss, build_model
from modeling.presets import resolve
from modeling.tiles import normalised
from stages.params import ModelParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]


BOTH = ("vit", "language")


@pytest.fixture
def process_group(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
    }.items():
        monkeypatch.setenv(name, str(value))
    dist.init_process_group("nccl")
    yield
    dist.destroy_process_group()


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
        losses.append(float(loss.detach()))
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


@pytest.mark.parametrize("train", [("mlp",), ("vit", "mlp"), ("vit", "mlp", "language")], ids="+".join)
def test_the_varlen_kernel_is_the_cpus_attention(train):
    """bf16, with and without recomputing and compiling: the row's loss within its precision, gradients likewise."""
    resolved = resolve(ModelParams(vision="tiny-vit", language="tiny-qwen2"))
    losses, norms = [], []
    for device, recompute, fused in [
        ("cpu", (), False),
        *((("cuda"), r, f) for r in ((), BOTH) for f in (False, True)),
    ]:
        model = build_model(resolved, resolved.tokenizer(), seed=0).to(torch.bfloat16)
        set_trainable(model, train)
        module = TrainingLoss(model, train, 0.0, recompute, fused=fused).to(device)
        batch = packed_row(model, [40, 9, 100, 33], tiles=5).to(torch.device(device))
        loss = module(batch)
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])))
    assert losses[1:] == pytest.approx([losses[0]] * 4, rel=2e-2)
    assert norms[1:] == pytest.approx([norms[0]] * 4, rel=5e-2)


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


def test_rows_of_other_sizes_need_no_new_kernels():
    resolved = resolve(ModelParams(vision="tiny-vit", language="tiny-qwen2"))
    model = build_model(resolved, resolved.tokenizer(), seed=0).to(torch.bfloat16)
    set_trainable(model, BOTH)
    module = TrainingLoss(model, BOTH, fused=True).cuda()
    compiled = []
    for lengths, tiles in ([40, 9, 100, 33], 5), ([70, 20], 3), ([30, 8, 9, 11, 5], 7), ([200], 2):
        module(packed_row(model, lengths, tiles).to(torch.device("cuda"))).backward()
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert compiled[1] == compiled[3]


def test_a_step_of_the_engine_is_clipped_or_left_out(process_group):
    train = ("mlp", "language")
    resolved = resolve(ModelParams(vision="tiny-vit", language="tiny-qwen2"))
    models = [build_model(resolved, resolved.tokenizer(), seed=0) for _ in range(2)]
    for model in models:
        set_trainable(model, train)
    names = {parameter: name for name, parameter in models[0].named_parameters()}
    engine = Engine(TrainingLoss(models[0], train), names, setting=1, precision="bf16", accumulation=1,
                    weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, max_grad_norm=1.0)  # fmt: skip
    batch = packed_row(models[0], [40, 9, 100, 33], tiles=5).to(engine.device)
    TrainingLoss(models[1].to(engine.device, torch.bfloat16), train)(batch).backward()
    reference = torch.nn.utils.get_total_norm([p.grad.float() for p in models[1].parameters() if p.grad is not None])
    norms, weights = [], []
    for skip in (False, True, False):
        engine.backward(engine.engine(batch))
        norms.append(engine.step(1e-2, skip=skip))
        weights.append(torch.cat([parameter.detach().flatten().clone() for parameter in engine.parameters]))
    assert norms[0] == pytest.approx(float(reference), rel=1e-2)
    assert not math.isfinite(norms[1]) and math.isfinite(norms[2])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_pixels_are_normalised_to_the_same_bits():
    tiles = torch.arange(256, dtype=torch.uint8).repeat_interleave(3).view(1, 16, 16, 3)
    assert torch.equal(normalised(tiles.cuda()).cpu(), normalised(tiles))
