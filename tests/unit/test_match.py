"""When an answer equals a reference: each metric against hand-computed cases."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.evaluate import match


@pytest.mark.parametrize(
    ("answer", "reference", "equal", "vqa"),
    [
        ("Paris.", "paris", True, True),
        ("  New   York ", "new york", True, True),
        ("Ｐａｒｉｓ", "Paris", True, True),
        ("the cat", "cat", False, True),
        ("two dogs", "2 dogs", False, True),
        ("Coca-Cola", "coca cola", False, False),
        ("3.5", "35", False, False),
        ("1:30", "130", False, False),
        ("-5", "5", False, False),
        ("it's", "its", False, False),
        ("北京。", "北京", True, True),
        ("25 cm²", "25 cm2", True, True),
        ("?", "!", False, False),
        ("!", "!", True, True),
    ],
)
def test_exact(answer, reference, equal, vqa):
    assert match.exact(answer, [reference]) is equal
    assert match.exact(answer, [reference], vqa=True) is vqa
    assert match.exact(answer, ["something else", reference]) is equal


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("105", "100", True),
        ("95", "100", True),
        ("105.1", "100", False),
        ("94.9", "100", False),
        ("-100", "100", False),
        ("-97", "-100", True),
        ("0", "0", True),
        ("0.01", "0", False),
        ("1,234.5", "1234.5", True),
        ("$5", "5", True),
        ("50", "50%", True),
        ("0.5", "50%", True),
        ("50%", "0.5", True),
        ("50%", "55%", False),
        ("3/4", "0.75", True),
        ("12 kg", "12", True),
        ("Brazil", "brazil", True),
        ("Brazil 2014", "Brazil 2015", False),
        ("2014-2016", "2014", False),
        ("many", "3", False),
        ("5 million", "5000000", True),
    ],
)
def test_relaxed(answer, reference, equal):
    assert match.relaxed(answer, [reference]) is equal


def test_relaxed_can_hold_years_and_integers_to_the_figure():
    assert match.relaxed("2010", ["2014"])
    assert not match.relaxed("2010", ["2014"], exactly="years")
    assert match.relaxed("2900", ["3000"], exactly="years")
    assert not match.relaxed("2900", ["3000"], exactly="integers")
    assert match.relaxed("2.9", ["3.01"], exactly="integers")
    assert not match.relaxed("101", ["100"], tolerance=0)


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("Hello World", ["hello  world"], 1.0),
        ("ab", ["ax"], 0.0),  # half of it differs: at the threshold
        ("abc", ["abx"], 2 / 3),
        ("abc", ["xyz", "abd", "abc"], 1.0),
        ("", [""], 1.0),
        ("", ["a"], 0.0),
        ("a" * 10_000, ["a"], 0.0),
        ("中国银行", ["中国很行"], 0.75),
    ],
)
def test_anls(answer, references, score):
    assert match.anls(answer, references) == pytest.approx(score)


def test_choices_and_yes_no():
    assert match.choice("B", ["b"]) and match.choice("B", ["(B)"]) and match.choice("AC", ["C, A"])
    assert not match.choice("A", ["AC"]) and not match.choice("B", ["C"])
    assert match.yes_no("yes", ["Yes."]) and match.yes_no("no", ["否"]) and match.yes_no("True", ["yes"])
    assert not match.yes_no("yes", ["no"]) and not match.yes_no("perhaps", ["perhaps"])


@pytest.mark.parametrize("metric", match.METRICS)
def test_no_answer_equals_nothing(metric):
    assert match.METRICS[metric](None, ["", "None", "no"]) == 0


def test_votes_are_counted_on_what_is_said():
    assert len({match.vote_key(text, "number") for text in ("0.75", "3/4", "75e-2", ".750")}) == 1
    assert match.vote_key("50%", "number") == match.vote_key("50", "number") != match.vote_key("51", "number")
    assert match.vote_key("Paris.", "text") == match.vote_key("paris", "text")
    assert match.vote_key("!", "text") != match.vote_key("?", "text")
    assert match.vote_key("是", "yes_no") == match.vote_key("yes", "yes_no") == "yes"
    assert match.vote_key("CA", "choice") == "AC"


@given(st.text("abc中", max_size=8), st.text("abc中", max_size=8), st.text("abc中", max_size=8))
def test_the_distance_is_one(a, b, c):
    assert match.distance(a, b) == match.distance(b, a) >= abs(len(a) - len(b))
    assert (match.distance(a, b) == 0) == (a == b)
    assert match.distance(a, c) <= match.distance(a, b) + match.distance(b, c)


@given(st.text(max_size=60), st.text(max_size=60), st.sampled_from(sorted(match.METRICS)))
def test_scores_lie_between_none_and_all(answer, reference, metric):
    assert 0 <= match.METRICS[metric](answer, [reference]) <= 1
    if metric in ("exact", "vqa", "relaxed", "anls"):
        assert match.METRICS[metric](answer, [answer]) == 1


@given(st.fractions(Fraction(1, 1000), 10**6, max_denominator=1000), st.floats(-0.2, 0.2))
def test_the_tolerance_is_a_share_of_the_reference(reference, off):
    answer = f"{float(reference) * (1 + off):.12f}"
    if abs(abs(off) - 0.05) > 1e-3:
        assert match.relaxed(answer, [f"{float(reference):.12f}"]) is (abs(off) < 0.05)
