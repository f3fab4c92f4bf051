"""Export: a folder that anyone can load and talk to."""

import copy
import json

import numpy as np
import pytest
import torch
from fake_io import FakeIO
from jinja2 import TemplateError
from PIL import Image

from modeling.chat import chat_template, system_prompt
from modeling.errors import CheckpointError
from modeling.internvl import load_model, save_model
from modeling.template import DEFAULT_SYSTEM, encode_prompt
from modeling.tiles import split_image, to_pixels
from stages.export import export, export_folder
from stages.io import Input
from stages.params import DataParams, ExportParams

CHAT_TEMPLATE = chat_template()


def turns(*texts, system=None):
    roles = ("human", "gpt")
    told = [] if system is None else [{"from": "system", "value": system}]
    return told + [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


@pytest.mark.parametrize(
    "conversation",
    [
        turns("What is 2 + 2?"),
        turns("  padded  \n\n"),
        turns("first", "answer", "second"),
        turns("hello", system="You are brief."),
        turns("hello", "你好", "再见", system=""),
        turns("{{ not jinja }} {% if %} 'quoted'\n"),
    ],
)
def test_the_chat_template_is_the_prompt_of_training(micro, conversation):
    """In both forms of content: a string, and a list of parts."""
    expected = micro.tokenizer.decode(encode_prompt(conversation, micro.tokenizer, [], 4))
    plain = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in conversation]
    parts = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in plain]
    for messages in (plain, parts):
        text = micro.tokenizer.apply_chat_template(
            messages, chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
        )
        assert text == expected
    ids = micro.tokenizer.apply_chat_template(plain, chat_template=CHAT_TEMPLATE, add_generation_prompt=True)
    assert list(ids["input_ids"]) == encode_prompt(conversation, micro.tokenizer, [], 4)


def test_the_chat_template_ends_a_finished_conversation(micro):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = micro.tokenizer.apply_chat_template(messages, chat_template=CHAT_TEMPLATE, tokenize=False)
    assert text.endswith("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n")


@pytest.mark.parametrize("system", ["", "Be brief.", "say \"{{ x }}\"\n\\ '你好' {% if %}"])
def test_the_template_begins_with_the_system_prompt_of_training(micro, system):
    tokenizer = copy.deepcopy(micro.tokenizer)
    tokenizer.chat_template = chat_template(system)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == tokenizer.decode(encode_prompt(turns("hi"), tokenizer, [], 4, system=system))
    assert system_prompt(tokenizer) == system
    assert system_prompt(micro.tokenizer) is None  # which has no template


def test_the_template_begins_with_bos_where_training_does(micro):
    tokenizer = copy.deepcopy(micro.tokenizer)
    tokenizer.bos_token, tokenizer.add_bos_token = "<unk>", True
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], chat_template=chat_template(bos=True), add_generation_prompt=True
    )["input_ids"]
    assert list(ids) == encode_prompt(turns("hi"), tokenizer, [], 4) and ids[0] == tokenizer.bos_token_id


def test_a_part_the_model_does_not_know_is_refused(micro):
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what happens?"}]}
    with pytest.raises(TemplateError, match="frames"):
        micro.tokenizer.apply_chat_template([message], chat_template=CHAT_TEMPLATE, tokenize=False)


@pytest.fixture
def io(micro, tmp_path):
    folder = tmp_path / "trained"
    save_model(micro.build(seed=4), micro.tokenizer, folder, 32)
    trained = Input("full", "train", "2" * 64, folder, {"lr": 4e-5})
    return FakeIO(tmp_path / "run", ExportParams(), inputs={"full": trained})


def picture(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


# width, height: one tile; a row; a column; the most; both sides of the tie rule, at which 2 × 2 and 1 × 1 are as near
@pytest.mark.parametrize("size", [(32, 32), (90, 30), (31, 100), (500, 370), (45, 45), (46, 46), (7, 5)])
def test_the_exported_image_processor_makes_the_pixels_of_training(io, size):
    """The grid, the order of the tiles, the thumbnail last, and the bytes: the class with Pillow has our resampling."""
    from transformers import AutoImageProcessor

    export(io)
    processor = AutoImageProcessor.from_pretrained(io.result, backend="pil")
    found = processor(picture(*size), return_tensors="pt")
    expected = to_pixels(split_image(picture(*size), 12, tile_size=32))
    assert found["num_patches"].tolist() == [len(expected)]
    assert torch.allclose(found["pixel_values"], expected, atol=1e-5)  # a byte is 0.017
    fewer = processor([picture(*size)] * 2, max_patches=6, return_tensors="pt")  # two pictures share the tiles
    expected = to_pixels(split_image(picture(*size), 6, tile_size=32))
    assert torch.allclose(fewer["pixel_values"], torch.cat([expected, expected]), atol=1e-5)


def test_auto_processor_makes_the_prompt_and_the_pixels_of_training(micro, io):
    """Where torchvision is installed, with its own rounding of pixels."""
    pytest.importorskip("torchvision", reason="InternVLProcessor needs torchvision")
    from transformers import AutoProcessor

    export(io)
    processor = AutoProcessor.from_pretrained(io.result)
    image = picture(90, 30).resize((900, 300))  # smooth
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Which digits?"}]
    found = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True,
        return_tensors="pt",
    )  # fmt: skip
    tiles = split_image(image, 12, tile_size=32)
    expected = encode_prompt(
        turns("<image>\nWhich digits?"), micro.tokenizer, [len(tiles)], micro.resolved.tokens_per_tile
    )
    assert found["input_ids"].tolist() == [expected]
    assert found["pixel_values"].shape == (len(tiles), 3, 32, 32)
    assert (found["pixel_values"] - to_pixels(tiles)).abs().max() < 0.05
    with pytest.raises(ValueError, match="video"):
        processor(text="a video: </img>")


