"""The meta file is read in full or refused with file, key and remedy; a line gives a Sample or a reason."""

import json
import os
from pathlib import Path

import pytest

from modeling.errors import DataError
from modeling.meta import Dataset, read_meta
from modeling.sources import Media, Rejected, Sample, parse_line, read_samples


def write_meta(folder: Path, meta: object) -> Path:
    (folder / "a.jsonl").touch()
    path = folder / "meta.json"
    path.write_text(meta if isinstance(meta, str) else json.dumps(meta))
    return path


def entry(**changes: object) -> dict:
    return {"root": "images", "annotation": "a.jsonl", "data_augment": False, "repeat_time": 1} | changes


@pytest.fixture
def dataset() -> Dataset:
    return Dataset("photos", "/data/photos", ("/data/a.jsonl",), "a.jsonl", False, None, 1.0)


def line(**changes: object) -> bytes:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    data = {"id": 7, "image": "a/b.jpg", "conversations": turns} | changes
    return json.dumps({key: value for key, value in data.items() if value is not ...}).encode()


def turns(*pairs: tuple[str, object]) -> list[dict]:
    return [{"from": role, "value": value} for role, value in pairs]


def test_official_meta_keys_and_paths_relative_to_the_meta_file(tmp_path):
    meta = {"a": entry(max_dynamic_patch=12, length=3, repeat_time=0.5, data_augment=True), "b": entry(root="/abs")}
    first, second = read_meta(write_meta(tmp_path, meta))
    assert first == Dataset(
        "a", str(tmp_path / "images"), (str(tmp_path / "a.jsonl"),), "a.jsonl", True, max_tiles=12, repeat=0.5, length=3
    )
    assert (second.root, second.max_tiles, second.repeat) == ("/abs", None, 1.0)


@pytest.mark.parametrize(
    ("meta", "fragments"),
    [
        ('{"a": ', ["meta.json:1", "not JSON"]),
        ([], ["at least one dataset, found a list"]),
        ({}, ["found an empty object"]),
        ({"a": ["a.jsonl"]}, ["meta.json: a", "an object"]),
        (
            {"a": entry(max_dynamic_patches=6)},
            ["a.max_dynamic_patches: unknown key", "did you mean 'max_dynamic_patch'"],
        ),
        ({"a": entry(zzz=6)}, ["unknown key 'zzz'", "known keys: root, annotation"]),
        ({"a": {"root": "x"}}, ["a.annotation: must be a path, found None"]),
        ({"a": {"root": 3, "annotation": "a.jsonl"}}, ["a.root: must be a path"]),
        ({"a": entry(annotation="b.jsonl")}, ["a.annotation", "b.jsonl not found"]),
        ({"a": entry(annotation="a.csv")}, ["'a.csv' is of no known format", ".jsonl, .json, .parquet, .tar"]),
        ({"a": entry(annotation="b-*.jsonl")}, ["no file matches", "relative to the meta file"]),
        ({"a": entry(annotation=[])}, ["a.annotation: must be a path, found []"]),
        ({"a": entry(annotation=["a.jsonl", 3])}, ["a.annotation: must be a path"]),
        ({"a": entry(root="https://host/x")}, ["is a URL", "copy the data"]),
        ({"a": entry(repeat_time=-1)}, ["a.repeat_time", "0 or more, found -1"]),
        ('{"a": {"root": "", "annotation": "a.jsonl", "repeat_time": NaN}}', ["repeat_time", "found nan"]),
        ({"a": entry(repeat_time="2")}, ["repeat_time", "found '2'"]),
        ({"a": entry(data_augment="yes")}, ["a.data_augment", "true or false"]),
        ({"a": entry(max_dynamic_patch=0)}, ["a.max_dynamic_patch", "at least 1"]),
        ({"a": entry(max_dynamic_patch=1.5)}, ["a.max_dynamic_patch", "whole number"]),
        ({"a": entry(length=-1)}, ["a.length", "whole number"]),
        ('{"a": {"root": "", "annotation": "a.jsonl"}, "a": {}}', ["'a' stands twice"]),
        ({"a": entry(repeat_time=10**400)}, ["a.repeat_time", "0 or more"]),
        ("[" * 100_000, ["cannot read the meta file"]),
    ],
)
def test_malformed_meta_is_refused_with_file_key_and_remedy(tmp_path, meta, fragments):
    with pytest.raises(DataError) as caught:
        read_meta(write_meta(tmp_path, meta))
    for fragment in [*fragments, "meta.json", "→"]:
        assert fragment in str(caught.value)


def test_absent_and_undecodable_meta_files(tmp_path):
    with pytest.raises(DataError, match="meta file not found"):
        read_meta(tmp_path / "none.json")
    (tmp_path / "bad.json").write_bytes(b'{"\xff')
    with pytest.raises(DataError, match=r"bad\.json.*cannot read"):
        read_meta(tmp_path / "bad.json")


def test_llava_line(dataset):
    sample = parse_line(dataset, 3, line(extra={"kept": "out"}))
    assert isinstance(sample, Sample)
    assert (sample.id, sample.dataset, sample.task, sample.file, sample.line) == ("7", "photos", "photos", "a.jsonl", 3)
    assert sample.images == (Media("a/b.jpg", "/data/photos/a/b.jpg"),) and sample.type == "image"
    assert sample.conversation[1] == {"from": "gpt", "value": "A cat."}


