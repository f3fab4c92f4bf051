"""The words behind a question are the official ones, to the letter, or one's own."""

from typing import Any

import pytest

from modeling.errors import UserError
from stages.evaluate.items import Item
from stages.evaluate.prompts import asked, grounding
from stages.evaluation import Prompt

# OpenGVLab/InternVL, internvl_chat/tools/reasoning_data_pipeline/utils/constants.py
BOXED_EN = (
    "Answer the preceding question. The last line of your response should follow this format: "
    "'Answer: \\boxed{$FINAL_ANSWER}' (without quotes), where 'FINAL_ANSWER' is your conclusion "
    "based on the reasoning provided. If you are uncertain or the problem is too complex, make "
    "a reasoned guess based on the information provided. Avoid repeating steps indefinitely—"
    "provide your best guess even if unsure. Think step by step logically, considering all "
    "relevant information before answering."
)
BOXED_ZH = (
    "请回答上述问题。你的回答最后一行应遵循以下格式："
    "“答案：\\boxed{$FINAL_ANSWER}”（不包含引号），其中“FINAL_ANSWER”是你根据推理得出的最终结论。"
    "如果你不确定答案或问题过于复杂，请基于已有信息做出有理有据的猜测。"
    "避免无限重复推理步骤——即使不完全确定，也请给出你认为最合理的答案。"
    "请一步一步进行逻辑思考，充分考虑所有相关信息后再作答。"
)
# open-compass/VLMEvalKit, vlmeval/vlm/internvl/utils.py build_mcq_cot_prompt
BOXED_CHOICE = (
    "Answer the preceding multiple choice question. The last line of your response should follow "
    "this format: 'Answer: \\boxed{$LETTER}' (without quotes), where LETTER is one of the options. "
    "If you are uncertain or the problem is too complex, make a reasoned guess based on the "
    "information provided. Avoid repeating steps indefinitely—provide your best guess even if "
    "unsure. Think step by step logically, considering all relevant information before answering."
)


def item(kind: Any = "text", question="<image>\nWhich?", language: Any = "en") -> Item:
    return Item("1", "t", question, kind, "exact", ("x",), language=language)


@pytest.mark.parametrize(
    ("kind", "language", "name", "words"),
    [
        ("choice", "en", "direct", "Answer with the option's letter from the given choices directly."),
        ("choice", "zh", "direct", "请直接回答选项字母。"),
        ("text", "en", "direct", "Answer the question using a single word or phrase."),
        ("number", "en", "direct", "Answer the question using a single word or phrase."),
        ("yes_no", "en", "direct", "Answer the question using a single word or phrase."),
        ("yes_no", "zh", "direct", "请用单个词或短语回答问题。"),
        ("choice", "en", "cot", BOXED_CHOICE),
        ("text", "en", "cot", BOXED_EN),
        ("yes_no", "en", "cot", BOXED_EN),
        ("number", "zh", "cot", BOXED_ZH),
    ],
)
def test_official_words(kind, language, name, words):
    assert asked(item(kind, language=language), name, Prompt()) == f"<image>\nWhich?\n{words}"


def test_chinese_choices_are_asked_for_a_letter_in_a_box():
    words = asked(item("choice", language="zh"), "cot", Prompt())
    assert "“答案：\\boxed{$LETTER}”" in words and words.endswith(BOXED_ZH[-40:])


def test_a_region_is_asked_for_in_the_official_words():
    # eval/refcoco/evaluate_grounding.py
    question = "Please provide the bounding box coordinate of the region this sentence describes: <ref>the cat</ref>"
    assert grounding("the cat", "en") == question
    assert asked(item("box", question), "direct", Prompt()) == question
    assert grounding("Where is <ref>the cat</ref>?", "en") == "Where is <ref>the cat</ref>?"


def test_words_that_the_data_have_already_are_neither_doubled_nor_contradicted():
    said = item("yes_no", "<image>\nIs it?\nAnswer the question using a single word or phrase.")
    assert asked(said, "direct", Prompt()) == said.question
    assert asked(said, "cot", Prompt()) == f"<image>\nIs it?\n{BOXED_EN}"


def test_ones_own_words_replace_the_official_ones_also_none():
    assert asked(item(), "cot", Prompt(suffix="Be brief.")) == "<image>\nWhich?\nBe brief."
    assert asked(item(), "direct", Prompt(suffix="")) == "<image>\nWhich?"
    assert asked(item(), "brief", Prompt(suffix="Be brief.")) == "<image>\nWhich?\nBe brief."
    with pytest.raises(UserError, match=r"prompts\.brief: has no words of its own.*suffix"):
        asked(item(), "brief", Prompt())
