"""When an extracted answer equals a reference: exact, relaxed numeric, ANLS, letters, yes or no; and the key of a vote.

Invariants: pure; None equals nothing; of several references the best counts; every score lies in [0, 1].

- exact: equal after normalisation (NFKC, case, spaces, punctuation), for VQA also without articles and with number
  words as digits, as the official `EvalAIAnswerProcessor` (accuracy_reward.py) does.
- relaxed: within 5 % of the reference (ChartQA, arXiv 2203.10244 §5.1). Percent is as written: "50%" is 50, or .5.
  The official evaluate_vqa.py reads "50%" as 0.5 and accuracy_reward.py as 50; here it is whatever fits.
  `exactly` holds years (as accuracy_reward.py does with 20xx) or all integers to the figure.
- vqa: of ten references, which are annotators' answers, the accuracy of VQA (arXiv 1505.00468 §3: min(matches / 3, 1),
  averaged over each nine of them); of fewer, any that is equal.
- number: equal as numbers, rounded to the fewer decimals of the two, but never to fewer than two: MMMU's
  `normalize_str` rounds all to two.
- iou: a box of IoU .5 or more (boxes.py).
- ANLS (arXiv 1907.00490 §4): 1 - normalised Levenshtein distance where that is under .5 of the longer text, else 0.
  (accuracy_reward.py adds the distance itself, so that there the most different text scores best.)
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal

from stages.evaluate import boxes, numerals
from stages.evaluate.extract import Kind
from stages.evaluate.spans import compatible, plain

Exactly = Literal["nothing", "years", "integers"]

ANNOTATORS = 10
DECIMALS = 12  # more than any answer has

_PUNCTUATION = re.compile(r"(?<=\d)[.,:/](?=\d)|([^\w\s%°$€£¥+\-]|_)|(?<!\w)-(?!\d)")
_ARTICLES = re.compile(r"\b(?:an?|the)\b")
_SMALL = {word: str(i) for i, word in enumerate(numerals.ONES[:11])} | {"none": "0"}
_YES = frozenset({"yes", "true", "是", "对", "正确", "有"})
_NO = frozenset({"no", "false", "否", "不是", "错", "错误", "不对", "没有"})


def normalise(text: str, vqa: bool = False) -> str:
    """The text as it is compared: NFKC, no case, one space, no punctuation but that of figures."""
    text = " ".join(unicodedata.normalize("NFKC", text[:4096]).casefold().split())
    text = _PUNCTUATION.sub(lambda m: m.group() if m[1] is None and m.group() != "-" else " ", text)
    if vqa:
        text = _ARTICLES.sub(" ", text)
        text = " ".join(_SMALL.get(word, word) for word in text.split())
    return " ".join(text.split())


def exact(answer: str | None, references: Sequence[str], *, vqa: bool = False) -> bool:
    """Whether the answer is one of the references after normalisation; mere punctuation stays as it is."""
    if answer is None:
        return False
    key = normalise(answer, vqa)
    return any(key == normalise(text, vqa) if key else answer.strip() == text.strip() for text in references)


def vqa(answer: str | None, references: Sequence[str]) -> float:
    """Equal to a reference; to one of ten annotators .3, to two .6, to three .9, to more 1."""
    if len(references) != ANNOTATORS:
        return float(exact(answer, references, vqa=True))
    same = sum(exact(answer, [text], vqa=True) for text in references)
    others = ANNOTATORS - same
    return (same * min(1.0, (same - 1) / 3) + others * min(1.0, same / 3)) / ANNOTATORS


def number(answer: str | None, references: Sequence[str]) -> bool:
    """Whether the answer is a reference's number; where either is no number, `exact`. Percent is as written."""
    return answer is not None and any(_same_number(answer, text) for text in references)


def relaxed(
    answer: str | None, references: Sequence[str], *, tolerance: float = 0.05, exactly: Exactly = "nothing"
) -> bool:
    """Whether the answer's number lies within the tolerance of a reference's; where either is no number, `exact`."""
    if answer is None:
        return False
    return any(_near(answer, text, Fraction(str(tolerance)), exactly) for text in references)


