"""The heuristic checks of a conversation's texts (arXiv 2412.05271 §4.3): the first finding, or none.

Invariants: pure; any text is accepted; time is near-linear in it. Every turn is looked at for control tokens and odd
characters, since both change what the model reads; answers alone for length and repetition, since only they are learnt.
A short answer ("A", "7", "是", "。") is an answer; one of nothing but space is none.
Where good and bad cannot be told apart the text passes: a false alarm costs a large mixture more than a border case.
Limits and what they mean: stages/curation.py; how well they do, beside the official hook: benchmarks/filters.py.
"""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache

from modeling.sources import Reason, Rejection
from modeling.template import IMG_CONTEXT, IMG_END, IMG_START
from stages.curation import TextChecks
from stages.prepare.repetition import (
    CJK,
    Finding,
    character_runs,
    copies,
    counting,
    echo,
    loop,
    same_answers,
    solid_bytes,
    symbol_noise,
)

SHOWN = 40  # characters of a text that a detail repeats
DECODED = 8  # places of a text at which JSON is looked for in vain

# Added tokens of the supported models: the template's, ChatML's (both families), Qwen 2.5's, InternLM 2's. Not <box>,
# <ref>, <quad>, which ground objects; nor <s> and </s>, which only InternLM 2 adds and which are HTML far more often,
# nor <tool_call>, which answers may hold. `<image>` and `<video>` are no tokens: in an answer they stay text.
CONTROL = frozenset({
    IMG_START, IMG_END, IMG_CONTEXT, "<|im_start|>", "<|im_end|>", "<|endoftext|>",
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
    "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
    "<|action_start|>", "<|action_end|>", "<|interpreter|>", "<|plugin|>",
    *(f"[UNUSED_TOKEN_{number}]" for number in range(147)),
})  # fmt: skip

# Nameless, private and replaced ones; the invisible: zero width (but for scripts that break lines by it), bidirectional
# overrides, marks of direction in a row, and tags (but for those of a flag, which the first alternative eats).
_ODD = re.compile(
    "\U0001f3f4[\U000e0020-\U000e007f]{1,7}|"
    "([\x00-\x08\x0b\x0e-\x1f\x7f\x80-\x9f\ufffd\ufffe\uffff\ud800-\udfff\ue000-\uf8ff\U000f0000-\U0010ffff"
    "\u2060-\u206f\u202a-\u202e\U000e0000-\U000e007f]|(?<![\u0e00-\u109f\u1780-\u17ff])[\u200b\ufeff]"
    "|(?<=[\u200c-\u200f])[\u200c-\u200f])"
)
# UTF-8 read as Latin-1 or cp1252: letters of the first bytes, then what the bytes 80 to BF look like there. One of
# them must be a sign that no typography sets behind a letter, as it does “ ” » … and no-break spaces (Spaß“, CAFÉ…).
_TAIL = "\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_SIGN = "\u0080-\u009f\u00a1-\u00a9\u00ac\u00af\u00b1\u00b4-\u00b6\u00b8\u00bc-\u00bf€ƒˆ‰˜Ÿ"
_LATIN = re.compile(
    rf"[\u00c2-\u00df][{_SIGN}]|[\u00e0-\u00ef](?=[{_TAIL}]?[{_SIGN}])[{_TAIL}]{{2}}"
    rf"|[\u00f0-\u00f4](?=[{_TAIL}]{{0,2}}[{_SIGN}])[{_TAIL}]{{3}}"
)
_GB_AS_LATIN = re.compile(r"[\u00a1-\u00ff]{8,}")  # two bytes a Chinese character, read as Latin-1
_CHINESE = re.compile(r"[\u3400-\u9fff\ue000-\uf8ff]{4,}")
_LETTERS = re.compile(rf"[^\W\d_{CJK}]{{2,}}")
_TOGETHER = frozenset({"LATIN", "GREEK", "MICRO", "KELVIN", "ANGSTROM", "FULLWIDTH", "MATHEMATICAL", "SCRIPT"})
_DATA = re.compile(r"^[ \t]*(?=[\[{])", re.MULTILINE)


def check_text(
    conversation: Sequence[Mapping[str, str]], limits: TextChecks, control: frozenset[str] = CONTROL
) -> Rejection | None:
    """The first finding in a conversation ({from, value} turns); its detail says in which turn (from 1) and what.

    control: what the tokenizer would read as control tokens.
    """
    pattern, answers = _either(control), []
    for number, turn in enumerate(conversation, 1):
        text = turn["value"]
        found = _control(text, pattern) or _odd(text, limits)
        if turn["from"] == "gpt" and found is None:
            found = _length(text, limits) or _repeats(text, limits)
            answers.append(text)
        if found is not None:
            reason, detail = found
            return Rejection(reason, f"turn {number}: {detail}")
    if len(answers) > 2 and (same := same_answers(answers)).figure > limits.same_answers:
        told = f"{_shown(same.text)} again, {same.times} answers of {len(answers)}"
        return Rejection("repetition", f"{told}: {same.figure:.0f} bytes, limit {limits.same_answers}")
    return None


