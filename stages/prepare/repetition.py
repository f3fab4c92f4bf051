"""How a text repeats itself: figures that are each the strongest place in the text, with what was found there.

Invariants: every figure is a sum or a count over the worst stretch, never a share of the whole text, so that clean text
before or after a loop cannot hide it; time is near-linear in the text. Weights are UTF-8 bytes of letters and digits:
a Chinese character weighs as much as three Latin letters, which is their ratio in tokens too, and the lines that
a table is drawn with weigh next to nothing.

The paper names the symptoms (arXiv 2412.05271 §4.3: repetition, overlong runs of zeros, too many duplicate lines) and
gives no figures. The official hook, distinct repeated word n-grams over all n-grams, counts an n-gram that comes a
thousand times once, and Chinese has no spaces; benchmarks/filters.py measures both side by side.
"""

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

MAX_PERIOD = 1024  # characters; the longest unit of an exact loop. Longer ones are copies, or an echo
AFTER_FIRST = 1.75  # units after the first: of three units the last may be cut off
MARK = 0.1  # what a symbol weighs in a loop, beside a letter: a loop of hundreds of symbols is one
TAGGED = 0.02  # what a character of a tag weighs in a loop: a table of empty cells is none
SPARSE, SPARSE_WEIGHT = 6, 1 / 15  # letters to a change of letter from which a loop weighs less: a unit matrix's rows
SHINGLE, SHINGLE_CJK = 3, 5  # words, or Chinese characters, that make a passage the same passage
LOOK_BACK = 1500  # words or characters: a passage that comes again later than this is no echo
FRESH = 3.0  # how much a byte of new text counts against a byte of repeated text in an echo
UNIT_BYTES = 6  # a line or sentence of fewer bytes, such as `else:`, is no copy
ANSWER_BYTES = 40  # nor is an answer of fewer, such as "There is no text in this picture."
WORD_BYTES = 10  # a word weighs at most this much, so that an address is not a paragraph

CJK = r"\u2e80-\u2fdf\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{CJK}]|[^\W\d_{CJK}]+|\d+")
_NUMBER = re.compile(r"(?<=第)[〇零一二三四五六七八九十百千万两]+|\d+")
_SPACE = re.compile(r"\s+")
_TAG = re.compile(r"</?[a-z][^<>]{0,80}>")
_TAGS = re.compile(rf"(?:{_TAG.pattern}\s*)+")
_ROW = re.compile(r"(?:[^\W\d_]|[\s,，!！?？'’~、-])+|[\d\s.,&\[\]-]+")  # words and no full stop, or figures alone
_BASES = re.compile(r"[acgtun]{3,}")
_UNIT = re.compile(r"\n|(?<=[。！？；])|(?<=[.!?;])\s")


@dataclass(frozen=True)
class Finding:
    """The strongest place. figure: what a limit is compared with; text: what repeats; times: how often it stands."""

    figure: float
    text: str
    times: float
    symbols: float = 0.0  # share of symbols in what repeats
    cut: bool = False  # a loop that goes on to the end of the text, and ends there within a word or a sentence
    refrain: bool = False  # a loop of whole lines as songs and matrices have them, or of bases of a genome


NOTHING = Finding(0, "", 0)


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _weights(text: str, codes: np.ndarray) -> np.ndarray:
    """Per character: its UTF-8 bytes if it is a letter or a digit, else 0."""
    table = np.zeros(int(codes.max(initial=0)) + 1, np.int8)
    for character in set(text):
        if character.isalnum():
            table[ord(character)] = len(character.encode())
    return table[codes]