def anls(answer: str | None, references: Sequence[str], *, threshold: float = 0.5) -> float:
    """The best similarity to a reference, 0 where the distance is at least the threshold's share of the longer text."""
    if answer is None:
        return 0.0
    given = " ".join(answer.casefold().split())
    best = 0.0
    for text in references:
        wanted = " ".join(text.casefold().split())
        longer = max(len(given), len(wanted))
        if longer == 0:
            best = 1.0
        elif longer - min(len(given), len(wanted)) < threshold * longer:  # else the lengths alone are too far apart
            share = distance(given, wanted) / longer
            best = max(best, 1 - share if share < threshold else 0.0)
    return best


def choice(answer: str | None, references: Sequence[str]) -> bool:
    """Whether the letters are those of a reference, in any order and dress: "AC" equals "A, C" and "(c) (a)"."""
    return answer is not None and any(_letters(answer) == _letters(text) for text in references)


def yes_no(answer: str | None, references: Sequence[str]) -> bool:
    """Whether the answer says what a reference says; 是, true… count."""
    said = _polarity(answer) if answer is not None else None
    return said is not None and any(said == _polarity(text) for text in references)


def vote_key(answer: str, kind: Kind) -> str:
    """What equal answers share, so that votes are counted on it: 0.75, 3/4 and 75e-2; "Paris" and "paris."."""
    if kind == "number" and (figure := _value(answer)) is not None:
        return str(figure)
    if kind == "choice":
        return _letters(answer)
    return (_polarity(answer) if kind == "yes_no" else None) or normalise(answer) or answer.strip()


METRICS: dict[str, Callable[[str | None, Sequence[str]], float]] = {
    "exact": lambda answer, references: float(exact(answer, references)),
    "vqa": vqa,
    "number": lambda answer, references: float(number(answer, references)),
    "relaxed": lambda answer, references: float(relaxed(answer, references)),
    "anls": anls,
    "choice": lambda answer, references: float(choice(answer, references)),
    "yes_no": lambda answer, references: float(yes_no(answer, references)),
    "iou": lambda answer, references: float(boxes.iou(answer, references) >= boxes.RIGHT),
}


def distance(one: str, other: str) -> int:
    """Levenshtein's: insertions, deletions and replacements that make one text the other; O(len × len) time."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def _value(text: str) -> Fraction | None:
    return numerals.value(plain(compatible(text)).rstrip(". "))


def _same_number(answer: str, reference: str) -> bool:
    given, wanted = _value(answer), _value(reference)
    if given is None or wanted is None:
        return exact(answer, [reference])
    places = max(2, min(_decimals(given), _decimals(wanted)))
    return round(given, places) == round(wanted, places)


def _decimals(figure: Fraction) -> int:
    """How many a number is written with; those of 1/3 have no end."""
    return next((d for d in range(DECIMALS) if (figure * 10**d).denominator == 1), DECIMALS)


def _near(answer: str, reference: str, tolerance: Fraction, exactly: Exactly) -> bool:
    given, wanted = _value(answer), _value(reference)
    if given is None or wanted is None:
        return exact(answer, [reference])
    year = re.fullmatch(r"(?:1[5-9]|20)\d\d", reference.strip()) is not None
    if (exactly == "years" and year) or (exactly == "integers" and wanted.denominator == 1):
        return given == wanted
    scales = [Fraction(1)]
    if ("%" in answer) != ("%" in reference):  # 0.5 and "50%"
        scales.append(Fraction(1, 100) if "%" in answer else Fraction(100))
    return any(abs(given * scale - wanted) <= tolerance * abs(wanted) for scale in scales)


def _letters(text: str) -> str:
    return "".join(sorted(set(re.sub(r"[^A-Z]", "", compatible(text).upper()))))


def _polarity(text: str) -> str | None:
    word = normalise(text)
    return "yes" if word in _YES else "no" if word in _NO else None
