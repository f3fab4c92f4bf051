"""The model: the official checkpoint's own numbers, saved and loaded by anyone, and the training loss."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from modeling.attention import Segments
from modeling.batches import Batch, Counts, empty_batch
from modeling.errors import CheckpointError
from modeling.freeze import set_trainable
from modeling.internvl import TrainingLoss, build_model, load_model, save_model

ALL = ("vit", "mlp", "language")
SIZES = (88, 72, 44)


@pytest.fixture
def official_loss(official):
    """Our training loss over the official weights; the model is given back as it was."""
    config = official.model.model.language_model.config
    before = config._attn_implementation
    yield TrainingLoss(official.model, ALL)
    config._attn_implementation = before


def packed(case, weights, lengths=SIZES):
    """The official packed row as a Batch. The last tile is a dummy (image flag 0) and belongs to no token."""
    labels = case["packed_labels"][0].long()
    places = (labels != -100).nonzero().flatten()
    return Batch(
        input_ids=case["packed_input_ids"].long(), position_ids=case["packed_position_ids"].long(),
        segments=Segments.of(lengths), positions=places - 1, targets=labels[places], weights=weights[places],
        pixels=case["pixel_values"][:4], uniforms=None, counts=Counts(),
    )  # fmt: skip


def test_features_and_logits_are_the_official_ones(official):
    case = official.case
    with torch.inference_mode():
        tower = official.model.model.vision_tower(pixel_values=case["pixel_values"]).last_hidden_state
        out = official.model(
            input_ids=case["input_ids"].long(), attention_mask=case["attention_mask"].long(),
            pixel_values=case["pixel_values"][:4], labels=case["labels"].long(),
        )  # fmt: skip
    real = case["attention_mask"].bool()
    torch.testing.assert_close(tower, case["expected_vit_last_hidden"], atol=2e-5, rtol=0)
    torch.testing.assert_close(out.logits[real], case["expected_logits"][real], atol=2e-5, rtol=0)
    torch.testing.assert_close(out.loss, case["expected_loss"], atol=0, rtol=1e-5)


def test_our_features_and_packed_logits_are_the_official_ones(official, official_loss):
    case = official.case
    batch = packed(case, case["packed_loss_weight_token"])
    caught = []
    language = official.model.model.language_model
    handle = language.register_forward_hook(lambda _m, _i, out: caught.append(out.last_hidden_state))
    with torch.no_grad():
        features = official_loss.image_features(case["pixel_values"], None)
        official_loss(batch)
        logits = official.model.lm_head(caught[0][0])
    handle.remove()
    torch.testing.assert_close(features, case["expected_vision_features"].flatten(0, 1), atol=2e-5, rtol=0)
    separate = torch.cat([case["expected_logits"][i, :n] for i, n in enumerate(SIZES)])
    torch.testing.assert_close(logits, separate, atol=2e-5, rtol=0)


@pytest.mark.parametrize("reduction", ["token", "sample", "square"])
def test_packed_losses_are_the_official_ones(official, official_loss, reduction):
    weights = official.case[f"packed_loss_weight_{reduction}"]
    batch = packed(official.case, weights)
    with torch.no_grad():
        loss = official_loss(batch) / batch.weights.sum()
        leaking = official_loss(packed(official.case, weights, lengths=(204,))) / batch.weights.sum()
    expected = official.case[f"expected_packed_loss_{reduction}"]
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-5)
    assert (leaking - expected).abs() > 1e-3, "the case must tell isolation from leaking"


@pytest.fixture(scope="module")
def saved(micro, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m"
    save_model(micro.build(seed=3), micro.tokenizer, folder, micro.resolved.tile_size)
    return folder


def question(micro):
    ids = [1, 2, 3] + micro.resolved.tokens_per_tile * [micro.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")] + [4, 5]
    torch.manual_seed(0)
    return {"input_ids": torch.tensor([ids]), "pixel_values": torch.randn(1, 3, 32, 32)}


def test_a_saved_model_comes_back_and_loads_in_plain_transformers(micro, saved):
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    original = micro.build(seed=3)
    loaded, tokenizer = load_model(saved)
    plain = AutoModelForImageTextToText.from_pretrained(saved)
    state = original.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.state_dict().items())
    assert not loaded.training and len(loaded.state_dict()) == len(state)
    with torch.inference_mode():
        logits = [m.eval()(**question(micro)).logits for m in (original, loaded, plain)]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    text = "<img>two digits</img> 42<|im_end|>"
    assert tokenizer(text).input_ids == micro.tokenizer(text).input_ids
    assert AutoTokenizer.from_pretrained(saved)(text).input_ids == micro.tokenizer(text).input_ids
    assert plain.generation_config.eos_token_id == micro.tokenizer.eos_token_id
    assert not any(path.suffix in (".bin", ".pt", ".pkl") for path in saved.iterdir())


def test_a_trained_model_is_saved_with_an_attention_that_others_know(micro, tmp_path):
    model = micro.build()
    TrainingLoss(model, ALL)
    save_model(model, micro.tokenizer, tmp_path, 32)
    loaded, _ = load_model(tmp_path)
    with torch.inference_mode():
        assert torch.equal(loaded(**question(micro)).logits, micro.build()(**question(micro)).logits)


def damage(folder, saved, change):
    shutil.copytree(saved, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("multi_modal_projector.linear_1.bias"), "missing_keys.*linear_1.bias"),
        (lambda t: t.update(stranger=torch.zeros(2)), "unexpected_keys.*stranger"),
    ],
)
def test_weights_that_do_not_fit_are_named(saved, tmp_path, change, named):
    with pytest.raises(CheckpointError, match=named):
        load_model(damage(tmp_path / "m", saved, change))


def test_a_weight_of_another_shape_is_an_error_of_the_user(saved, tmp_path):
    def shrink(tensors):
        tensors["multi_modal_projector.linear_1.bias"] = torch.zeros(3)

    with pytest.raises(CheckpointError, match=r"linear_1\.bias"):
        load_model(damage(tmp_path / "m", saved, shrink))


def test_a_folder_that_is_no_model(tmp_path, saved):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(tmp_path / "absent")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(CheckpointError, match="'qwen2' is not 'internvl'"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "inter')
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(tmp_path)


def test_a_folder_without_or_with_damaged_weights(tmp_path, saved):
    for n, content in enumerate((None, b"", b"not safetensors at all")):
        folder = tmp_path / str(n)
        shutil.copytree(saved, folder)
        (folder / "model.safetensors").unlink()
        if content is not None:
            (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match="weights"):
            load_model(folder)


def test_weights_that_could_run_code_are_not_read(tmp_path, saved):
    folder = tmp_path / "m"
    shutil.copytree(saved, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="weights"):
        load_model(folder)


def test_a_fresh_model_depends_on_its_seed_alone(micro):
    torch.manual_seed(5)
    first = micro.build(seed=1).state_dict()
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1)), "the caller's generator is left alone"
    second, other = micro.build(seed=1).state_dict(), micro.build(seed=2).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    name = "model.vision_tower.embeddings.position_embeddings"
    assert not torch.equal(first[name], other[name]) and first[name].std() > 0.01
    assert not micro.build().config.tie_word_embeddings


def row(micro, supervised=True, image=True):
    ids = [1, 2, 3, 4, 5, 6, 7, 8]
    if image:
        ids[2:2] = micro.resolved.tokens_per_tile * [micro.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")]
    n = len(ids)
    torch.manual_seed(2)
    return Batch(
        input_ids=torch.tensor([ids]), position_ids=torch.arange(n)[None], segments=Segments.of([n]),
        positions=torch.tensor([n - 3, n - 2]), targets=torch.tensor([7, 8]),
        weights=torch.ones(2) if supervised else torch.zeros(2),
        pixels=torch.randn(1, 3, 32, 32) if image else None, uniforms=None, counts=Counts(),
    )  # fmt: skip


def test_the_loss_is_the_sum_over_supervised_positions(micro):
    model, batch = micro.build(), row(micro)
    loss = TrainingLoss(model, ALL)(replace(batch, weights=torch.tensor([0.5, 2.0])))
    model.model.language_model.config._attn_implementation = "sdpa"
    logits = model(input_ids=batch.input_ids, pixel_values=batch.pixels).logits[0]
    expected = F.cross_entropy(logits[batch.positions], batch.targets, reduction="none") @ torch.tensor([0.5, 2.0])
    torch.testing.assert_close(loss, expected)
    assert loss.dtype == torch.float32 and loss.ndim == 0


@pytest.mark.parametrize(
    ("train", "trained"),
    [
        (("mlp",), ["multi_modal_projector"]),
        (("vit", "mlp"), ["multi_modal_projector", "vision_tower"]),
        (("language",), ["language_model", "lm_head"]),
        (ALL, ["language_model", "lm_head", "multi_modal_projector", "vision_tower"]),
    ],
)
def test_every_trained_parameter_gets_a_gradient_and_no_other(micro, train, trained):
    model = micro.build()
    set_trainable(model, train)
    TrainingLoss(model, train)(row(micro)).backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got == {name for name, p in model.named_parameters() if p.requires_grad}
    assert sorted({name.removeprefix("model.").split(".")[0] for name in got}) == trained
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    # softmax knows no shift of all keys: their bias has a zero gradient; so has what only feeds it
    assert all("k_proj.bias" in name for name in got - moved)


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_a_row_without_an_image_still_takes_part_in_the_exchange(micro, drop_path):
    """A zero gradient, not an absent one, for every trained parameter; and the loss is unmoved."""
    model = micro.build()
    loss = TrainingLoss(model, ALL, drop_path)
    text = row(micro, image=False)
    loss(text).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if "language_model" not in name and "lm_head" not in name:
            assert parameter.grad.abs().sum() == 0, name
    frozen = TrainingLoss(micro.build(), ("language",))
    assert torch.equal(loss(text), frozen(text))


def test_the_row_of_a_rank_without_a_pack_adds_nothing(micro):
    model = micro.build()
    loss = TrainingLoss(model, ALL, 0.3)
    value = loss(empty_batch(micro.tokenizer.eos_token_id, 2))
    value.backward()
    assert value == 0.0
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in model.parameters())


def test_frozen_parts_build_no_graph(micro):
    """Whatever requires a gradient: in mlp warmup the tower runs without autograd, in vit incremental with it."""
    batch = row(micro)
    for train, expected in ((("mlp",), False), (("vit", "mlp"), True)):
        model = micro.build()
        loss = TrainingLoss(model, train)
        seen = []
        model.model.vision_tower.encoder.register_forward_hook(lambda _m, _i, out, s=seen: s.append(out[0]))
        features = loss.image_features(batch.pixels, None)
        assert seen[0].requires_grad is expected and features.requires_grad
    frozen = TrainingLoss(micro.build(), ("language",)).image_features(batch.pixels, None)
    assert not frozen.requires_grad


def test_weights_of_another_language_folder_are_checked(micro, tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {key: value for key, value in micro.resolved.language.items() if key != "model_type"}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=300, **sizes)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        build_model(replace(micro.resolved, language_folder=tmp_path), micro.tokenizer, 0)