def _best_stretch(values: np.ndarray) -> tuple[int, int, float]:
    """(start, end, sum) of the run of values with the highest sum."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    gain = sums - np.minimum.accumulate(sums)
    end = int(np.argmax(gain))
    return int(np.argmin(sums[: end + 1])), end, float(gain[end])


def solid_bytes(text: str) -> int:
    """Bytes of letters and digits, by which all figures are measured."""
    return int(_weights(text, _codes(text)).sum())


def _symbols(text: str) -> float:
    """Share of symbols in a text, spaces apart: one each, beside the bytes of letters and digits."""
    dense = "".join(text.split())
    solid = solid_bytes(dense)
    marks = len(dense) - sum(map(str.isalnum, dense))
    return marks / (marks + solid) if dense else 0.0


# -- single characters ----------------------------------------------------------------------------------------------


def symbol_noise(text: str) -> Finding:
    """The stretch with most symbols over letters and digits; what stood up to four before does not count.

    So `-----`, `|---|---|` and `. . . .` are nothing, and formulas and code have letters between.
    """
    text = "".join(text.split())
    codes = _codes(text)
    values = np.where(_weights(text, codes) > 0, -2.0, 1.0)
    for back in (1, 2, 3, 4):
        values[back:][(values[back:] > 0) & (codes[back:] == codes[:-back])] = 0
    start, end, figure = _best_stretch(values)
    return Finding(figure, text[start:end], 1)


def character_runs(text: str) -> tuple[Finding, Finding, Finding]:
    """The longest run of one letter or digit, that of one other character, and of words of one and the same character.

    The last is `0, 0.0, 00`: whatever stands between, so that lists and tables of zeros are seen. Figures are bytes of
    letters and digits, and counts of symbols and words (half the letters, where these are more). Case does not count;
    tags in a row are one space, so that a table of empty cells is none.
    """
    text = _TAGS.sub(" ", text.lower())
    codes = _codes(text)
    if not len(codes):
        return NOTHING, NOTHING, NOTHING
    weights = _weights(text, codes)
    solid = weights > 0
    starts = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]]))
    lengths = np.diff(np.append(starts, len(codes)))

    def longest(chosen: np.ndarray) -> Finding:
        best = int(np.argmax(np.where(chosen, lengths, 0)))
        weight = max(1, int(weights[starts[best]]))  # bytes: a Chinese character says as much as three letters
        return Finding(int(lengths[best]) * weight, text[starts[best]], int(lengths[best])) if chosen[best] else NOTHING

    words, places = NOTHING, np.flatnonzero(solid)
    if len(places):
        letters = codes[places]
        begins = np.concatenate([[True], np.diff(places) > 1])
        runs = np.flatnonzero(np.concatenate([[True], letters[1:] != letters[:-1]]))
        counts = np.add.reduceat(begins, runs, dtype=np.int64)
        counts = np.maximum(counts, np.diff(np.append(runs, len(letters))) // 2)  # 1,000,000,000: three digits a word
        best = int(np.argmax(counts))
        words = Finding(int(counts[best]), chr(letters[runs[best]]), int(counts[best]))
    return longest(solid[starts]), longest(~solid[starts]), words


# -- exact loops ----------------------------------------------------------------------------------------------------


def loop(text: str) -> Finding:
    """The heaviest exact loop: bytes after its first unit. Case and line breaks do not count; tags are symbols.

    A loop of one and the same letter or digit is none: `character_runs` has those, with limits of their own.
    """
    text = _flat(text)
    codes = _codes(text)
    weights = _weights(text, codes).astype(float)
    weights[(weights == 0) & (codes != ord(" ")) & (codes != ord("\n"))] = MARK
    for tag in _TAG.finditer(text) if "<" in text else ():
        weights[tag.start() : tag.end()] = TAGGED
    return _heaviest(text, codes, weights)


def counting(text: str) -> Finding:
    """As `loop`, where the units differ in their numbers, which weigh nothing: "Step 101: again. Step 102: again." """
    text = _NUMBER.sub("0", plain := _flat(text))
    if text == plain:
        return NOTHING
    codes = _codes(text)
    return _heaviest(text, codes, np.where(codes == ord("0"), 0.0, _weights(text, codes)))


def _flat(text: str) -> str:
    """In lower case; a space for any space, a line break where one is in it."""
    return _SPACE.sub(lambda match: "\n" if "\n" in match.group() else " ", text.strip().lower())


def _heaviest(text: str, codes: np.ndarray, weights: np.ndarray) -> Finding:
    """The stretch of equal units, at least three and none between, that weighs most after the first unit.

    At scale k each k-gram is traced to its last occurrence. Where k is at least the period p, that is exactly p
    characters before (Fine and Wilf), and a stretch of p + k characters is enough: the scales 8, 16, 32, … see every
    loop of three units. Only k-grams that come twice go to the next scale, so that ordinary text costs little more
    than one sort.
    """
    codes = np.where(codes == ord("\n"), np.uint32(ord(" ")), codes)
    sums = np.concatenate([[0.0], np.cumsum(weights)])
    solid = np.flatnonzero(weights >= 1)
    turns = np.zeros(len(codes) + 1, np.int64)  # how many letters before differ from the letter before them
    turns[solid[1:] + 1] = codes[solid[1:]] != codes[solid[:-1]]
    turns, letters = np.cumsum(turns), np.concatenate([[0], np.cumsum(weights >= 1)])
    best = NOTHING
    hashes, places, k, factor = codes.astype(np.uint64), np.arange(len(codes)), 1, 0x9E3779B97F4A7C15
    while k <= MAX_PERIOD and len(places) > 1 and len(hashes) > 1:
        if k >= 8:
            here = hashes[places]
            order = np.argsort(here, kind="stable")
            places, here = places[order], here[order]
            same = here[1:] == here[:-1]
            back = np.zeros(len(hashes), np.int64)
            back[places[1:][same]] = (places[1:] - places[:-1])[same]
            firsts = np.flatnonzero(np.concatenate([[True], back[1:] != back[:-1]]))
            ends = np.append(firsts[1:], len(back)) - 1 + k
            periods = back[firsts]
            hit = (periods > (k // 2 if k > 8 else 0)) & (periods <= k) & (ends - firsts >= AFTER_FIRST * periods)
            firsts, ends, periods = firsts[hit], ends[hit], periods[hit]
            units = firsts + periods
            inside = letters[units] - letters[firsts]
            changes = turns[units] - turns[firsts]
            figures = np.where((changes == 0) & (inside > 0), 0, sums[ends] - sums[firsts])
            figures = np.where((SPARSE * changes <= inside) & (inside > 0), SPARSE_WEIGHT * figures, figures)
            for at in np.argsort(-figures):
                if figures[at] <= best.figure:
                    break
                first, end, period = int(firsts[at]), int(ends[at]), int(periods[at])
                if (codes[first:end] == codes[first - period : end - period]).all():  # no collision of hashes
                    unit, times = text[first - period : first], 1 + (end - first) / period
                    cut = end == len(text) and text[-1].isalnum() and text[end - period].isalnum()
                    lines = text.count("\n", first - period, end) >= int(times) - 1
                    refrain = bool(_BASES.fullmatch(unit) or (lines and not cut and _ROW.fullmatch(unit)))
                    best = Finding(float(figures[at]), unit, times, _symbols(unit), cut, refrain)
                    break
            twice = np.zeros(len(places), bool)
            twice[1:] |= same
            twice[:-1] |= same
            places = np.sort(places[twice])
        factor = (factor * 0x5851F42D4C957F2D + 0x14057B7EF767814F) & 0xFFFFFFFFFFFFFFFF
        hashes = hashes[:-k] * np.uint64(factor | 1) + (hashes[k:] ^ (hashes[k:] >> np.uint64(29)))
        places = places[places < len(hashes)]
        k *= 2
    return best


# -- copies and echoes ----------------------------------------------------------------------------------------------


def copies(text: str) -> Finding:
    """Lines and sentences that stood before: bytes of copies less bytes of new text, in the stretch where that is most.

    times: how many copies; text: the unit that is copied most. A song's line or a row of figures that follows itself
    is none: `loop` weighs it.
    """
    return _copied([" ".join(raw.split()) for raw in _UNIT.split(text.lower())], UNIT_BYTES, in_a_row=False)


def same_answers(answers: list[str]) -> Finding:
    """As `copies`, of the whole answers of a dialogue. The same short answer ("Yes.", "A") in many turns is none."""
    return _copied([" ".join(answer.lower().split()) for answer in answers], ANSWER_BYTES, in_a_row=True)


def _copied(units: list[str], least: int, in_a_row: bool) -> Finding:
    units = [unit for unit in units if unit]
    seen = Counter(units)
    if len(seen) == len(units):
        return NOTHING
    values, before, last = [], set(), ""
    for unit in units:
        weight = sum(len(c.encode()) for c in unit if c.isalnum())
        if unit not in before:
            values.append(-weight)  # short ones too: the numbers of a table are what is new in it
        else:
            values.append(weight if weight >= least and (in_a_row or unit != last or not _ROW.fullmatch(unit)) else 0)
        before.add(unit)
        last = unit
    start, end, figure = _best_stretch(np.array(values, float))
    inside = units[start:end]
    if not inside:
        return NOTHING
    most = max(inside, key=lambda unit: seen[unit] * len(unit))
    return Finding(figure, most, sum(value > 0 for value in values[start:end]), _symbols(" ".join(inside)))


def echo(text: str) -> tuple[Finding, Finding]:
    """Text that says again what was said a moment ago, in another order or with another word here and there.

    Words (Chinese: characters) in a passage of SHINGLE (SHINGLE_CJK) that stood within LOOK_BACK before count their
    bytes, new ones FRESH times against. The figure is that of the stretch where it is most; times: its words. In the
    first finding numbers are all the same and weigh nothing, which is right for prose that counts up; in the second a
    number is a word as others, which is right for tables, boxes and code, whose rows differ in their numbers.
    """
    matches = list(_WORD.finditer(text))
    if len(matches) <= SHINGLE_CJK:
        return NOTHING, NOTHING
    words = [match.group().lower() for match in matches]
    table = {word: number for number, word in enumerate(dict.fromkeys(words))}
    lengths = {word: min(len(word.encode()), WORD_BYTES) for word in table}
    ids = np.array([table[word] for word in words], np.uint64)
    weights = np.array([lengths[word] for word in words], float)
    numbers = np.array([word[0].isdigit() for word in table])[ids]
    chinese = np.array([len(word) == 1 and word >= "\u2e80" for word in table])[ids]
    size = SHINGLE_CJK if chinese.mean() > 0.5 else SHINGLE

    def strongest(ids: np.ndarray, weights: np.ndarray) -> Finding:
        start, end, figure = _best_stretch(np.where(_seen(ids, size), weights, -FRESH * weights))
        if end <= start:
            return NOTHING
        passage = text[matches[start].start() : matches[end - 1].end()]
        return Finding(figure, passage, end - start, _symbols(passage))

    exact = strongest(ids, weights)
    if not numbers.any():
        return exact, exact
    return strongest(np.where(numbers, np.uint64(len(table)), ids), np.where(numbers, 0, weights)), exact


def _seen(ids: np.ndarray, size: int) -> np.ndarray:
    """Per word, whether a passage of `size` words around it stood within LOOK_BACK words before."""
    keys = np.zeros(len(ids) - size + 1, np.uint64)
    for offset in range(size):
        keys = keys * np.uint64(0x9E3779B97F4A7C15) + ids[offset : offset + len(keys)]
        keys ^= keys >> np.uint64(31)
    order = np.argsort(keys, kind="stable")
    again = order[1:][(keys[order[1:]] == keys[order[:-1]]) & (np.diff(order) <= LOOK_BACK)]
    change = np.zeros(len(ids) + 1, np.int64)
    change[again] += 1
    change[again + size] -= 1
    return np.cumsum(change[:-1]) > 0
