"""Sources on S3 give the same rows as on a disk; a store that does not answer is nobody's fault but its own."""

import json
from pathlib import Path

import pytest
from corpus import FORMATS, digit_pictures, make_samples, write
from s3_service import moto, s3_store
from test_formats import bytes_tokenizer, rows, run  # noqa: F401

from modeling import files
from modeling.errors import DataError
from modeling.meta import read_meta
from orchestrator.fingerprint import absent_source
from stages.prepare.digest import source_digest


@pytest.fixture
def bucket(monkeypatch):
    store = s3_store(monkeypatch)
    yield store
    files.forget()


def upload(folder: Path, store) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            store.put_file(path.relative_to(folder).as_posix(), path)
    return f"s3://{store.address.bucket}/{store.address.prefix}"


def on_s3(meta: Path, url: str, to: Path) -> Path:
    entries = json.loads(meta.read_text())
    for entry in entries.values():
        entry["root"], entry["annotation"] = f"{url}/{entry['root']}", f"{url}/{entry['annotation']}"
    to.mkdir()
    (to / "meta.json").write_text(json.dumps(entries))
    return to / "meta.json"


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_rows_from_s3(tmp_path, bucket, form, bytes_tokenizer):  # noqa: F811
    pictures, _ = digit_pictures()
    samples = make_samples(pictures[:60], [str(i) for i in range(60)])[:5]
    meta = write(samples, form, tmp_path / "in")
    local = run(meta, tmp_path / "local")
    remote = on_s3(meta, upload(tmp_path / "in", bucket), tmp_path / "remote")
    out = run(remote, tmp_path / "out", endpoint_url=moto())
    assert rows(out, bytes_tokenizer) == rows(local, bytes_tokenizer)


def test_the_meta_file_itself_may_lie_on_s3(tmp_path, bucket, bytes_tokenizer):  # noqa: F811
    """As a cluster needs it: its paths count from where it lies."""
    pictures, _ = digit_pictures()
    samples = make_samples(pictures[:60], [str(i) for i in range(60)])[:5]
    meta = write(samples, "internvl", tmp_path / "in")
    local = run(meta, tmp_path / "local")
    there = f"{upload(tmp_path / 'in', bucket)}/{meta.relative_to(tmp_path / 'in').as_posix()}"
    (dataset,) = read_meta(there, moto())
    assert dataset.annotations[0].startswith("s3://") and dataset.root.startswith("s3://")
    assert absent_source(there, moto()) is None and absent_source(f"{there}.no", moto()) == f"{there}.no"
    assert source_digest(there, moto())["datasets"][dataset.name]["missing"] == 0
    assert rows(run(there, tmp_path / "out", endpoint_url=moto()), bytes_tokenizer) == rows(local, bytes_tokenizer)
    with pytest.raises(DataError, match="meta file not found"):
        read_meta(f"{there}.no", moto())


def test_an_object_that_is_put_again_is_another_source(tmp_path, bucket):
    pictures, _ = digit_pictures()
    samples = make_samples(pictures[:60], [str(i) for i in range(60)])[:5]
    meta = write(samples, "internvl", tmp_path / "in")
    remote = on_s3(meta, upload(tmp_path / "in", bucket), tmp_path / "remote")
    first = source_digest(remote, moto())
    assert first["datasets"]["things"]["files"] == 5 and first["datasets"]["things"]["missing"] == 0
    assert source_digest(remote, moto()) == first
    bucket.put("media/0.png", b"another picture")
    assert source_digest(remote, moto()) != first
    bucket.delete("media/0.png")
    assert source_digest(remote, moto())["datasets"]["things"]["missing"] == 1


def test_what_is_missing_or_forbidden_on_s3_is_told(tmp_path, bucket, monkeypatch):
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"annotation": f"s3://{bucket.address.bucket}/no.jsonl"}}))
    with pytest.raises(DataError, match=r"d\.annotation: s3://.*no\.jsonl not found"):
        read_meta(tmp_path / "meta.json", moto())
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"annotation": f"s3://{bucket.address.bucket}/no-*.tar"}}))
    with pytest.raises(DataError, match="no file matches"):
        read_meta(tmp_path / "meta.json", moto())


def test_a_store_that_is_away_rejects_no_sample(tmp_path, bucket, monkeypatch):
    pictures, _ = digit_pictures()
    samples = make_samples(pictures[:60], [str(i) for i in range(60)])[:1]
    meta = write(samples, "internvl", tmp_path / "in")
    entries = json.loads(meta.read_text())
    entries["things"]["root"] = "s3://nowhere/media"
    meta.write_text(json.dumps(entries))
    monkeypatch.setattr(files, "TRIES", 1)
    with pytest.raises(files.Unavailable, match=r"nowhere/media/0\.png"):
        run(meta, tmp_path / "out", endpoint_url="http://127.0.0.1:9")
