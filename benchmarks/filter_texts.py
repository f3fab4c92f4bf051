"""Clean texts for benchmarks/filters.py, in English, Chinese and code; filter_spoil.py makes bad ones of others.

Documents of Debian packages (APT says which) and of the Python packages installed, cut at paragraphs, entries,
functions or classes; and made texts of the kinds that a vision-language mixture has and a filter likes to take for
loops: tables, boxes, forms, sums, songs, short answers. A hash of its words says to which half a text belongs and
whether it is shown clean or spoiled, so that a copy of it in another package goes where it went.
"""

import ast
import gzip
import hashlib
import inspect
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

APT = "fortunes fortunes-zh manpages-zh debian-faq-zh-cn debian-reference-zh-cn maint-guide-zh-cn libc6-dev"
SHORTEST, LONGEST = 40, 8000  # characters of a piece of a document

SHARE = Path("/usr/share")
FORTUNES = SHARE / "games/fortunes"
BOOKS = {
    "debian-reference": SHARE / "debian-reference/debian-reference.zh-cn.txt.gz",
    "debian-faq": SHARE / "doc/debian/FAQ/debian-faq.zh-cn.txt.gz",
    "maint-guide": SHARE / "doc/maint-guide-zh-cn/maint-guide.zh-cn.txt.gz",
}
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m|.\x08")
_ROFF_FONT = re.compile(r"\\f(\[\w*\]|\(..|.)|\\&|\\/|\\,|\\:|\\\|")
LANGUAGES = ("en", "zh", "code")
TURN = "\x1e"  # between the answers of a dialogue; every other text is one answer


@dataclass(frozen=True)
class Text:
    text: str
    language: str
    source: str
    kind: str = "clean"


def side(text: str) -> tuple[int, bool]:
    """(half 0 or 1, whether it is to be spoiled), by the words of the text."""
    digest = hashlib.sha256(" ".join(text.split()).encode("utf-8", "replace")).digest()
    return digest[0] & 1, digest[1] < 80


# -- documents ------------------------------------------------------------------------------------------------------


def pieces(document: str) -> Iterator[str]:
    """Runs of whole paragraphs of a document, of varied length.

    They are the same for every seed of the benchmark, so that a passage stays in its half for all seeds. What documents
    share, such as notices of licences, is in both halves: some 2 % of the paragraphs.
    """
    held, goal, rng = "", 0, random.Random(document)
    for paragraph in re.split(r"\n\s*\n", document):
        goal = goal or int(SHORTEST * (LONGEST / SHORTEST) ** rng.random())
        held += ("\n\n" if held else "") + paragraph.strip("\n")
        if len(held) >= goal:
            yield held
            held, goal = "", 0


def fortunes(names: list[Path]) -> Iterator[str]:
    for path in names:
        yield from _ESCAPE.sub("", path.read_text("utf-8", "replace")).split("\n%\n")


def manual(path: Path) -> str:
    """A manual page without its markup; paragraphs stay paragraphs."""
    out = []
    for line in gzip.decompress(path.read_bytes()).decode("utf-8", "replace").splitlines():
        line = _ROFF_FONT.sub("", line).replace(r"\-", "-").replace(r"\e", "\\").replace(r"\(co", "©")
        if line.startswith(('.\\"', "'\\\"", ".TH", ".so", ".if", ".ie", ".el", ".de", ".ds", ".nr", "..")):
            continue
        if line.startswith((".SH", ".SS", ".PP", ".TP", ".LP", ".P", ".IP", ".sp")):
            out.append("")
        line = re.sub(r"^[.'][A-Za-z]+ ?", "", line).strip('"')
        if line:
            out.append(line)
    return "\n".join(out)


