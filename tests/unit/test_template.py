"""The chat template and its labels, against outputs of the official code (tests/data/golden/template.jsonl)."""

import hashlib
import json
import re
from copy import deepcopy
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from modeling.template import (
    DEFAULT_SYSTEM,
    IGNORE,
    IMG_CONTEXT,
    SPECIAL_TOKENS,
    encode_conversation,
    encode_prompt,
    frame_token_counts,
)
from modeling.tokenizer import build_tokenizer

GOLDEN = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "data" / "golden" / "template.jsonl").read_text("utf-8").splitlines()
]
TOKENIZER = build_tokenizer("bytes")


def with_bos() -> PreTrainedTokenizerFast:
    """As InternLM's: it puts <s> (269) before every text it encodes, and says so."""
    from tokenizers import Tokenizer, processors

    backend = Tokenizer.from_str(TOKENIZER.backend_tokenizer.to_str())
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 269)])  # type: ignore
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>")
    tokenizer.add_bos_token = True
    return tokenizer


BOS_TOKENIZER = with_bos()


def sha256(ids: list[int]) -> str:
    return hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest()


def run_length(text: str) -> str:
    return re.sub(f"({IMG_CONTEXT})+", lambda run: f"{IMG_CONTEXT[:-1]}*{len(run[0]) // len(IMG_CONTEXT)}>", text)


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: str(case["id"]))
def test_golden(case):
    tokenizer = BOS_TOKENIZER if case["bos"] else TOKENIZER
    before = deepcopy(case["conversations"])

    def encode():
        return encode_conversation(
            case["conversations"],
            tokenizer,
            case["tiles"],
            case["tokens_per_tile"],
            case["max_length"],
            video=case["kind"] == "video",
        )

    expect = case["expect"]
    if "rejected" in expect:
        with pytest.raises(ValueError, match=expect["rejected"].replace("_", " ")):
            encode()
        return
    encoded = encode()
    assert run_length(tokenizer.decode(encoded.input_ids)) == expect["text_rle"]
    assert len(encoded.input_ids) == len(encoded.labels) == expect["n_tokens"]
    assert encoded.answer_spans == expect["supervised"]
    assert sum(label != IGNORE for label in encoded.labels) == expect["n_supervised"]
    assert encoded.input_ids.count(tokenizer.convert_tokens_to_ids(IMG_CONTEXT)) == expect["n_img_context"]
    assert sha256(encoded.input_ids) == expect["input_ids_sha256"]
    assert sha256(encoded.labels) == expect["labels_sha256"]
    assert case["conversations"] == before


def test_labels_are_the_answers_and_their_end():
    encoded = encode_conversation(turns("q", "Yes.", "more", "Bye"), TOKENIZER, [], 4)
    labels = [label for label in encoded.labels if label != IGNORE]
    assert TOKENIZER.decode(labels) == "Yes.<|im_end|>Bye<|im_end|>"
    spans = [TOKENIZER.decode(encoded.input_ids[start:end]) for start, end in encoded.answer_spans]
    assert spans == ["Yes.<|im_end|>", "Bye<|im_end|>"]


def test_exactly_one_bos_at_the_front():
    conversation = turns("q", "a", "q", "a")
    plain = encode_conversation(conversation, TOKENIZER, [], 4)
    encoded = encode_conversation(conversation, BOS_TOKENIZER, [], 4)
    assert encoded.input_ids == [269, *plain.input_ids]
    assert encoded.labels == [IGNORE, *plain.labels]
    assert encoded.answer_spans == [[start + 1, end + 1] for start, end in plain.answer_spans]


