"""Model folders on S3: the same model as from a disk, fetched once, and what is planned is what is loaded."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from s3_service import ENVIRONMENT, Proxy, moto, s3_store

from modeling import disk, files, remote
from modeling.digests import tokenizer_digest, weights_digest
from modeling.errors import UserError
from modeling.internvl import save_model, start_from
from modeling.presets import as_planned, folders, resolve, sizes
from modeling.remote import model_folder, recorded
from orchestrator.cli.main import main
from orchestrator.portable import local_paths
from orchestrator.spec import load_spec
from stages.evaluate.results import _parameters
from stages.params import ModelParams, PrepareParams
from stages.prepare.measure import build_measure

YAML = """
name: remote
storage: {folder}/storage
model: {model}
data: {{mix: {{meta: {folder}/mix.json}}}}
stages:
  mix_data: {{kind: prepare, data: mix}}
  full_finetune: {{needs: [mix_data], lr: 1e-3, global_batch: 2, steps: 2}}
"""


@pytest.fixture
def store(monkeypatch, tmp_path):
    monkeypatch.setenv("STAGELINE_CACHE", str(tmp_path / "cache"))
    forget()
    yield s3_store(monkeypatch)
    forget()


def forget() -> None:
    """As another process would begin."""
    for cached in (remote._listing, remote._held):
        cached.cache_clear()
    files.forget()


@pytest.fixture
def local(micro, tmp_path) -> Path:
    folder = tmp_path / "local" / "micro"
    save_model(micro.build(3), micro.tokenizer, folder, micro.resolved.tile_size)
    (folder / "pytorch_model.bin").write_bytes(b"would be code")
    return folder


def upload(store, folder: Path) -> str:
    for path in sorted(folder.iterdir()):
        store.put_file(f"models/{folder.name}/{path.name}", path)
    return f"s3://{store.address.bucket}/{store.address.prefix}/models/{folder.name}"


def experiment(tmp_path: Path, url: str, endpoint: str = "") -> Path:
    turns = [{"from": "human", "value": "Say a."}, {"from": "gpt", "value": "a"}]
    (tmp_path / "words.jsonl").write_text(json.dumps({"id": 0, "conversations": turns}) + "\n")
    words = {"root": "", "annotation": "words.jsonl", "data_augment": False, "repeat_time": 1, "length": 1}
    (tmp_path / "mix.json").write_text(json.dumps({"words": words}))
    path = tmp_path / "exp.yaml"
    model = f"{{folder: '{url}', endpoint_url: '{endpoint or moto()}'}}"
    path.write_text(YAML.format(folder=tmp_path, model=model))
    return path


def test_the_same_model_as_from_a_disk(store, local):
    url = upload(store, local)
    params = ModelParams(folder=url, endpoint_url=moto())
    here, there = ModelParams(folder=str(local)), resolve(params, weights=True)
    assert resolve(here).language == there.language and resolve(here).tokens_per_tile == there.tokens_per_tile
    assert there.whole is not None and there.whole.name == "micro"
    tokenizer = there.tokenizer()
    assert tokenizer.get_vocab() == resolve(here).tokenizer().get_vocab()
    for ours, its in zip(start_from(there.whole, tokenizer).parameters(), start_from(local, tokenizer).parameters()):
        assert ours.equal(its)


def test_planning_fetches_no_weights_and_nobody_fetches_what_may_be_code(store, local):
    params = ModelParams(folder=upload(store, local), endpoint_url=moto())
    folder = folders(params)["folder"]
    assert sizes(params) == sizes(ModelParams(folder=str(local)))
    assert tokenizer_digest(folder) == tokenizer_digest(local)
    names = {path.name for path in folder.iterdir()}
    assert not {name for name in names if name.endswith((".safetensors", ".bin"))}
    planned = weights_digest(folder)
    assert folders(params, weights=True) == {"folder": folder}
    new = {path.name for path in folder.iterdir()} - names
    assert new == {"model.safetensors"} and weights_digest(folder) == planned is not None


def test_other_weights_are_another_model(store, local, micro):
    url = upload(store, local)
    first = model_folder(url, moto(), weights=True)
    save_model(micro.build(4), micro.tokenizer, local, micro.resolved.tile_size)
    upload(store, local)
    assert model_folder(url, moto(), weights=True) == first, "a process sees one state"
    forget()
    second = model_folder(url, moto(), weights=True)
    assert second != first and weights_digest(second) != weights_digest(first)
    assert (second / "model.safetensors").read_bytes() == (local / "model.safetensors").read_bytes()


def test_what_was_uploaded_between_two_looks_is_not_taken_for_what_was_planned(store, local):
    url = upload(store, local)
    model_folder(url, moto())
    with (local / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    upload(store, local)
    with pytest.raises(UserError, match="changed, or removed, while it was read"):
        model_folder(url, moto(), weights=True)
    store.delete("models/micro/model.safetensors")
    with pytest.raises(UserError, match="changed, or removed, while it was read"):
        model_folder(url, moto(), weights=True)


@pytest.mark.parametrize("fault", ["404 NoSuchKey", "tear", "drop", "503 SlowDown"])
def test_a_file_is_there_when_every_byte_of_it_came(store, local, monkeypatch, fault):
    """Asked again where that may help; what is gone for a moment, as during an upload, is not taken for zeros."""
    monkeypatch.setattr(remote, "PIECE", 50_000)
    url = upload(store, local)
    want = (local / "model.safetensors").read_bytes()
    assert len(want) > 3 * remote.PIECE
    with Proxy() as proxy:
        folder = model_folder(url, proxy.endpoint)
        proxy.faults[:] = [("GET model.safetensors", fault)]
        if fault.startswith("404"):
            with pytest.raises(UserError, match="changed, or removed, while it was read"):
                model_folder(url, proxy.endpoint, weights=True)
            assert not (folder / "model.safetensors").exists()
        model_folder(url, proxy.endpoint, weights=True)
        assert proxy.faults == [] and (folder / "model.safetensors").read_bytes() == want


def test_a_full_disk_is_told_as_one(store, local, monkeypatch):
    url = upload(store, local)

    def full(file: int, data: bytes, at: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(remote.os, "pwrite", full)
    with pytest.raises(UserError, match=r"no space is left in .*micro"):
        model_folder(url, moto())


@pytest.mark.parametrize("change", ["config.json", "tokenizer.json", "removed"])
def test_workers_refuse_another_model_than_was_planned(store, local, change):
    planned = as_planned(ModelParams(folder=upload(store, local), endpoint_url=moto()))
    assert resolve(planned).whole == resolve(planned, weights=True).whole
    if change == "removed":
        for name in [path.name for path in local.iterdir()]:
            store.delete(f"models/micro/{name}")
    else:
        (local / change).write_text((local / change).read_text() + " ")
        upload(store, local)
    forget()
    with pytest.raises(UserError, match="micro: it was changed, or removed, after the run was planned"):
        resolve(planned)
    build_measure.cache_clear()
    with pytest.raises(UserError, match="after the run was planned"):
        build_measure(planned, PrepareParams(data="mix"), None)


def test_what_is_planned_names_local_folders_as_they_are(local):
    for params in (ModelParams(folder=str(local)), ModelParams(vision="micro-vit", language="micro-qwen2")):
        assert as_planned(params) == params


def test_a_file_that_became_shorter_while_it_was_read(store, local, monkeypatch):
    monkeypatch.setattr(remote, "PIECE", 50_000)
    url = upload(store, local)
    model_folder(url, moto())
    (local / "model.safetensors").write_bytes(b"short")
    upload(store, local)
    with pytest.raises(UserError, match="it was changed, or removed, while it was read"):
        model_folder(url, moto(), weights=True)


def test_a_copy_of_a_copy_is_known_by_its_content(store, local, tmp_path):
    folder = model_folder(upload(store, local), moto(), weights=True)
    shutil.copytree(folder, tmp_path / "mine")
    assert recorded(folder) and recorded(tmp_path / "mine") is None
    before = weights_digest(tmp_path / "mine")
    (tmp_path / "mine" / "config.json").write_text("{}")
    assert weights_digest(tmp_path / "mine") != before


def test_a_damaged_record_is_written_again(store, local):
    url = upload(store, local)
    folder = model_folder(url, moto())
    want = recorded(folder)
    (folder / remote.LISTING).write_text("")
    assert recorded(folder) is None
    forget()
    assert recorded(model_folder(url, moto())) == want


def test_import_takes_an_address(store, local, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto())
    url = upload(store, local)
    assert main(["import", url, "--output", str(tmp_path / "out")]) == 0
    assert weights_digest(tmp_path / "out")
    assert main(["import", url + "-not", "--output", str(tmp_path / "other")]) == 2
    assert f"{url}-not: there is no such folder" in capsys.readouterr().err


def test_ways_to_write_the_address(store, local, tmp_path):
    """With a slash at its end; with folders below it, and hidden files, which are not the model's."""
    url = upload(store, local)
    first = model_folder(url, moto())
    store.put("models/micro/checkpoints/config.json", b"{}")
    store.put("models/micro/.s3.json", b"{}")
    forget()
    assert model_folder(url + "/", moto()) == first and recorded(first)
    assert load_spec(experiment(tmp_path, url + "/")).model == ModelParams(folder=url, endpoint_url=moto())


