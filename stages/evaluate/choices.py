"""Which options a piece of a response names: letters in the usual forms, option texts, a figure that one option has.

Invariants: pure; a letter that is not among the options is none; "A" as an article and "I" as a pronoun are none unless
the form leaves no doubt; a longer option text beats a shorter one inside it; what is negated is not named. Several
letters named together come back together: whether that is an answer is the caller's to say.

Forms that occur, and where the usual parsers draw at random or take the article for an answer: MMMU
`eval_utils.py parse_multi_choice_response`, VLMEvalKit `vlmeval/utils/matching_util.py can_infer_option`.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from stages.evaluate.numerals import numbers, value
from stages.evaluate.spans import REGION, compatible, cut_off, plain, sentences

Options = tuple[tuple[str, str], ...]  # (letter, text as compared)

_FIRST = re.compile(r"[(\[*_\"'“<]{0,4}(?P<letter>[A-Z])(?P<close>[)\]*_\"'”>]{0,4})")
_JOIN = re.compile(
    r" ?(?:,|、|/|&|;|\band\b|\bor\b|\bnor\b|和|与|及|或|以及){1,2} ?(?:and |or |和|(?:option |选项))?", re.IGNORECASE
)
_BEHIND = re.compile(
    r"[*_\"'”\s]*(?:$|[.,:;)\]!?。；、(]|- |-$|— |[\u3400-\u9fff]"
    r"|(?:because|since|as|for|which|are|due|given|and|but)\b)",
    re.IGNORECASE,
)
_FILL = re.compile(
    r"(?:(?:therefore|thus|hence|so|then|clearly|indeed|probably|most likely|likely|definitely|simply|just|only|option"
    r"|choice|letter|answer|the|either|both|neither|it is|it's|that|is|be|选项|选择|选|是|为)(?![A-Za-z])"
    r"|[\s,:*_\"“>]){1,12}",
    re.IGNORECASE,
)
_NOT = re.compile(r"(?:not|不是|并非|不)\s?(?![A-Za-z]*thing)")
_BUT = re.compile(r"\b(?:but|rather|instead|it is|it's)\b|而是|是", re.IGNORECASE)
_DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|never|neither|nor|without|unlike|rather than|instead of|excludes?|eliminat\w+|rules? out|ruled out"
    r"|cannot be|than)|n't)[\s,:]+(?:[\w'\"-]+\s){0,3}[(*\"'“]{0,3}$"
    r"|(?:不是|并非|而非|不为|不选|不应选|不能选|不该选|排除|没有|不像)[^,。;，；]{0,4}$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"[)\]*_\"'”.:]{0,4}\s?(?:(?:is|are|was|were|can be|must be)\s(?:\w+\s){0,2}?"
    r"(?:not|wrong|incorrect|false|out|excluded|missing|eliminated|ruled out|impossible)\b"
    r"|(?:isn't|aren't|does not|doesn't|do not|don't|cannot|can't|would|could)\b"
    r"|[^,。;，；]{0,4}(?:不正确|不符|不对|错误|错|排除))",
    re.IGNORECASE,
)
_SUBJECT = re.compile(r"[A-Z] (?:is|has|was|does|shows|looks|seems|would|could|might|may|can)\b")
_TURN = re.compile(r".*(?:\b(?:but|however|so|therefore|thus|hence)\b|但|不过|所以|因此)", re.DOTALL | re.IGNORECASE)
_MENTION = re.compile(
    r"(?:\boptions?\s|\bchoices?\s|选项)[(\[*\"']{0,3}(?P<named>[A-Z])\b|[(\[](?P<bracket>[A-Z])[)\]]|(?P<cn>[A-Z])选项"
    r"|(?<![A-Za-z0-9_'’.\-\\])(?P<bare>[B-HJ-Z])(?![A-Za-z0-9_'’\\]|-[A-Za-z])"
)
_LINE = re.compile(
    r"^[\s*_>#\-(]{0,6}(?:\d{1,2}[.)] ?)?[*_(]{0,4}(?:(?:option|选项) ?)?\(?([A-Z])\)?[*_]{0,2}[.):：、]",
    re.MULTILINE | re.IGNORECASE,
)


def comparable(text: str) -> str:
    """An option's text as it is compared: no dress, no case, no article, no punctuation around it."""
    text = re.sub(r"\s+", " ", plain(compatible(text))).casefold().strip(" .,;:!?\"'“”。，；：！？()*_")
    return re.sub(r"^(?:an?|the) (?=.)", "", text)


def settle(options: Mapping[str, str] | Sequence[str]) -> Options:
    """Letters and comparable texts of a mapping {letter: text} or a list of texts for A, B, C…"""
    pairs = options.items() if isinstance(options, Mapping) else zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", options)
    return tuple((letter, comparable(text)) for letter, text in pairs)


def read(region: str, options: Options) -> set[str]:
    """The letters that a region which states an answer names, by letter or by text; none if it names none.

    region: what a box holds or what follows a marker; it is looked at from its beginning.
    """
    region = plain(region[:REGION])
    letters = {letter for letter, _ in options}
    if re.fullmatch(r"\W*[A-Za-z]\W*", region, re.ASCII):
        return {region.strip(" ()[]*_.,:;\"'<>-!?。“”").upper()} & letters
    if exact := _same(region, options):
        return exact
    if re.fullmatch(r"[A-Z]{2,26}", region) and list(region) == sorted(set(region)) and set(region) <= letters:
        return set(region)
    if filled := _FILL.match(region):
        region = region[filled.end() :]
        if exact := _same(region, options):
            return exact
    if denied := _NOT.match(region):
        other = _BUT.search(region, denied.end())
        return read(region[other.end() :].strip(), options) if other else set()
    region = sentences(region)[0] if region.strip() else ""
    return leading(region, options) or texts(region, options) or mentions(region, options) or _figure(region, options)


