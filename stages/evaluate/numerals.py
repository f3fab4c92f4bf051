r"""Numbers as they are written: signs, separators, exponents, fractions, percent, scales, units; words at last.

Invariants: pure; any text is accepted; a number is a plain decimal ("1234.5", "-0.002"), a reduced fraction ("3/4")
or either with "%": units and currencies are dropped, scales ("5 million", "3万") are multiplied in. 1,234.5 and
1.234,5 and 1 234,5 are one number; "1,234" is a thousand, "3,5" is three and a half. Superscripts, indices and digits
inside words ("H2O", "cm^2", "x_1") are no numbers.
"""

import re
from decimal import Context
from fractions import Fraction

_EXACT = Context(prec=1200)
_LONGEST = 60  # characters of a number; what has more is no answer
_SCALES = {
    "hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12, "百万": 6, "千万": 7, "万亿": 12, "千": 3,
    "万": 4, "亿": 8,
}  # fmt: skip
NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.^\\])(?<![A-Za-z_^]\{)(?P<sign>(?<![\w)\]}%])[-+–] ?(?=[\d.]))?"
    r"(?:(?P<whole>\d{1,9}) (?P<part>\d{1,9}) ?/ ?(?P<of>\d{1,9})(?![\d/])"
    r"|10(?:\^|\*\*)\{?(?P<ten>[-+]?\d{1,2})\}?(?!\d)"
    r"|(?P<body>\d{1,3}(?:,\d{3}){1,9}(?!\d)(?:\.\d+)?|\d{1,3}(?:\.\d{3}){1,9},\d+"
    r"|\d{1,3}(?: \d{3}){1,9}(?!\d)(?:[.,]\d+)?|(?<!\()\d+,\d{1,2}(?![\d,])|\d+(?:\.\d+)?|\.\d+)"
    r"(?: ?/ ?(?P<under>\d{1,12})(?![\d/])"
    r"|[eE](?P<e>[-+]?\d{1,3})(?!\d)| ?[×x*] ?10(?:\^|\*\*)\{?(?P<power>[-+]?\d{1,3})\}?)?)"
    r"(?: ?(?P<percent>%|percent\b|per cent\b|个百分点)"
    r"|[ -]?(?P<scale>(?:hundred|thousand|million|billion|trillion)\b|百万|千万|万亿|万|亿"
    r"|千(?![克米瓦卡赫焦帕伏字])))?",
    re.IGNORECASE,
)
_MINUS = re.compile(r"(?:^|\bis |[:=] )(?:minus|negative) $|负$", re.IGNORECASE)
_PERCENT = re.compile(r"百分之(?=[\d零〇一二两三四五六七八九十百])")

ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_WORDS = {word: i for i, word in enumerate(ONES)} | {word: 10 * i for i, word in enumerate(_TENS, 2)}
_ENGLISH = re.compile(
    r"(?<!\bno )(?<!\bthe )(?<!\bthis )(?<!\bthat )(?<!\beach )(?<!\bevery )(?<!\bany )(?<!\bwhich )(?<!\bother )"
    rf"\b(?P<n>{'|'.join(sorted(_WORDS, key=len, reverse=True))})(?:[- ](?P<ones>{'|'.join(ONES[1:10])}))?"
    r"(?:[- ](?P<scale>hundred|thousand|million|billion))?\b(?!(?<=one) of (?:the|them|these|those)\b)",
    re.IGNORECASE,
)
_HAN = dict(zip("零〇一二两三四五六七八九", (0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9)))
_UNITS = {"十": 10, "百": 100, "千": 1000}
_NUMERAL = "[零〇一二两三四五六七八九十百千万亿]"
# alone, of several characters, before a measure word or behind "is": else 一起 and 统一 would be ones
_CHINESE = re.compile(
    rf"(?<![第零〇一二两三四五六七八九十百千万亿])(?:{_NUMERAL}{{2,20}}|{_NUMERAL}(?=\W*$|[个只条张人名辆本件块元次天年月日"
    rf"号楼层岁棵朵杯瓶把匹位双支颗座家台部页米斤倍种幅间艘架根枚])|(?<=[是为有共于=]){_NUMERAL})"
)


