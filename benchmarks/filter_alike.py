"""Clean texts for benchmarks/filters.py that a filter easily takes for bad ones: they repeat or look odd by nature.

Chart reading and worked steps that count, records and logs, figures of one digit, matrices, base64, songs, quotation
marks as German and French set them, and dialogues that answer alike. A review of the checks by texts written by hand
found nearly all of these kinds rejected. Each is made here by chance, so that both halves hold texts of every kind;
lengths were set before the limits of stages/curation.py were chosen anew.
"""

import base64
import json
import random
from collections.abc import Callable, Iterator

from filter_texts import NOUNS, TURN

THINGS = {
    "en": ["revenue", "population", "output", "rainfall", "share of exports", "unemployment rate"],
    "zh": ["营业收入", "常住人口", "总产量", "降雨量", "出口份额", "失业率"],
}
QUOTED = {
    "de": ["Spaß", "groß", "Größe", "Müßiggang", "Café", "Straße", "Überfluß", "À la carte"],
    "fr": ["liberté", "égalité", "été", "café", "fraternité", "à côté", "déjà", "CAFÉ", "SOCIÉTÉ", "où"],
}


def charts(rng: random.Random) -> tuple[str, str]:
    """A line for each year or hour."""
    thing, first, count = rng.randrange(len(THINGS["en"])), rng.randint(1950, 2010), rng.randint(8, 30)
    values = [rng.randint(10, 999) / 10 for _ in range(count)]
    en, zh = THINGS["en"][thing], THINGS["zh"][thing]
    english = rng.choice([
        f"In {{0}}, the {en} was {{1}} million.", f"- {{0}}: the {en} reaches {{1}} percent.",
        f"The {en} in {{0}} is about {{1}}.",
        "At {2}:00 the temperature is {1} degrees and the humidity is {3} percent.",
        "Year {0}: {1}% of the respondents agree, while {3}% disagree.",
    ])  # fmt: skip
    chinese = rng.choice([f"{{0}}年{zh}为{{1}}万。", f"{{0}}年的{zh}约为{{1}}，", "{2}时气温{1}度，湿度百分之{3}。"])
    rows = [(first + i, value, i % 24, rng.randint(10, 90)) for i, value in enumerate(values)]
    return "\n".join(english.format(*row) for row in rows), "\n".join(chinese.format(*row) for row in rows)


def steps(rng: random.Random) -> tuple[str, str]:
    first, by, count = rng.randint(0, 5), rng.randint(1, 9), rng.randint(8, 22)
    total, english, chinese = first, [], []
    form = rng.choice([
        "Step {0}: Add {1} to the total. The total is now {2}.", "{0}. We add {1} and get {2}.",
        "Round {0}: take the number {1}, add it to the sum, and write down {2}.",
    ])  # fmt: skip
    for i in range(1, count):
        total += i * by
        english.append(form.format(i, i * by, total))
        chinese.append(f"第{i}步：把第{i}个数{i * by}加到总和里，总和变为{total}。")
    return "\n".join(english), "\n".join(chinese)


def clauses(rng: random.Random) -> tuple[str, str]:
    """Clauses of a contract, or captions of frames: equal but for their numbers."""
    count, noun = rng.randint(4, 9), rng.randrange(len(NOUNS["zh"]))
    if rng.random() < 0.5:
        what = f"A {rng.choice(['man', 'woman', 'child'])} in a blue shirt is standing next to the {NOUNS['en'][noun]}."
        english, chinese = f"Frame-{{0}}: {what}", f"第{{0}}帧：一位穿蓝色衬衫的人站在{NOUNS['zh'][noun]}旁边。"
    else:
        english = (
            "Section {0}. The Licensee shall pay to the Licensor the amount stated in Schedule {0} within thirty days "
            f"of {rng.choice(['the Effective Date', 'receipt of the invoice', 'the end of the term'])}."
        )
        chinese = "第{0}条 被许可人应于生效之日起三十日内向许可人支付附件{0}所载明的款项。"
    lines = range(1, count + 1)
    return "\n".join(english.format(i) for i in lines), "\n".join(chinese.format(i) for i in lines)


def digits(rng: random.Random) -> str:
    """Figures and strings of one digit, letter or group."""
    times = rng.randint(20, 60)
    return rng.choice([
        f"{rng.randint(1, 8)}/9 = 0.{rng.choice('12345678') * times}…", f"1/7 = 0.{'142857' * rng.randint(4, 9)}",
        f"{rng.choice(['It', 'A googol', 'The result'])} is 1{'0' * rng.randint(20, 100)}.",
        f"The address is 0x{'0' * rng.choice([40, 64])}", f"The hash is 0x{'f' * rng.choice([40, 64])}.",
        f"{rng.choice(['ATGC', 'GGTA', ''])}{rng.choice(['CAG', 'ATTCT', 'CGG', 'GAA'])*rng.randint(12, 45)}GGTT",
        "H" + "a" * rng.randint(4, 45) + "!", "ha" * rng.randint(4, 25),
    ])  # fmt: skip


def chants(rng: random.Random) -> str:
    chant = rng.choice(["南无阿弥陀佛", "恭喜恭喜", "加油！", "生日快乐，", "啦啦啦，", "谢谢大家！"])
    return chant * rng.randint(3, 6)


