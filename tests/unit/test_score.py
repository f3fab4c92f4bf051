"""From responses to the rows of the tables, each task type against a case that is worked out by hand."""

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.evaluate import boxes, extract, match, statistics
from stages.evaluate.items import Item
from stages.evaluate.score import answer_of, maximum, table, value_of


def item(id="1", kind: Any = "text", metric="exact", references=("x",), task="t", **more) -> Item:
    return Item(id, task, "Q", kind, metric, tuple(references), **more)


def choice(id="1", right="B", **more) -> Item:
    return item(id, "choice", "choice", (right,), options={"A": "cat", "B": "dog", "C": "owl", "D": "bee"}, **more)


def scored(items, responses, cut=None, fallback_seed=None):
    """The table of items with one response each; a response has as many tokens as words."""
    cut = cut or [False] * len(items)
    answers = [answer_of(one, text, at_end) for one, text, at_end in zip(items, responses, cut, strict=True)]
    values = [value_of(one, answer, fallback_seed) for one, answer in zip(items, answers)]
    return table(items, answers, cut, [len(text.split()) for text in responses], values)


def test_choices_count_what_cannot_be_read_and_what_was_cut_as_wrong():
    subjects = ["Art", "Art", "Music", "Music"]
    items = [choice(str(i), category=subject) for i, subject in enumerate(subjects)]
    responses = ["B", "Step 1: … so Answer: \\boxed{B}", "I am sorry, I cannot tell.", "Let me think about the dog"]
    row = scored(items, responses, [False, False, False, True])["t"]
    # right: 2 of 4; unparsable: the refusal and the one that was cut = 2/4; tokens: (1 + 6 + 6 + 6) / 4
    assert (row["n"], row["right"], row["accuracy"], row["metric"]) == (4, 2.0, 0.5, "choice")
    assert (row["unparsable"], row["cut"], row["tokens"]) == (0.5, 0.25, 4.75)
    assert row["categories"] == {"Art": {"n": 2, "accuracy": 1.0}, "Music": {"n": 2, "accuracy": 0.0}}
    # Wilson, p = 1/2, n = 4, z² = 3.8415: centre 1/2, half = 1.96·√(1/16 + 3.8415/64)/(1 + 3.8415/4) = .3500
    assert row["low"] == pytest.approx(0.1500, abs=1e-4) and row["high"] == pytest.approx(0.8500, abs=1e-4)


def test_a_drawn_letter_changes_the_value_and_not_the_rate_of_the_unparsable():
    items = [choice(str(i), extract.fallback(7, str(i), "abcd")) for i in range(8)]  # what seed 7 draws is right
    row = scored(items, ["no idea"] * 8, fallback_seed=7)["t"]
    assert row["accuracy"] == 1.0 and row["unparsable"] == 1.0
    row = scored(items, ["no idea"] * 8)["t"]
    assert row["accuracy"] == 0.0 and row["unparsable"] == 1.0
    assert value_of(item(kind="number", metric="number", references=("3",)), None, fallback_seed=7) == 0


def test_open_questions_of_mmmu():
    items = [
        item("1", "number", "number", ("24/7", "3.429")), item("2", "number", "number", ("1,200",)),
        item("3", "number", "number", ("0.5",)), item("4", "text", "vqa", ("gold", "Au")),
    ]  # fmt: skip
    row = scored(items, ["About 3.43", "It is 1200 kg.", "0.51", "The gold"])["t"]
    assert row["right"] == 3  # 3.43 is 3.429 to two decimals; 1,200 is 1200; .51 is not .5; articles do not count


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [("3.43", "24/7", 1), ("3.42", "24/7", 0), ("0.001", "0.004", 0), ("3", "3.004", 1), ("3", "3.1", 0),
     ("7", "7.0", 1), ("-7", "7", 0), ("1234567", "1234568", 0), ("Paris", "paris", 1),
     ("Paris", "3", 0), (None, "3", 0)],
)  # fmt: skip
def test_numbers_are_the_same_to_the_decimals_that_both_have(answer, reference, same):
    assert match.METRICS["number"](answer, ["none of these", reference]) == same


def test_documents_by_anls():
    items = [
        item("1", metric="anls", references=("Annual Report", "annual report 1999")),
        item("2", metric="anls", references=("Smith",)), item("3", metric="anls", references=("12 May",)),
    ]  # fmt: skip
    row = scored(items, ["annual reports", "Smyth", "1 June"])["t"]
    # 1: one insertion in 14 letters, 1 - 1/14. 2: one replacement in 5, .8. 3: "12 may" against "1 june": 2 deleted,
    # j, u, n and e for m, a, y … 5 edits of 6, over one half: 0
    expected = [13 / 14, 0.8, 0]
    assert row["accuracy"] == pytest.approx(sum(expected) / 3) and row["metric"] == "anls"
    bounds = statistics.interval(expected)
    assert (row["low"], row["high"]) == pytest.approx((bounds.low, bounds.high))


