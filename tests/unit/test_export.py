"""Export: a folder that anyone can load and talk to."""

import json

import pytest
import torch
from fake_io import FakeIO

from modeling.errors import CheckpointError
from modeling.internvl import load_model, save_model
from modeling.template import encode_prompt
from stages.export import CHAT_TEMPLATE, export
from stages.io import Input
from stages.params import ExportParams


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


@pytest.fixture
def io(micro, tmp_path):
    folder = tmp_path / "trained"
    save_model(micro.build(seed=4), micro.tokenizer, folder, 32)
    trained = Input("full", "train", "2" * 64, folder, {"lr": 4e-5})
    return FakeIO(tmp_path / "run", ExportParams(), inputs={"full": trained})


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