def song(rng: random.Random) -> str:
    """Verses, with a refrain of the same lines."""
    lines = [
        "Take a sad song and make it better", "The river runs down to the silver sea",
        "I walked alone in morning light", "You told me once that you would stay", "And all the bells began to ring",
        "The train goes north at half past nine", "My mother sang it long ago",
        "We danced until the lanterns died", "The winter came without a word",
    ]  # fmt: skip
    hook = rng.choice([
        "Na na na nananana, nananana, hey Jude", "We will, we will sing for you", "Oh, hey, come back to me",
        "La la la la la, my love", "Hallelujah, hallelujah",
    ])  # fmt: skip
    verses = [rng.sample(lines, rng.randint(2, 4)) + [hook] * rng.randint(2, 4) for _ in range(rng.randint(1, 3))]
    return "\n\n".join("\n".join(verse) for verse in verses) + f"\n{hook}" * rng.randint(0, 4)


def quotes(rng: random.Random) -> str:
    """Quotation marks, ellipses and no-break spaces right behind letters with accents."""
    de, fr = (rng.sample(QUOTED[name], 5) for name in ("de", "fr"))
    return rng.choice([
        f"Auf dem Schild steht „{de[0]}“.",
        f"Die Wörter „{de[0]}“, „{de[1]}“ und „{de[2]}“ stehen »{de[3]}« gegenüber.",
        f"The sign reads “{fr[0]}”.", f"Le mot «\u00a0{fr[0]}\u00a0» figure sur le fronton.",
        ", ".join(f"«\u00a0{word}\u00a0»" for word in fr) + " sont les mots que l’auteur emploie le plus souvent.",
        f"Il dit\u00a0: «\u00a0{fr[0]}…\u00a0» — puis «\u00a0{fr[1]}\u00a0»\u00a0!", f"{de[0]}\u00a0und\u00a0{de[1]}…",
        "".join(rng.sample("ÁÉÍÓÚÝÞÆÖÐÅØÄÜ", rng.randint(8, 12))),
    ])  # fmt: skip


def matrix(rng: random.Random) -> str:
    rows, columns = rng.randint(3, 8), rng.randint(4, 10)
    wide = rng.randint(10, 60)
    return rng.choice([
        f"np.zeros(({rows}, {columns})) gives\n[" + "\n ".join(["[" + " ".join(["0."] * columns) + "]"] * rows) + "]",
        "\n".join(" ".join("1" if i == j else "0" for j in range(columns)) for i in range(columns)),
        "\n".join(" ".join("1" if i == j else "0" for j in range(wide)) for i in range(rng.randint(1, 10))),
        json.dumps([[0] * rows] * rows),
    ])  # fmt: skip


def records(rng: random.Random) -> str:
    count, indent = rng.randint(10, 60), rng.choice([2, 4])
    boxes = [
        {"bbox_2d": [rng.randint(0, 999) for _ in range(4)], "label": rng.choice(["person", "car"])}
        for _ in range(count)
    ]
    people = [
        {"name": f"n{i}", "active": True, "role": "user", "email": f"u{i}@example.com", "address": {"city": "Paris"}}
        for i in range(count // 2)
    ]
    text = json.dumps(rng.choice([boxes, people]), indent=indent)
    return rng.choice(["", "Here are the objects:\n"]) + rng.choice([text, f"```json\n{text}\n```"])


def markup(rng: random.Random) -> str:
    cells, rows = rng.randint(3, 7), rng.randint(4, 14)
    clock = [f"{rng.randint(8, 20):02d}:{i:02d}" for i in range(rng.randint(20, 60))]
    embedded = base64.b64encode(rng.randbytes(rng.randint(60, 400))).decode()
    return rng.choice([
        "<table>" + ("<tr>" + "<td></td>" * cells + "</tr>") * rows + "</table>",
        "iVBORw0KGgo" + "A" * rng.randint(20, 60) + embedded,
        "\n".join(f"2024-03-01 {t}:07 INFO [worker-{rng.randint(1, 8)}] Request processed in {rng.randint(1, 400)} ms"
                  for t in clock),
        f"The price was <s>${rng.randint(11, 99)}</s> now ${rng.randint(1, 10)}.",
        f"<channel><title>{rng.choice(NOUNS['en'])}</title><image><url>{rng.randint(1, 99)}</url></image></channel>",
        f"<video>\n  <source src='{rng.choice(NOUNS['en'])}{rng.randint(1, 99)}.mp4'>\n</video>\n",
        f"Words seen less than {rng.randint(2, 9)} times become <unk>, and lines are filled up with <pad>.",
    ])  # fmt: skip


def dialogue(rng: random.Random, language: str) -> str:
    """Many turns, most of which get the same short answer."""
    same = {
        "en": ["Yes.", "No.", "A", "2", "I cannot see that in the image.", "There is no text in this region."],
        "zh": ["是。", "不是。", "没有。", "图中看不清楚。", "B", "无法判断"],
    }[language]
    often = rng.choice(same)
    answers = [often if rng.random() < 0.8 else rng.choice(same + NOUNS[language]) for _ in range(rng.randint(5, 40))]
    return TURN.join(answers)


def alike(rng: random.Random, count: int) -> Iterator[tuple[str, str]]:
    """`count` pairs (language, text) of each language: as many of each kind as of any other."""
    both: list[Callable[[random.Random], tuple[str, str]]] = [charts, steps, clauses]
    english, chinese, code = [digits, song, quotes], [digits, chants], [matrix, records, markup, digits]
    for index in range(count):
        for place, language in enumerate(("en", "zh")):
            own = (english, chinese)[place]
            at = index % (len(both) + len(own) + 1)
            if at < len(both):
                yield language, both[at](rng)[place]
            elif at < len(both) + len(own):
                yield language, own[at - len(both)](rng)
            else:
                yield language, dialogue(rng, language)
        yield "code", code[index % len(code)](rng)