def test_ten_annotators_agree_by_halves():
    """arXiv 1505.00468 §3: over each nine of ten, min(matches / 3, 1)."""
    for matches, accuracy in ((0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)):
        answers = ["two"] * matches + [f"word{i}" for i in range(10 - matches)]
        assert match.METRICS["vqa"]("2", answers) == pytest.approx(accuracy)
    assert match.METRICS["vqa"]("2", ["two", "three"]) == 1


def test_charts_are_right_within_a_twentieth():
    items = [
        item("1", "number", "relaxed", ("200",)), item("2", "number", "relaxed", ("200",)),
        item("3", "text", "relaxed", ("Brazil",)),
    ]  # fmt: skip
    assert scored(items, ["The value is 210.", "211", "Brazil."])["t"]["right"] == 2


def test_hallucination_by_popes_definitions():
    wanted = ["Yes", "Yes", "Yes", "No", "No", "No"]
    groups = ["popular", "popular,random", "random", "popular", "popular", "random"]
    items = [
        item(str(i), "yes_no", "yes_no", (answer,), category=group)
        for i, (answer, group) in enumerate(zip(wanted, groups))
    ]
    row = scored(items, ["Yes", "Yes, there is.", "No.", "yes", "No", "The picture is lovely"])["t"]
    # said yes: 3, of which 2 rightly: precision 2/3; yes wanted: 3, found 2: recall 2/3; F1 2/3
    # right: questions 1, 2 and 5 = 3/6, for the last cannot be read; yes rate 3/6
    assert row["precision"] == row["recall"] == row["f1"] == pytest.approx(2 / 3)
    assert (row["accuracy"], row["yes_rate"], row["unparsable"]) == (0.5, 0.5, pytest.approx(1 / 6))
    assert row["categories"]["popular"] == {"n": 4, "accuracy": 0.75}
    assert row["categories"]["random"] == {"n": 3, "accuracy": pytest.approx(1 / 3)}
    row = scored([items[3]], ["No"])["t"]  # nothing to be found, and nothing said
    assert row["f1"] == row["precision"] == row["recall"] == row["yes_rate"] == 0 and row["accuracy"] == 1


def test_grounding_is_right_from_half_the_union_on():
    reference = ("[100, 100, 300, 300]",)
    items = [item(str(i), "box", "iou", reference) for i in range(4)]
    responses = [
        "<ref>the cat</ref><box>[[100, 100, 300, 300]]</box>",  # all of it: 1
        "<box>[[100, 100, 300, 200]]</box>",  # 20,000 of 40,000: 1/2, and right
        "[[200, 200, 400, 400]]",  # 10,000 of 40,000 + 40,000 - 10,000: 1/7
        "I see no cat.",  # none: 0
    ]
    row = scored(items, responses)["t"]
    assert row["right"] == 2 and row["accuracy"] == 0.5 and row["unparsable"] == 0.25
    assert row["iou"] == pytest.approx((1 + 1 / 2 + 1 / 7) / 4)


@pytest.mark.parametrize(
    ("response", "box"),
    [
        ("<ref>a dog</ref><box>[[12, 34, 560, 780]]</box>", "[12, 34, 560, 780]"),
        ("<box>[[12,34,560,780],[1,2,3,4]]</box>", "[12, 34, 560, 780]"),
        ("<box>12, 34, 560, 780</box>", "[12, 34, 560, 780]"),
        ("<box>(12,34),(560,780)</box>", "[12, 34, 560, 780]"),
        ("[0.012, 0.034, 0.56, 0.78]", "[12, 34, 560, 780]"),
        ("The region is [12, 34, 560, 780].", "[12, 34, 560, 780]"),
        ("12, 34, 560, 780", "[12, 34, 560, 780]"),
        ('```json\n{"bbox_2d": [12, 34, 560, 780], "label": "dog"}\n```', "[12, 34, 560, 780]"),
        ('{"x1": 12, "y1": 34,\n "x2": 560, "y2": 780}', "[12, 34, 560, 780]"),
        ("x_min=12, y_min=34, x_max=560, y_max=780", "[12, 34, 560, 780]"),
        ("The cat is at [1, 2, 3, 4].\nAnswer: \\boxed{[12, 34, 560, 780]}", "[12, 34, 560, 780]"),
        ("<box>[[1, 2, 3, 4]]</box>? No. \nAnswer: \\boxed{<box>[[12, 34, 560, 780]]</box>}", "[12, 34, 560, 780]"),
        ("<think>[1, 2, 3, 4]</think>[12, 34, 560, 780]", "[12, 34, 560, 780]"),
        ("边界框是【12，34，560，780】，即 [12，34，560，780]。", "[12, 34, 560, 780]"),
        ("[12, 34, 560, 780] or [1, 2, 3, 4] or so. Hard to tell.", None),
        ("[12, 34, 560]", None),
        ("[1234]", None),
        ("[[12, 34], [560, 780]]", "[12, 34, 560, 780]"),
        ("[12, 34, 560, 780, 9]", None),
        ("12, 34, 560, 780, 9", None),
        ("It was in 1999, and 2 of 3.", None),
        ("[12, 34, 560, 780]\nAnswer: \\boxed{none}", None),
        ("", None),
    ],
)
def test_the_box_of_a_response(response, box):
    assert answer_of(item(kind="box"), response) == box


