"""Five formats: the same samples give the same rows; whatever is damaged in any of them is counted with its reason."""

import base64
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus import FORMATS, digit_pictures, encoded, gif, make_samples, mp4, write
from fake_io import FakeIO
from hypothesis import given
from hypothesis import strategies as st

from modeling.batches import Batcher
from modeling.epochs import plan_steps
from modeling.errors import DataError
from modeling.frames import FrameChoices
from modeling.meta import read_meta
from modeling.shards import ShardReader
from modeling.sources import Rejection
from modeling.tokenizer import build_tokenizer
from stages.params import DataParams, ModelParams, PrepareParams
from stages.prepare import formats
from stages.prepare import measure as measuring
from stages.prepare.run import prepare

MODEL = ModelParams(vision="tiny-vit", language="tiny-qwen2")
LIMITS = {"max_tokens": 2000, "max_tiles_per_sample": 12, "max_tiles": 4, "min_frames": 2, "max_frames": 8}

COLUMNS = ("id", "tokens", "tiles", "answers", "frames", "frame_tokens", "augment")


@pytest.fixture(autouse=True)
def bytes_tokenizer(monkeypatch):
    """A model of tile size 32 with 4 tokens per tile and the byte tokenizer."""
    from types import SimpleNamespace

    from modeling import presets

    tokenizer = build_tokenizer("bytes")
    fake = SimpleNamespace(tokenizer=lambda: tokenizer, tile_size=32, tokens_per_tile=4)
    monkeypatch.setattr(presets, "resolve", lambda model: fake)
    measuring.build_measure.cache_clear()
    yield tokenizer
    measuring.build_measure.cache_clear()


def run(meta: Path, out: Path, endpoint_url: str | None = None, **params) -> FakeIO:
    sources = {"d": DataParams(meta=str(meta), system="", endpoint_url=endpoint_url)}
    io = FakeIO(out, PrepareParams(data="d", **LIMITS | params), model=MODEL, sources=sources)
    prepare(io)
    return io


def rows(io: FakeIO, tokenizer) -> dict[str, tuple]:
    """Of every sample, by id, what training will see of it: ids, labels and pixels of a row that holds it alone."""
    reader = ShardReader(io.result)
    index = reader.index
    plan = plan_steps(
        index["tokens"], index["tiles"], index["repeat"], max_tokens=2000, max_tiles=12, global_batch=1, seed=0,
        epochs=1, choices=FrameChoices.of(index),
    )  # fmt: skip
    batcher = Batcher(
        reader,
        plan,
        tokenizer,
        tile_size=32,
        tokens_per_tile=4,
        system="",
        reduction="square",
        unit="conversation",
        seed=0,
    )
    out = {}
    for number in range(len(plan.sample)):
        batch = batcher.batch(0, [number])
        pixels = None if batch.pixels is None else batch.pixels.numpy().tobytes()
        row = reader.row(
            int(plan.sample[number]), ["id", "tokens", "tiles", "answers", "frames", "frame_tokens", "augment"]
        )
        shape = tuple(tuple(v) if isinstance(v, list) else v for v in row.values())
        out[row["id"]] = (shape, batch.input_ids.tolist(), batch.targets.tolist(), batch.positions.tolist(), pixels)
    return out


def test_five_formats_give_identical_rows(tmp_path, bytes_tokenizer):
    pictures, targets = digit_pictures()
    samples = make_samples(pictures[:60], [f"a {digit}" for digit in targets[:60]])
    found = {}
    for form in FORMATS:
        io = run(write(samples, form, tmp_path / form), tmp_path / form / "out")
        assert io.summary is not None and io.summary["rejected"] == 0 and io.summary["kept"] == len(samples)
        found[form] = rows(io, bytes_tokenizer)
    reference = found["internvl"]
    assert set(reference) == {sample.id for sample in samples}
    for form in FORMATS[1:]:
        for id, row in reference.items():
            assert found[form][id] == row, (form, id)