def python_files(rng: random.Random, count: int) -> list[Path]:
    library, packages = (Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib"))
    own = [path for path in sorted(library.rglob("*.py")) if "site-packages" not in path.parts]
    others = [path for path in sorted(packages.rglob("*.py")) if "_vendor" not in path.parts]
    return [*rng.sample(own, min(count, len(own))), *rng.sample(others, min(count, len(others)))]


def python_texts(files: list[Path]) -> Iterator[tuple[str, str]]:
    """("docstrings" | "python", text): docstrings, and functions and classes as they stand."""
    for path in files:
        try:
            source = path.read_text("utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
            continue  # test data of the packages: not every file is a program
        lines = source.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (words := ast.get_docstring(node)):
                yield "docstrings", inspect.cleandoc(words)
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.end_lineno:
                yield "python", "\n".join(lines[node.lineno - 1 : node.end_lineno])


def documents(rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """(language, source, text) of everything on this machine. Raises FileNotFoundError where a package is absent."""
    for path in [*BOOKS.values(), FORTUNES / "tang300", FORTUNES / "literature", Path("/usr/include/stdio.h")]:
        if not path.exists():
            raise FileNotFoundError(f"{path} not found: apt-get update; apt-get install {APT}")
    chinese = ["chinese", "tang300", "song100"]
    english = [path for path in sorted(FORTUNES.iterdir()) if not path.suffix and path.name not in chinese]
    for text in fortunes(english):
        yield "en", "fortunes", text
    for text in fortunes([FORTUNES / name for name in chinese]):
        yield "zh", "fortunes-zh", text
    for path in sorted((SHARE / "common-licenses").iterdir()):
        for text in pieces(path.read_text("utf-8", "replace")):
            yield "en", "licences", text
    for name, path in BOOKS.items():
        for text in pieces(gzip.decompress(path.read_bytes()).decode("utf-8", "replace")):
            yield "zh", name, text
    for path in sorted((SHARE / "man/zh_CN").rglob("*.gz")):
        for text in pieces(manual(path)):
            if sum("\u4e00" <= c <= "\u9fff" for c in text) > len(text) / 10:
                yield "zh", "manpages-zh", text
    for kind, text in python_texts(python_files(rng, 700)):
        yield ("en" if kind == "docstrings" else "code"), kind, text
    headers = sorted(Path("/usr/include").rglob("*.h"))
    for path in rng.sample(headers, min(len(headers), 500)):
        for text in pieces(path.read_text("utf-8", "replace")):
            yield "code", "C headers", text


# -- made texts -----------------------------------------------------------------------------------------------------

SONGS = {
    "en": [
        "Row, row, row your boat,\nGently down the stream.\nMerrily, merrily, merrily, merrily,\nLife is but a dream.",
        "Twinkle, twinkle, little star,\nHow I wonder what you are!\nUp above the world so high,\n"
        "Like a diamond in the sky.\nTwinkle, twinkle, little star,\nHow I wonder what you are!",
        "The wheels on the bus go round and round,\nRound and round, round and round,\n"
        "The wheels on the bus go round and round,\nAll through the town.",
        "Ha ha ha ha! That is a good one.",
        "London Bridge is falling down,\nFalling down, falling down,\nLondon Bridge is falling down,\nMy fair lady.",
    ],
    "zh": [
        "两只老虎，两只老虎，\n跑得快，跑得快，\n一只没有眼睛，一只没有尾巴，\n真奇怪，真奇怪。",
        "采采芣苢，薄言采之。采采芣苢，薄言有之。\n采采芣苢，薄言掇之。采采芣苢，薄言捋之。",
        "哈哈哈哈哈哈，这张图真好笑！",
        "寻寻觅觅，冷冷清清，凄凄惨惨戚戚。",
        "鹅，鹅，鹅，曲项向天歌。\n白毛浮绿水，红掌拨清波。",
    ],
}
NOUNS = {
    "en": [
        "dog",
        "cat",
        "person",
        "bicycle",
        "car",
        "traffic",
        "light",
        "bench",
        "umbrella",
        "handbag",
        "tie",
        "suitcase",
        "frisbee",
        "kite",
        "bottle",
        "cup",
    ],
    "zh": [
        "狗",
        "猫",
        "行人",
        "自行车",
        "汽车",
        "红绿灯",
        "长椅",
        "雨伞",
        "手提包",
        "领带",
        "行李箱",
        "飞盘",
        "风筝",
        "瓶子",
        "杯子",
    ],
}
LABELS = {
    "en": ["Name", "Date of birth", "Address", "Invoice no.", "Total", "Tax", "Quantity", "Signature", "Phone"],
    "zh": ["姓名", "出生日期", "住址", "发票号码", "合计", "税额", "数量", "签字", "电话"],
}


def table(rng: random.Random, nouns: list[str]) -> str:
    columns, cells = (
        rng.randint(2, 8),
        rng.choice([["Yes", "No"], ["-"], ["0", "1"], [str(n) for n in range(3000)], ["0.00", "1.25"]]),
    )
    rows = [[rng.choice(nouns), *(rng.choice(cells) for _ in range(columns))] for _ in range(rng.randint(3, 20))]
    if rng.random() < 0.2:
        return "\n".join(",".join(row) for row in rows)
    if rng.random() < 0.2:
        row = " & ".join("c" * 1 for _ in range(columns))
        return f"\\begin{{tabular}}{{{row}}}\n" + " \\\\\n".join(" & ".join(row) for row in rows) + "\n\\end{tabular}"
    head = f"| {' | '.join(['#', *nouns[:columns]])} |\n|{'---|' * (columns + 1)}\n"
    return head + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def boxes(rng: random.Random, nouns: list[str]) -> str:
    count = rng.randint(1, 25)
    corners = [sorted(rng.sample(range(1000), 2)) + sorted(rng.sample(range(1000), 2)) for _ in range(count)]
    if rng.random() < 0.4:
        name = rng.choice(nouns)
        return f"<ref>{name}</ref><box>{[[a, c, b, d] for a, b, c, d in corners]}</box>"
    if rng.random() < 0.5:
        return "\n".join(f"<ref>{rng.choice(nouns)}</ref><box>[[{a}, {c}, {b}, {d}]]</box>" for a, b, c, d in corners)
    return json.dumps(
        [{"label": rng.choice(nouns), "bbox": corner} for corner in corners],
        ensure_ascii=False,
        indent=rng.choice([None, 2]),
    )


def form(rng: random.Random, labels: list[str]) -> str:
    def filled() -> str:
        return rng.choice(
            [
                "______________",
                "N/A",
                f"{rng.random() * 1000:.2f}",
                f"{rng.randint(1, 10**9)}",
                "□ □",
                "1000000",
                "XXXX",
            ]
        )

    sheets = [
        "\n".join(f"{label}: {filled()}" for label in rng.sample(labels, rng.randint(3, len(labels))))
        for _ in range(rng.randint(1, 3))
    ]
    return ("\n" + rng.choice("-=*") * rng.randint(20, 90) + "\n").join(sheets)


def sums(rng: random.Random, says: str) -> str:
    kind = rng.randrange(5)
    if kind == 0:
        n = rng.randint(2, 12)
        return "\n".join(f"{n} × {i} = {n * i}" for i in range(1, rng.randint(9, 20)))
    if kind == 1:
        return "\n".join("  ".join(f"{i}×{j}={i * j}" for i in range(1, j + 1)) for j in range(1, 10))
    if kind == 2:
        a, b = rng.randint(10**5, 10**30), rng.randint(10**5, 10**30)
        return f"{says} {a} × {b} = {a * b}"
    if kind == 3:
        size = rng.randint(2, 6)
        entries = " \\\\ ".join(" & ".join("1" if i == j else "0" for j in range(size)) for i in range(size))
        return f"{says} $$I = \\begin{{pmatrix}} {entries} \\end{{pmatrix}}$$"
    steps = [
        f"{says} x_{{{i}}} = \\frac{{{rng.randint(1, 99)}}}{{{rng.randint(1, 99)}}} x_{{{i - 1}}} + {rng.randint(1, 9)}"
        for i in range(1, rng.randint(3, 9))
    ]
    return "\n".join(steps) + f"\n\\boxed{{{rng.randint(1, 999)}}}"


def short(rng: random.Random, language: str) -> str:
    fixed = {
        "en": ["A", "B", "Yes", "No", "7", "1000000", "0", "0.5", "-", "?", "stop", "12:00", "none", "C. 25%"],
        "zh": ["是", "否", "七", "红色", "无", "。", "三个", "B", "5", "左边"],
    }
    return (
        rng.choice(fixed[language]) if rng.random() < 0.5 else f"{rng.choice(NOUNS[language])} {rng.randint(0, 99999)}"
    )


def program(rng: random.Random) -> str:
    name, count = rng.choice(["value", "node", "user", "frame"]), rng.randint(3, 20)
    numbers = [rng.randint(0, 999) for _ in range(count)]
    objects = [{"id": i, name: n, "tags": [], "parent": None} for i, n in enumerate(numbers)]
    dump = [" ".join(f"{b if rng.random() < 0.5 else 0:02x}" for b in rng.randbytes(16)) for _ in numbers]
    nested = "  if (a) {\n    if (b) {\n      while (c) {\n        d();\n      }\n    }\n  }\n"
    imports = "import os\nimport sys\nimport json\nfrom a import b\nfrom a import c\n\n"
    return rng.choice([
        "\n".join(f"assert {name}({n}) == {n * n}" for n in numbers),
        "\n".join(f"    {name.upper()}_{i} = {i}" for i in range(count)),
        f"for (;;) {{\n{nested}}}\n" * 2,
        "\n".join(f"INSERT INTO {name} (id, count) VALUES ({i}, {n});" for i, n in enumerate(numbers)),
        "<ul>\n" + "".join(f'  <li><a href="#{name}{n}">{name} {n}</a></li>\n' for n in numbers) + "</ul>",
        "\n".join(f"{16 * i:08x}  {line}" for i, line in enumerate(dump)),
        json.dumps(objects, indent=2),
        imports + "\n".join(f"def {name}_{n}():\n    return {n}\n" for n in set(numbers[:6])),
        f"{name} = [" + ", ".join(["0"] * count) + "]",
    ])  # fmt: skip


def answer(rng: random.Random, language: str) -> str:
    """An answer to a question about a picture."""
    says = {"en": "Hence", "zh": "因此"}[language]
    return rng.choice([
        lambda: table(rng, NOUNS[language]), lambda: boxes(rng, NOUNS[language]), lambda: form(rng, LABELS[language]),
        lambda: sums(rng, says), lambda: short(rng, language), lambda: rng.choice(SONGS[language]),
    ])()  # fmt: skip


def made(rng: random.Random, count: int) -> Iterator[tuple[str, str]]:
    """`count` pairs (language, text) of each language."""
    for _ in range(count):
        yield "code", program(rng)
        yield "en", answer(rng, "en")
        yield "zh", answer(rng, "zh")