@pytest.mark.parametrize(
    ("changes", "images"),
    [
        ({"image": ["a.jpg", "b.jpg"]}, ("/data/photos/a.jpg", "/data/photos/b.jpg")),
        ({"image": "/data/photos/x.jpg"}, ("/data/photos/x.jpg",)),
        ({"image": "sub/../x.jpg"}, ("/data/photos/x.jpg",)),
        ({"image": ...}, ()),
        ({"image": ""}, ()),
        ({"image": [], "video": ""}, ()),
        ({"image": "a.jpg", "video": "ignored beside an image.mp4"}, ("/data/photos/a.jpg",)),
    ],
)
def test_images_of_a_line(dataset, changes, images):
    sample = parse_line(dataset, 1, line(**changes))
    assert isinstance(sample, Sample)
    assert tuple(media.path for media in sample.images) == images


def test_accepted_forms(dataset):
    system = turns(("system", ""), ("human", "hi"), ("gpt", ""))
    sample = parse_line(dataset, 1, b"\xef\xbb\xbf" + line(id=..., task="qa", conversations=system))
    assert isinstance(sample, Sample)
    assert (sample.id, sample.task, len(sample.conversation)) == ("photos-1", "qa", 3)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"id": 7, ', "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b'{"id": NaN}', "not_a_number"),
        (b'{"score": 1e999}', "not_a_number"),
        (line().replace(b"cat", b"c\xe9t"), "invalid_utf8"),
        (line().replace(b"cat", rb"c\ud800t"), "invalid_utf8"),
        (line(id=...).replace(b"a/b", rb"\udc80"), "invalid_utf8"),
        (b"[1, 2]", "not_an_object"),
        (line(id=[1]), "bad_id"),
        (line(id=True), "bad_id"),
        (line(conversations=...), "missing_conversations"),
        (line(conversations=..., messages=3), "missing_conversations"),
        (line(conversations=..., messages=[]), "empty_conversation"),
        (line(conversations=..., messages=["hi"]), "bad_turn"),
        (line(conversations=..., messages=[{"role": "user", "content": [{"type": "audio"}]}]), "bad_turn"),
        (line(conversations=..., messages=[{"role": "tool", "content": "x"}]), "unknown_role"),
        (line(conversations=[]), "empty_conversation"),
        (line(conversations=["hi"]), "bad_turn"),
        (line(conversations=turns(("human", None), ("gpt", "x"))), "bad_turn"),
        (line(conversations=turns(("human", "x"), ("gpt", ["x"]))), "bad_turn"),
        (line(conversations=turns(("user", "x"), ("gpt", "x"))), "unknown_role"),
        (line(conversations=turns(("human", "x"), ("system", "x"), ("gpt", "x"))), "unknown_role"),
        (line(conversations=[{"from": ["human"], "value": "x"}]), "unknown_role"),
        (line(conversations=turns(("gpt", "x"), ("human", "x"))), "first_turn_not_human"),
        (line(conversations=turns(("system", "x"))), "first_turn_not_human"),
        (line(conversations=turns(("system", "x"), ("gpt", "x"))), "first_turn_not_human"),
        (line(conversations=turns(("human", "x"))), "no_gpt_turn"),
        (line(image=3), "bad_image"),
        (line(image=0), "bad_image"),
        (line(image=["a.jpg", None]), "bad_image"),
        (line(image="a\0.jpg"), "bad_image"),
        (line(image="../a.jpg"), "outside_root"),
        (line(image="x/../../photos2/a.jpg"), "outside_root"),
        (line(image="/etc/passwd"), "outside_root"),
        (line(image="."), "outside_root"),
        (line(image="https://host/a.jpg"), "bad_image"),
        (line(image="data:image/png;base64,***"), "bad_image"),
        (line(image={"bytes": None, "path": "a.jpg"}), "bad_image"),
        (line(image=..., video=["a.mp4", "b.mp4"]), "unsupported_video"),
        (line(image=..., video=3), "bad_video"),
        (line(image=..., video="../a.mp4"), "outside_root"),
        (line(image=..., video="a.mp4", clip=[3, 1]), "bad_video"),
        (line(image=..., video="a.mp4", clip="1-3"), "bad_video"),
        (line(image=..., video="frames/", clip=[1, 3]), "bad_video"),
        (line(image=..., video="a.mp4", clip=[0, 10**400]), "bad_video"),
        (line(conversations=turns(("human", "<video>\nWhat?"), ("gpt", "x"))), "unsupported_video"),
    ],
)
def test_broken_lines_are_rejected_with_their_reason(dataset, raw, reason):
    rejected = parse_line(dataset, 12, raw)
    assert isinstance(rejected, Rejected)
    assert (rejected.reason, rejected.file, rejected.line, rejected.dataset) == (reason, "a.jsonl", 12, "photos")
    json.dumps([rejected.id, rejected.detail], ensure_ascii=False).encode()
    assert rejected.detail and len(rejected.detail) <= 300


def test_root_of_the_file_system_holds_every_path(dataset):
    everything = Dataset("all", os.sep, dataset.annotations, "a.jsonl", False, None, 1.0)
    sample = parse_line(everything, 1, line(image="/data/x.jpg"))
    assert isinstance(sample, Sample)
    assert sample.images[0].path == "/data/x.jpg"


def test_read_samples_skips_blank_lines_and_keeps_line_numbers(tmp_path):
    dataset = Dataset("d", str(tmp_path), (str(tmp_path / "a.jsonl"),), "a.jsonl", False, None, 1.0)
    (tmp_path / "a.jsonl").write_bytes(line() + b"\r\n\n" + b"{\n" + line())
    assert [(type(item), item.line) for item in read_samples(dataset)] == [(Sample, 1), (Rejected, 3), (Sample, 4)]
