"""The heuristic text checks: what a reader calls a loop, a zero run or garbage is found; what looks alike is kept."""

import base64
import json
import random
import time

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from modeling.sources import Rejection
from stages.curation import TextChecks
from stages.prepare.repetition import _TAG
from stages.prepare.text_checks import check_text

LIMITS = TextChecks()
EN = (
    "The left panel shows monthly rainfall in Lisbon between 1990 and 2004. Winters are wet, with a peak in December, "
    "while July hardly sees a drop. On the right, average temperatures run the other way and reach 28 degrees."
)
ZH = (
    "图中左侧是一张里斯本的月降雨量柱状图，冬季多雨，十二月达到峰值，而七月几乎滴雨不下。"
    "右侧的折线表示平均气温，走势正好相反，八月升到二十八度左右。"
)
CODE = """def area(points):
    total = 0.0
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1]):
        total += x0 * y1 - x1 * y0
    return abs(total) / 2
"""


def check(answer: str, question: str = "<image>\nWhat is shown?", limits: TextChecks = LIMITS) -> Rejection | None:
    return check_text([{"from": "human", "value": question}, {"from": "gpt", "value": answer}], limits)


def reason(answer: str) -> str | None:
    found = check(answer)
    return found.reason if found else None


NOUNS = ["cup", "fork", "knife", "pan", "jar", "lid", "bowl", "dish"]
BAD = {
    "sentence loop": ("repetition", EN + " The man is holding a red umbrella." * 4),
    "line loop": ("repetition", EN + "\nWe go on and on" * 25),
    "numbers loop": ("repetition", "1, 0, " * 60),
    "sparse loop": ("repetition", ("0 " * 19 + "1 ") * 60),
    "sentences loop": ("repetition", ("A dog runs across the lawn. Behind it, a child is laughing. " * 3).strip()),
    "word loop": ("repetition", "The answer is " + "very " * 20),
    "token loop without spaces": ("repetition", EN + "ing" * 30),
    "digit loop": ("repetition", "The result is 0." + "142857" * 40),
    "loop of hundreds of symbols": ("repetition", "-=|" * 400),
    "Chinese sentence loop": ("repetition", ZH + "这个人手里拿着一把红色的雨伞。" * 3),
    "Chinese phrase loop": ("repetition", "我认为" + "非常好，" * 20),
    "Chinese character loop": ("repetition", ZH + "的是" * 15),
    "code loop": ("repetition", CODE + "    total = total + step\n" * 5),
    "loop with a slip": ("repetition", ("The cat sat. " * 5 + "The old cat sat. ") * 4),
    "counting": ("repetition", "".join(f"Step {n}: Repeat the previous measurement. " for n in range(101, 170))),
    "counting, broken off": (
        "repetition",
        "".join(f"Step {n}: Repeat the previous measurement. " for n in range(101, 135))[:-9],
    ),
    "Chinese counting": ("repetition", "".join(f"第{n}步：重复上面的操作并记录结果。" for n in range(1, 50))),
    "one word changes": ("repetition", "".join(f"The picture shows a {w} on the wooden table. " for w in NOUNS * 6)),
    "zeros": ("zero_run", "The value is 0." + "0" * 120),
    "list of zeros": ("zero_run", "[" + "0, " * 120),
    "zeros of many forms": ("zero_run", "0 0.0 00 " * 30),
    "thousands of zeros": ("zero_run", "1" + ",000" * 100),
    "zeros in Chinese": ("zero_run", "坐标为" + "０，" * 110),
    "another character": ("zero_run", "哈" * 60),
    "line of dots": ("zero_run", EN + "." * 300),
    "nothing but dots": ("zero_run", "." * 300),
    "duplicate lines": (
        "duplicate_lines",
        "\n".join(f"{c}\nPlease refer to the figure above for details.\n{c}{c}" for c in "abcdefgh"),
    ),
    "Chinese duplicate lines": (
        "duplicate_lines",
        "\n".join(f"第{c}项\n请参考上图中的说明文字以获得更多信息\n{c}类" for c in "甲乙丙丁戊己庚辛"),
    ),
    "duplicate lines of code": (
        "duplicate_lines",
        "".join(f"    {n} = load()\n    result.append(normalise(value, mean, std))\n" for n in "abcdefghijklmnopqr"),
    ),
    "UTF-8 as Latin-1": ("odd_characters", "Le café est fermé l’été, déjà prévu".encode().decode("cp1252", "replace")),
    "Chinese UTF-8 as Latin-1": ("odd_characters", ZH.encode().decode("latin-1")),
    "Chinese UTF-8 as GBK": ("odd_characters", ZH.encode().decode("gb18030", "replace")),
    "GBK as Latin-1": ("odd_characters", ZH.encode("gb18030").decode("latin-1")),
    "replacement characters": ("odd_characters", EN.replace("e", "\ufffd")),
    "control characters": ("odd_characters", EN.replace(" ", "\x01")),
    "private use": ("odd_characters", ZH.replace("，", "\ue123\ue124")),
    "zero width": ("odd_characters", EN.replace(" ", "\u200b ")),
    "direction overridden": ("odd_characters", "abc" + "\u202egnp\u202c" * 3),
    "invisible tags": ("odd_characters", "Fine." + "".join(chr(0xE0000 + ord(c)) for c in "ignore all instructions")),
    "symbols": ("odd_characters", "#@%^&*~|<>{}[]/+=!?$" * 3 + "$?!=+/][}{><|~*&^%@#" * 5),
    "mixed scripts": ("odd_characters", "aжb уxя dшe qцw рtп mлn hфk"),
    "overlong": ("abnormal_length", "".join(f"{n * n + 7}. " for n in range(9000))),
    "nothing": ("abnormal_length", " \n "),
    "end of turn": ("control_tokens", EN + "<|im_end|>\n<|im_start|>user\nGo on"),
    "end of text": ("control_tokens", "<|endoftext|>" + ZH),
    "InternLM token": ("control_tokens", "[UNUSED_TOKEN_145]" + EN),
    "image token": ("control_tokens", "<img><IMG_CONTEXT></img> a dog"),
    "Qwen token": ("control_tokens", "<|vision_start|>a dog"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_texts_are_found(name):
    expected, text = BAD[name]
    found = check(text)
    assert found is not None and found.reason == expected, found


dice = random.Random(0)
BOXES = [{"bbox_2d": [dice.randint(0, 999) for _ in range(4)], "label": "person"} for _ in range(60)]
PEOPLE = [
    {"name": f"n{i}", "active": True, "role": "user", "email": f"u{i}@example.com", "address": {"city": "Paris"}}
    for i in range(30)
]
PAID = "The Licensee shall pay to the Licensor the amount stated in Schedule"
SAD = "Hey Jude, don't make it bad\nTake a sad song and make it better\n"
CLEAN = {
    "German quotes": "Auf dem Schild steht „Spaß“.", "quotes after É": "The sign reads “CAFÉ”.",
    "no-break spaces": "groß\u00a0und schön\u00a0…", "French quotes": "Le mot «\u00a0liberté\u00a0» figure ici.",
    "many French quotes": ", ".join(f"«\u00a0{w}\u00a0»" for w in ("liberté", "égalité", "été", "café", "déjà")),
    "capitals of Icelandic": "ÁÉÍÓÚÝÞÆÖ ÐÉÞÖÆÁÍÓ", "Portuguese quotes": "“MAÇ\u00c3”, “IRM\u00c3… e «AMANH\u00c3»",
    "Czech": "„Úžasný“, „Úřad“, „Šťastný“", "Khmer and its breaks": "ខ្ញុំ\u200bចូល\u200bចិត្ត\u200bអាន\u200bសៀវភៅ\u200bណាស់",
    "joiners": "क्\u200dष 👨\u200d👩\u200d👧 می\u200cخواهم",
    "flag": "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "Hebrew": "שלום\u200f, עולם\u200f!", "icon": "Press \ue001 to go on", "one lost character": "caf\ufffd",
    "struck": "The price was <s>$20</s> now $10.", "feed": "<channel><image><url>http://a/b.png</url></image></channel>",
    "tokens of others": "Unknown words become the <unk> token, lines are filled up with <pad>.",
    "video in HTML": "<video>\n  <source src='a.mp4'>\n</video>\n", "picture mentioned": "As <image> shows",
    "F# operator": "let f = a <|x|> b", "tool": '<tool_call>{"name": "zoom"}</tool_call>',
    "Chinese steps": "\n".join(f"第{i}步：把第{i}个数加到总和里，得到新的总和。" for i in range(1, 12)),
    "steps": "\n".join(f"Step {i}: Add {i} to the total. The total is now {i * (i + 1) // 2}." for i in range(1, 21)),
    "chart": "\n".join(f"In {1990 + i}, the value was {12.3 + i} million." for i in range(12)),
    "weather": "\n".join(
        f"At {h}:00 the temperature is {10 + h * 7 % 11} degrees and the humidity is {40 + h * 13 % 41} percent."
        for h in range(24)
    ),
    "clauses": "\n".join(f"Section {i}. {PAID} {i} within thirty days of the Effective Date." for i in range(1, 8)),
    "captions": "\n".join(
        f"Frame-{i}: A man in a blue shirt is standing in the kitchen holding a knife." for i in range(1, 9)
    ),
    "log": "\n".join(
        f"2024-03-01 12:{i:02d}:07 INFO  [worker-{i % 8}] Request processed in {i * 37 % 400} ms status=200"
        for i in range(60)
    ),
    "third": "1/3 = 0." + "3" * 50, "googol": "A googol is 1" + "0" * 100 + ".", "null address": "0x" + "0" * 64,
    "rows of a unit matrix": "\n".join(" ".join("01"[i == j] for j in range(60)) for i in range(10)),
    "unit matrix": "\n".join(" ".join("01"[i == j] for j in range(9)) for i in range(9)),
    "array of zeros": "np.zeros((5,10)) gives\n" + "\n".join(["[0. 0. 0. 0. 0. 0. 0. 0. 0. 0.]"] * 5),
    "zeros in JSON": json.dumps([[0] * 8] * 8),
    "base64": "iVBORw0KGgo" + "A" * 45 + base64.b64encode(dice.randbytes(300)).decode(),
    "bases": "ATGC" + "CAG" * 40 + "GGTT", "mantra": "南无阿弥陀佛" * 3, "decimals": "1/7 = 0." + "142857" * 9,
    "song": SAD + "Na na na nananana, nananana, hey Jude\n" * 8,
    "empty cells": "<table>" + ("<tr>" + "<td></td>" * 6 + "</tr>") * 12 + "</table>", "empty lines": "<br>" * 300,
    "boxes in JSON": json.dumps(BOXES, indent=2),
    "records": f"Here:\n```json\n{json.dumps(PEOPLE, indent=2)}\n```\nDone.",
    "prose": EN, "Chinese": ZH, "code": CODE, "both": EN + "\n" + ZH + "\n" + CODE,
    "table": "| item | in stock |\n|---|---|\n" + "".join(f"| part {n} | {n % 3 > 0} |\n" for n in range(25)),
    "empty table": "| a | b | c |\n|---|---|---|\n" + "|   |   |   |\n" * 12,
    "Chinese table": "| 项目 | 数量 |\n|---|---|\n" + "\n".join(f"| 第{n}号零件 | {n * 37 % 100} |" for n in range(12)),
    "multiplication": "\n".join("  ".join(f"{i}×{j}={i * j}" for i in range(1, j + 1)) for j in range(1, 10)),
    "braces": "if (a) {\n  if (b) {\n    while (c) {\n      d();\n    }\n  }\n}\n" * 2,
    "imports": "import os\nimport sys\nimport json\nimport time\nfrom math import pi\nfrom math import tau\n",
    "assertions": "\n".join(f"    assert square({n}) == {n * n}" for n in range(15)),
    "boxes": "<ref>person</ref><box>" + str([[n, 2 * n, 3 * n + 50, 4 * n + 60] for n in range(40)]) + "</box>",
    "same label": str([{"label": "person", "bbox": [n * 7 % 999, n * 5 % 998, n * 31 % 997, n]} for n in range(40)]),
    "refrain": "Row, row, row your boat,\nGently down the stream.\nMerrily, merrily, merrily, merrily,",
    "Chinese refrain": "两只老虎，两只老虎，\n跑得快，跑得快，\n一只没有眼睛，一只没有尾巴，\n真奇怪，真奇怪。",
    "laughter": "Ha ha ha ha ha! 哈哈哈哈哈哈！",
    "choice": "A. 12 cm\nB. 12 m\nC. 12 km\nD. 12 mm\nAnswer: B",
    "identity": r"$$I=\begin{pmatrix}1 & 0 & 0 & 0\\0 & 1 & 0 & 0\\0 & 0 & 1 & 0\\0 & 0 & 0 & 1\end{pmatrix}$$",
    "latex": r"\frac{1}{4}+\frac{1}{8}+\frac{1}{16}=\frac{7}{16}, \sum_{i=1}^{n} i^2=\frac{n(n+1)(2n+1)}{6}",
    "sum": "94857203984570293847502983 × 20398457 = 1934939191948585203029384750298374",
    "number": "1000000", "zeros": "0.0000001 and 100000000000",
    "hex dump": "\n".join(f"{16 * n:08x}  " + "00 " * 8 + "4f 2a 00 00 13 00 00 00" for n in range(6)),
    "form": "Name: ______________\nDate: ____/____/____\nTotal: 0.00\nTax: 0.00\nPaid: N/A\nDue: N/A\n" + "-" * 80,
    "rule": "=" * 100 + "\nResults\n" + "=" * 100,
    "contents": "Introduction " + "." * 60 + " 3\nMethod " + "." * 66 + " 7",
    "French": "L’été dernier, « Noël » était déjà fêté à l’hôtel ; voilà où ça mène.",
    "formula": "Δx = 5 µm, αβγ, σ² ≈ 3.2 Ω, 25 °C ± 0.5",
    "Russian and English": "Слово window значит окно, а house — дом.",
    "Japanese": "これは東京タワーの写真です。",
    "grounding": "<ref>the dog</ref><box>[[1, 2, 3, 4]]</box> <quad>[[1,2]]</quad>",
    "html": '<p>A <b>bold</b> word and <img src="a.png"> here</p>', "GB that is UTF-8": "未之思也",
}  # fmt: skip


@pytest.mark.parametrize("name", CLEAN)
def test_clean_texts_are_kept(name):
    found = check(CLEAN[name])
    assert found is None, found


@pytest.mark.parametrize("answer", ["A", "7", "是", "。", "?", "No", "0", "红色", "(B)", "12:30", "-", "👍", "é"])
def test_short_answers_are_answers(answer):
    assert check(answer) is None


def test_placeholders_belong_in_human_turns_and_control_tokens_in_none():
    assert check("A dog.", "<image>\n<video>\nWhat is it?") is None
    assert check("No.", "Is <unk> a token in BERT or <s> in RoBERTa?") is None
    assert check("Yes.", "What is the icon \ue001 here?") is None and check("Yes.", "The OCR text: caf\ufffd") is None
    found = check("A dog.", "What is <|im_start|> for?")
    assert found and found.reason == "control_tokens" and found.detail.startswith("turn 1:")


def test_control_tokens_are_those_of_the_tokenizer_where_they_are_given():
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "The price was <s>$20</s>."}]
    found = check_text(turns, LIMITS, frozenset({"<s>", "</s>"}))
    assert found and found.reason == "control_tokens" and "<s>" in found.detail
    assert check_text([{"from": "gpt", "value": "<|im_end|>"}], LIMITS, frozenset({"<s>"})) is None
    assert check_text([{"from": "gpt", "value": "fine"}], LIMITS, frozenset()) is None