@pytest.mark.parametrize("form", FORMATS)
def test_units_are_cut_small_and_lose_nothing(tmp_path, monkeypatch, form):
    pictures, _ = digit_pictures()
    samples = make_samples(pictures[:60], [str(i) for i in range(60)])
    (dataset,) = read_meta(write(samples, form, tmp_path))
    monkeypatch.setattr(formats, "RECORDS", 4)
    for name in ("runs_of_lines", "runs_of_list"):
        function = getattr(formats, name)
        monkeypatch.setattr(function, "__defaults__", (4,))
    units = [unit for path in dataset.annotations for unit in formats.split(dataset, path, tmp_path)]
    read = [record for unit in units for record in formats.read(unit, dataset)]
    assert len(units) == {"parquet": 9, "webdataset": 2}.get(form, 8)
    assert [record[1]["id"] for record in read] == [sample.id for sample in samples]
    places = [record[0] for record in read]
    assert places == ([*range(1, 16), *range(1, 16)] if form == "webdataset" else list(range(1, 31)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.lists(JSON, max_size=12), st.sampled_from([None, 1]), st.integers(1, 5))
def test_a_list_is_cut_at_its_elements(tmp_path_factory, records, indent, run):
    path = tmp_path_factory.mktemp("list") / "a.json"
    path.write_text(json.dumps(records, indent=indent, ensure_ascii=False))
    found = []
    for first, count, offset, size in formats.runs_of_list(path, "a.json", run):
        piece = path.read_bytes()[offset : offset + size]
        elements = [json.loads(one) for one in formats.elements(piece)]
        assert first == len(found) + 1 and len(elements) == count <= run
        found += elements
    assert found == records


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty file is no JSON list"),
        ('{"a": 1}', "no JSON list"),
        ("3", "no JSON list"),
        ('[{"a": 1}, {"b": ', "does not end: 2 brackets are open"),
        ("[1] [2]", "something follows the end"),
    ],
)
def test_what_is_no_list_is_told(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message):
        list(formats.runs_of_list(tmp_path / "a.json", "a.json"))


def members(path: Path, *files: tuple[str, bytes], links: dict[str, str] | None = None) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)


