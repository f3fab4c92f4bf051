r"""The answer of a response: a letter, a number, yes or no, or a text; None where there is none.

Invariants: pure, and linear in the response; any text is accepted; what cannot be read is None and is never guessed.
`fallback` is the keyed draw that the old parsers made in secret (MMMU `eval_utils.py parse_multi_choice_response`
calls `random.choice`): a user asks for it, and the rate of None is reported all the same.

Which candidate wins, for direct answers and chains of thought alike:

1. What is stated: boxes (`\boxed{…}`, `<answer>…</answer>`) and markers ("Answer:", "the correct option is", "答案是",
   "选B", "B is correct", a heading "Answer"). The last that can be read wins. A marker behind a box wins over it: it is
   a correction. A marker in the conditional or followed by its own box does not count. A box that is not empty ends
   the search: if it holds none of the options or no number, there is no answer, whatever was said before it.
2. Otherwise the form of the whole: a letter, number, yes or no at the very beginning or as the last line; then what the
   last sentence names; then what is named once in all. A refusal, or a response that breaks off, has no answer.
3. Several letters are an answer only to a question with several.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from stages.evaluate import choices, numerals
from stages.evaluate.spans import (
    REFUSAL,
    Statement,
    compatible,
    cut_off,
    marked,
    plain,
    sentences,
    statements,
    thought_out,
)

Kind = Literal["choice", "number", "text", "yes_no"]

_LETTER = r"[(*\"]{0,3}[A-Z][)*\"]{0,3}"
_CHOOSE = re.compile(
    r"(?<!not )\b(?:choose|chose|select|pick|go with|opt for|choosing|selecting)\s"
    r"(?=(?:option |answer |choice )?[(*\"]{0,3}[A-Z]\b)"
    rf"|\b(?:therefore|thus|hence|so)[,:]? (?=(?:it is |it's |option )?{_LETTER}[.!]?$)"
    r"|(?<![不别没勿首优备])(?<!不应)(?<!不能)(?<!不该)选(?:择|项)?(?::|是|为)? ?(?<!选项)"
    r"(?=[(*\"“]{0,3}[A-Z](?![A-Za-z]*[a-z]))",
    re.MULTILINE,
)
_VERDICT = re.compile(
    r"(?=(?<![A-Za-z'\-])(?<!and )(?<!or )(?<![A-Z], )(?<!\), )(?<![、和与])"
    rf"{_LETTER}(?:(?:, | and | or |、|和|与){_LETTER}){{0,8}}"
    r"(?: (?:is|are)(?: \w+ly| therefore| indeed| both)? (?:the )?(?:only |most )?"
    r"(?:correct|right|best|true|answer|accurate|appropriate)\b"
    r"|(?:选项)?(?:是|为|最|才)?(?:正确|符合题意|对)(?!应|于|比)))"
)
_YES = (
    r"(?:yes|yeah|yep|yup|true|correct|right)\b|没错|是的|对的|正确|是(?!否|不)|对(?!于|比|面|应|话)|有(?=$|\W|一|两)"
)
_NO = (
    r"(?:no(?! (?:one|idea|doubt)\b)|nope|nah|false|incorrect|wrong)\b|不是|不对|不正确|没有|错误|错|否|无(?!法)"
    r"|不(?!确定|知|清|能|好|一定|明)"
)
_SAID = re.compile(rf"\W*(?:(?P<no>{_NO})|(?P<yes>{_YES}))", re.IGNORECASE)
_BOTH = re.compile(r"\W*yes (?:and|or) no\b", re.IGNORECASE)
_SO = re.compile(r"(?:.*\b(?:so|therefore|thus|hence)\b|.*(?:因此|所以))[,: ]{0,2}", re.IGNORECASE)
_COMMA = re.compile(r"[,，] ?((?:yes|no)\W*)$", re.IGNORECASE)
_NO_CLAIM = re.compile(
    r"\bthere (?:is|are) (?:no|not)\b|\bthere (?:isn't|aren't)\b|没有|不存在|不正确|是错"
    r"|\bi (?:do not|don't) see (?:any|an?)\b"
    r"|\b(?:is|are) (?:false|incorrect|wrong|not (?:true|correct))\b"
    r"|^(?:(?:it|this|that|he|she|they) (?:is|are|was|does|do|can) not|not at all|not really)\W*$",
    re.IGNORECASE,
)
_YES_CLAIM = re.compile(
    r"\bthere (?:is|are)\b|\b(?:is|are) (?:true|correct)\b|正确|是对的|[中里上]有"
    r"|\bi (?:can )?see (?:an?|some)\b"
    r"|^(?:it|this|that|he|she|they) (?:is|are|was|does|do|can)\W*$",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"^ ?[*_#]{0,4}\d{1,2}[.)] |\b(?:step|option|question|figure|image|table) \d+[.:]?|第 ?\d+ ?[步题张]",
    re.MULTILINE | re.IGNORECASE,
)
_YEAR = re.compile(
    r"\b(?:in|since|by|of|year|from|until|during|for) (?:the year )?(?:1[5-9]|20)\d\d\b|(?:1[5-9]|20)\d\d年",
    re.IGNORECASE,
)
_RANGE = re.compile(r" ?(?:-|–|~|to|至|到|[×*+÷]) ?[$€£]?\d")
_RANGED = re.compile(r"(?:\bbetween .*|\d ?(?:-|–|~|to|[×*+÷]) ?)$")
_QUOTES = ("**", "__", "``", '""', "“”", "「」", "''", "‘’", "《》", "$$", "$", "`", "*")


def extract(
    response: str,
    kind: Kind,
    options: Mapping[str, str] | Sequence[str] = (),
    *,
    multiple: bool = False,
    cut: bool = False,
) -> str | None:
    """The answer of a response, or None.

    options: of a choice, {letter: text} or texts for A, B, C…; a text may be empty. multiple: several letters may be
    right; they come in order ("AC"). cut: the generation ended at its limit, so only boxes and markers count.
    Returns a letter; a number as `numerals` writes it ("1234.5", "3/4", "50%"); "yes" or "no"; or a text as it stands.
    """
    text = thought_out(response)
    if kind == "text":
        return _text(text, cut)
    text = compatible(text)
    if not text:
        return None
    if kind == "choice":
        return _choice(text, choices.settle(options), multiple, cut)
    return _number(text, cut) if kind == "number" else _yes_no(text, cut)


def fallback(seed: int, question_id: str, options: Mapping[str, str] | Sequence[str]) -> str:
    """A letter drawn for a question whose response has no answer: one seed and one question draw the same again."""
    letters = [letter for letter, _ in choices.settle(options)]
    if not letters:
        raise ValueError(f"question {question_id} has no options to draw from")
    drawn = hashlib.sha256(f"{seed}\0{question_id}".encode("utf-8", "surrogatepass")).digest()
    return letters[int.from_bytes(drawn[:8], "big") % len(letters)]


def _choice(text: str, options: choices.Options, multiple: bool, cut: bool) -> str | None:
    def answer(found: set[str]) -> str | None:
        return "".join(sorted(found)) if len(found) == 1 or (multiple and found) else None

    for said in statements(text, _CHOOSE, _VERDICT):
        if said.boxed and not plain(said.text):
            continue
        if (found := choices.read(said.text, options)) or said.boxed:
            return answer(found)
    if cut or (REFUSAL.match(text) and not any(option == choices.comparable(text) for _, option in options)):
        return None
    return answer(choices.guess(text, options))


def _number(text: str, cut: bool) -> str | None:
    for said in statements(text):
        if said.boxed and not plain(said.text):
            continue
        if (found := _stated(said)) or said.boxed:
            return found
    parts = sentences(text)
    if cut or REFUSAL.match(text) or "\\boxed" in text:
        return None
    if cut_off(text, parts) and not re.search(r"\d[^\d\s]{0,4}(?: \w{1,12})?$", parts[-1]):
        return None
    last = plain(parts[-1])
    return _last(last) if numerals.numbers(last) or numerals.words(last) else _only(plain(text))


def _stated(said: Statement) -> str | None:
    """The first number of a statement, behind its last "=" where there is one; a range is none."""
    region = plain(said.text)
    region = region if said.boxed else (sentences(region) or [""])[0]
    behind = re.split(r"[=≈]", region)[-1]
    for find in (numerals.numbers, numerals.words):
        for place in (behind, region):
            if found := find(place):
                start, end, figure = found[0]
                ranged = _RANGE.match(place, end) or re.search(r"\bbetween $", place[:start])
                return None if ranged else figure
    return None


def _last(sentence: str) -> str | None:
    """The last number of a sentence, not a year it speaks of where there is another."""
    sentence = _LABEL.sub("", sentence)
    head, _, parts = sentence.partition(": ")  # "There are 9: 4 men and 5 women."
    if len(numerals.numbers(head)) == 1 and len(numerals.numbers(parts)) > 1 and "=" not in parts:
        sentence = head
    for find in (numerals.numbers, numerals.words):
        if found := find(_YEAR.sub(" ", sentence)) or find(sentence):
            return None if _RANGED.search(sentence[: found[-1][0]][-40:]) else found[-1][2]
    return None


def _only(text: str) -> str | None:
    """The number of a text that has no other."""
    text = _LABEL.sub("", text)
    for find in (numerals.numbers, numerals.words):
        if found := {figure for _, _, figure in find(text)}:
            return found.pop() if len(found) == 1 else None
    return None


def _yes_no(text: str, cut: bool) -> str | None:
    for said in statements(text):
        if said.boxed and not plain(said.text):
            continue
        if (found := _said(plain(said.text))) or said.boxed:
            return found
    if cut or REFUSAL.match(text):
        return None
    parts = [plain(part) for part in sentences(text)]
    last = parts[-1]
    so = _SO.match(last)
    end = _COMMA.search(last)
    if found := _said(parts[0]) or _said(last) or (so and _said(last[so.end() :])) or (end and _said(end[1])):
        return found
    if cut_off(text, parts):
        return None
    return "no" if _NO_CLAIM.search(last) else "yes" if _YES_CLAIM.search(last) else None


def _said(text: str) -> str | None:
    """yes or no, if the text begins with it."""
    match = _SAID.match(text)
    return None if match is None or _BOTH.match(text) else "no" if match["no"] else "yes"


def _text(text: str, cut: bool) -> str | None:
    for said in statements(text):
        region = said.text
        if said.inline:
            region = (sentences(region) or [""])[0]
        if found := _bare(region):
            return found
    if cut or marked(text) or REFUSAL.match(text):
        return None
    return _bare(text)


def _bare(text: str) -> str | None:
    """Without emphasis, quotes, formula signs and full stop around it; \\text{…} unwrapped."""
    text = re.sub(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox) ?\{([^{}]*)\}", r"\1", text).strip()
    for _ in range(6):
        before = text
        text = re.sub(r"^\\[(\[]\s*(.*?)\s*\\[)\]]$", r"\1", text.strip(), flags=re.DOTALL)
        text = re.sub(r"\*\*([^*]+)\*\*", r"\1", text)
        for pair in _QUOTES:
            left, right = pair[: (len(pair) + 1) // 2], pair[len(pair) // 2 :]
            if pair in ("**", "__", "$$"):
                left = right = pair
            if len(text) > len(left + right) and text.startswith(left) and text.endswith(right):
                text = text[len(left) : -len(right)]
        if text.endswith(("。", ".")) and not text.endswith("..") and not re.search(r"\b[A-Za-z]\.[A-Za-z]\.$", text):
            text = text[:-1]
        if text == before:
            break
    return re.sub(r" {2,}", " ", text).strip(" *_") or None
