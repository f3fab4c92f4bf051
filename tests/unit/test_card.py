"""The data card: its counts add up, its page is safe whatever a sample holds, the same input gives the same bytes."""

import base64
import io
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import HOSTILE, Outline, check_closed, example, png
from PIL import Image

from stages.prepare import card
from stages.prepare.card import write_card
from stages.prepare.counts import count_verdicts
from stages.prepare.page import PICTURES, SIDE, thumbnail

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("dataset", "type", "verdict", "step", "reason", "domain")),
        ("tokens", pa.int32()),
        ("mean_tokens", pa.int32()),
        ("supervised", pa.int32()),
        ("tiles", pa.int16()),
        ("repeat", pa.float64()),
        ("quality", pa.float32()),
        ("repetition", pa.float32()),
    ]
)
KEPT = {
    "dataset": "a", "type": "image", "verdict": "kept", "step": "", "reason": "", "domain": "", "tokens": 300,
    "supervised": 20, "tiles": 1, "repeat": 1.0, "quality": None, "repetition": None,
}  # fmt: skip
REASONS = [("structure", "bad_json"), ("structure", "too_long"), ("images", "odd_shape"), ("scores", "low_quality")]


def row(why: tuple[str, str] | None = None, **changes) -> dict:
    rejected = {"verdict": "rejected", "step": why[0], "reason": why[1]} if why else {}
    found = KEPT | rejected | changes
    return {"mean_tokens": found["tokens"]} | found


ROWS = st.lists(
    st.builds(
        row,
        st.none() | st.sampled_from(REASONS),
        dataset=st.sampled_from(["a", "b", "集"]),
        type=st.sampled_from(["image", "multi_image", "video", "text"]),
        tokens=st.integers(1, 2**31 - 1) | st.integers(1, 20000),
        tiles=st.integers(0, 2**15 - 1) | st.integers(0, 48),
        repeat=st.sampled_from([0.5, 1.0, 2.0]),
        domain=st.sampled_from(["", "general", "mathematics"]),
        quality=st.none() | st.floats(0, 10, width=32),
    ),
    max_size=40,
)


def verdicts(folder: Path, rows: list[dict], group: int = 7) -> Path:
    path = folder / "verdicts.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, row_group_size=group)
    return path


def write(folder: Path, rows: list[dict], examples=(), title: str = "card", **given) -> tuple[dict, Path]:
    path = folder / "card.html"
    given = {"settings": {"max_tokens": 16384}, "provenance": {"date": "2025-01-31"}} | given
    return write_card(path, title, verdicts(folder, rows), examples, **given), path


def number(text: str) -> int:
    return int(text.replace(",", "").replace("−", "-"))


@given(ROWS)
@settings(deadline=None, max_examples=50)
def test_counts_add_up_and_the_page_shows_it(tmp_path_factory, rows):
    figures, path = write(tmp_path_factory.mktemp("card"), rows)
    for name, found in [("", figures), *figures["sets"].items()]:
        ours = [r for r in rows if not name or r["dataset"] == name]
        expected = Counter((r["step"], r["reason"]) for r in ours if r["verdict"] == "rejected")
        assert {(s, r): n for s, reasons in found["reasons"].items() for r, n in reasons.items()} == expected
        assert found["read"] == len(ours) == found["kept"] + found["rejected"] and found["rejected"] == expected.total()
    assert list(figures["sets"]) == list(dict.fromkeys(r["dataset"] for r in rows))
    assert figures["tokens"] == sum(r["tokens"] for r in rows if r["verdict"] == "kept")

    page = path.read_text(encoding="utf-8")
    assert f"{figures['read']} = {figures['kept']} + {figures['rejected']}." in page
    waterfall = page[page.index("step and reason") : page.index("</table>")]
    steps = [number(n) for n in re.findall(r'<tr class="step">.*?>(−[\d,]+)<', waterfall)]
    reasons = [number(n) for n in re.findall(r'<th class="inner">.*?>(−[\d,]+)<', waterfall)]
    assert sum(steps) == sum(reasons) == -figures["rejected"]
    if figures["kept"]:
        for name in ("length", "tiles"):
            plot = page[page.index(f'aria-labelledby="{name}-title') :]
            bars = re.findall(r"<title>[^<]*: ([\d,]+) samples?</title>", plot[: plot.index("</svg>")])
            assert sum(map(number, bars)) == figures["kept"]
    check_closed(path)


@given(ROWS, st.integers(1, 50))
@settings(deadline=None, max_examples=30)
def test_row_groups_do_not_matter(tmp_path_factory, rows, group):
    folder = tmp_path_factory.mktemp("card")
    one, other = (card.figures(count_verdicts(verdicts(folder, rows, size))) for size in (1000, group))
    assert one == other


def test_a_verdict_of_another_kind_is_not_overlooked(tmp_path):
    with pytest.raises(ValueError, match="maybe"):
        write(tmp_path, [row(verdict="maybe")])


