"""The heuristic checks of a conversation's texts (arXiv 2412.05271 §4.3): the first finding, or none.

Invariants: pure; any text is accepted; time is near-linear in it. Every turn is looked at for control tokens and odd
characters, since both change what the model reads; answers alone for length and repetition, since only they are learnt.
A short answer ("A", "7", "是", "。") is an answer; one of nothing but space is none.
Limits and what they mean: stages/curation.py; how well they do, beside the official hook: benchmarks/filters.py.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache

from modeling.sources import Reason, Rejection
from stages.curation import TextChecks
from stages.prepare.repetition import CJK, Finding, character_runs, copies, counting, echo, loop, symbol_noise

SHOWN = 40  # characters of a text that a detail repeats

# What the tokenizers of the supported models take for control tokens. Not <box>, <ref>, <quad>: they ground objects.
_CONTROL = re.compile(
    r"<\|[a-z][a-z0-9_]*\|>|\[UNUSED_TOKEN_\d+\]|</?img>|<IMG_CONTEXT>|</?s>|<pad>|<unk>|<video>|<image>"
)
_PLACEHOLDERS = ("<image>", "<video>")  # stand for media in human turns

_ODD = re.compile(
    "[\x00-\x08\x0b\x0e-\x1f\x7f\x80-\x9f\ufffd\ufffe\uffff\ud800-\udfff\ue000-\uf8ff\U000f0000-\U0010ffff]"
)
# UTF-8 read as Latin-1 or cp1252: letters of the first bytes, then what the bytes 80 to BF look like there.
_TAIL = "\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_LATIN = re.compile(rf"[\u00c2-\u00df][{_TAIL}]|[\u00e0-\u00ef][{_TAIL}]{{2}}|[\u00f0-\u00f4][{_TAIL}]{{3}}")
_GB_AS_LATIN = re.compile(r"[\u00a1-\u00ff]{8,}")  # two bytes a Chinese character, read as Latin-1
_CHINESE = re.compile(r"[\u3400-\u9fff\ue000-\uf8ff]{4,}")
_LETTERS = re.compile(rf"[^\W\d_{CJK}]{{2,}}")
_TOGETHER = frozenset({"LATIN", "GREEK", "MICRO", "KELVIN", "ANGSTROM", "FULLWIDTH", "MATHEMATICAL", "SCRIPT"})


def check_text(conversation: Sequence[Mapping[str, str]], limits: TextChecks) -> Rejection | None:
    """The first finding in a conversation ({from, value} turns); its detail says in which turn (from 1) and what."""
    for number, turn in enumerate(conversation, 1):
        text, answer = turn["value"], turn["from"] == "gpt"
        found = _control(text, turn["from"]) or _odd(text, limits)
        if answer and found is None:
            found = _length(text, limits) or _repeats(text, limits)
        if found is not None:
            reason, detail = found
            return Rejection(reason, f"turn {number}: {detail}")
    return None


Found = tuple[Reason, str] | None


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 1] + "…")


def _control(text: str, role: str) -> Found:
    if "<" not in text and "[UNUSED_TOKEN_" not in text:
        return None
    for match in _CONTROL.finditer(text):
        if role != "human" or match.group() not in _PLACEHOLDERS:
            return "control_tokens", f"{match.group()} at character {match.start()} would be read as a control token"
    return None


def _odd(text: str, limits: TextChecks) -> Found:
    odd, garbled = _ODD.findall(text), [] if text.isascii() else _mojibake(text)
    for what, found in (("odd characters", odd), ("passages in the wrong encoding", garbled)):
        if len(found) > limits.odd_characters or len(found) > limits.odd_share * len(text):
            shown = _shown("".join(dict.fromkeys(found)))
            return "odd_characters", f"{len(found)} {what} ({shown}), limit {limits.odd_characters}"
    if len(text) > limits.symbol_noise and (noise := symbol_noise(text)).figure > limits.symbol_noise:
        shown = _shown(noise.text)
        return "odd_characters", f"{noise.figure:.0f} symbols without words ({shown}), limit {limits.symbol_noise}"
    if not text.isascii():
        mixed = [word for word in _LETTERS.findall(text) if len({_script(c) for c in word} - {""}) > 1]
        if len(mixed) > limits.mixed_words:
            shown = _shown(" ".join(mixed))
            return "odd_characters", f"{len(mixed)} words in several scripts ({shown}), limit {limits.mixed_words}"
    return None


def _mojibake(text: str) -> list[str]:
    """What was written in one encoding and read in another: UTF-8 or GB 18030 as Latin-1, UTF-8 as GB 18030."""
    found = _LATIN.findall(text) + _GB_AS_LATIN.findall(text)
    for run in _CHINESE.findall(text):
        raw = run.encode("gb18030", "ignore")
        # Garbled text turns into Chinese with nearly all bytes. Other letters prove nothing: 未之思也 is δ֮˼Ҳ so read.
        if 3 * sum("\u3000" <= c <= "\uffef" for c in raw.decode("utf-8", "ignore")) > 0.6 * len(raw):
            found.append(run)
    return found


@lru_cache(maxsize=65536)
def _script(character: str) -> str:
    """LATIN, CYRILLIC, …; those that stand together in formulas are one, marks and nameless characters none ("")."""
    if not character.isalpha():
        return ""
    name = unicodedata.name(character, "").partition(" ")[0]
    return "LATIN" if name in _TOGETHER else name


def _length(text: str, limits: TextChecks) -> Found:
    if not (bare := text.strip()):
        return "abnormal_length", "an answer of nothing but space"
    size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    if size > limits.max_bytes:
        return "abnormal_length", f"{size} bytes, at most {limits.max_bytes} are allowed"
    if size > limits.cut_bytes and (bare[-1].isalpha() or bare[-1] in ",，、"):
        return "abnormal_length", f"{size} bytes (limit {limits.cut_bytes}) and cut off: ends with {bare[-20:]!r}"
    return None


def _repeats(text: str, limits: TextChecks) -> Found:
    if len(text) * 3 < limits.loop_bytes:  # too short for any loop, as most answers to questions about pictures
        return None
    solid, marks, words = character_runs(text)
    for found, what, limit in (
        (solid, "times", limits.same_characters),
        (marks, "times", limits.same_symbols),
        (words, "words of it", limits.same_words),
    ):
        if found.figure > limit:
            return "zero_run", f"{found.text!r}: {found.figure} {what} in a row, limit {limit}"

    def over(found: Finding, limit: int, dense_limit: int | None = None) -> str:
        """What to tell where the figure is over the limit, else nothing."""
        if dense_limit is not None and found.symbols > limits.dense:
            limit = dense_limit
        if found.figure <= limit:
            return ""
        return f"{_shown(found.text)}, {found.times:.3g} times: {found.figure:.0f} bytes repeat, limit {limit}"

    if told := over(loop(text), limits.loop_bytes):
        return "repetition", f"a loop of {told}"
    if told := over(copies(text), limits.copied_bytes, limits.dense_copied_bytes):
        return "duplicate_lines", f"copies of {told}"
    if told := over(counting(text), limits.counting_bytes, limits.dense_counting_bytes):
        return "repetition", f"a loop that counts: {told}"
    counted, exact = echo(text)
    if counted.symbols > limits.dense:
        counted = exact
    for found in (counted, exact):
        limit = limits.dense_echoed_bytes if found.symbols > limits.dense else limits.echoed_bytes
        if found.figure > limit:
            return "repetition", f"the same again from {_shown(found.text)}: {found.figure:.0f} bytes, limit {limit}"
    return None