def test_system_turn_and_default():
    def text(conversation, system=None):
        return TOKENIZER.decode(encode_conversation(conversation, TOKENIZER, [], 4, system=system).input_ids)

    own = [{"from": "system", "value": "Be brief."}, *turns("q", "a")]
    assert text(turns("q", "a")).startswith(f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n<|im_start|>user\nq")
    assert text(turns("q", "a"), "S").startswith("<|im_start|>system\nS<|im_end|>\n")
    assert text(turns("q", "a"), "").startswith("<|im_start|>system\n<|im_end|>\n")
    assert text(own, "S").startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


def user_text(conversation, tiles, **options) -> str:
    encoded = encode_conversation(conversation, TOKENIZER, tiles, 2, system="", **options)
    return run_length(TOKENIZER.decode(encoded.input_ids)).removeprefix("<|im_start|>system\n<|im_end|>\n")


def test_placeholders_of_images_and_frames():
    one = "<img><IMG_CONTEXT*2></img>"
    assert f"user\n{one}\nq<" in user_text(turns("q", "a"), [1])
    assert f"user\nq {one} r<" in user_text(turns("q <image> r", "a"), [1])
    assert f"user\n<img><IMG_CONTEXT*6></img>{one}<" in user_text(turns("<image><image>", "a"), [3, 1])
    assert f"user\nFrame-1: {one}\nFrame-2: {one}\nq<" in user_text(turns("<video>\nq", "a"), [1, 1])
    assert f"user\nFrame-1: {one}\nFrame-2: {one}\nq<" in user_text(turns("q", "a"), [1, 1], video=True)
    assert f"user\nFrame-1: {one}\nq<" in user_text(turns("q", "a"), [1], video=True)
    assert f"user\nr\nFrame-1: {one}\n<" in user_text(turns("q", "a", "r\n<video>\n", "b"), [1])
    assert "user\n<video>\nq<" in user_text(turns("<video>\nq", "a"), [])
    # Where the official code adds a second placeholder to the first turn.
    later = user_text(turns("q", "a", "now <image>", "b"), [1])
    assert "user\nq<" in later and f"user\nnow {one}<" in later


def test_what_is_no_placeholder_stays_text():
    assert "assistant\nsee <image><|im_end|>" in user_text(turns("<image> q", "see <image>"), [1])
    conversation = [{"from": "system", "value": "an <image>"}, *turns("<image> q", "a")]
    assert "system\nan <image><" in TOKENIZER.decode(encode_conversation(conversation, TOKENIZER, [1], 2).input_ids)
    encoded = encode_conversation(turns("say <|im_end|> now", "a"), TOKENIZER, [], 2)
    assert encoded.input_ids.count(TOKENIZER.convert_tokens_to_ids("<|im_end|>")) == 4


@pytest.mark.parametrize(
    ("conversation", "tiles", "options", "reason"),
    [
        (turns("<image> <image>", "a"), [1], {}, "more placeholders"),
        (turns("<image>", "a"), [], {}, "more placeholders"),
        (turns("q", "a"), [1, 1], {}, "fewer placeholders"),
        (turns("<image>", "a"), [1, 1], {}, "fewer placeholders"),
        (turns("<video> q", "a"), [1, 1], {}, "fewer placeholders"),
        (turns("<video>\n<video>\n", "a"), [1, 1], {}, "more placeholders"),
        ([{"from": "system", "value": "s"}, *turns("q", "a")], [1], {}, "fewer placeholders"),
        ([{"from": "gpt", "value": "a"}], [1], {}, "fewer placeholders"),
        ([*turns("q", "a"), {"from": "system", "value": "s"}], [], {}, "system turn"),
        ([{"from": "user", "value": "q"}], [], {}, "unknown role"),
        ([{"value": "q"}], [], {}, "unknown role"),
        ([{"from": "human"}], [], {}, "must be text"),
        ([], [], {}, "no turns"),
        (turns("an <IMG_CONTEXT>", "a"), [], {}, "IMG_CONTEXT"),
        (turns("<image> </img>", "a"), [1], {}, "</img>"),
        (turns("<image>", "a"), [0], {}, "at least 1"),
        (turns("<image>", "a"), [40], {"max_length": 60}, "truncated"),
        (turns("<video>\n", "a"), [1] * 40, {"max_length": 260}, "truncated"),
    ],
)
def test_refused(conversation, tiles, options, reason):
    with pytest.raises(ValueError, match=reason):
        encode_conversation(conversation, TOKENIZER, tiles, 4, **options)


def test_a_tokenizer_without_image_tokens_is_refused():
    from tokenizers import Tokenizer

    description = json.loads(TOKENIZER.backend_tokenizer.to_str())
    description["added_tokens"] = [t for t in description["added_tokens"] if t["content"] not in SPECIAL_TOKENS]
    backend = Tokenizer.from_str(json.dumps(description))
    with pytest.raises(ValueError, match="does not know"):
        encode_conversation(turns("<image>", "a"), PreTrainedTokenizerFast(tokenizer_object=backend), [1], 4)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, BOS_TOKENIZER, build_tokenizer("tiny-bpe")])
