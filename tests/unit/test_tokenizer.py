"""The tokenizers built from nothing: nothing is lost, digits stay apart, special tokens are found anywhere."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from modeling.template import SPECIAL_TOKENS
from modeling.tokenizer import NAMES, build_tokenizer

TOKENIZERS = {name: build_tokenizer(name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_ids_of_control_and_image_tokens_follow_the_text(name):
    tokenizer = TOKENIZERS[name]
    special = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", *SPECIAL_TOKENS]
    assert tokenizer.convert_tokens_to_ids(special) == list(range(len(tokenizer) - 13, len(tokenizer)))
    assert len(TOKENIZERS["bytes"]) == 269 and len(TOKENIZERS["tiny-bpe"]) <= 413
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<pad>")
    ids = tokenizer("a <img><IMG_CONTEXT> </img>b").input_ids
    assert tokenizer.decode(ids) == "a <img><IMG_CONTEXT> </img>b"
    assert ids.count(tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")) == 1


@pytest.mark.parametrize("name", NAMES)
@given(text=st.text(max_size=60))
def test_every_text_survives(name, text):
    tokenizer = TOKENIZERS[name]
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_each_digit_is_one_token():
    tokenizer = TOKENIZERS["tiny-bpe"]
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("The digits are 7302, x10").input_ids)
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == list("730210")


def test_words_of_the_tasks_are_short():
    tokenizer = TOKENIZERS["tiny-bpe"]
    for word in ("system", "user", "assistant", "Which", " digit", " digits", " larger", " image", "Read"):
        assert len(tokenizer(word).input_ids) <= 2, word


def test_vocabulary_is_the_same_everywhere():
    vocabulary = sorted(TOKENIZERS["tiny-bpe"].get_vocab().items(), key=lambda item: item[1])
    digest = hashlib.sha256("\n".join(piece for piece, _ in vocabulary).encode()).hexdigest()
    assert (
        digest == "e419130202e6e8f1da8ed690593df5e763d8e1c23a8393116594d92f72019064"
    )  # changing it makes stored models unreadable


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_read_again_by_transformers(name, tmp_path):
    text = "<|im_start|>user\n<img><IMG_CONTEXT></img>\nRead  the digits: 42 <ref>数字</ref>.<|im_end|>\n"
    TOKENIZERS[name].save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text).input_ids == TOKENIZERS[name](text).input_ids
    assert again.decode(again(text).input_ids) == text
    assert again.get_vocab() == TOKENIZERS[name].get_vocab()
    assert (again.eos_token_id, again.pad_token_id) == (TOKENIZERS[name].eos_token_id, TOKENIZERS[name].pad_token_id)


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="tiny-bpe"):
        build_tokenizer("tiny")