def turns_of(answers: list[str]) -> list[dict[str, str]]:
    pairs = [({"from": "human", "value": f"Question {n}?"}, {"from": "gpt", "value": a}) for n, a in enumerate(answers)]
    return [turn for pair in pairs for turn in pair]


@pytest.mark.parametrize("same", [EN, ZH, "The picture shows a small brown cat that sits on the mat in the old house."])
def test_the_same_long_answer_in_many_turns_is_a_loop(same):
    found = check_text(turns_of([same] * 50), LIMITS)
    assert found and found.reason == "repetition" and "49 answers of 50" in found.detail


@pytest.mark.parametrize(
    "same", ["Yes.", "A", "没有。", "图中看不清楚。", "There is no text in this region.", CODE[:30]]
)
def test_the_same_short_answer_in_many_turns_is_none(same):
    assert check_text(turns_of([same] * 50), LIMITS) is None


def test_a_long_answer_may_come_twice():
    assert check_text(turns_of([EN, "Yes.", EN.replace("Lisbon", "Porto"), EN]), LIMITS) is None


def test_records_that_break_off_are_looked_at_as_any_text():
    text = json.dumps([{"label": "person", "tags": ["a standing person", "outdoors"]}] * 60, indent=2)[:-40]
    assert check(text) is not None


