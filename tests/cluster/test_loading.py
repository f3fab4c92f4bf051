"""Rows made in processes of their own, from shards fetched once a node: the same training to the bit, nothing left."""

import contextlib
import time

import psutil
from chaos import assert_undisturbed, fetched, on_s3
from harness import EVERY, YAML, Experiment, assert_lineage, runs

from orchestrator.errors import ErrorClass
from orchestrator.store import open_store


def makers(rank: psutil.Process) -> list[psutil.Process]:
    """The processes below a rank that hold the memory of a row."""
    found = []
    for child in rank.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(file.path.startswith("/memfd:stageline-row") for file in child.memory_maps()):
                found.append(child)
    return found


def test_a_rank_is_killed_and_its_makers_go_with_it_and_the_weights_are_the_same(undisturbed, before_finetune, start):
    driver = start(before_finetune, "stages.full_finetune.data_workers=2")
    driver.wait_for_checkpoint(EVERY)
    rank, other = driver.workers()
    until = time.monotonic() + 10
    while not len(makers(rank)) == len(makers(other)) == 2:
        assert time.monotonic() < until, f"{makers(rank)}, {makers(other)}"
        time.sleep(0.05)
    below = rank.children(recursive=True)
    rank.kill()
    until = time.monotonic() + 10
    while left := [process for process in below if runs(process)]:
        assert time.monotonic() < until, f"left behind: {left}"
        time.sleep(0.05)
    assert driver.wait() == 0
    driver.assert_no_orphans()
    state = before_finetune.state("full_finetune")
    assert [failure.error_class for failure in state.failures] == [ErrorClass.lost_node]
    assert_lineage(before_finetune)
    assert before_finetune.weights() == undisturbed.weights()
    assert before_finetune.losses().tolist() == undisturbed.losses().tolist()


def test_on_s3_a_node_fetches_each_result_once(undisturbed, before_finetune, ceph, tmp_path, monkeypatch):
    """Two ranks, and the driver, which plans with the index of the same data."""
    for name, value in (ceph.environment | {"STAGELINE_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    experiment, store = on_s3(before_finetune, tmp_path / "s3", f"s3://{ceph.bucket()}/loading", ceph.endpoint_url)
    assert experiment.run("stages.full_finetune.data_workers=1").returncode == 0
    entries = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    names = {path.relative_to(entry).as_posix() for entry in entries for path in entry.rglob("*") if path.is_file()}
    assert len(entries) == 2, "the data and the model of the stage before"
    assert {"index.parquet", "shards/000000-000000.tar", "model.safetensors"} <= names
    fetched(experiment, store)
    assert_undisturbed(experiment, undisturbed)


def test_a_model_on_s3_trains_as_the_same_one_on_a_disk(undisturbed, ceph, tmp_path, monkeypatch):
    """From the weights that mlp_warmup left, which this experiment finds on S3 alone; then asked as a model."""
    for name, value in (ceph.environment | {"STAGELINE_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    bucket = ceph.bucket()
    store = open_store(f"s3://{bucket}/models?endpoint_url={ceph.endpoint_url}")
    for path in undisturbed.result("mlp_warmup").iterdir():
        store.put_file(f"warm/{path.name}", path)
    model = f"{{{{folder: s3://{bucket}/models/warm, endpoint_url: '{ceph.endpoint_url}'}}}}"
    text = YAML.split("  evaluate:")[0].replace("{{vision: micro-vit, language: micro-qwen2}}", model)
    text = text.replace("  mlp_warmup: {{needs: [mix_data], steps: 4, lr: 1e-3}}\n", "").replace(", mlp_warmup]", "]")
    asked = "  evaluate: {{kind: evaluate, model: outside, needs: [heldout_data], resources: {{workers: 1}}}}\n"
    experiment = Experiment(tmp_path / "s3", undisturbed.data, f"models: {{{{outside: {model}}}}}\n{text}{asked}")
    assert experiment.run().returncode == 0
    (folder,) = (tmp_path / "cache").glob("*/warm")
    assert (folder / "model.safetensors").is_file()
    assert_lineage(experiment)
    assert experiment.losses().tolist() == undisturbed.losses().tolist()
    assert experiment.weights() == undisturbed.weights()
    completed = experiment.state("evaluate").completed
    assert completed is not None and completed["summary"]