def test_quantiles_shares_and_repeat_factors(tmp_path):
    rows = [row(tokens=tokens) for tokens in range(1, 101)]
    rows += [row(dataset="b", type="text", tokens=5050, tiles=0, repeat=3.0), row(REASONS[0], type="", tokens=0)]
    figures, path = write(tmp_path, rows)
    lengths = figures["lengths"]["image"]
    assert [lengths[name] for name in ("samples", "median", "p90", "p99", "longest")] == [100, 50, 90, 99, 100]
    assert lengths["mean"] == 50.5
    assert figures["shares"]["by_type"] == {"image": 0.25, "text": 0.75}
    assert figures["shares"]["tokens_per_epoch"] == 20200
    page = path.read_text(encoding="utf-8")
    assert all(text in page for text in ("25.00 %", "75.00 %", "45.92 %", "9.37 %", "39.79 %", "4.92 %", "20,200"))


def test_scores_are_shown_where_there_are_any(tmp_path):
    _, path = write(tmp_path, [row()])
    assert "Scores" not in Outline(path).text
    rows = [row(quality=9.0, domain="general"), row(REASONS[3], quality=2.4, domain="general"), row()]
    figures, path = write(tmp_path, rows)
    assert figures["scored"] == {"quality": 2, "repetition": 0}
    page = path.read_text(encoding="utf-8")
    assert "<title>score 9: 1 sample</title>" in page and "<title>score 2: 1 sample</title>" in page
    assert "5.70" in page and "Scores of repetition" not in page


@pytest.mark.parametrize("rows", [[], [row(REASONS[0])]])
def test_a_mixture_without_a_kept_sample_has_a_card(tmp_path, rows):
    figures, path = write(tmp_path, rows)
    assert figures["kept"] == 0 and figures["shares"]["by_type"] == {}
    check_closed(path)


def test_texts_stay_texts_wherever_they_stand(tmp_path):
    def outline(text: str) -> Outline:
        folder = tmp_path / str(len(text))
        folder.mkdir()
        plain = text.replace("\ud800", "")  # no lone surrogate gets into Parquet
        rows = [row(dataset=plain, domain=plain, quality=5.0), row((plain, plain), dataset=plain, type=plain)]
        shown = [example(1, text=text, pictures=(png(),), type=text), example(2, text=text, verdict="kept", reason="")]
        shown.append(replace(shown[0], step=text, reason=text, key=text))
        words = {"a": {text: text}, text: [text]}
        _, path = write(folder, rows, shown, title=text, settings=words, provenance=words)
        check_closed(path)
        return Outline(path)

    tame, hostile = outline("tame"), outline(HOSTILE)
    assert hostile.tags == tame.tags
    assert hostile.raw == tame.raw
    assert "<script>alert(1)</script>" in hostile.text and "{{ 7 * 7 }}" in hostile.text
    assert "⟨U+202E⟩gnp.exe" in hostile.text and "⟨U+0000⟩" in hostile.text and "⟨U+D800⟩" in hostile.text


def test_the_same_input_gives_the_same_bytes(tmp_path):
    pages = []
    for name in "ab":
        (tmp_path / name).mkdir()
        _, path = write(tmp_path / name, [row(), row(REASONS[1])], [example(pictures=(png(500, 300),))])
        pages.append(path.read_bytes())
    assert pages[0] == pages[1]


def test_examples_are_bounded(tmp_path, monkeypatch):
    shown = [example(i, verdict="kept", step="", reason="") for i in range(9)] + [example(i) for i in range(10, 19)]
    shown += [example(20, reason="zero_run", pictures=(png(),) * 9)]
    rows = [row(dataset="photos")] + [row(("text", reason)) for reason in ("repetition", "zero_run")]
    _, path = write(tmp_path, rows, iter(shown))
    text = Outline(path).text
    assert [i for i in range(21) if f"id-{i} " in text] == [0, 1, 2, 10, 11, 12, 13, 14, 20]
    assert len(Outline(path).values("src")) == card.PICTURES < PICTURES
    assert f"and {9 - card.PICTURES} more pictures" in text
    monkeypatch.setattr(card, "EXAMPLES", 4)
    _, path = write(tmp_path, rows, iter(shown))
    assert len(re.findall("id-", Outline(path).text)) == 4


def jpeg(image: Image.Image, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def test_a_thumbnail_is_small_and_holds_nothing_of_the_file(tmp_path):
    picture = jpeg(Image.new("RGB", (1000, 400)), comment=b"<svg onload=alert(1)>", icc_profile=b"<script>" * 9)
    small = thumbnail(picture + b"<html><script>alert(1)</script>")
    assert (small.width, small.height, small.note) == (SIDE, 102, "1000 × 400 pixels")
    data = base64.b64decode(small.uri.removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(data)).size == (SIDE, 102)
    assert b"script" not in data and b"svg" not in data
    assert thumbnail(png(4000, 1)).height == 1


@pytest.mark.parametrize(
    "data", [b"", b"<svg onload=alert(1)>", png()[:40], jpeg(Image.new("RGB", (99, 99)))[:300], b"P6 0 0 255\n"]
)
def test_a_picture_that_does_not_decode_has_a_placeholder(tmp_path, data):
    assert thumbnail(data).uri == ""
    _, path = write(tmp_path, [row(("text", "repetition"))], [example(pictures=(data,))])
    outline = Outline(path)
    assert outline.values("src") == [] and "no picture" in outline.text
    check_closed(path)


def test_a_decompression_bomb_is_not_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    found = thumbnail(png(200, 200))
    assert found.uri == "" and "does not decode" in found.note
