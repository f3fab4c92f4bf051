"""What a step costs, against what torch counts when it runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling.attention import Segments
from modeling.batches import Batch, Counts
from modeling.estimate import (
    Memory,
    activation_bytes,
    choose_checkpointing,
    human,
    measure,
    skeleton,
    state_bytes,
    step_flops,
)
from modeling.freeze import set_trainable
from modeling.internvl import TrainingLoss
from modeling.presets import language_fields, vision_fields

STAGES = {"mlp_warmup": ("mlp",), "vit_incremental": ("vit", "mlp"), "full_finetune": ("vit", "mlp", "language")}
VISION = vision_fields("micro-vit") | {"num_hidden_layers": 3}
LANGUAGE = {k: v for k, v in language_fields("micro-qwen2").items() if k != "tokenizer"} | {
    "num_hidden_layers": 4, "vocab_size": 97,
}  # fmt: skip
LENGTHS, TILES = (40, 23, 65), 5


def row(model) -> Batch:
    torch.manual_seed(0)
    total = sum(LENGTHS)
    ids = torch.randint(1, 90, (1, total))
    ids[0, : TILES * model.config.image_seq_length] = model.config.image_token_id
    positions = torch.arange(30, total - 1)
    return Batch(
        input_ids=ids, position_ids=torch.cat([torch.arange(n) for n in LENGTHS])[None], segments=Segments.of(LENGTHS),
        positions=positions, targets=ids[0, positions + 1], weights=torch.ones(len(positions)),
        pixels=torch.randn(TILES, 3, 32, 32), uniforms=None, counts=Counts(),
    )  # fmt: skip


def trained(train, checkpointed=()):
    model = skeleton(VISION, LANGUAGE).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        for module in model.modules():  # buffers that to_empty left as they were found
            if hasattr(module, "inv_freq"):
                module.inv_freq.copy_(1.0 / 1e4 ** (torch.arange(len(module.inv_freq)) / len(module.inv_freq)))
    set_trainable(model, train)
    return model, TrainingLoss(model, train, 0.0, checkpointed)


@pytest.mark.parametrize("stage", STAGES)
def test_flops_are_what_torch_counts(stage):
    """Within 2 %, attention apart: the first layers' inputs need no gradient."""
    train = STAGES[stage]
    model, loss = trained(train)
    batch = row(model)
    with FlopCounterMode(display=False) as counter:
        loss(batch).backward()
    expected = step_flops(
        measure(model), train, tokens=sum(LENGTHS), squares=0, supervised=len(batch.targets), tiles=TILES
    ) - attention_of_vit(model, train)  # fmt: skip
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


def attention_of_vit(model, train) -> float:
    """torch's counter knows no CPU attention kernel."""
    sizes = measure(model)
    forward = TILES * 4 * sizes.patches**2 * sizes.width["vit"] * sizes.layers["vit"]
    return forward * (3 if "vit" in train else 1)


@pytest.mark.parametrize("checkpointed", [(), ("language",), ("vit", "language")])
@pytest.mark.parametrize("stage", STAGES)
def test_saved_bytes_are_what_autograd_keeps(stage, checkpointed):
    """Beside the real CPU attention, which keeps its gathered segments: within 15 % where nothing is recomputed."""
    train = STAGES[stage]
    estimated, _ = activation_bytes(
        VISION, LANGUAGE, train, "fp32", lengths=LENGTHS, tiles=TILES, checkpointed=checkpointed
    )
    model, loss = trained(train, checkpointed)
    for part in (model.model.vision_tower, model.model.language_model):
        part.config._attn_implementation = "sdpa" if part is model.model.vision_tower else "stageline_segments"
    batch = row(model)
    batch.positions, batch.targets, batch.weights = (x[:0] for x in (batch.positions, batch.targets, batch.weights))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(batch)
    real = sum(kept.values())
    if checkpointed:
        assert real < estimated, "the layer that is being recomputed is counted too"
        assert estimated < 3 * real + 2 * estimated / (VISION["num_hidden_layers"] + LANGUAGE["num_hidden_layers"])
    else:
        assert estimated == pytest.approx(real, rel=0.15)


def test_recomputing_gives_the_same_gradients():
    grads = []
    for checkpointed in ((), ("vit", "language")):
        torch.manual_seed(0)
        model, loss = trained(STAGES["full_finetune"], checkpointed)
        loss(row(model)).backward()
        grads.append([p.grad for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))


def test_state_under_every_zero_stage():
    """arXiv 1910.02054, §5: 16 bytes a parameter in mixed precision, divided as the stages say; fp32 gradients more."""
    sizes = measure(skeleton(VISION, LANGUAGE))
    train, count = STAGES["full_finetune"], sizes.total
    assert [value / count for value in state_bytes(sizes, train, "fp32", 0, 8)] == [4, 4, 8]
    assert [value / count for value in state_bytes(sizes, train, "bf16", 0, 8)] == [2, 6 / 8, 12 / 8]
    assert [value / count for value in state_bytes(sizes, train, "bf16", 1, 8)] == [2, 6 / 8, 12 / 8]
    assert [value / count for value in state_bytes(sizes, train, "bf16", 2, 8)] == [2, 6 / 8, 12 / 8]
    assert [value / count for value in state_bytes(sizes, train, "bf16", 3, 8)] == [2 / 8, 6 / 8, 12 / 8]
    frozen = state_bytes(sizes, ("mlp",), "bf16", 1, 1)
    assert frozen == (2 * count, 6 * sizes.parameters["mlp"], 12 * sizes.parameters["mlp"])


def test_only_what_memory_asks_for_is_recomputed():
    needs = {(): 100.0, ("vit",): 70.0, ("language",): 60.0, ("vit", "language"): 20.0}

    def cost_of(modules):
        return Memory(0, 0, 0, needs[modules] / 1.1, 0)

    chosen = [choose_checkpointing(limit, cost_of) for limit in (101, 80, 65, 30, 10)]
    assert chosen == [(), ("vit",), ("language",), ("vit", "language"), None]


def test_counts_are_told_as_people_write_them():
    assert [human(n) for n in (999, 12_345, 304e6, 8.08e9, 191e9)] == ["999", "12.3k", "304M", "8.1B", "191B"]


def test_a_built_models_own_configuration_is_measured_like_the_fields_it_came_from(micro):
    config = micro.build().config
    own = config.vision_config.to_dict(), config.text_config.to_dict()
    fields = vision_fields("micro-vit"), language_fields("micro-qwen2") | {"vocab_size": len(micro.tokenizer)}
    assert measure(skeleton(*own)) == measure(skeleton(*fields)) == measure(micro.build())
    saved = [activation_bytes(*part, ("mlp",), "fp32", lengths=[50], tiles=2) for part in (own, fields)]
    assert saved[0] == saved[1]
