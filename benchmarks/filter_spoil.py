"""Bad texts for benchmarks/filters.py, made of clean ones (filter_texts.py) that are shown nowhere else.

The generators of `SPOIL`: what is spoiled begins anywhere or only at the end, is mostly cut off, and has from the
fewest repeats that a reader calls a loop to many. `build` makes the whole set.
"""

import random
import re
from collections.abc import Callable

from filter_alike import alike
from filter_texts import LANGUAGES, LONGEST, SHORTEST, TURN, Text, documents, made, side

_CJK = re.compile(r"[\u4e00-\u9fff]")


def sentences(text: str, language: str) -> list[str]:
    """Lines of code, or sentences of some length, each with what follows it."""
    if language == "code":
        found = [line + "\n" for line in text.splitlines()]
        return [line for line in found if sum(map(str.isalnum, line)) >= 10]
    flat = " ".join(text.split())
    found = re.findall(r"[^。！？；]+[。！？；]" if language == "zh" else r"[^.!?]+[.!?]+\s", flat + " ")
    least = 8 if language == "zh" else 20
    return [one for one in found if sum(map(str.isalnum, one)) >= least]


def words(text: str, language: str) -> list[str]:
    if language == "zh":
        return [word for word in re.findall(r"[\u4e00-\u9fff]+", text) if len(word) > 1]
    return [word for word in re.findall(r"[A-Za-z_]+", text) if len(word) > 2]


def more(rng: random.Random, least: int, mean: float) -> int:
    """`least` or more: small numbers are as likely as any, so that the hardest loops are well represented."""
    return least + int(rng.expovariate(1 / (mean - least)))