Found = tuple[Reason, str] | None


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 1] + "…")


@lru_cache(maxsize=8)
def _either(tokens: frozenset[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def _control(text: str, pattern: re.Pattern[str]) -> Found:
    if match := pattern.search(text):
        return "control_tokens", f"{match.group()} at character {match.start()} would be read as a control token"
    return None


def _odd(text: str, limits: TextChecks) -> Found:
    odd, garbled = list(filter(None, _ODD.findall(text))), [] if text.isascii() else _mojibake(text)
    for what, found in (("odd characters", odd), ("passages in the wrong encoding", garbled)):
        if len(found) > max(limits.odd_characters, limits.odd_share * len(text)):
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
    """What was written in one encoding and read in another: UTF-8 or GB 18030 as Latin-1, UTF-8 as GB 18030.

    Runs without a space come in pieces of as many characters as make a pattern.
    """
    found = _LATIN.findall(text)
    for run in _GB_AS_LATIN.findall(text):
        # half of the bytes are letters and a third signs; capitals in a row are a word, signs in a row a table
        letters = sum(map(str.isalpha, run))
        if len(run) <= 8 * (len(run) - letters) and len(run) <= 4 * letters:
            found += [run[at : at + 8] for at in range(0, len(run), 8)]
    for run in _CHINESE.findall(text):
        raw = run.encode("gb18030", "ignore")
        # Garbled text turns into Chinese with nearly all bytes. Other letters prove nothing: 未之思也 is δ֮˼Ҳ so read.
        if 3 * sum("\u3000" <= c <= "\uffef" for c in raw.decode("utf-8", "ignore")) > 0.6 * len(raw):
            found += [run[at : at + 4] for at in range(0, len(run), 4)]
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
    if len(text) * 3 < limits.loop_bytes:  # too short for any, as most answers to questions about pictures
        return None
    solid, marks, words = character_runs(text)
    for found, what, limit in (
        (solid, "bytes of it", limits.same_characters),
        (marks, "times", limits.same_symbols),
        (words, "words of it", limits.same_words),
    ):
        if found.figure > limit:
            return "zero_run", f"{found.text!r}: {found.figure} {what} in a row, limit {limit}"

    def over(found: Finding, limit: int) -> str:
        """What to tell where the figure is over the limit, else nothing."""
        if found.figure <= limit:
            return ""
        return f"{_shown(found.text)}, {found.times:.3g} times: {found.figure:.0f} bytes repeat, limit {limit}"

    looped = loop(text)
    limit = limits.refrain_bytes if looped.refrain else limits.loop_bytes
    # One word of a short answer may repeat itself: a chant, the digits of a fraction.
    if " " not in looped.text and looped.symbols < 0.5 and solid_bytes(text) <= limits.short_bytes:
        limit = limits.short_bytes
    if told := over(looped, limit):
        return "repetition", f"a loop of {told}"
    text = without_data(text)
    copied = copies(text)
    if told := over(copied, limits.dense_copied_bytes if copied.symbols > limits.dense else limits.copied_bytes):
        return "duplicate_lines", f"copies of {told}"
    counted = counting(text)
    limit = limits.dense_counting_bytes if counted.symbols > limits.dense else limits.counting_bytes
    if told := over(counted, limit // 2 if counted.cut else limit):
        return "repetition", f"a loop that counts: {told}"
    alike, exact = echo(text)
    for found, limit in ((alike, limits.counting_bytes), (exact, limits.echoed_bytes)):
        if found.symbols > limits.dense:
            found, limit = exact, limits.dense_echoed_bytes
        if found.figure > limit:
            return "repetition", f"the same again from {_shown(found.text)}: {found.figure:.0f} bytes, limit {limit}"
    return None


def without_data(text: str) -> str:
    """Without the JSON that begins a line and is whole: records repeat their keys, and have an end."""
    kept, at, failed = [], 0, 0
    for match in _DATA.finditer(text):
        if match.end() < at or failed >= DECODED:
            continue
        try:
            _, end = json.JSONDecoder().raw_decode(text, match.end())
        except (ValueError, RecursionError):  # not JSON, or cut off
            failed += 1
            continue
        kept.append(text[at : match.end()])
        at = end
    return "".join(kept) + text[at:]