def qa(question: str = "<image>\nWhat?", answer: str = "A five.", **more) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def damaged(folder: Path) -> tuple[Path, dict[str, str]]:
    """A corpus in five formats with damage of many kinds; (meta file, id -> reason, or "" where it is whole)."""
    pictures, _ = digit_pictures()
    root = folder / "media"
    root.mkdir(parents=True)
    whole, jpeg = encoded(pictures[0]), encoded(pictures[1], 64, "JPEG")
    bomb = encoded(np.zeros((1, 1), np.uint8), 8, "BMP")
    bomb = bomb[:18] + (40_000).to_bytes(4, "little") + (40_000).to_bytes(4, "little") + bomb[26:]
    film = mp4(pictures[:20])
    files = {
        "whole.png": whole,
        "really_a.png": jpeg,
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated.png": whole[:-40],
        "bomb.bmp": bomb,
        "empty.jpg": b"",
        "page.jpg": b"<html>404 Not Found</html>",
        "evil.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "film.mp4": film,
        "empty.mp4": b"",
        "cut.mp4": film[: len(film) // 3],
        "text.mp4": b"no film at all" * 100,
        "list.mp4": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        "big.png": encoded(pictures[2], 128),
    }
    for name, data in files.items():
        (root / name).write_bytes(data)
    lines: list[tuple[dict | bytes, str]] = [
        (qa(image="whole.png"), ""),
        (qa(image="really_a.png"), ""),
        (qa("Hi"), ""),
        (qa("<video>\nWhat?", video="film.mp4"), ""),
        (qa(image="truncated.jpg"), "unreadable_image"),
        (qa(image="truncated.png"), "unreadable_image"),
        (qa(image="bomb.bmp"), "too_many_pixels"),
        (qa(image="none.jpg"), "missing_image"),
        (qa(image="empty.jpg"), "zero_size"),
        (qa(image="page.jpg"), "unreadable_image"),
        (qa(image="evil.eps"), "unreadable_image"),
        (qa(image="drawing.svg"), "unreadable_image"),
        (qa(image="../../../etc/passwd"), "outside_root"),
        (qa("<image>" * 15, image=["big.png"] * 15), "too_many_tiles"),
        (qa("<image><image>", image="whole.png"), "placeholder_mismatch"),
        (qa("Hi", "x" * 5000), "too_long"),
        (qa("Hi", "", conversations=[]), "empty_conversation"),
        (qa("<video>\nWhat?", video="empty.mp4"), "zero_size"),
        (qa("<video>\nWhat?", video="cut.mp4"), "unreadable_video"),
        (qa("<video>\nWhat?", video="text.mp4"), "unreadable_video"),
        (qa("<video>\nWhat?", video="list.mp4"), "unreadable_video"),
        (qa("<video>\nWhat?", video="none.mp4"), "missing_video"),
        (qa("<video>\nWhat?", video="film.mp4", clip=[50, 60]), "unreadable_video"),
        (qa("<video>\nWhat?", video="nothing/"), "missing_video"),
        (b'{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": NaN}]}', "not_a_number"),
        (b'{"conversations": "\xff\xfe"}', "invalid_utf8"),
        (b'{"conversations": [', "bad_json"),
        (b"[" * 50_000, "bad_json"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "bad_turn"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "unknown_role"),
        (qa(image="http://127.0.0.1:1/a.jpg"), "bad_image"),
        (qa(image="data:image/png;base64," + base64.b64encode(whole).decode()), ""),
        (qa(image="data:image/png;base64,%%%"), "bad_image"),
    ]
    (folder / "lines.jsonl").write_bytes(
        b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x, _ in lines)
    )
    listed = [(qa("a"), ""), (3, "not_an_object"), ({"id": [1]}, "bad_id"), (qa("b"), "")]
    (folder / "list.json").write_text(json.dumps([record for record, _ in listed]))
    table = [
        ({"conversations": qa()["conversations"], "image": {"bytes": whole, "path": "a.png"}}, ""),
        ({"conversations": qa()["conversations"], "image": {"bytes": jpeg[:100], "path": "a.jpg"}}, "unreadable_image"),
        ({"conversations": qa()["conversations"], "image": {"bytes": None, "path": "a.jpg"}}, "bad_image"),
        ({"conversations": None, "image": None}, "missing_conversations"),
    ]
    pq.write_table(pa.Table.from_pylist([row for row, _ in table]), folder / "rows.parquet")
    text = json.dumps(qa()).encode()
    archive = ["", "bad_member", "bad_record", "unreadable_image", "", "bad_member"]
    members(
        folder / "archive.tar", ("a.json", text), ("a.png", whole), ("../../up.json", text), ("b.png", whole),
        ("c.json", text), ("c.png", b"no picture"), ("d.json", text), ("d.jpg", jpeg),
        links={"link.json": "/etc/passwd"},
    )  # fmt: skip
    expected = {f"lines-{i}": reason for i, (_, reason) in enumerate(lines, 1)}
    expected |= {f"list-{i}": reason for i, (_, reason) in enumerate(listed, 1)}
    expected |= {f"rows-{i}": reason for i, (_, reason) in enumerate(table, 1)}
    expected |= {f"archive-{i}": reason for i, reason in enumerate(archive, 1)}
    meta = {
        name: {"root": "media", "annotation": file, "repeat_time": 1}
        for name, file in (
            ("lines", "lines.jsonl"),
            ("list", "list.json"),
            ("rows", "rows.parquet"),
            ("archive", "*.tar"),
        )
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder / "meta.json", expected


def test_every_kind_of_damage_is_counted_with_its_reason(tmp_path):
    meta, expected = damaged(tmp_path / "corpus")
    out = run(meta, tmp_path / "out", max_rejected=1)
    verdicts = pq.read_table(out.kept / "verdicts.parquet").to_pylist()
    found = {f"{row['dataset']}-{row['line']}": row["reason"] for row in verdicts}
    assert found == expected
    assert len(set(expected.values()) - {""}) >= 20
    summary = out.summary
    assert summary is not None
    reasons = Counter(reason for reason in expected.values() if reason)
    assert summary["reasons"] == dict(reasons) and summary["samples"] == len(expected)
    assert summary["samples"] == summary["kept"] + sum(summary["reasons"].values())
    for name, counts in summary["datasets"].items():
        assert (
            counts["samples"]
            == counts["kept"] + sum(counts["reasons"].values())
            == sum(key.startswith(f"{name}-") for key in expected)
        )
    assert len(ShardReader(out.result)) == summary["kept"] == sum(not reason for reason in expected.values())
    listed = [json.loads(line) for line in (out.result / "rejected.jsonl").read_text().splitlines()]
    assert len(listed) == summary["rejected"] and all(one["detail"] for one in listed)
    card = (out.kept / "card.html").read_text()
    assert "unreadable_image" in card and "<script>alert" not in card


def test_an_archive_that_breaks_off_ends_the_stage_after_all_is_read(tmp_path):
    pictures, _ = digit_pictures()
    text = json.dumps(qa()).encode()
    members(tmp_path / "0.tar", *((f"{i}.{end}", data) for i in range(9) for end, data in (
        ("json", text), ("png", encoded(pictures[i])))))  # fmt: skip
    (tmp_path / "1.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:9000])
    (tmp_path / "2.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"annotation": "*.tar"}}))
    with pytest.raises(DataError, match=r"2 files cannot be read to their end.*1\.tar.*2\.tar") as caught:
        run(tmp_path / "meta.json", tmp_path / "out", max_rejected=1)
    assert "fetch these files again" in str(caught.value)


def test_a_second_attempt_takes_the_parts_of_the_first(tmp_path, monkeypatch):
    from fake_io import Stopped

    pictures, _ = digit_pictures()
    samples = make_samples(pictures[:60], [str(i) for i in range(60)])
    monkeypatch.setattr(formats.runs_of_lines, "__defaults__", (4,))
    meta = write(samples, "internvl", tmp_path / "in")
    whole = run(meta, tmp_path / "whole")

    def attempt(stop_at: int | None) -> FakeIO:
        io = FakeIO(
            tmp_path / "out", PrepareParams(data="d", **LIMITS), model=MODEL,
            sources={"d": DataParams(meta=str(meta), system="")}, stop_at=stop_at,
        )  # fmt: skip
        prepare(io)
        return io

    measured = []
    from stages.prepare import parts

    real = parts.measure_sample
    monkeypatch.setattr(
        parts, "measure_sample", lambda sample, *rest: measured.append(sample.id) or real(sample, *rest)
    )
    with pytest.raises(Stopped):
        attempt(9)
    assert 9 <= len(measured) <= 12
    with pytest.raises(Stopped):
        attempt(20)
    done = attempt(None)
    assert sorted(measured) == sorted(sample.id for sample in samples), "nothing twice, nothing left out"
    for path in sorted(whole.result.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (done.result / path.relative_to(whole.result)).read_bytes(), path.name
    assert not (tmp_path / "out" / "parts").exists()


def test_rejection_reasons_are_what_the_code_raises():
    import re
    from typing import get_args

    from modeling.sources import Reason

    source = "".join(path.read_text() for path in Path(formats.__file__).parent.glob("*.py"))
    for found in re.findall(r'Rejection\(\s*"(\w+)"', source):
        assert found in get_args(Reason), found
    assert issubclass(Rejection, Exception)


def test_gif_pictures_stay_pictures(tmp_path):
    pictures, _ = digit_pictures()
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.gif").write_bytes(gif(pictures[:3]))
    (tmp_path / "a.jsonl").write_text(json.dumps(qa(image="a.gif")))
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"root": "media", "annotation": "a.jsonl"}}))
    io = run(tmp_path / "meta.json", tmp_path / "out")
    assert ShardReader(io.result).row(0)["frames"] == 0


