"""prepare: every sample kept or rejected with its reason, the same result at any number of workers."""

import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_io import FakeIO, Stopped
from PIL import Image

from modeling.errors import DataError
from modeling.shards import ShardReader
from modeling.template import encode_conversation
from modeling.tiles import split_image
from modeling.tokenizer import build_tokenizer
from stages.params import DataParams, ModelParams, PrepareParams
from stages.prepare import measure as measuring
from stages.prepare.digest import source_digest
from stages.prepare.formats import runs_of_lines
from stages.prepare.run import prepare

TILE, PER_TILE = 32, 4
MODEL = ModelParams(vision="tiny-vit", language="tiny-qwen2")


@pytest.fixture(autouse=True)
def resolved(monkeypatch):
    """A model of tile size 32 with 4 tokens per tile and the byte tokenizer."""
    from modeling import presets

    tokenizer = build_tokenizer("bytes")
    fake = SimpleNamespace(tokenizer=lambda: tokenizer, tile_size=TILE, tokens_per_tile=PER_TILE)
    monkeypatch.setattr(presets, "resolve", lambda model: fake)
    measuring.build_measure.cache_clear()
    yield tokenizer
    measuring.build_measure.cache_clear()


def picture(path: Path, size: tuple[int, int] = (32, 32), kind: str = "PNG") -> bytes:
    noise = np.random.default_rng(len(path.name)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, kind)
    path.write_bytes(out.getvalue())
    return out.getvalue()


def ask(question: str = "<image>\nWhat?", answer: str = "A cat.", **more: Any) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


