r"""The places of a response where an answer is stated: boxes, markers ("Answer:", "答案是"), sentences.

Invariants: any text is accepted; time is linear in it (no pattern can start where it may run over more than a few
hundred characters in vain; tests/unit/test_extract.py holds hostile texts and 1 MB to it). What is thought (`<think>`)
is no answer.

The box is the form the CoT prompts ask for (recipe §8.1), matched by braces as the official
reasoning_data_pipeline/utils/accuracy_reward.py `extract_answer_from_box` does; unlike there, a box that is not closed
holds nothing, where the official code hands back the whole response.
"""

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

LAST = 64  # statements that are looked at; a response that has more is a loop
REGION = 400  # characters after a marker that can hold the answer
_CHUNK = 256  # NFKC orders combining marks in quadratic time: 80,000 in a row took 5 s, in pieces 0.02 s

_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,9}[{｛]|\\[{}]|[{}｛｝]")
_WRAP = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt|bb|cal)|mbox|operatorname|boldsymbol|bf|rm)"
    r"\s?\{([^{}]{0,400})\}"
)
_FRACTION = re.compile(r"\\[dtc]?frac\s?(?:\{([^{}]{1,40})\}\s?\{([^{}]{1,40})\}|(\d)\s?(\d))")
_SIGNS = (
    ("\\left", ""), ("\\right", ""), ("{,}", ","), ("\\%", "%"), ("\\$", "$"), ("\\times", "×"), ("\\cdot", "×"),
    ("^{\\circ}", "°"), ("^\\circ", "°"), ("\\approx", "≈"), ("\\(", ""), ("\\)", ""), ("\\[", ""), ("\\]", ""),
    ("\\,", " "), ("\\;", " "), ("\\:", " "), ("\\!", ""), ("\\quad", " "), ("\\ ", " "), ("~", " "), ("$", ""),
    ("**", ""), ("__", ""), ("`", ""),
)  # fmt: skip

_BE = (
    r"(?:is|are|was|should\sbe|must\sbe|will\sbe|would\sbe|could\sbe|might\sbe|may\sbe|has\sto\sbe|can\sonly\sbe"
    r"|cannot\sbe|can't\sbe|isn't)\b"
)
_MARKER = re.compile(
    r"(?:(?<!no )(?<!any )\banswers?\b|\bconclusion\b(?=[*_]{0,3}:)"
    r"|\b(?:correct|right|best|final|appropriate|accurate|suitable)\s(?:option|choice|response)\b)"
    r"(?:\s(?:to|for|of)\s(?:the|this|that|your)\s(?:\w{1,20}\s){0,2}?\w{1,20}(?=\s|:))?(?:\s(?:choice|option|letter|here))?"
    rf"[*_\"]{{0,4}}\s?(?:[:：=→]|,?{_BE})"
    r"|(?:答案|(?:正确|最佳|合适)的?(?:选项|选择|回答))[*_]{0,3}\s?(?:】|(?:应该|应当|应|就|便|只能|可能|显然)?(?:是|为|选|[:：=]))"
    r"|最(?:符合|合适|恰当|可能)[^,。，\n]{0,8}(?:是|为)"
    r"|^[#>*_\- ]{0,8}(?:(?:the|my|final|correct)\s){0,2}answer[*_#: ]{0,6}$"
    r"|^####\s?(?=[-+$]{0,2}\d[\d.,]{0,40}\s?$)",
    re.IGNORECASE | re.MULTILINE,
)
_LEAD = re.compile(r"[\s*_>:：]*")
_VERB = re.compile(rf"(?:{_BE}|[是为选])$", re.IGNORECASE)
_END = re.compile(
    r"(?<!\b[A-Z][.])(?<!\bst[.])(?<!\bdr[.])(?<!\bmr[.])(?<!\bmrs[.])(?<!\bvs[.])(?<=[.!?])[*_\"')]{0,3}\s+"
    r"|(?<=[。！？；])|\n+",
    re.IGNORECASE,
)
_IF = re.compile(r"\b(?:if|were|had)\b|如果|假如|若", re.IGNORECASE)
REFUSAL = re.compile(
    r"\W*(?:(?:i'?m|i am) (?:(?:very|really|so) )?sorry|sorry\b|(?:unfortunately, )?i (?:can't|can ?not|am unable"
    r"|am not able|am not sure|don't know|do not know)|as an ai\b|抱歉|很抱歉|对不起|我?(?:无法|不能确定|不知道))",
    re.IGNORECASE,
)  # fmt: skip