def numbered(folder: Path, name: str, count: int = 6) -> bytes:
    pictures, _ = digit_pictures()
    text = json.dumps(qa()).encode()
    both = ((f"{i}.{end}", data) for i in range(count) for end, data in (("json", text), ("png", encoded(pictures[i]))))
    members(folder / name, *both)
    return (folder / name).read_bytes()


@pytest.mark.parametrize("damage", ["a header", "its end", "an end inside a header", "two in one", "a size beyond it"])
def test_no_damage_of_an_archive_is_taken_for_its_end(tmp_path, damage):
    whole = numbered(tmp_path, "0.tar")
    third = whole.index(b"3.json") // 512 * 512
    if damage == "a header":
        data = whole[: third + 150] + bytes([whole[third + 150] ^ 1]) + whole[third + 151 :]
    elif damage == "its end":
        data = whole[:third]
    elif damage == "an end inside a header":
        data = whole[: third + 100]
    elif damage == "two in one":
        data = whole + whole
    else:
        info = tarfile.TarInfo("3.json")
        info.size = 1 << 60
        data = whole[:third] + info.tobuf(tarfile.GNU_FORMAT) + whole[third + 512 :]
    (tmp_path / "0.tar").write_bytes(data)
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"annotation": "0.tar"}}))
    with pytest.raises(DataError, match=r"1 files cannot be read to their end.*0\.tar"):
        run(tmp_path / "meta.json", tmp_path / "out", max_rejected=1)
    listed = [json.loads(line) for line in (tmp_path / "out" / "kept" / "rejected.jsonl").read_text().splitlines()]
    assert [one["reason"] for one in listed] == ["broken_file"] and listed[0]["line"] == (7 if "two" in damage else 4)