class Mixture:
    """A meta file with datasets made of dicts or raw bytes per line."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta: dict[str, dict] = {}
        (folder / "images").mkdir(parents=True)
        for name, size in {"a.png": (32, 32), "wide.png": (128, 32), "big.png": (192, 128)}.items():
            picture(folder / "images" / name, size)

    def add(self, name: str, lines: list[dict | bytes], **keys: Any) -> "Mixture":
        text = b"\n".join(one if isinstance(one, bytes) else json.dumps(one).encode() for one in lines)
        (self.folder / f"{name}.jsonl").write_bytes(text + b"\n")
        self.meta[name] = {"root": "images", "annotation": f"{name}.jsonl", "repeat_time": 1, **keys}
        (self.folder / "meta.json").write_text(json.dumps(self.meta))
        return self

    def prepare(self, out: str = "out", workers: int = 1, stop_at: int | None = None, **params: Any) -> FakeIO:
        io = FakeIO(
            self.folder / out,
            PrepareParams(data="d", **{"max_tokens": 200, "max_tiles_per_sample": 12, "max_tiles": 6, **params}),
            model=MODEL,
            sources={"d": DataParams(meta=str(self.folder / "meta.json"), system="")},
            workers=workers,
            stop_at=stop_at,
        )
        prepare(io)
        return io


@pytest.fixture
def mixture(tmp_path) -> Mixture:
    return Mixture(tmp_path)


def rejected(io: FakeIO) -> list[dict]:
    return [json.loads(line) for line in (io.result / "rejected.jsonl").read_text().splitlines()]


def test_rows_say_what_training_will_build(mixture, resolved):
    two = "Image-1: <image>\nImage-2: <image>\nSame?"
    mixture.add(
        "pictures",
        [ask(image="wide.png", id="w", task="t"), ask(two, "No.", image=["a.png", "wide.png"]), ask("Hi", "Yo.")],
        data_augment=True, max_dynamic_patch=6, repeat_time=1.5,
    ).add("text", [ask("1", "2")])  # fmt: skip
    out = mixture.prepare()
    reader = ShardReader(out.result)
    assert [reader.row(i)["tiles_per_image"] for i in range(4)] == [[5], [1, 4], [], []]
    assert list(reader.index["id"]) == ["w", "pictures-2", "pictures-3", "text-1"]
    assert list(reader.index["task"]) == ["t", "pictures", "pictures", "text"]
    assert reader.index["max_tiles"].tolist() == [6, 6, 6, 6]
    assert reader.index["augment"].tolist() == [True, True, True, False]
    assert reader.index["repeat"].tolist() == [1.5, 1.5, 1.5, 1]
    for i in range(4):
        conversation, images = reader.sample(i)
        row = reader.row(i)
        limit = max(1, row["max_tiles"] // max(1, len(images)))
        tiles = [len(split_image(image, limit, tile_size=TILE)) for image in images]
        encoded = encode_conversation(conversation, resolved, tiles, PER_TILE, system="")
        assert tiles == row["tiles_per_image"] and sum(tiles) == row["tiles"]
        assert len(encoded.input_ids) == row["tokens"]
        assert sum(row["answers"]) == sum(label != -100 for label in encoded.labels)
        assert [image.size for image in images] == list(zip(row["widths"], row["heights"]))
    assert reader.read(0)[1] == [(mixture.folder / "images" / "wide.png").read_bytes()], "stored as they are"
    assert out.summary is not None
    assert out.summary["kept"] == 4 and out.summary["tiles"] == 10
    assert out.summary["datasets"]["text"]["tokens"] == reader.index["tokens"][3]
    assert json.loads((out.result / "summary.json").read_text()) == out.summary


def broken(mixture: Mixture) -> list[tuple[dict | bytes, str]]:
    images = mixture.folder / "images"
    whole = picture(images / "whole.jpg", (64, 64), "JPEG")
    (images / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "empty.png").touch()
    (images / "text.png").write_text("no picture")
    (images / "folder.png").mkdir()
    (images / "no_header.png").write_bytes((images / "a.png").read_bytes()[8:])
    return [
        (b'{"conversations": ', "bad_json"),
        (b'{"conversations": NaN}', "not_a_number"),
        (b'{"conversations": "\xff"}', "invalid_utf8"),
        (b"[]", "not_an_object"),
        ({"image": "a.png"}, "missing_conversations"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "unknown_role"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "no_gpt_turn"),
        (ask(image="none.png"), "missing_image"),
        (ask(image="folder.png"), "missing_image"),
        (ask(image="x" * 300 + ".png"), "unreadable_image"),
        (ask(image="../images/a.png"), "kept"),
        (ask(image="../out.png"), "outside_root"),
        (ask(image="truncated.jpg"), "unreadable_image"),
        (ask(image="text.png"), "unreadable_image"),
        (ask(image="no_header.png"), "unreadable_image"),
        (ask(image="empty.png"), "zero_size"),
        (ask("<image><image>", image="a.png"), "placeholder_mismatch"),
        (ask("What?", image=["a.png", "a.png"]), "placeholder_mismatch"),
        (ask("<image>"), "placeholder_mismatch"),
        (ask("<image>" * 8, image=["big.png"] * 8), "kept"),
        (ask("<image>" * 13, image=["big.png"] * 13), "too_many_tiles"),
        (ask("x", "y" * 200), "too_long"),
        (ask("x", ""), "kept"),
        (ask(video="a.mp4"), "missing_video"),
    ]


def test_broken_samples_are_rejected_each_with_its_reason_and_place(mixture):
    cases = broken(mixture)
    mixture.add("d", [line for line, _ in cases])
    out = mixture.prepare(max_rejected=1)
    reasons = {one["line"]: one["reason"] for one in rejected(out)}
    for number, (line, reason) in enumerate(cases, 1):
        assert reasons.get(number, "kept") == reason, line
    assert out.summary is not None
    assert out.summary["samples"] == len(cases) == out.summary["kept"] + out.summary["rejected"]
    assert sum(out.summary["reasons"].values()) == out.summary["rejected"]
    empty_answer = ShardReader(out.result).index["line"].tolist().index(23)
    assert ShardReader(out.result).index["answers"][empty_answer].tolist() == [1]


def test_a_decompression_bomb_is_rejected_by_its_header(mixture, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    mixture.add("d", [ask(image="big.png"), ask(image="a.png")])
    assert [one["reason"] for one in rejected(mixture.prepare(max_rejected=1))] == ["too_many_pixels"]


def test_verify_header_leaves_the_pixels_alone(mixture):
    images = mixture.folder / "images"
    (images / "cut.jpg").write_bytes(picture(images / "whole.jpg", (64, 64), "JPEG")[:-800])
    mixture.add("d", [ask(image="cut.jpg"), ask(image="a.png")])
    assert [one["reason"] for one in rejected(mixture.prepare("full", max_rejected=1))] == ["unreadable_image"]
    header = mixture.prepare("header", max_rejected=0, verify="header")
    with pytest.raises(DataError, match="sample d-1: an image does not decode"):
        ShardReader(header.result).sample(0)


def test_a_wrong_extension_is_read_by_content(mixture):
    whole = picture(mixture.folder / "images" / "really_jpeg.png", (40, 40), "JPEG")
    out = mixture.add("d", [ask(image="really_jpeg.png")]).prepare()
    reader = ShardReader(out.result)
    assert reader.read(0)[1] == [whole]
    assert b"000-000000-000000001.0.jpg" in (out.result / "shards" / "000000-000000.tar").read_bytes()


def test_no_supervised_token_is_a_reason(mixture, monkeypatch):
    nothing = SimpleNamespace(input_ids=[1, 2], labels=[-100, -100], answer_spans=[])
    monkeypatch.setattr(measuring, "encode_conversation", lambda *_, **__: nothing)
    mixture.add("d", [ask("a", "b")])
    with pytest.raises(DataError, match="no_supervised_token 1"):
        mixture.prepare()


def test_too_many_rejections_end_the_stage_with_counts_places_and_remedy(mixture):
    lines: list = [ask("x", "y")] * 8 + [b"{", ask(image="none.png")]
    mixture.add("d", lines)
    with pytest.raises(DataError) as caught:
        mixture.prepare("strict", max_rejected=0.19)
    text = str(caught.value)
    for fragment in (
        "2 rejected (bad_json 1, missing_image 1), 20.0% of 10 samples, max_rejected is 19.0%",
        "d.jsonl:9 bad_json", "d.jsonl:10 missing_image", "images/none.png", "meta.json",
        "raise stages.stage.max_rejected",
    ):  # fmt: skip
        assert fragment in text, text
    assert not (mixture.folder / "strict" / "result").exists()
    assert len((mixture.folder / "strict" / "kept" / "rejected.jsonl").read_text().splitlines()) == 2
    assert mixture.prepare("lenient", max_rejected=0.2).summary is not None


def test_nothing_kept_and_nothing_there(mixture):
    with pytest.raises(DataError, match="1 rejected"):
        mixture.add("d", [b"{"]).prepare("none", max_rejected=1)
    with pytest.raises(DataError, match="hold no sample"):
        mixture.add("d", [b"", b" "]).prepare("empty")


def test_the_result_is_the_same_at_any_number_of_workers(mixture):
    lines = [ask(f"<image>\n{i}", image=["a.png", "wide.png"][i % 2]) if i % 7 else b"{" for i in range(700)]
    mixture.add("first", lines).add("second", [ask(str(i), "x") for i in range(300)])
    one = mixture.prepare("one", max_rejected=1, shard_megabytes=0.5)
    four = mixture.prepare("four", workers=4, max_rejected=1, shard_megabytes=0.5)
    files = sorted(path.relative_to(one.result) for path in one.result.rglob("*") if path.is_file())
    assert len(files) > 5 and one.summary == four.summary
    for file in files:
        assert (one.result / file).read_bytes() == (four.result / file).read_bytes(), file
    assert max((one.result / file).stat().st_size for file in files) < 502_000
    steps = [step for step, _, _ in one.ticks]
    assert steps == sorted(steps) and one.ticks[-1] == (1000, 1000, one.ticks[-1][2])
    assert one.ticks[-1][2]["samples"] == one.summary["kept"]


def test_a_stop_hands_nothing_over(mixture):
    mixture.add("d", [ask(str(i), "x") for i in range(600)])
    with pytest.raises(Stopped):
        mixture.prepare(stop_at=300)
    assert not (mixture.folder / "out" / "result").exists()


def test_a_wrong_length_in_the_meta_is_told(mixture):
    out = mixture.add("d", [ask("x", "y")], length=5).prepare()
    assert any("length 5, d.jsonl has 1 samples" in line for line in out.lines)


@pytest.mark.parametrize("text", [b"", b"a", b"a\n", b"a\nb", b"\n\na\n" * 5, b"a\r\nb\r\nc"])
def test_chunks_of_lines_cover_the_file(tmp_path, text):
    pieces = list(runs_of_lines(io.BytesIO(text), 2))
    assert b"".join(text[offset : offset + size] for _, _, offset, size in pieces) == text
    assert [first for first, *_ in pieces] == list(range(1, 2 * len(pieces), 2))
    assert sum(lines for _, lines, *_ in pieces) == len(text.splitlines())


def test_digest_follows_meaning_annotations_and_media(mixture):
    mixture.add("d", [ask(image="a.png"), ask(image=["wide.png", "none.png"]), b"{"])
    meta = mixture.folder / "meta.json"
    before = source_digest(meta)
    assert (before["datasets"]["d"]["files"], before["datasets"]["d"]["missing"]) == (2, 1)
    assert source_digest(meta) == before

    mixture.meta["d"]["length"] = 77
    meta.write_text(json.dumps(mixture.meta, indent=8))
    assert source_digest(meta) == before, "length and layout mean nothing"
    moved = mixture.folder.rename(mixture.folder.with_name("moved"))
    assert source_digest(moved / "meta.json") == before, "paths mean nothing"
    mixture.folder, meta = moved, moved / "meta.json"

    seen = [before]
    for change in (
        lambda: mixture.add("d", [ask(image="a.png")], repeat_time=2),
        lambda: mixture.add("d", [ask(image="wide.png")], repeat_time=2),
        lambda: picture(moved / "images" / "wide.png", (50, 50)),
        lambda: os.utime(moved / "images" / "wide.png", ns=(1, 1)),
        lambda: (moved / "images" / "wide.png").unlink(),
        lambda: mixture.add("e", [ask("x", "y")]),
    ):
        change()
        digest = source_digest(meta)
        assert digest not in seen
        seen.append(digest)
    (moved / "e.jsonl").unlink()
    with pytest.raises(DataError, match=r"e\.jsonl not found"):
        source_digest(meta)


def test_a_digest_counts_every_picture(mixture):
    mixture.add("d", [ask(image=f"{i}.png") for i in range(100)])
    for i in range(100):
        (mixture.folder / "images" / f"{i}.png").touch()
    assert source_digest(mixture.folder / "meta.json")["datasets"]["d"]["files"] == 100