def test_the_exported_folder_names_what_a_processor_asks_for_and_adds_no_token(micro, io):
    """A token more than the embeddings have rows would only fail in use."""
    from transformers import AutoTokenizer

    export(io)
    tokenizer = AutoTokenizer.from_pretrained(io.result)
    assert len(tokenizer) == len(micro.tokenizer)
    ids = [getattr(tokenizer, f"{name}_image_token_id") for name in ("start", "context", "end")]
    assert ids == micro.tokenizer.convert_tokens_to_ids(["<img>", "<IMG_CONTEXT>", "</img>"])
    for text in ("a <video> and <img>", "<box>[[1, 2, 3, 4]]</box>", "plain 123"):
        assert tokenizer(text).input_ids == micro.tokenizer(text).input_ids
    asked = json.loads((io.result / "generation_config.json").read_text())
    assert {key: asked[key] for key in ("do_sample", "eos_token_id", "pad_token_id")} == {
        "do_sample": False, "eos_token_id": micro.tokenizer.eos_token_id, "pad_token_id": micro.tokenizer.pad_token_id,
    }  # fmt: skip
    assert "max_new_tokens" not in asked, "vLLM would let nobody ask for more"


def test_the_export_speaks_with_the_system_prompt_of_its_data(micro, io, tmp_path):
    from transformers import AutoTokenizer

    from modeling.weights import open_source

    (io.inputs["full"].folder / "trained.json").write_text(json.dumps({"system": ""}))
    io.sources = {"of another stage": DataParams(meta="b", system="Be brief.")}
    export(io)
    tokenizer = AutoTokenizer.from_pretrained(io.result)
    assert system_prompt(tokenizer) == ""
    assert "system prompt of training (an empty one)" in (io.result / "README.md").read_text()
    export_folder(open_source(io.result), tmp_path / "again", "hf")  # stageline export FOLDER
    assert system_prompt(AutoTokenizer.from_pretrained(tmp_path / "again")) == ""
    tokenizer.chat_template = "{{ messages[0]['content'] }}"  # another's: not ours to keep
    tokenizer.save_pretrained(io.result)
    export_folder(open_source(io.result), tmp_path / "other", "hf")
    assert system_prompt(AutoTokenizer.from_pretrained(tmp_path / "other")) == DEFAULT_SYSTEM


def test_a_result_without_a_record_gets_the_official_system_prompt_and_the_card_says_so(io):
    from transformers import AutoTokenizer

    export(io)
    assert system_prompt(AutoTokenizer.from_pretrained(io.result)) == DEFAULT_SYSTEM
    assert "system prompt of training is not recorded" in (io.result / "README.md").read_text()


def test_the_exported_folder_loads_with_its_template_and_card(micro, io):
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    export(io)
    model = AutoModelForImageTextToText.from_pretrained(io.result)
    state = micro.build(seed=4).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(io.result)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == tokenizer.decode(encode_prompt(turns("hi"), tokenizer, [], 4))
    assert load_model(io.result)[1] is not None
    card = (io.result / "README.md").read_text()
    assert "stage `full`" in card and '"lr": 4e-05' in card
    assert io.summary == {"stage": "full", "parameters": sum(p.numel() for p in model.parameters()), "layout": "hf"}
    processor = json.loads((io.result / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 32, "width": 32}


def test_the_official_layout(micro, io, tmp_path):
    """Under the official names, with a card that says who reads it; it comes back to the bit."""
    from safetensors.torch import load_file

    from modeling.weights import open_source, write

    io.params = ExportParams(layout="official")
    export(io)
    config = json.loads((io.result / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("internvl_chat", ["InternVLChatModel"])
    assert {name.split(".")[0] for name in load_file(io.result / "model.safetensors")} == {
        "vision_model", "mlp1", "language_model",
    }  # fmt: skip
    assert "InternVLChatModel" in (io.result / "README.md").read_text() and io.summary["layout"] == "official"
    write(open_source(io.result), tmp_path / "back", "hf")
    model, tokenizer = load_model(tmp_path / "back")
    state = micro.build(seed=4).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert len(tokenizer) == len(micro.tokenizer)


def test_a_model_that_does_not_load_is_not_exported(io):
    (io.inputs["full"].folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError):
        export(io)
    assert io.summary is None and not io.result.exists()