def test_rows_that_python_cannot_hold_are_rejected_one_by_one(tmp_path):
    turns = qa("Hi")["conversations"]
    offsets = pa.array([0, 1, 3, 4], pa.int32()).buffers()[1]
    ids = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xff\xfeb")])
    other = pa.array([2**62] * 3, pa.timestamp("us"))  # of no interest, and not looked at
    pq.write_table(pa.table({"id": ids, "conversations": [turns] * 3, "when": other}), tmp_path / "a.parquet")
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"annotation": "a.parquet"}}))
    out = run(tmp_path / "meta.json", tmp_path / "out", max_rejected=1)
    assert list(ShardReader(out.result).index["id"]) == ["a", "b"]
    assert out.summary is not None and out.summary["reasons"] == {"bad_record": 1}


def test_rows_hold_their_pictures_themselves(tmp_path):
    rows = [{"conversations": qa()["conversations"], "image": "a.png"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.png").write_bytes(encoded(digit_pictures()[0][0]))
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"annotation": "a.parquet"}}))
    with pytest.raises(DataError, match=r"bad_image .*rows and archives hold their media themselves"):
        run(tmp_path / "meta.json", tmp_path / "out", max_rejected=1)


def test_parts_of_type_image_stand_for_the_pictures_of_the_row(tmp_path):
    pictures, _ = digit_pictures()
    content = [{"type": "image", "text": None}, {"type": "image", "text": None}, {"type": "text", "text": "Which?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "Both."}]},
    ]
    images = [{"bytes": encoded(picture), "path": None} for picture in pictures[:2]]
    pq.write_table(pa.Table.from_pylist([{"messages": messages, "images": images}]), tmp_path / "a.parquet")
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"annotation": "a.parquet"}}))
    conversation, found = ShardReader(run(tmp_path / "meta.json", tmp_path / "out").result).sample(0)
    assert conversation[0]["value"] == "Image-1: <image>\nImage-2: <image>\nWhich?" and len(found) == 2


def test_a_picture_that_was_missing_is_looked_at_again(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(qa(image="a.png")))
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"annotation": "a.jsonl"}}))
    with pytest.raises(DataError, match="missing_image 1"):
        run(tmp_path / "meta.json", tmp_path / "out")
    (tmp_path / "a.png").write_bytes(encoded(digit_pictures()[0][0]))
    done = run(tmp_path / "meta.json", tmp_path / "out")
    assert done.summary is not None and done.summary["kept"] == 1


def test_a_mount_that_fails_is_no_samples_fault(tmp_path, monkeypatch):
    import errno

    (tmp_path / "a.jsonl").write_text(json.dumps(qa(image="a.png")))
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"annotation": "a.jsonl"}}))
    real = measuring.files.read

    def stale(path, *rest, **more):
        if path.endswith(".png"):
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path, *rest, **more)

    monkeypatch.setattr(measuring.files, "read", stale)
    with pytest.raises(ConnectionError, match="Stale file handle"):
        run(tmp_path / "meta.json", tmp_path / "out")


def test_a_unit_whose_tasks_die_is_named_in_the_end(tmp_path):
    from stages.prepare.measuring import MOST_BEGUN

    (tmp_path / "a.jsonl").write_text(json.dumps(qa("Hi")))
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"annotation": "a.jsonl"}}))
    begun = tmp_path / "out" / "parts" / "begun"
    begun.mkdir(parents=True)
    for i in range(MOST_BEGUN):
        (begun / f"000000-{i}").touch()
    with pytest.raises(DataError, match=r"d, a\.jsonl: records 1 to 1: .*ended without a word"):
        run(tmp_path / "meta.json", tmp_path / "out")


def test_a_dataset_that_curation_names_must_be_there(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(qa("Hi")))
    (tmp_path / "meta.json").write_text(json.dumps({"charts": {"annotation": "a.jsonl"}}))
    params = PrepareParams.model_validate({"data": "d", "curate": {"exempt": {"text": ["chart"]}}, **LIMITS})
    io = FakeIO(tmp_path / "out", params, model=MODEL, sources={"d": DataParams(meta=str(tmp_path / "meta.json"))})
    with pytest.raises(DataError, match=r"no dataset 'chart' → did you mean 'charts'\?"):
        prepare(io)


def test_a_task_that_fails_in_words_leaves_no_mark(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(json.dumps(qa("Hi")))
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"annotation": "a.jsonl"}}))

    def away(*_):
        raise measuring.files.Unavailable("the store does not answer")

    from stages.prepare import parts

    with monkeypatch.context() as patch:
        patch.setattr(parts, "measure_sample", away)
        with pytest.raises(ConnectionError):
            run(tmp_path / "meta.json", tmp_path / "out")
    assert not list((tmp_path / "out" / "parts" / "begun").iterdir())
    run(tmp_path / "meta.json", tmp_path / "out")