class Statement(NamedTuple):
    """Where an answer is stated. text: what a box holds, or the line after a marker. inline: a sentence of it."""

    text: str
    boxed: bool
    inline: bool = False


def thought_out(text: str) -> str:
    """The response without what was thought before it; runs of spaces become one, none stand around a line's end."""
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    text = re.sub(r"[^\S\n]+", " ", text)
    return re.sub(r" ?\n ?", "\n", text).strip()


def compatible(text: str) -> str:
    """NFKC (fullwidth forms, circled letters), with ½ as 1/2 and ⁵ as ^{5} rather than glued to what they follow."""
    if text.isascii():
        return text
    text = re.sub("[¼-¾⅐-⅞↉]", lambda m: " " + unicodedata.normalize("NFKC", m.group()).replace("⁄", "/"), text)
    text = re.sub("[⁰¹²³⁴-⁹⁻]+", lambda m: f"^{{{unicodedata.normalize('NFKC', m.group())}}}", text)
    text = "".join(unicodedata.normalize("NFKC", text[at : at + _CHUNK]) for at in range(0, len(text), _CHUNK))
    return text.replace("\u2212", "-").replace("’", "'").replace("‘", "'")


def plain(text: str) -> str:
    r"""Without LaTeX's and Markdown's dress: \text{…} unwrapped, \frac{a}{b} as a/b, no $, ** or backticks."""
    if "\\" in text:
        for _ in range(4):
            text, found = _WRAP.subn(r"\1", text)
            if not found:
                break
        text = _FRACTION.sub(lambda m: f" {m[1] or m[3]}/{m[2] or m[4]}", text)
    for sign, other in _SIGNS:
        text = text.replace(sign, other)
    text = text.strip()
    return text[1:-1].strip() if re.fullmatch(r"\{[^{}]*\}", text) else text


def boxes(text: str) -> list[tuple[int, int, int]]:
    r"""The closed \boxed{…}, \fbox{…} and the last <answer>…</answer>: (first character, first and last of content)."""
    found, stack = [], []
    for match in _BOX.finditer(text):
        token = match.group()
        if token[0] == "\\" and len(token) == 2:  # a brace that is printed
            continue
        if token[-1] in "{｛":
            stack.append((match.start(), match.end(), len(token) > 1))
        elif stack:
            start, content, boxed = stack.pop()
            if boxed:
                found.append((start, content, match.start()))
    if (end := text.rfind("</answer>")) >= 0 and (start := text.rfind("<answer>", 0, end)) >= 0:
        found.append((start, start + len("<answer>"), end))
    return sorted(found)


def statements(text: str, *more: re.Pattern[str]) -> Iterator[Statement]:
    """Boxes and what follows a marker, the last of the response first.

    more: further markers. One that is conditional ("if …, the answer would be A") states nothing; neither does one
    that is followed by a box, which states it itself, closed or not.
    """
    found = [(start, begin, end, True) for start, begin, end in boxes(text)]
    for pattern in (_MARKER, *more):
        for match in pattern.finditer(text):
            begin = _LEAD.match(text, match.end(), match.end() + 20).end()  # pyright: ignore[reportOptionalMemberAccess]
            found.append((match.start(), begin, match.end(), False))
    for start, begin, end, boxed in sorted(found, reverse=True)[:LAST]:
        if boxed:
            yield Statement(text[begin:end], True)
            continue
        marker, region = text[start:end], text[begin : begin + REGION].partition("\n")[0]
        before = _END.split(text[max(0, start - 200) : start])[-1]
        if re.search(r"(?:would|could|might|may)\sbe$", marker) and _IF.search(before + " " + region):
            continue
        if re.search(r"(?:can't|cannot|isn't)", marker):
            region = "not " + region
        if not re.match(r"[\s$*_(\[\\]{0,9}\\(?:boxed|fbox)\b", region):
            yield Statement(region, False, _VERB.search(marker) is not None)


def marked(text: str) -> bool:
    """Whether an answer is announced anywhere, were it empty or cut off."""
    return "\\boxed" in text or "<answer>" in text or _MARKER.search(text) is not None


def sentences(text: str) -> list[str]:
    """Sentences and lines, none empty. "B. a dog", "St. Louis" and "3.5" are not split."""
    return [part.strip() for part in _END.split(text) if part.strip()]


def cut_off(text: str, parts: list[str]) -> bool:
    """Whether it looks as if more was to come: several sentences of which the last has no end, or an open one."""
    end = text.rstrip("*_`\"'”）) ")[-1:]
    return end in tuple(",，、=+×-:：(") or (len(parts) > 1 and end not in tuple(".!?。！？；;…"))
