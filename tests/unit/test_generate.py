"""Answers: the prompt of training, greedy, the same alone and in a batch."""

import pytest
import torch
from PIL import Image

from modeling.generate import Question, answer, encode_question
from modeling.template import encode_prompt


def ask(text, *images, max_tiles=6):
    return Question([{"from": "human", "value": text}], images, max_tiles)


def picture(width=32, height=32, level=100):
    return Image.linear_gradient("L").resize((width, height)).point(lambda v: (v + level) % 256).convert("RGB")


def test_the_prompt_is_that_of_training(micro):
    config = micro.build().config
    question = ask("<image>\n<image>\nWhich?", picture(64, 32), picture(), max_tiles=6)
    ids, pixels = encode_question(question, micro.tokenizer, config, "")
    assert ids == encode_prompt(question.conversation, micro.tokenizer, [3, 1], config.image_seq_length, system="")
    assert pixels is not None and pixels.shape == (4, 3, 32, 32)
    assert ids.count(config.image_token_id) == 4 * config.image_seq_length
    text, none = encode_question(ask("two plus two"), micro.tokenizer, config, None)
    assert none is None and "InternVL" in micro.tokenizer.decode(text)


def test_the_tile_limit_is_shared_by_the_images(micro):
    """As in preparation: max(1, limit // images) for each."""
    config, wide = micro.build().config, picture(128, 32)
    alone = encode_question(ask("<image>", wide, max_tiles=4), micro.tokenizer, config, "")[1]
    pair = encode_question(ask("<image><image>", wide, wide, max_tiles=4), micro.tokenizer, config, "")[1]
    assert len(alone) == 5 and len(pair) == 2 * 3


def test_a_gray_picture_is_taken(micro):
    pixels = encode_question(ask("<image>", picture().convert("L")), micro.tokenizer, micro.build().config, "")[1]
    assert pixels.shape == (1, 3, 32, 32)


QUESTIONS = [
    ask("<image>\nRead it.", picture(96, 32)),
    ask("two plus two"),
    ask("<image>\n<image>\nWhich digit of the two is the larger one?", picture(), picture(level=7)),
]


def test_a_batch_answers_as_each_question_alone(micro):
    """Padding on the left and neighbours change no answer."""
    model = micro.build(seed=1)
    alone = [answer(model, micro.tokenizer, [q], system="", max_new_tokens=8)[0] for q in QUESTIONS]
    together = answer(model, micro.tokenizer, QUESTIONS, system="", max_new_tokens=8)
    assert together == alone and len(set(alone)) > 1
    assert answer(model, micro.tokenizer, QUESTIONS[1:2], system="", max_new_tokens=8) == alone[1:2]


def test_it_is_greedy_and_stops_at_the_end_of_the_turn(micro, monkeypatch):
    """A head that always prefers one token says it max_new_tokens times; one that prefers <|im_end|> says nothing."""
    model = micro.build()
    token = micro.tokenizer("7").input_ids[0]

    def prefer(wanted):
        def head(hidden):
            logits = torch.zeros(*hidden.shape[:-1], len(micro.tokenizer))
            logits[..., wanted] = 1.0
            return logits

        monkeypatch.setattr(model.lm_head, "forward", head)

    prefer(token)
    assert answer(model, micro.tokenizer, [ask("a"), ask("b b")], system=None, max_new_tokens=5) == ["77777"] * 2
    prefer(micro.tokenizer.eos_token_id)
    assert answer(model, micro.tokenizer, [ask("a")], system=None, max_new_tokens=5) == [""]


def test_a_picture_without_a_place_is_an_error(micro):
    with pytest.raises(ValueError, match="placeholders"):
        answer(micro.build(), micro.tokenizer, [ask("<image>\n<image>", picture())], system="")