def test_of_a_response_that_was_cut_only_what_is_stated_counts():
    thought = "First I look at <box>[[1, 2, 3, 4]]</box> and then at"
    assert answer_of(item(kind="box"), thought, cut=True) is None
    assert answer_of(item(kind="box"), thought) == "[1, 2, 3, 4]"
    assert answer_of(item(kind="box"), "<box>[[1, 2, 3, 4]]</box><box>[[1,", cut=True) == "[1, 2, 3, 4]"


@given(st.text(alphabet="[](){}<>box/0123456789.,;- x1=\\\n", max_size=300))
def test_any_text_is_read_and_what_comes_back_is_a_box(text):
    found = boxes.extract(text)
    assert found is None or boxes.coordinates(found) is not None


@pytest.mark.parametrize("text", ["[" * 200_000, "1, " * 100_000, "<box>" * 50_000, "[1, 2, 3, " * 50_000, " " * 10**6])
def test_a_long_response_takes_no_time(text):
    start = time.process_time()
    boxes.extract(text)
    assert time.process_time() - start < 10


@given(st.lists(st.integers(0, 1000), min_size=8, max_size=8))
def test_overlap_is_a_share_the_same_both_ways(numbers):
    one, other = tuple(map(float, numbers[:4])), tuple(map(float, numbers[4:]))
    share = boxes.overlap(one, other)  # pyright: ignore[reportArgumentType]
    assert 0 <= share <= 1 and share == boxes.overlap(other, one)  # pyright: ignore[reportArgumentType]


def test_chinese_and_plain_language():
    items = [
        choice("1", language="zh", task="zh"), item("2", references=("北京",), language="zh", task="zh"),
        item("3", "yes_no", "yes_no", ("yes",), language="zh", task="zh yn"),
        item("4", references=("Paris",), task="en"),
    ]  # fmt: skip
    rows = scored(items, ["答案：B", "北京。", "是的", "**Paris**."])
    assert {task: row["accuracy"] for task, row in rows.items()} == {"zh": 1, "zh yn": 1, "en": 1}
    assert rows["zh"]["metric"] == "choice, exact" and "f1" in rows["zh yn"]


def test_several_letters_are_an_answer_where_several_may_be_right():
    assert value_of(choice(right="AC", multiple=True), answer_of(choice(right="AC", multiple=True), "A and C")) == 1
    assert answer_of(choice(), "A and C") is None


def test_mmbench_counts_a_question_as_right_if_it_is_with_its_options_in_every_order():
    items = [choice(id) for id in ("5", "1000005", "2000005", "6", "1000006")]
    row = scored(items, ["B", "B", "A", "B", "B"])["t"]
    assert row["accuracy"] == 0.8 and row["circular"] == {"n": 2, "accuracy": 0.5}
    row = scored([choice(id) for id in ("1500123", "2500123")], ["B", "A"])["t"]  # numbers of pictures
    assert "circular" not in row


def test_the_maximum_says_what_it_is_a_maximum_of():
    items = [choice(str(i)) for i in range(3)] + [item("9", task="other")]
    direct = scored(items, ["B", "A", "A", "x"])
    cot = scored(items, ["Answer: \\boxed{B}", "Answer: \\boxed{B}", "I cannot say", "y"])
    best = maximum({"direct": direct, "cot": cot})
    assert best["t"] == {"prompt": "cot", "accuracy": 2 / 3, "n": 3, "label": "maximum over direct, cot"}
    assert best["other"]["prompt"] == "direct"
    frames = maximum({"direct, 16 frames": cot, "direct, 32 frames": cot})  # the first of equals
    assert frames["t"]["prompt"] == "direct, 16 frames" and "16 frames, direct, 32 frames" in frames["t"]["label"]
    assert maximum({"direct": direct}) == {}
