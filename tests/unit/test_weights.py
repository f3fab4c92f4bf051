"""Import and export of whole models: the official modules' numbers, keys that do not fit, the same bits both ways."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import OFFICIAL
from official_reference import logits, variant
from safetensors.torch import load_file, save_file

from modeling.attention import Segments
from modeling.batches import Batch, Counts
from modeling.errors import CheckpointError, UserError
from modeling.internvl import TrainingLoss, load_model, save_model
from modeling.weights import open_source, write

SIZES, TILES = (88, 72, 44), (2, 2, 0)  # of the three samples of case.safetensors
IMAGE = 262
STYLES = ("tiny", "6b", "internlm2")
CASE = load_file(OFFICIAL / "case.safetensors")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only lose by sharing their sums among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def put(folder, config, weights):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=STYLES)
def checkpoint(request, tmp_path_factory):
    """folder, config, weights of an official checkpoint in each style; the first with its tokenizer."""
    config, weights = json.loads((OFFICIAL / "config.json").read_text()), load_file(OFFICIAL / "model.safetensors")
    if request.param == "tiny":
        return SimpleNamespace(style="tiny", folder=OFFICIAL, config=config, weights=weights)
    config, weights = variant(request.param, config, weights)
    folder = put(tmp_path_factory.mktemp(request.param) / "m", config, weights)
    return SimpleNamespace(style=request.param, folder=folder, config=config, weights=weights)


@pytest.fixture(scope="module")
def imported(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported") / "hf"
    write(open_source(checkpoint.folder, image_token_id=IMAGE), folder, "hf")
    return folder


@pytest.fixture(scope="module")
def expected(checkpoint):
    return reference(checkpoint.config, checkpoint.weights)


def samples():
    """(ids [L], its tiles) of the case, one by one."""
    first = 0
    for row, (size, tiles) in enumerate(zip(SIZES, TILES)):
        yield CASE["input_ids"][row, :size].long(), CASE["pixel_values"][first : first + tiles]
        first += tiles


@torch.inference_mode()
def reference(config, weights):
    """Logits [88 + 72 + 44, vocabulary] of the plain-torch official forward."""
    return torch.cat([logits(weights, config, ids, tiles, IMAGE) for ids, tiles in samples()])


@torch.inference_mode()
def separate(model):
    """The same of a model, through its usual forward."""
    out = []
    for ids, tiles in samples():
        images = {"pixel_values": tiles} if len(tiles) else {}
        out.append(model(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), **images).logits[0])
    return torch.cat(out)


def test_the_reference_is_the_official_code():
    """The plain-torch forward gives the stored outputs of the official modules: it can stand in for them elsewhere."""
    config, weights = json.loads((OFFICIAL / "config.json").read_text()), load_file(OFFICIAL / "model.safetensors")
    stored = torch.cat([CASE["expected_logits"][row, :size] for row, size in enumerate(SIZES)])
    torch.testing.assert_close(reference(config, weights), stored, atol=2e-5, rtol=0)


def test_logits_are_the_official_ones(imported, expected):
    model, _ = load_model(imported)
    torch.testing.assert_close(separate(model), expected, atol=2e-5, rtol=0)


def test_a_padded_batch_gives_the_official_logits(imported, expected):
    model, _ = load_model(imported)
    mask = CASE["attention_mask"].long()
    with torch.inference_mode():
        out = model(input_ids=CASE["input_ids"].long(), attention_mask=mask, pixel_values=CASE["pixel_values"][:4])
    torch.testing.assert_close(out.logits[mask.bool()], expected, atol=2e-5, rtol=0)


def test_a_packed_row_equals_the_separate_rows(imported):
    model, _ = load_model(imported)
    apart = separate(model)
    loss, seen = TrainingLoss(model, ("vit", "mlp", "language")), []
    model.model.language_model.register_forward_hook(lambda _m, _i, out: seen.append(out.last_hidden_state))
    row = Batch(
        input_ids=torch.cat([ids for ids, _ in samples()])[None],
        position_ids=torch.cat([torch.arange(size) for size in SIZES])[None], segments=Segments.of(SIZES),
        positions=torch.tensor([3]), targets=torch.tensor([7]), weights=torch.ones(1),
        pixels=CASE["pixel_values"][:4], uniforms=None, counts=Counts(),
    )  # fmt: skip
    with torch.inference_mode():
        loss(row)
        torch.testing.assert_close(model.lm_head(seen[0][0]), apart, atol=2e-5, rtol=0)


def test_export_and_import_give_the_same_bits_in_both_layouts(checkpoint, imported, tmp_path):
    out = tmp_path / "official"
    write(open_source(imported), out, "official")
    again = load_file(out / "model.safetensors")
    assert again.keys() == checkpoint.weights.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in checkpoint.weights.items())
    config = json.loads((out / "config.json").read_text())
    assert "auto_map" not in json.dumps(config)
    for part in ("vision_config", "llm_config"):
        dropped = {"auto_map", "attn_implementation", "use_cache", "use_flash_attn"}
        kept = {name: value for name, value in checkpoint.config[part].items() if name not in dropped}
        # what the library leaves out, because it says nothing
        assert {name: config[part].get(name) for name in kept} == kept
    write(open_source(out), tmp_path / "hf", "hf")  # the id of the image token came along
    back, first = load_file(tmp_path / "hf" / "model.safetensors"), load_file(imported / "model.safetensors")
    assert back.keys() == first.keys() and all(torch.equal(back[name], first[name]) for name in first)
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == json.loads(
        (imported / "config.json").read_text()
    )
    copy = tmp_path / "copy"
    write(open_source(imported), copy, "hf")
    assert (copy / "model.safetensors").read_bytes() == (imported / "model.safetensors").read_bytes()


def swap(first, second):
    def change(name):
        for a, b in ((first, second), (second, first)):
            if a in name:
                return name.replace(a, b)
        return name

    return lambda weights: {change(name): tensor for name, tensor in weights.items()}


def reordered(part, order):
    """The tensors called `part`, their rows in another order."""
    return lambda weights: {n: t[order] if part in n else t for n, t in weights.items()}


# rows of wqkv [kv_head, group + 2, head_dim] as three plain blocks would have them; rows of the ViT's qkv as k, q, v
PLAIN = torch.arange(128).view(2, 4, 16).transpose(0, 1).flatten()
KEY_FIRST = torch.cat([torch.arange(64, 128), torch.arange(64), torch.arange(128, 192)])
BROKEN = {
    "w1 and w3 swapped": ("internlm2", swap("feed_forward.w1", "feed_forward.w3")),
    "the two norms of a layer swapped": ("internlm2", swap("attention_norm", "ffn_norm")),
    "wqkv in plain blocks": ("internlm2", reordered("wqkv", PLAIN)),
    "eps": ("internlm2", {"rms_norm_eps": 1e-6}),
    "rope theta": ("internlm2", {"rope_theta": 100.0}),
    "q and k swapped": ("6b", reordered("attn.qkv", KEY_FIRST)),
    "q_norm in another order of the heads": ("6b", reordered("q_norm", torch.arange(64).flip(0))),
    "layer scales swapped": ("6b", swap("ls1", "ls2")),
    "norms swapped": ("6b", swap("norm1", "norm2")),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_mapping_that_is_wrong_would_be_seen(broken, tmp_path):
    """Each mistake a mapping could make, made in the checkpoint instead, moves the logits by more than 0.1."""
    style, change = BROKEN[broken]
    config, weights = json.loads((OFFICIAL / "config.json").read_text()), load_file(OFFICIAL / "model.safetensors")
    config, weights = variant(style, config, weights)
    expected = reference(config, weights)
    if isinstance(change, dict):
        config = config | {"llm_config": config["llm_config"] | change}
    else:
        weights = {name: tensor.contiguous() for name, tensor in change(weights).items()}
    source = open_source(put(tmp_path / "broken", config, weights), image_token_id=IMAGE)
    write(source, tmp_path / "hf", "hf")
    assert (separate(load_model(tmp_path / "hf")[0]) - expected).abs().max() > 0.1


def test_bf16_and_shards_stay(tmp_path):
    config, weights = json.loads((OFFICIAL / "config.json").read_text()), load_file(OFFICIAL / "model.safetensors")
    config, weights = variant("internlm2", config, weights)
    weights = {name: tensor.bfloat16() for name, tensor in weights.items()}
    folder = put(tmp_path / "sharded", config, {})
    (folder / "model.safetensors").unlink()
    placed = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(weights)}
    for shard in set(placed.values()):
        save_file({name: weights[name] for name in weights if placed[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    write(open_source(folder, image_token_id=IMAGE), tmp_path / "hf", "hf")
    model, _ = load_model(tmp_path / "hf")
    assert model.dtype == torch.bfloat16 == next(iter(load_file(tmp_path / "hf" / "model.safetensors").values())).dtype
    write(open_source(tmp_path / "hf"), tmp_path / "out", "official")
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(again[name], weights[name]) and again[name].dtype == torch.bfloat16 for name in weights)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shards are missing: \['model-00002"):
        write(open_source(folder, image_token_id=IMAGE), tmp_path / "no", "hf")


def test_a_large_model_is_written_in_shards(checkpoint, imported, tmp_path, monkeypatch):
    monkeypatch.setattr("modeling.weights.SHARD", "200KB")
    write(open_source(imported), tmp_path / "official", "official")
    assert len(list((tmp_path / "official").glob("model-*.safetensors"))) > 2
    write(open_source(tmp_path / "official"), tmp_path / "hf", "hf")
    back, first = load_file(tmp_path / "hf" / "model.safetensors"), load_file(imported / "model.safetensors")
    assert all(torch.equal(back[name], first[name]) for name in first)


def test_all_keys_that_do_not_fit_are_named_before_anything_is_written(checkpoint, imported, tmp_path):
    def broken(folder, layout):
        weights = load_file(folder / "model.safetensors")
        lost = next(name for name in sorted(weights) if "norm1" in name or "layernorm_before" in name)
        del weights[lost]
        short = next(name for name in weights if name.endswith("mlp.fc1.bias"))
        weights |= {short: torch.zeros(3), "stranger.weight": torch.zeros(2)}
        place = tmp_path / layout / "m"
        shutil.copytree(folder, place, ignore=shutil.ignore_patterns("case.safetensors"))
        save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
        return place, lost, short

    for folder, layout in ((checkpoint.folder, "official"), (imported, "hf")):
        place, lost, short = broken(folder, layout)
        for target in ("hf", "official"):
            with pytest.raises(CheckpointError) as caught:
                write(open_source(place, image_token_id=IMAGE), tmp_path / "out", target)
            told = caught.value.message
            assert f"1 missing keys: {'' if layout == 'official' else 'model.'}{lost}" in told
            assert "1 unexpected keys: " in told and "stranger.weight" in told
            assert "1 keys of another shape: " in told and f"{short} [3] for [128]" in told
            assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "nothing half-written is left"


def test_weights_that_could_run_code_are_refused(tmp_path):
    shutil.copy(OFFICIAL / "config.json", tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: files that can run code") as caught:
        write(open_source(tmp_path, image_token_id=IMAGE), tmp_path / "out", "hf")
    assert "convert them to safetensors" in caught.value.remedy


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ps_version": "v1"}, "ps_version 'v1'"),
        ({"ps_version": None}, "ps_version None"),
        ({"select_layer": -4}, "select_layer -4"),
        ({"downsample_ratio": 0.25}, r"downsample_ratio 0\.25"),
        ({"use_llm_lora": 16}, "use_llm_lora 16"),
        ({"force_image_size": 112}, "force_image_size 112 with vision_config.image_size 56"),
        ({"llm_config": {"model_type": "skynet"}}, "no language model of type 'skynet'"),
        ({"llm_config": None}, "no llm_config"),
        ({"model_type": "llava"}, "model type 'llava' is neither"),
    ],
)
def test_what_cannot_be_mapped_is_refused(change, named, tmp_path):
    config = json.loads((OFFICIAL / "config.json").read_text()) | change
    with pytest.raises(CheckpointError, match=named):
        open_source(put(tmp_path / "m", config, {}), image_token_id=IMAGE)


def test_pixel_shuffle_is_v1_where_the_configuration_is_silent(tmp_path):
    config = json.loads((OFFICIAL / "config.json").read_text())
    del config["ps_version"]
    with pytest.raises(CheckpointError, match="ps_version 'v1'"):
        open_source(put(tmp_path / "m", config, {}), image_token_id=IMAGE)


def test_the_tokenizer_comes_along(micro, tmp_path):
    source = open_source(OFFICIAL)
    assert source.config.image_token_id == IMAGE and source.notes == ()
    write(source, tmp_path / "hf", "hf")
    write(open_source(tmp_path / "hf"), tmp_path / "official", "official")
    _, tokenizer = load_model(tmp_path / "hf")
    again = open_source(tmp_path / "official").tokenizer
    text = "<img><IMG_CONTEXT></img> a 7<|im_end|>"
    assert tokenizer(text).input_ids == again(text).input_ids == source.tokenizer(text).input_ids
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (259, 256) == (again.eos_token_id, again.pad_token_id)
    about = json.loads((tmp_path / "official" / "tokenizer_config.json").read_text())
    assert about["tokenizer_class"] == "PreTrainedTokenizerFast", "a name that transformers 4 knows too"
    with pytest.raises(UserError, match="token 262 of the tokenizer, not 5"):
        open_source(OFFICIAL, image_token_id=5)


def test_a_tokenizer_of_another_model(micro, tmp_path):
    micro.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="the tokenizer has 413 tokens, the model rows for 320"):
        open_source(OFFICIAL, tokenizer=str(tmp_path))


def test_a_folder_without_a_tokenizer(checkpoint, tmp_path):
    if checkpoint.style == "tiny":
        return
    given, guessed = open_source(checkpoint.folder, image_token_id=IMAGE), open_source(checkpoint.folder)
    assert given.config.image_token_id == IMAGE and "no tokenizer" in given.notes[0]
    assert guessed.config.image_token_id == {"6b": 151667, "internlm2": 92546}[checkpoint.style]
    assert "--image-token-id" in guessed.notes[0]
    write(given, tmp_path / "hf", "hf")
    assert load_model(tmp_path / "hf")[1] is None
    spoken = open_source(checkpoint.folder, tokenizer=str(OFFICIAL))
    assert spoken.config.image_token_id == IMAGE and spoken.notes == ()


def test_a_trained_model_goes_out_and_comes_back(micro, tmp_path):
    """Also with names as older versions of transformers wrote them."""
    save_model(micro.build(seed=3), micro.tokenizer, tmp_path / "trained", 32)
    write(open_source(tmp_path / "trained"), tmp_path / "official", "official")
    write(open_source(tmp_path / "official"), tmp_path / "hf", "hf")
    state = micro.build(seed=3).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in load_model(tmp_path / "hf")[0].state_dict().items())
    shutil.copytree(tmp_path / "trained", tmp_path / "memory")
    save_file(state, tmp_path / "memory" / "model.safetensors", metadata={"format": "pt"})
    write(open_source(tmp_path / "memory"), tmp_path / "again", "hf")
    bits = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("trained", "hf", "again")]
    assert bits[0] == bits[1] == bits[2]


def test_a_tied_head_becomes_one_of_its_own_in_the_official_layout(micro, tmp_path):
    model = micro.build(seed=3)
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    save_model(model, micro.tokenizer, tmp_path / "tied", 32)
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    write(open_source(tmp_path / "tied"), tmp_path / "official", "official")
    weights = load_file(tmp_path / "official" / "model.safetensors")
    assert torch.equal(weights["language_model.lm_head.weight"], weights["language_model.model.embed_tokens.weight"])
    write(open_source(tmp_path / "tied"), tmp_path / "hf", "hf")
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (
        tmp_path / "tied" / "model.safetensors"
    ).read_bytes()


def test_what_the_official_layout_cannot_say(imported, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(imported, folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_feature_layer"] = -2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="vision_feature_layer -2, which the official layout cannot say"):
        write(open_source(folder), tmp_path / "out", "official")


def test_a_folder_that_holds_something_is_left_alone(imported, tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(UserError, match="there is something already"):
        write(open_source(imported), tmp_path, "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["note"]