def leading(region: str, options: Options) -> set[str]:
    """The letters a region begins with: "B. a dog", "(b) because…", "A and C"."""
    letters, found, at, end = {letter for letter, _ in options}, [], 0, 0
    region = re.sub(r"^([(\[])([a-z])([)\]])", lambda m: m.group().upper(), region)
    while match := _FIRST.match(region, at):
        if match["letter"] not in letters:
            break
        bracketed = ")" in match["close"] or "]" in match["close"] or "*" in match["close"]
        if not bracketed and not _BEHIND.match(region, match.end()):
            joined = _JOIN.match(region, match.end())
            loose = match["letter"] not in "AI" and re.match(r" ", region[match.end() :])
            if not joined and not (loose and not found):
                break
        found.append(match["letter"])
        before, end = end, match.end()
        join = _JOIN.match(region, end)
        if not join:
            break
        at = join.end()
    if found and _DENIED_AFTER.match(region, end):  # "A is wrong", "A and C are wrong", but "B, A is wrong"
        return set(found[:-1]) if region[before : before + 1] == "," else set()
    return set(found)


def mentions(text: str, options: Options) -> set[str]:
    """Letters that stand as letters of options anywhere in the text and are not denied there."""
    letters, found = {letter for letter, _ in options}, set()
    for match in _MENTION.finditer(text):
        letter = match["named"] or match["bracket"] or match["cn"] or match["bare"]
        if letter in letters and not _denied(text, match.start(), match.end()):
            found.add(letter)
    return found


def texts(text: str, options: Options) -> set[str]:
    """Letters of the options whose texts stand in the text and are not denied there; the longest match wins."""
    pattern = _any_of(options)
    if pattern is None:
        return set()
    folded, found = re.sub(r"\s+", " ", text).casefold(), set()
    for match in pattern.finditer(folded):
        if not _denied(folded, match.start(), match.end()):
            found |= {letter for letter, option in options if option == match.group()}
    return found


def enumerates(text: str) -> bool:
    """Whether lines of the text go through the options one by one."""
    return len({letter.upper() for letter in _LINE.findall(text)}) > 1


def guess(text: str, options: Options) -> set[str]:
    """The options that a response without box or marker names: at its beginning, else at its end, else at all."""
    parts = sentences(text)
    listing = enumerates(text)
    if not listing and (found := _alone(parts[0], options)):
        return found
    if found := _alone(parts[-1], options, whole=True):
        return found
    whole = plain(text)
    if cut_off(text, parts):
        return set()
    for piece in (plain(parts[-1]), *(() if listing else (whole,))):
        for find in (mentions, texts):
            if len(found := find(piece, options)) > 1 and (turn := _TURN.match(piece)):
                found = find(piece[turn.end() :], options) or found
            if found:
                return found
    return _figure(whole, options) if len(parts) == 1 else set()


def _alone(part: str, options: Options, whole: bool = False) -> set[str]:
    """The letters a sentence begins with in a form that leaves no doubt, or that are all of it."""
    bare = plain(part)
    if re.fullmatch(r"\W{0,4}[A-Za-z]\W{0,4}", bare, re.ASCII) or _same(bare, options):
        return read(bare, options)
    found = set() if _SUBJECT.match(bare) else leading(bare, options)
    if not whole or re.fullmatch(r"\W{0,9}[A-Z](?:(?:\W|and|or|和|与|或){1,6}[A-Z]){0,25}\W{0,9}", bare):
        return found
    return found & _same(re.sub(r"^\W{0,3}[A-Z]\W{1,3}", "", bare), options)


def _same(region: str, options: Options) -> set[str]:
    """The letters of the options whose text the region is, spaces apart."""
    key = comparable(region).replace(" ", "")
    return {letter for letter, text in options if text and text.replace(" ", "") == key}


def _figure(region: str, options: Options) -> set[str]:
    """The option whose figure is the only one that the region has, where no other option has it."""
    figures = {figure for _, _, figure in numbers(region)}
    if len(figures) != 1:
        return set()
    named = value(figures.pop())
    found = {letter for letter, text in options if text and value(text) == named}
    return found if named is not None and len(found) == 1 else set()


def _denied(text: str, start: int, end: int) -> bool:
    clause = re.split(r"[;；。]|[.!?] |,\s?(?:it|but|so)\b", text[max(0, start - 60) : start])[-1]
    return bool(_DENIED_BEFORE.search(clause) or _DENIED_AFTER.match(text[end : end + 40]))


@lru_cache(maxsize=4096)
def _any_of(options: Options) -> re.Pattern[str] | None:
    known = sorted(
        {text for _, text in options if len(text) > 1 or text.isdigit() or text >= "\u3400"}, key=len, reverse=True
    )
    known = [text for text in known if text]
    if not known:
        return None
    return re.compile(rf"(?<![A-Za-z0-9])(?<!\d[.,])(?:{'|'.join(map(re.escape, known))})(?![A-Za-z0-9]|[.,]\d)")
