"""The heuristic text checks: what a reader calls a loop, a zero run or garbage is found; what looks alike is kept."""

import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from modeling.sources import Rejection
from stages.curation import TextChecks
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
    "sentences loop": ("repetition", ("A dog runs across the lawn. Behind it, a child is laughing. " * 3).strip()),
    "word loop": ("repetition", "The answer is " + "very " * 20),
    "token loop without spaces": ("repetition", EN + "ing" * 30),
    "digit loop": ("repetition", "The result is 0." + "142857" * 12),
    "loop of hundreds of symbols": ("repetition", "-=|" * 400),
    "Chinese sentence loop": ("repetition", ZH + "这个人手里拿着一把红色的雨伞。" * 3),
    "Chinese phrase loop": ("repetition", "我认为" + "非常好，" * 12),
    "Chinese character loop": ("repetition", ZH + "的是" * 15),
    "code loop": ("repetition", CODE + "    total = total + step\n" * 5),
    "loop with a slip": ("repetition", ("The cat sat. " * 5 + "The old cat sat. ") * 4),
    "counting": ("repetition", "".join(f"Step {n}: Repeat the previous measurement. " for n in range(101, 130))),
    "Chinese counting": ("repetition", "".join(f"第{n}步：重复上面的操作并记录结果。" for n in range(1, 30))),
    "one word changes": ("repetition", "".join(f"The picture shows a {w} on the wooden table. " for w in NOUNS * 3)),
    "zeros": ("zero_run", "The value is 0." + "0" * 60),
    "list of zeros": ("zero_run", "[" + "0, " * 60),
    "zeros of many forms": ("zero_run", "0 0.0 00 " * 20),
    "zeros in Chinese": ("zero_run", "坐标为" + "０，" * 50),
    "another character": ("zero_run", "哈" * 60),
    "line of dots": ("zero_run", EN + "." * 300),
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
    "symbols": ("odd_characters", "#@%^&*~|<>{}[]/+=!?$" * 3 + "$?!=+/][}{><|~*&^%@#" * 5),
    "mixed scripts": ("odd_characters", "aжb уxя dшe qцw рtп mлn hфk"),
    "overlong": ("abnormal_length", "".join(f"{n * n + 7}. " for n in range(9000))),
    "nothing": ("abnormal_length", " \n "),
    "end of turn": ("control_tokens", EN + "<|im_end|>\n<|im_start|>user\nGo on"),
    "end of text": ("control_tokens", "<|endoftext|>" + ZH),
    "InternLM token": ("control_tokens", "[UNUSED_TOKEN_145]" + EN),
    "image token": ("control_tokens", "<img><IMG_CONTEXT></img> a dog"),
    "placeholder in an answer": ("control_tokens", "As <image> shows"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_texts_are_found(name):
    expected, text = BAD[name]
    found = check(text)
    assert found is not None and found.reason == expected, found


CLEAN = {
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
    found = check("A dog.", "What is <|im_start|> for?")
    assert found and found.reason == "control_tokens" and found.detail.startswith("turn 1:")


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
    assert reason(EN + "0" * 41) == "zero_run" and reason(EN + "0" * 39) is None


def test_an_answer_that_is_long_must_end_as_a_text_ends():
    sentences = [f"In {n * n % 9973} of {n * n * n % 9967} towns {n * 7919 % 9949} people voted. " for n in range(60)]
    limits = TextChecks(cut_bytes=1000, counting_bytes=10**6, echoed_bytes=10**6)
    whole = "".join(sentences).strip()
    assert check(whole, limits=limits) is None
    found = check(whole[:-3], limits=limits)
    assert found is not None and found.reason == "abnormal_length"


UNIT = st.text(min_size=1, max_size=60).filter(lambda text: any(c.isalnum() for c in text))


@settings(max_examples=150, deadline=None)
@given(UNIT)
def test_any_text_that_repeats_for_long_is_found(unit):
    assert check(unit * 60) is not None


@settings(max_examples=80, deadline=None)
@given(UNIT, st.sampled_from([EN, ZH, CODE, ""]), st.sampled_from([EN, ZH, CODE, ""]))
def test_clean_text_around_a_loop_does_not_hide_it(unit, before, after):
    assume(check(unit) is None)
    assert check(before + "\n" + unit * 60 + "\n" + after) is not None


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