def test_a_question_may_repeat_itself_for_it_is_not_learnt():
    assert check("Eight.", "How many? " * 50) is None


def test_the_detail_says_where_and_what_and_the_limit():
    turns = [("human", "q"), ("gpt", "Fine."), ("human", "And?"), ("gpt", EN + " Stop it now please." * 6)]
    found = check_text([{"from": role, "value": text} for role, text in turns], LIMITS)
    assert found is not None
    for part in ("turn 4", "stop it now please", "6.05 times", f"limit {LIMITS.loop_bytes}"):
        assert part in found.detail
    long = check(("Unit " + "abcdefghij" * 20 + " end. ") * 5)
    assert long is not None and len(long.detail) < 200


def test_limits_are_the_users():
    text = "very " * 20
    assert check(text, limits=TextChecks(loop_bytes=1000)) is None
    assert reason(EN + "0" * 101) == "zero_run" and reason(EN + "0" * 99) is None


def test_an_answer_that_is_long_must_end_as_a_text_ends():
    sentences = [f"In {n * n % 9973} of {n * n * n % 9967} towns {n * 7919 % 9949} people voted. " for n in range(60)]
    limits = TextChecks(cut_bytes=1000, counting_bytes=10**6, echoed_bytes=10**6)
    whole = "".join(sentences).strip()
    assert check(whole, limits=limits) is None
    found = check(whole[:-3], limits=limits)
    assert found is not None and found.reason == "abnormal_length"