def placed(rng: random.Random, text: str, spoiled: str, language: str) -> str:
    """The spoiled stretch in a text: from its beginning, from anywhere, or only at the end; mostly cut off."""
    glue = "\n" if language == "code" else ("" if language == "zh" else " ")
    keep = rng.choice([0.0, rng.random(), 1.0])
    head, tail = text[: int(len(text) * keep)], text[int(len(text) * keep) :]
    if rng.random() < 0.6 or not tail:
        return head + glue + spoiled[: len(spoiled) - rng.randrange(max(1, min(12, len(spoiled) // 20)))]
    return head + glue + spoiled + glue + tail


def unit(rng: random.Random, text: str, language: str) -> tuple[str, int]:
    """(what repeats, the least repeats that a reader calls a loop), from one character to several sentences."""
    every, lines = words(text, language), sentences(text, language)
    scale = rng.choice(["syllable", "word", "phrase", "sentence", "sentence", "sentences", "digits"])
    space = "" if language == "zh" else " "
    if scale == "syllable":  # no space anywhere
        word = rng.choice(every)
        return word[: rng.randint(1, 2) if language == "zh" else rng.randint(2, 4)], 20
    if scale == "word":
        word = rng.choice(every)
        return (word[:2] + rng.choice(["", "，"]) if language == "zh" else word + rng.choice([" ", ", "])), 12
    if scale == "phrase":
        at = rng.randrange(max(1, len(every) - 5))
        chosen = every[at : at + (2 if language == "zh" else rng.randint(2, 5))]
        return "".join(w[:6] for w in chosen) + "，" if language == "zh" else " ".join(chosen) + space, 6
    if scale == "digits":
        digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 12)))
        return digits + rng.choice(["", " ", ", "]), 12
    at = rng.randrange(len(lines))
    return ("".join(lines[at : at + rng.randint(2, 4)]) if scale == "sentences" else lines[at]), 3


def loop(rng: random.Random, text: str, language: str) -> str:
    what, least = unit(rng, text, language)
    if rng.random() < 0.75:
        return placed(rng, text, what * more(rng, least, 4 * least), language)
    out, every = [], words(text, language)
    for _ in range(more(rng, max(6, least), 6 * least)):  # a loop with a slip now and then
        slip, at = rng.random(), rng.randrange(len(what))
        if slip < 0.1:
            out.append(what[:at] + rng.choice(every)[:6] + what[at:])
        elif slip < 0.2:
            out.append(what[:at] + what[at + 1 :])
        else:
            out.append(what)
    return placed(rng, text, "".join(out), language)


def zeros(rng: random.Random, text: str, language: str, least: int = 110) -> str:
    """`least` times and more: a googol and a table of 10 times 10 zeros have 100 and are right."""
    times = more(rng, least, least + 100)
    kinds = ["0", "0", "0, ", "0 ", "0.0 ", "0.00, ", "00 ", "0\n", "0.0, 0, "]
    if language == "code":
        kinds += ["0x00, ", "0.0, ", "[0, 0, 0], "]
    if language == "zh":
        kinds += ["０", "０，", "0、", "零"]
    kinds += [rng.choice("123456789abcxX"), rng.choice("哈啊一") if language == "zh" else "e"]
    if rng.random() < 0.12:
        return placed(rng, text, rng.choice("-.=_*#!~。…") * more(rng, 260, 500), language)
    return placed(rng, text, rng.choice(kinds) * times, language)


def lines(rng: random.Random, text: str, language: str) -> str:
    """Lines of the text (sentences on lines of their own) come again among the others, half of all or more."""
    own = text.splitlines() if language == "code" else [one.strip() for one in sentences(text, language)]
    own = own[: rng.randint(6, 30)]
    solid = [one for one in own if sum(len(c.encode()) for c in one if c.isalnum()) >= 16]
    chosen = rng.sample(solid, min(len(solid), rng.randint(1, 3)))
    copies = max(5, int(len(own) * rng.uniform(1.0, 2.5)))
    for _ in range(copies):
        own.insert(rng.randrange(len(own) // 3, len(own) + 1), rng.choice(chosen))
    return "\n".join(own)


def cut(rng: random.Random, text: str) -> str:
    """Ends within a word."""
    for at in range(len(text) - 1 - rng.randrange(30), 0, -1):
        if text[at - 1].isalpha() and text[at].isalpha():
            return text[:at]
    return text


def rambling(rng: random.Random, text: str, language: str, pool: list[str]) -> str:
    """Goes on and on with small changes until it is cut off."""
    every, chosen = words(text, language), sentences(text, language)
    kind, one = rng.choice(["counting", "slots", "shuffle", "overlong"]), rng.choice(chosen)
    if kind == "overlong":
        out = text
        while len(out.encode()) < 17_000 + rng.randrange(25_000):
            out += "\n" + rng.choice(pool)
        return cut(rng, out)
    if kind == "counting":
        first, times = rng.choice([1, 1, 37, 101]), more(rng, 25, 100)
        if language == "code":
            name = rng.choice(every)
            comment = f"# Step §: {name} {rng.choice(every)}\n"
            form = rng.choice([f"{name}_§ = {name}(§)\n", comment, f"{one.rstrip()}  # §\n"])
            times *= 3
        elif language == "zh":
            form = rng.choice(["第§步：", "§. ", "（§）", "步骤§："]) + one
        else:
            form = rng.choice(["Step §: ", "§. ", "(§) ", "In frame § "]) + one
        return cut(rng, placed(rng, text, "".join(form.replace("§", str(first + i)) for i in range(times)), language))
    if kind == "slots":
        target = rng.choice(words(one, language) or every)
        times = more(rng, 25, 80) * (2 if language == "code" else 1)
        out = "".join(one.replace(target, rng.choice(every), 1) for _ in range(times))
    else:
        few = rng.sample(chosen, min(len(chosen), rng.randint(3, 8)))
        out = "".join(rng.choice(few) for _ in range(len(few) * more(rng, 5, 15)))
    return cut(rng, placed(rng, text, out, language))


def characters(rng: random.Random, text: str, language: str) -> str:
    kind = rng.choice(["utf8 as latin", "utf8 as gbk", "replaced", "control", "private", "symbols", "scripts"])
    if kind == "utf8 as latin" or (kind == "utf8 as gbk" and language != "zh"):
        body = (
            text if re.search(r"[^\x00-\x7f]", text) else text.replace("'", "’").replace("- ", "— ").replace("e", "é")
        )
        return body.encode().decode("cp1252", "replace")
    if kind == "utf8 as gbk":
        return text.encode().decode("gb18030", "replace")
    if kind == "replaced":
        return "".join("\ufffd" if rng.random() < 0.05 else c for c in text) + "\ufffd" * 3
    if kind in ("control", "private"):
        low, high = (1, 8) if kind == "control" else (0xE000, 0xE0FF)
        return "".join(c + (chr(rng.randint(low, high)) if rng.random() < 0.03 else "") for c in text) + chr(low) * 3
    if kind == "symbols":
        return placed(rng, text[:200], "".join(rng.choice("#@%^&*~|\\<>{}[]/+=!?$") for _ in range(400)), language)
    ranges = [
        (0x400, 0x44F),
        (0x5D0, 0x5EA),
        (0x627, 0x64A),
        (0xE01, 0xE2E),
        (0x905, 0x939),
        (0x61, 0x7A),
        (0xAC00, 0xAD00),
    ]
    return placed(
        rng,
        text,
        "".join(chr(rng.randint(*rng.choice(ranges))) + " " * (rng.random() < 0.15) for _ in range(150)),
        language,
    )


TOKENS = [
    "<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "[UNUSED_TOKEN_145]", "<img>", "</img>", "<IMG_CONTEXT>",
    "<|im_end|>\n<|im_start|>user\n", "<|vision_start|>",
]  # fmt: skip


def control(rng: random.Random, text: str, language: str) -> str:
    at = rng.choice([0, len(text), rng.randrange(len(text))])
    return text[:at] + rng.choice(TOKENS) * rng.choice([1, 1, 4]) + text[at:]


def few_zeros(rng: random.Random, text: str, language: str) -> str:
    """From 48 times: longer than most right answers have, shorter than some."""
    return zeros(rng, text, language, 48)


def dialogue(rng: random.Random, text: str, language: str) -> str:
    """The same long answer in many turns."""
    long = [one.strip() for one in sentences(text, language) if len(one.encode()) > 75]
    return TURN.join([rng.choice(long or [text])] * more(rng, 8, 30))


SPOIL: dict[str, Callable[..., str]] = {
    "loop": loop, "zeros": zeros, "lines": lines, "rambling": rambling, "characters": characters, "control": control,
    "dialogue": dialogue, "few zeros": few_zeros,
}  # fmt: skip
AIMED = ("loop", "zeros", "lines", "rambling")


def build(seed: int, clean: int, bad: int) -> tuple[list[Text], list[Text]]:
    """The two halves; each has up to `clean` clean texts per language and `bad` bad ones per kind and language."""
    rng = random.Random(seed)
    found: dict[tuple[int, bool, str], dict[str, set[str]]] = {}
    for language, source, text in documents(rng):
        text = text.strip()
        if SHORTEST <= len(text) <= LONGEST:
            found.setdefault((*side(text), language), {}).setdefault(source, set()).add(text)
    for language, text in made(rng, 2 * clean):
        found[side(text)[0], False, language].setdefault("made", set()).add(text)
    for language, text in alike(rng, 2 * clean):
        found[side(text)[0], False, language].setdefault("alike", set()).add(text)
    halves: tuple[list[Text], list[Text]] = ([], [])
    for half in (0, 1):
        for language in LANGUAGES:
            sources = found[half, False, language]
            left, order = clean, sorted(sources, key=lambda name: len(sources[name]))
            for index, source in enumerate(order):  # equal shares; what a small source lacks goes to the others
                texts = rng.sample(sorted(sources[source]), min(len(sources[source]), left // (len(order) - index)))
                left -= len(texts)
                halves[half].extend(Text(text, language, source) for text in texts)
            pool = sorted(set().union(*found[half, True, language].values()))
            fit = [t for t in pool if len(sentences(t, language)) >= 6 and len(words(t, language)) >= 20]
            for kind, spoil in SPOIL.items():
                for text in rng.sample(fit, bad):
                    arguments = (pool,) if spoil is rambling else ()
                    halves[half].append(Text(spoil(rng, text, language, *arguments), language, "", kind))
    return halves