def numbers(text: str) -> list[tuple[int, int, str]]:
    """Every number in digits: (first character, end, value)."""
    found = []
    for match in NUMBER.finditer(text):
        before = text[max(0, match.start() - 20) : match.start()]
        clock = re.match(r":\d", text[match.end() : match.end() + 2]) or re.search(r"\d:$", before)
        clock = clock or text.startswith("^", match.end())
        if (
            not clock and (value := _value(match)) is not None and len(value) <= _LONGEST
        ):  # neither times, ratios nor powers
            if _minus(text, match):
                value = _signed(value[0] != "-", value.lstrip("-"))
            if value[-1] != "%" and _PERCENT.match(text, match.start() - 4, match.end()):
                value += "%"
            found.append((match.start(), match.end(), value))
    return found


def words(text: str) -> list[tuple[int, int, str]]:
    """Every number in English or Chinese words: (first character, end, value)."""
    found = []
    for match in _ENGLISH.finditer(text):
        value = _WORDS[match["n"].lower()] + (_WORDS[match["ones"].lower()] if match["ones"] else 0)
        value *= 10 ** _SCALES.get((match["scale"] or "").lower(), 0)
        found.append((*match.span(), _signed(_minus(text, match), str(value))))
    for match in _CHINESE.finditer(text):
        percent = "%" if text[max(0, match.start() - 3) : match.start()] == "百分之" else ""
        found.append((*match.span(), _signed(_minus(text, match), f"{chinese(match.group())}{percent}")))
    return sorted(found)


def chinese(numeral: str) -> int:
    """二百零五 → 205, 一万二千 → 12000, 二〇一九 → 2019."""
    if not set(numeral) & set("十百千万亿"):
        return int("".join(str(_HAN[c]) for c in numeral))
    total = section = digit = 0
    for c in numeral:
        if c in _HAN:
            digit = _HAN[c]
        elif c in _UNITS:
            section, digit = section + (digit or (0 if section else 1)) * _UNITS[c], 0
        elif c == "万":
            total, section, digit = total + (section + digit) * 10**4, 0, 0
        else:  # 亿 raises all that stands before it: 一万二千亿
            total, section, digit = (total + section + digit) * 10**8, 0, 0
    return total + section + digit


def value(text: str) -> Fraction | None:
    """Of a text that is nothing but one number, maybe with a currency before and a unit of two words behind, or None.

    Percent is as written: "50%" → 50.
    """
    text = re.sub(r"[$€£¥₹]", "", text).strip()
    found = numbers(text)
    if len(found) != 1 or found[0][0] or not re.fullmatch(r"[^\d,;:/]{0,20}", text[found[0][1] :]):
        return None
    return Fraction(found[0][2].rstrip("%")) if len(text[found[0][1] :].split()) < 3 else None


def _value(match: re.Match[str]) -> str | None:
    if len(match.group()) > 2 * _LONGEST:
        return None
    minus, end = match["sign"] is not None and match["sign"][0] in "-–", "%" if match["percent"] else ""
    if match["of"]:
        part, of = int(match["part"]), int(match["of"])
        return None if not of else _signed(minus, str(Fraction(int(match["whole"]) * of + part, of))) + end
    body = "1" if match["ten"] else match["body"].replace(" ", "")
    if re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", body):
        body = body.replace(",", "")
    elif "," in body:
        body = body.replace(".", "").replace(",", ".")
    if match["under"]:
        under = int(match["under"])
        return None if not under else _signed(minus, str(Fraction(body) / under)) + end
    power = int(match["e"] or match["power"] or match["ten"] or 0) + _SCALES.get((match["scale"] or "").lower(), 0)
    number = _EXACT.normalize(_EXACT.scaleb(_EXACT.create_decimal(body), power))
    return _signed(minus, format(number, "f")) + end


def _minus(text: str, match: re.Match[str]) -> bool:
    return _MINUS.search(text[max(0, match.start() - 20) : match.start()]) is not None


def _signed(minus: bool, text: str) -> str:
    return f"-{text}" if minus and text != "0" else text