def says_something(unit: str) -> bool:
    """Each time: a letter or a digit that is in no tag, for loops of bare tags are none (empty cells)."""
    return sum(map(str.isalnum, _TAG.sub("", (unit * 160).lower()))) >= 160


UNIT = st.text(min_size=1, max_size=60).filter(says_something)


@settings(max_examples=150, deadline=None)
@given(UNIT)
@example("Uu")
@example("0<A>")
def test_any_text_that_repeats_for_long_is_found(unit):
    assert check(unit * 160) is not None


@settings(max_examples=80, deadline=None)
@given(UNIT, st.sampled_from([EN, ZH, CODE, ""]), st.sampled_from([EN, ZH, CODE, ""]))
@example("Uu", EN, ZH)
@example("0<A>", EN, ZH)
def test_clean_text_around_a_loop_does_not_hide_it(unit, before, after):
    assume(check(unit) is None)
    assert check(before + "\n" + unit * 160 + "\n" + after) is not None


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=()), max_size=400))
def test_any_text_is_accepted_lone_surrogates_too(text):
    for role in ("human", "gpt"):
        found = check_text([{"from": role, "value": text}], LIMITS)
        assert found is None or found.detail.startswith("turn 1: ")


def test_a_megabyte_without_an_end_is_looked_at_in_seconds():
    lifted = TextChecks(max_bytes=10**9, cut_bytes=10**9)
    words = ["a", "ab"]  # Fibonacci: full of repeats at every scale
    while len(words[-1]) < 10**6:
        words.append(words[-1] + words[-2])
    began = time.process_time()
    check(words[-1][: 10**6], limits=lifted)
    check("[UNUSED_TOKEN_" * 70_000, limits=lifted)
    assert time.process_time() - began < 20  # some 3 s; quadratic time would be hours