def test_truncation_is_a_prefix_and_clips_spans(tokenizer):
    conversation = turns("<image>\nq", "long answer", "r", "another")
    whole = encode_conversation(conversation, tokenizer, [2], 4)
    first_token_after_images = max(i for i, t in enumerate(whole.input_ids) if tokenizer.decode([t]) == "</img>") + 1
    for max_length in range(first_token_after_images, len(whole.input_ids) + 2):
        cut = encode_conversation(conversation, tokenizer, [2], 4, max_length)
        assert cut.input_ids == whole.input_ids[:max_length] and cut.labels == whole.labels[:max_length]
        supervised = [i for i, label in enumerate(cut.labels) if label != IGNORE]
        assert [i for start, end in cut.answer_spans for i in range(start, end)] == supervised
        assert all(start < end for start, end in cut.answer_spans)
    with pytest.raises(ValueError, match="truncated"):
        encode_conversation(conversation, tokenizer, [2], 4, first_token_after_images - 1)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, BOS_TOKENIZER, build_tokenizer("tiny-bpe")])
def test_image_tokens_equal_the_spelled_out_string(tokenizer):
    encoded = encode_conversation(turns("a<image>b <image>", "c"), tokenizer, [3, 2], 5, system="s")
    first, second = (f"<img>{IMG_CONTEXT * (5 * tiles)}</img>" for tiles in (3, 2))
    parts = ("system\ns", f"user\na{first}b {second}", "assistant\nc")
    spelled = [t for p in parts for t in tokenizer(f"<|im_start|>{p}<|im_end|>\n", add_special_tokens=False).input_ids]
    assert [token for token in encoded.input_ids if token != tokenizer.bos_token_id] == spelled
    runs = [len(list(run)) for token, run in groupby(encoded.input_ids) if tokenizer.decode([token]) == IMG_CONTEXT]
    assert runs == [15, 10]


@pytest.mark.parametrize("tokenizer", [TOKENIZER, BOS_TOKENIZER, build_tokenizer("tiny-bpe")])
def test_a_prompt_is_what_comes_before_the_answer_in_training(tokenizer):
    conversation = turns("<image>\nq", "a", "r", "the answer")
    encoded = encode_conversation(conversation, tokenizer, [2], 4, system="s")
    prompt = encode_prompt(conversation[:-1], tokenizer, [2], 4, system="s")
    assert prompt == encoded.input_ids[: encoded.answer_spans[-1][0]]
    with pytest.raises(ValueError, match="human turn"):
        encode_prompt(conversation, tokenizer, [2], 4)


VIDEOS = [
    turns("What happens?", "a"),
    turns("<video>\n这段视频讲的是什么？", "一只猫", "And then?", "nothing"),
    turns("Look: <video>\n   1. what 2. Frame-3: who", "a"),
    turns("first a question", "an answer", "now <video>\n", "b"),
    [{"from": "system", "value": "s"}, *turns("<video>\n<video>", "a")],
]


@pytest.mark.parametrize("tokenizer", [TOKENIZER, BOS_TOKENIZER, build_tokenizer("tiny-bpe")])
@pytest.mark.parametrize("conversation", VIDEOS, ids=range(len(VIDEOS)))
def test_lengths_of_a_video_are_those_of_its_samples(tokenizer, conversation):
    counts = [*range(1, 14), 32, 99, 101]
    expected, answers = [], []
    for count in counts:
        encoded = encode_conversation(conversation, tokenizer, [1] * count, 5, system="s", video=True)
        expected.append(len(encoded.input_ids))
        answers.append([end - start for start, end in encoded.answer_spans])
    assert frame_token_counts(conversation, tokenizer, 5, counts, system="s") == expected
    assert all(lengths == answers[0] for lengths in answers), "answers are the same whatever is shown"


@pytest.mark.parametrize("question", ["<image>", "a </img> <video>\n", "<video>", "<video>\n<video>\n"])
def test_a_video_whose_text_does_not_fit_is_refused(question):
    with pytest.raises(ValueError, match=r"placeholders|ends an image"):
        frame_token_counts(turns(question, "a"), TOKENIZER, 4, range(8, 33))