@pytest.mark.parametrize(
    "url", ["s3://", "s3://-/x", "s3://bucket/x?endpoint_url=http://h:1", "s3://u:hunter2@bucket/x"]
)
def test_an_address_that_is_none_is_told_by_its_field(tmp_path, capsys, url):
    assert main(["plan", str(experiment(tmp_path, url))]) == 2
    told = capsys.readouterr().err
    assert "model.folder: " in told and "hunter2" not in told and "Traceback" not in told


def test_a_tokenizer_of_its_own_comes_without_weights(store, local):
    params = ModelParams(
        vision="micro-vit", language="micro-qwen2", tokenizer=upload(store, local), endpoint_url=moto()
    )
    assert resolve(params, weights=True).tokenizer().get_vocab()
    assert not list(folders(params)["tokenizer"].glob("*.safetensors"))


def test_messages_name_the_address_and_not_the_copy(store, local):
    (local / "config.json").write_text(json.dumps({"model_type": "internvl_chat"}))
    url = upload(store, local)
    with pytest.raises(UserError, match=f"'{url}' holds an InternVL in the official layout .* import {url} "):
        resolve(ModelParams(folder=url, endpoint_url=moto()))


def test_parameters_are_counted_where_the_weights_lie(store, local, micro):
    url = upload(store, local)
    counts = _parameters(url, moto())
    assert counts == _parameters(str(local), None)
    assert sum(counts.values()) == sum(p.numel() for p in micro.build(3).parameters())


