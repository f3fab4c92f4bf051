"""The vLLM engine against a stand-in for the library: what it is asked, and what is made of its answers."""

import json
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from modeling import vllm_engine
from modeling.errors import UserError
from modeling.generate import Question
from modeling.template import encode_prompt
from modeling.vllm_engine import VllmEngine


def ask(text, *images, **more):
    return Question([{"from": "human", "value": text}], images, **more)


@pytest.fixture
def library(monkeypatch, micro):
    """A module `vllm` that keeps what it was called with and answers with the seed."""
    kept = SimpleNamespace(loaded=None, prompts=[], params=[])

    class LLM:
        def __init__(self, **settings):
            kept.loaded = settings

        def generate(self, prompts, params, use_tqdm):
            kept.prompts, kept.params = prompts, params
            reasons = ["stop", "length"]
            return [
                SimpleNamespace(outputs=[SimpleNamespace(
                    token_ids=[*micro.tokenizer.encode(f" {each.seed % 10} "), micro.tokenizer.eos_token_id],
                    cumulative_logprob=-1.5, finish_reason=reasons[i % 2],
                )])
                for i, each in enumerate(params)
            ]  # fmt: skip

    config = {"vision_config": {"image_size": [32, 32]}}
    monkeypatch.setattr(vllm_engine.Path, "read_text", lambda path: json.dumps(config))
    fake = SimpleNamespace(LLM=LLM, SamplingParams=lambda **settings: SimpleNamespace(**settings))
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setattr(vllm_engine, "read_tokenizer", lambda folder: micro.tokenizer)
    for name in vllm_engine.NAMED:
        monkeypatch.setattr(micro.tokenizer, name, "<img>", raising=False)
    return kept


def test_absent_it_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # so that the import fails
    with pytest.raises(UserError, match="engine: transformers"):
        VllmEngine("folder")


def test_a_tokenizer_that_it_could_not_use_is_named(library, monkeypatch, micro):
    monkeypatch.setattr(micro.tokenizer, "video_token", None, raising=False)
    with pytest.raises(UserError, match="does not name video_token"):
        VllmEngine("folder")


def test_what_it_asks_for(library, micro):
    engine = VllmEngine("folder", gpu_memory_utilization=0.5)
    assert library.loaded["model"] == "folder" and library.loaded["logprobs_mode"] == "raw_logprobs"
    assert library.loaded["gpu_memory_utilization"] == 0.5
    gray, wide = Image.new("L", (32, 32)), Image.new("RGB", (128, 32))
    questions = [
        ask("two"),
        ask("<image>\n<image>\nWhich?", gray, wide, max_tiles=6),
        ask("<video>\nMoves?", wide, wide, video=True),
    ]
    rows = engine.sample(
        questions, ["a", "b", "c"], system="S", max_new_tokens=9, temperature=0.7, top_p=0.9, samples=(0, 4), seed=2
    )
    assert [len(row) for row in rows] == [2, 2, 2]
    first = rows[0][0]
    ids = micro.tokenizer.encode(f" {library.params[0].seed % 10} ")
    told = (len(ids) + 1, -1.5, None, False)
    assert (first.tokens, first.logprob, first.certainty, first.cut) == told and rows[0][1].cut
    assert first.text == str(library.params[0].seed % 10), "blanks and the end stripped, in the order of the questions"
    text, _, pair, _, frames, _ = library.prompts
    assert text == {"prompt_token_ids": encode_prompt(questions[0].conversation, micro.tokenizer, [], 1, "S")}
    images, kwargs = pair["multi_modal_data"]["image"], pair["mm_processor_kwargs"]
    assert [image.mode for image in images] == ["RGB", "RGB"]
    assert kwargs == {"crop_to_patches": True, "min_patches": 1, "max_patches": 3}, "the pictures share the limit"
    assert frames["mm_processor_kwargs"]["crop_to_patches"] is False
    shown = micro.tokenizer.decode(pair["prompt_token_ids"])
    assert "user\n<IMG_CONTEXT>\n<IMG_CONTEXT>\nWhich?" in shown and "<img>" not in shown
    assert "Frame-1: <IMG_CONTEXT>\nFrame-2: <IMG_CONTEXT>\n" in micro.tokenizer.decode(frames["prompt_token_ids"])
    settings = vars(library.params[0])
    assert settings.pop("seed") and settings == {
        "temperature": 0.7, "top_p": 0.9, "max_tokens": 9, "logprobs": 0,
        "stop_token_ids": [micro.tokenizer.eos_token_id],
    }  # fmt: skip


def test_seeds_are_of_seed_key_and_number(library):
    engine = VllmEngine("folder")

    def seeds(keys, samples, seed):
        engine.sample(
            [ask("a")] * len(keys), keys, system="", max_new_tokens=2, temperature=1.0, samples=samples, seed=seed
        )
        return [each.seed for each in library.params]

    pool = seeds(["a", "b"], (0, 1, 2), 0)
    assert len(set(pool)) == 6
    assert seeds(["b"], (2, 0), 0) == [pool[5], pool[3]]
    assert not set(seeds(["a", "b"], (0, 1, 2), 1)) & set(pool)


def test_greedy_asks_once(library):
    (row,) = VllmEngine("folder").sample([ask("a")], ["a"], system="", max_new_tokens=2, samples=(0, 1, 2))
    assert len(library.prompts) == 1 and library.params[0].temperature == 0 and len(row) == 3 and len(set(row)) == 1


def test_what_it_cannot_do_is_refused(library):
    engine = VllmEngine("folder")
    with pytest.raises(UserError, match="strict"):
        engine.sample([ask("a", tile_tie="inclusive")], ["a"], system="", max_new_tokens=2)
    with pytest.raises(ValueError, match="must be"):
        engine.sample([ask("a")], ["a"], system="", max_new_tokens=0)
    assert engine.sample([], [], system="", max_new_tokens=2) == []
