"""Pictures and texts in which benchmarks/duplicates.py plants copies, and the edits that make them.

Pictures: Fashion-MNIST (Debian's dataset-fashion-mnist) and scikit-learn's digits, enlarged, in rows, composed with
captions; pages of text, bar charts. Texts: Python's own help, docstrings and source; Chinese is made of 70 words.
"""

import ast
import gzip
import io
import random
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

FASHION = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")
LONG = 400  # characters of a text, runs of spaces counted as one
BICUBIC = Image.Resampling.BICUBIC


class Material:
    def __init__(self, seed: int):
        from pydoc_data.topics import topics

        from sklearn.datasets import load_digits

        loaded: Any = load_digits()
        self.random = random.Random(seed)
        self.fashion = np.frombuffer(gzip.decompress(FASHION.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)
        self.digits = (loaded.images * 15.9375).astype(np.uint8)
        self.words = [word for text in topics.values() for word in text.split() if word.isalpha()]
        self.font = ImageFont.load_default(14)
        self.code, docstrings = standard_library()
        paragraphs = [" ".join(part.split()) for text in topics.values() for part in text.split("\n\n")]
        self.help = unlike([text for text in [*paragraphs, *docstrings] if len(text) >= LONG])
        self.random.shuffle(self.code)

    def number(self, below: int) -> int:
        return self.random.randrange(below)

    def phrase(self, words: int) -> str:
        return " ".join(self.random.choices(self.words, k=words))

    def digit(self, side: int, which: int) -> Image.Image:
        return Image.fromarray(self.digits[which]).resize((side, side), BICUBIC)

    def garment(self, which: int) -> Image.Image:
        return Image.fromarray(self.fashion[which]).resize((112, 112), BICUBIC)

    def row(self, digits: list[int]) -> Image.Image:
        picture = Image.new("L", (308, 80))
        for place, which in enumerate(digits):
            picture.paste(self.digit(48, which), (10 + 48 * place, 16))
        return picture

    def composed(self) -> Image.Image:
        """Three garments, three digits and a caption, on paper."""
        picture = Image.new("L", (360, 280), 255)
        for place in range(3):
            picture.paste(self.garment(self.number(len(self.fashion))), (10 + 115 * place, 10))
            picture.paste(self.digit(80, self.number(len(self.digits))), (10 + 115 * place, 130))
        ImageDraw.Draw(picture).text((10, 240), self.phrase(6), font=self.font, fill=0)
        return picture

    def page(self, lines: list[str]) -> Image.Image:
        picture = Image.new("L", (640, 820), 255)
        draw = ImageDraw.Draw(picture)
        for place, line in enumerate(lines):
            draw.text((40, 40 + 24 * place), line, font=self.font, fill=0)
        return picture

    def lines(self) -> list[str]:
        return [self.phrase(self.random.randint(6, 10)) for _ in range(30)]

    def chart(self) -> Image.Image:
        """Eight bars, one of them coloured."""
        picture = Image.new("RGB", (400, 300), "white")
        draw, coloured = ImageDraw.Draw(picture), self.number(8)
        for place in range(8):
            box = (30 + 45 * place, 280 - self.random.randint(20, 250), 60 + 45 * place, 280)
            draw.rectangle(box, fill=(200, 60, 40) if place == coloured else (90, 90, 120))
        return picture

    def chinese(self) -> str:
        words = [
            "图片",
            "显示",
            "一个",
            "红色",
            "汽车",
            "停在",
            "街道",
            "旁边",
            "孩子",
            "正在",
            "公园",
            "玩耍",
            "天空",
            "蓝色",
            "建筑",
            "很高",
            "我们",
            "可以",
            "看到",
            "许多",
            "人",
            "在",
            "市场",
            "购买",
            "蔬菜",
            "水果",
            "价格",
            "便宜",
            "老人",
            "坐在",
            "椅子",
            "上",
            "阅读",
            "报纸",
            "小狗",
            "跑过",
            "草地",
            "河水",
            "清澈",
            "远处",
            "山峰",
            "白雪",
            "覆盖",
            "太阳",
            "升起",
            "光线",
            "温暖",
            "学生",
            "走进",
            "教室",
            "老师",
            "讲解",
            "数学",
            "问题",
            "答案",
            "正确",
        ]
        return "。".join("".join(self.random.choices(words, k=self.random.randint(6, 12))) for _ in range(14)) + "。"


def standard_library() -> tuple[list[str], list[str]]:
    """Functions without their docstrings, and docstrings, of at least LONG characters."""
    code: list[str] = []
    help_: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            if docstring := ast.get_docstring(node):
                help_.append(" ".join(docstring.split()))
                node.body = node.body[1:] or [ast.Pass()]
            if isinstance(node, ast.FunctionDef):
                code.append(ast.unparse(node))
    code = [text for text in code if len(" ".join(text.split())) >= LONG]
    return unlike(code), [text for text in help_ if len(text) >= LONG]


def unlike(texts: list[str]) -> list[str]:
    """Those that share less than a third of their runs of five words with the ones before: real sources repeat."""
    seen: set[tuple[str, ...]] = set()
    out = []
    for text in texts:
        words = text.casefold().split()
        runs = {tuple(words[at : at + 5]) for at in range(len(words) - 4)}
        if len(runs & seen) * 3 < len(runs):
            out.append(text)
        seen |= runs
    return out


# -- edits --------------------------------------------------------------------------------------------------------


def scaled(x: float, y: float, how: Image.Resampling = BICUBIC) -> Callable:
    return lambda picture: picture.resize((round(picture.width * x), round(picture.height * y)), how)


def encoded(kind: str, quality: int) -> Callable:
    def edit(picture: Image.Image) -> Image.Image:
        out = io.BytesIO()
        picture.save(out, kind, quality=quality)
        return Image.open(io.BytesIO(out.getvalue()))

    return edit


def brighter(factor: float) -> Callable:
    return lambda picture: ImageEnhance.Brightness(picture).enhance(factor)


PICTURE_EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "× 0.5": scaled(0.5, 0.5),
    "× 0.75 bilinear": scaled(0.75, 0.75, Image.Resampling.BILINEAR),
    "× 2": scaled(2, 2),
    "× 2 nearest": scaled(2, 2, Image.Resampling.NEAREST),
    "wider by 2 %": scaled(1.02, 1),
    "lower by 4 %": scaled(1, 0.96),
    "PNG to JPEG 95": encoded("JPEG", 95),
    "JPEG 75": encoded("JPEG", 75),
    "JPEG 50": encoded("JPEG", 50),
    "WebP 80": encoded("WEBP", 80),
    "WebP 50": encoded("WEBP", 50),
    "brighter 5 %": brighter(1.05),
    "darker 5 %": brighter(0.95),
    "darker 10 %": brighter(0.9),
    "× 0.5 and JPEG 50": lambda picture: encoded("JPEG", 50)(scaled(0.5, 0.5)(picture)),
}


def exchanged(words: int, material: Material) -> Callable[[str], str]:
    def edit(text: str) -> str:
        parts = text.split(" ")
        places = [place for place, part in enumerate(parts) if part.isalpha()]
        for place in material.random.sample(places, min(words, len(places))):
            parts[place] = material.phrase(1)
        return " ".join(parts)

    return edit


def text_edits(material: Material, kind: str) -> dict[str, Callable[[str], str]]:
    def another(text: str) -> str:
        """Two characters in the middle."""
        return text[: len(text) // 2] + "飞机" + text[len(text) // 2 + 2 :]

    return {
        "capitals": str.upper,
        "spacing": lambda text: "\n " + text.replace(" ", "  \t"),
        "punctuation": lambda text: re.sub(r"[,;:.!?'\"](?=\s|$)|[。，]", "", text) + " !",
        "full width": lambda text: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
        "a word": another if kind == "Chinese" else exchanged(1, material),
    }