def test_a_folder_that_is_a_file_is_no_folder(tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert main(["plan", str(experiment(tmp_path, str(tmp_path / "model.safetensors")))]) == 0
    assert "no folder" in capsys.readouterr().out


def test_processes_of_a_machine_fetch_once(store, local):
    url = upload(store, local)
    code = "import sys; from modeling import files, remote; real = files.read\n" \
        "def read(address, *of):\n    print(address); return real(address, *of)\n" \
        "files.read = read; remote.model_folder(sys.argv[1], sys.argv[2], weights=True)"  # fmt: skip
    command = [sys.executable, "-c", code, url, moto()]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    fetched = [line for process in running for line in process.communicate(timeout=120)[0].splitlines()]
    assert all(process.returncode == 0 for process in running)
    names = {path.name for path in local.iterdir() if path.suffix != ".bin"}
    assert sorted(fetched) == sorted(f"{url}/{name}" for name in names if name.endswith(remote.FETCHED))


def test_a_folder_in_use_stays_when_others_need_the_room(store, local, monkeypatch):
    folder = model_folder(upload(store, local), moto(), weights=True)
    monkeypatch.setenv("STAGELINE_CACHE_GB", "0")
    disk.make_room(disk.cache_folder() / "another", 1, "test")
    assert (folder / "model.safetensors").is_file()
    with pytest.raises(BlockingIOError):
        disk.take_lock(folder.parent.with_suffix(".use"), fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_plan_names_what_is_not_there(store, tmp_path, capsys):
    url = f"s3://{store.address.bucket}/nowhere/micro"
    assert main(["plan", str(experiment(tmp_path, url))]) == 0
    assert f"no folder {url} (model.folder)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("how", ["no bucket", "no keys", "nobody there"])
def test_a_store_that_does_not_serve_is_told(store, local, tmp_path, capsys, monkeypatch, how):
    url, endpoint = upload(store, local), ""
    if how == "no bucket":
        url = "s3://b-of-nobody/micro"
    elif how == "no keys":
        for name in ENVIRONMENT:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("HOME", str(tmp_path))
    else:
        monkeypatch.setattr(files, "TRIES", 1)
        endpoint = "http://127.0.0.1:9"
    assert main(["plan", str(experiment(tmp_path, url, endpoint))]) == (0 if how == "no bucket" else 2)
    told = capsys.readouterr()
    text = {"no bucket": f"no folder {url}", "no keys": f"{url}: no keys for S3", "nobody there": "does not answer"}
    assert text[how] in " ".join((told.out + told.err).split()) and "Traceback" not in told.err


def test_where_it_lies_is_no_part_of_the_experiment_that_a_cluster_cannot_see(store, local, tmp_path):
    spec = load_spec(experiment(tmp_path, upload(store, local)))
    assert not [field for field, _ in local_paths(spec) if field.startswith("model")]


def test_a_bad_endpoint_is_told_by_its_field(tmp_path, capsys):
    assert main(["plan", str(experiment(tmp_path, "s3://b/micro", "ftp://x"))]) == 2
    assert "model.endpoint_url: endpoint_url is not an address" in capsys.readouterr().err
