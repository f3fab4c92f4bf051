"""Shards: readable by any tar tool, the same bytes for the same samples, damage named."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from modeling.errors import DataError
from modeling.images import ImageError, decode_rgb, open_image
from modeling.ragged import Ragged
from modeling.shards import ShardReader, ShardWriter, pack_sample


def png(color: int, size: tuple[int, int] = (8, 6)) -> bytes:
    out = io.BytesIO()
    Image.new("L", size, color).save(out, "PNG")
    return out.getvalue()


def write(folder: Path, samples: int = 6, shard_bytes: int = 6000) -> ShardReader:
    """Sample i has i % 3 images, all of gray value i."""
    with ShardWriter(folder, shard_bytes) as writer:
        for i in range(samples):
            images = [("png", png(i))] * (i % 3)
            conversation = [{"from": "human", "value": f"frage {i} é"}, {"from": "gpt", "value": "a"}]
            record = {"id": f"id{i}", "conversations": conversation}
            blob, place = pack_sample(f"000-{i:09d}", record, images)
            row = {
                "id": f"id{i}", "task": "t", "dataset": "d", "key": f"000-{i:09d}", "tokens": 10 + i,
                "answers": [1] * (1 + i % 2), "tiles": i % 3, "tiles_per_image": [1] * (i % 3), "widths": [8] * (i % 3),
                "heights": [6] * (i % 3), "max_tiles": 12, "augment": i == 1, "repeat": 0.5, "file": "a.jsonl",
                "line": i,
            }  # fmt: skip
            writer.add(blob, row | place)
    return ShardReader(folder)


def test_samples_come_back_as_they_were_written(tmp_path):
    reader = write(tmp_path / "a")
    assert len(reader) == 6
    for i in range(6):
        conversation, images = reader.sample(i)
        assert conversation == reader.conversation(i)
        assert conversation[0]["value"] == f"frage {i} é"
        assert [(image.mode, image.size, image.getpixel((0, 0))) for image in images] == [
            ("RGB", (8, 6), (i, i, i))
        ] * (i % 3)
        assert reader.read(i)[1] == [png(i)] * (i % 3)


def test_index_columns(tmp_path):
    reader = write(tmp_path / "a")
    assert reader.index["tokens"].tolist() == list(range(10, 16))
    assert reader.index["augment"].tolist() == [False, True, False, False, False, False]
    answers = reader.index["answers"]
    assert isinstance(answers, Ragged)
    assert [a.tolist() for a in answers] == [[1], [1, 1]] * 3
    assert answers[-1].tolist() == [1, 1] and answers.sums().tolist() == [1, 2] * 3
    with pytest.raises(IndexError):
        answers[6]
    assert not reader.index["frames"].any() and reader.index["frames"].dtype == np.int32, "no videos, no nulls"
    assert not reader.index["min_frames"].any() and not len(reader.index["frame_tokens"].values)
    row = reader.row(2)
    assert (row["id"], row["max_tiles"], row["tiles_per_image"], row["repeat"]) == ("id2", 12, [1, 1], 0.5)
    json.dumps(row)
    assert reader.row(2, ["tokens", "answers"]) == {"tokens": 12, "answers": [1]}


def test_shards_are_plain_tars_cut_between_samples(tmp_path):
    reader = write(tmp_path / "a")
    assert sorted(set(reader.index["shard"])) == ["000000.tar", "000001.tar", "000002.tar"]
    names = []
    for shard in sorted((tmp_path / "a" / "shards").iterdir()):
        with tarfile.open(shard) as tar:
            for member in tar:
                names.append(member.name)
                assert (member.mtime, member.uid, member.uname) == (0, 0, "")
    assert names[:5] == [
        "000-000000000.json", "000-000000001.json", "000-000000001.0.png", "000-000000002.json", "000-000000002.0.png",
    ]  # fmt: skip


def test_the_same_samples_give_the_same_bytes(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    for path in sorted((tmp_path / "a").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes(), path


def test_an_empty_index_reads(tmp_path):
    reader = write(tmp_path / "a", samples=0)
    assert len(reader) == 0 and list(reader.index["answers"]) == [] and list(reader.index["id"]) == []


def test_a_flipped_image_byte_names_shard_and_id_and_leaves_the_text(tmp_path):
    reader = write(tmp_path / "a")
    row = reader.row(4)
    path = tmp_path / "a" / "shards" / row["shard"]
    data = bytearray(path.read_bytes())
    data[row["image_offsets"][0] + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{row['shard']}: sample id4: bytes .* run the prepare stage again"):
        reader.sample(4)
    assert reader.conversation(4)[0]["value"] == "frage 4 é"


def test_truncated_and_absent_shards_name_the_sample(tmp_path):
    reader = write(tmp_path / "a")
    row = reader.row(5)
    path = tmp_path / "a" / "shards" / row["shard"]
    path.write_bytes(path.read_bytes()[: row["json_offset"] + 3])
    with pytest.raises(DataError, match="sample id5"):
        reader.conversation(5)
    path.unlink()
    with pytest.raises(DataError, match=r"sample id5: .*No such file"):
        reader.sample(5)


def test_damaged_or_absent_index(tmp_path):
    with pytest.raises(DataError, match="no index"):
        ShardReader(tmp_path)
    write(tmp_path / "a")
    path = tmp_path / "a" / "index.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="the index is damaged"):
        ShardReader(tmp_path / "a")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "YCbCr"])
def test_every_mode_becomes_rgb_of_like_brightness(mode):
    values = np.full((6, 8), 40_000, np.uint16)
    image = Image.fromarray(values) if mode.startswith("I") else Image.new("L", (8, 6), 156)
    if mode == "I":
        image = image.convert("I")
    elif mode == "1":
        image = Image.new("1", (8, 6), 1)
    elif mode in ("CMYK", "YCbCr"):
        image = image.convert("RGB").convert(mode)
    elif mode != "I;16":
        image = image.convert(mode)
    out = io.BytesIO()
    image.save(out, {"CMYK": "TIFF", "I": "TIFF", "YCbCr": "JPEG"}.get(mode, "PNG"))
    picture = decode_rgb(out.getvalue())
    assert picture.mode == "RGB" and picture.size == (8, 6)
    expected = 255 if mode == "1" else 156
    assert np.abs(np.asarray(picture).astype(int) - expected).max() <= 2


def test_truncated_jpegs_are_refused_at_every_cut():
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(out, "JPEG")
    whole = out.getvalue()
    assert decode_rgb(whole).size == (40, 40)
    for cut in range(0, len(whole) - 40, 97):
        with pytest.raises(ImageError):
            decode_rgb(whole[:cut])
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_only_raster_formats_are_opened():
    with pytest.raises(ImageError, match="known format"):
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


def test_decompression_bombs_are_told_apart(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ImageError) as caught:
        open_image(png(0, (8, 6)))
    assert caught.value.bomb
