"""`stageline cluster check` on nodes that are not fit: it names them, and ends."""

import os
import re
import signal

import pytest
from nodes import Nodes

from cluster import survey
from orchestrator.cli.main import main

EXPERIMENT = """
name: checked
storage: STORAGE
model: {vision: tiny-vit, language: tiny-qwen2}
data: {some: {meta: s3://bucket/some.json}}
stages:
  some_data: {kind: prepare, data: some}
  mlp_warmup: {needs: [some_data], steps: 2, lr: 1e-3, global_batch: 4}
"""


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    """Two that are fit, then one on which torch cannot be imported, then one that hangs, which Ray finds out late."""
    with Nodes(2, environment={"RAY_health_check_failure_threshold": "60"}) as cluster:
        (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open')\n")
        with monkeypatch.context() as patch:
            patch.setenv("PYTHONPATH", str(tmp_path))
            cluster.add()
        hangs = cluster.add()
        os.kill(hangs.raylet, signal.SIGSTOP)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
        os.kill(hangs.raylet, signal.SIGCONT)


def test_nodes_that_are_not_fit_are_named(nodes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(survey, "ANSWER_S", 60.0)  # the one that hangs takes all of it; torch is imported on the others
    experiment, storage = tmp_path / "e.yaml", tmp_path / "storage"
    experiment.write_text(EXPERIMENT.replace("STORAGE", str(storage)))
    assert main(["cluster", "check", str(experiment), "--here", "--megabytes", "1"]) == 2
    said = capsys.readouterr().out
    assert re.search(r"problem: \S+ does not answer: .+ → ", said)
    assert re.search(r"problem: torch cannot be imported on \S+: libcudart.so.12: cannot open → ", said)
    assert "5 nodes, 2 problems" in said and "all-reduce: gloo, 2 nodes, 1 MiB: " in said
    assert not [path for path in storage.rglob("*") if path.is_file()], "what it wrote there is gone"
