"""Judging: words at the first answer token, marks after each step in one pass, the loss of an answer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modeling import judging
from modeling.errors import UserError
from modeling.generate import Question, encode_question
from modeling.judging import answer_loss, choice_probability, plain, scorer_turns, step_scores, steps_of
from modeling.template import IGNORE, encode_conversation

torch.set_num_threads(1)


def ask(text, *images, before=(), video=False):
    return Question([*before, {"from": "human", "value": text}], images, 6, video=video)


def picture(width=32, height=32, level=100):
    shades = [(v + level) % 256 for v in range(256)]
    return Image.linear_gradient("L").resize((width, height)).point(shades).convert("RGB")


TALK = ({"from": "human", "value": "<image>\nLook."}, {"from": "gpt", "value": "ok"})
QUESTIONS = [
    ask("<image>\nRead it.", picture(96, 32)),
    ask("two plus two"),
    ask("Now read it.", picture(), before=TALK),
    ask("<video>\nWhat moves?", picture(), picture(level=50), video=True),
]


@pytest.fixture(scope="module")
def tiny(micro):
    model = micro.build(seed=1)
    with torch.no_grad():
        model.lm_head.weight *= 8
    return model


def test_a_choice_is_read_at_the_first_answer_token(micro, tiny):
    words = ("Yes", "No")
    first = [micro.tokenizer(word, add_special_tokens=False).input_ids[0] for word in words]
    found = choice_probability(tiny, micro.tokenizer, QUESTIONS, words, system="")
    for question, p in zip(QUESTIONS, found, strict=True):
        ids, pixels = encode_question(question, micro.tokenizer, tiny.config, "")
        images = {} if pixels is None else {"pixel_values": pixels}
        with torch.no_grad():
            all_words = tiny(input_ids=torch.tensor([ids]), **images).logits[0, -1].softmax(-1)
        yes, no = all_words[first].tolist()
        assert p == pytest.approx(yes / (yes + no), rel=1e-4)
    assert len({round(p, 5) for p in found}) == len(found)
    other = choice_probability(tiny, micro.tokenizer, QUESTIONS[:1], ("No", "Yes"), system="")
    assert other == pytest.approx([1 - found[0]], rel=1e-4)
    assert choice_probability(tiny, micro.tokenizer, [], words, system="") == []


def test_words_that_begin_alike_are_refused(micro, tiny):
    with pytest.raises(UserError, match="same token"):
        choice_probability(tiny, micro.tokenizer, QUESTIONS[:1], ("7 a", "7 b"), system="")


def test_one_pass_scores_as_a_question_for_each_step(micro, tiny):
    """Each step is read after '+' for the ones before it, and sees nothing that comes after it."""
    responses = ["It is a 7.\n\nSo it is 7.\n\\boxed{7}", "four", "  \n", "a\nb\nc\nd"]
    together = step_scores(tiny, micro.tokenizer, QUESTIONS, responses, system="")
    assert [len(row) for row in together] == [3, 1, 0, 4]
    for question, response, scores in zip(QUESTIONS, responses, together, strict=True):
        steps = steps_of(response)
        for k, score in enumerate(scores):
            turns = scorer_turns(question, steps[: k + 1])[:-1]
            step = Question(turns, question.images, question.max_tiles, video=question.video)
            (alone,) = choice_probability(tiny, micro.tokenizer, [step], ("+", "-"), system="")
            assert score == pytest.approx(alone, rel=1e-3)
    assert len({round(score, 3) for row in together for score in row}) > 5


def test_the_scorers_words_are_the_official_ones():
    """item2conv_prm and item2conv_orm of visualprm_data_pipeline_postprocess.py (commit 637c8258a15)."""
    question = ask("<image>\nWhich?", picture())
    assert scorer_turns(question, ["first", "second"], ["+", "-"]) == [
        {"from": "human", "value": "### Question:\n<image>\nWhich?\n\n### Solution Process:\nfirst"},
        {"from": "gpt", "value": "+"},
        {"from": "human", "value": "second"},
        {"from": "gpt", "value": "-"},
    ]
    (turn, mark) = scorer_turns(question, ["first\n\nsecond"])
    assert turn["value"].endswith("### Solution Process:\nfirst\n\nsecond") and mark["value"] == "+"
    assert scorer_turns(QUESTIONS[2], ["a"])[:2] == list(TALK)
    for steps, marks in (([], None), (["a"], ["+", "+"])):
        with pytest.raises(ValueError, match="needs a mark"):
            scorer_turns(question, steps, marks)


@given(st.text(alphabet="ab \n<image>", max_size=40))
def test_steps_hold_all_that_was_said(response):
    steps = steps_of(response)
    assert all(step and step == step.strip() and "\n" not in step for step in steps)
    assert "".join("".join(steps).split()) == "".join(response.split())
    assert "<image>" not in plain(response)


def test_a_response_that_names_a_picture_is_text(micro, tiny):
    """Of itself `<image>` in a human turn would ask for one more picture."""
    said = "In <image> I see </img> and <IMG_CONTEXT>, as in <video>\nhere"
    rows = step_scores(tiny, micro.tokenizer, [QUESTIONS[0], QUESTIONS[3]], [said, said], system="")
    assert [len(row) for row in rows] == [2, 2]


def test_the_loss_is_that_of_training(micro, tiny, monkeypatch):
    """The library's own loss under the template's label mask; in a batch as alone, in chunks as whole."""
    answers = ["7", "four, I think", "it is a 3", ""]
    together = answer_loss(tiny, micro.tokenizer, QUESTIONS, answers, system="")
    tiles = [[4], [], [1], [1, 1]]
    for question, answer, counts, (loss, tokens) in zip(QUESTIONS, answers, tiles, together, strict=True):
        turns = [*question.conversation, {"from": "gpt", "value": answer}]
        encoded = encode_conversation(
            turns, micro.tokenizer, counts, tiny.config.image_seq_length, system="", video=question.video or None
        )
        labels, (start, _) = list(encoded.labels), encoded.answer_spans[-1]
        labels[:start] = [IGNORE] * start  # earlier answers are context
        pixels = encode_question(question, micro.tokenizer, tiny.config, "")[1]
        images = {} if pixels is None else {"pixel_values": pixels}
        with torch.no_grad():
            mean = tiny(input_ids=torch.tensor([encoded.input_ids]), labels=torch.tensor([labels]), **images).loss
        assert tokens == sum(label != IGNORE for label in labels)
        assert loss / tokens == pytest.approx(mean.item(), rel=1e-4)
    assert together[3][1] == 1, "an empty answer is its end"
    monkeypatch.setattr(judging, "CHUNK", 2)
    chunked = answer_loss(tiny, micro.tokenizer, QUESTIONS, answers, system="")
    assert [loss for loss, _ in chunked] == pytest.approx([loss for loss, _ in together], rel=1e-5)
    assert answer_loss(tiny, micro.tokenizer, [], [], system="") == []
