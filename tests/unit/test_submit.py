"""What `submit`, `cancel` and `cluster check` send to a cluster, which is played here, and what they refuse to."""

from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.cli import cluster_check
from orchestrator.cli import jobs as module
from orchestrator.cli.main import main
from orchestrator.drivernote import ask_job_to_stop
from orchestrator.errors import StorageTransient
from orchestrator.jobs import RUNNING, Jobs
from orchestrator.store import FileStore, MemoryStore

SPEC = """name: x
storage: {storage}
model: {{vision: micro-vit, language: micro-qwen2}}
data: {{a: {{meta: s3://bucket/a.json}}}}
stages:
  a_data: {{kind: prepare, data: a}}
  mlp_warmup: {{needs: [a_data], lr: 1e-3, global_batch: 4, steps: 10}}
"""


class Cluster(Jobs):
    """With the jobs in `known`; what is started comes to them."""

    def __init__(self, here=True):
        self.address, self.known, self._here = "http://head:8265", [], here
        self._client: Any = SimpleNamespace(list_jobs=lambda: self.known, stop_job=self.stops)

    def here(self):
        return self._here

    def open_to_anyone(self):
        return False

    def start(self, job, command, experiment, metadata, grace=0.0):
        self.known.append(
            SimpleNamespace(
                submission_id=job, status="RUNNING", metadata=metadata, start_time=1, end_time=None, message="",
                command=command,
            )
        )  # fmt: skip
        return job

    def stops(self, job):
        self.info(job).status = "STOPPED"

    def wait(self, job, patience_s):
        return self.info(job).status


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The experiment is x.yaml in tmp_path."""
    its = Cluster()
    monkeypatch.setattr(module, "Jobs", lambda address: its)
    monkeypatch.setattr(cluster_check, "Jobs", lambda address: its)
    (tmp_path / "x.yaml").write_text(SPEC.format(storage=tmp_path / "runs"))
    return its


@pytest.fixture
def submit(cluster, tmp_path, capsys):
    """submit(*arguments): (exit code, what was said, the cluster's jobs by then)."""

    def submit(*arguments: str, file: str = "x.yaml"):
        code = main(["submit", str(tmp_path / file), *arguments])
        said = capsys.readouterr()
        return code, said.out + said.err, len(cluster.known)

    return submit


def test_the_same_again_is_not_started_twice(submit, cluster, tmp_path):
    code, said, count = submit("stages.mlp_warmup.lr=1e-4")
    assert (code, count) == (0, 1) and "submitted x-" in said
    code, said, count = submit("stages.mlp_warmup.lr=0.0001", "--grace", "9")
    assert (code, count) == (0, 1) and f"x runs already as {cluster.known[0].submission_id}" in said
    text = (tmp_path / "x.yaml").read_text()
    (tmp_path / "x.yaml").write_text(f"# a remark\n{text.replace('1e-3', '1e-4')}")
    code, said, count = submit()
    assert (code, count) == (0, 1) and "runs already" in said, "the same settings, written otherwise"
    del cluster.known[0].metadata["settings"]
    assert submit("stages.mlp_warmup.lr=1e-5")[::2] == (0, 1), "of a job that an earlier Stageline submitted"


@pytest.mark.parametrize("change", ["override", "edit", "file"])
def test_other_settings_of_what_runs_are_refused(submit, cluster, tmp_path, change):
    submit()
    job, text = cluster.known[0].submission_id, (tmp_path / "x.yaml").read_text()
    if change == "edit":
        (tmp_path / "x.yaml").write_text(text.replace("steps: 10", "steps: 11"))
    (tmp_path / "two.yaml").write_text(text.split("  mlp_warmup")[0])
    overrides = ("stages.mlp_warmup.lr=1e-4",) if change == "override" else ()
    code, said, count = submit(*overrides, file="two.yaml" if change == "file" else "x.yaml")
    assert (code, count) == (2, 1) and "submitted" not in said
    assert f": x runs with other settings as {job} → `stageline cancel {job}` first, or give it another `name:`" in said
    cluster.known[0].status = "STOPPED"
    assert submit(*overrides)[::2] == (0, 2)


def test_what_is_about_to_end_is_told_instead_of_running_already(submit, cluster, tmp_path):
    submit()
    job = cluster.known[0].submission_id
    ask_job_to_stop(FileStore(tmp_path / "runs"), "x", job, 0.0, "cancelled")
    code, said, count = submit("--address", "head:8265")
    assert (code, count) == (2, 1)
    assert (
        f"x is stopping as {job} → submit it again when it has ended; stageline logs -f {job} --address http:" in said
    )
    cluster.known[0].status = "STOPPED"
    assert submit()[::2] == (0, 2)


def test_a_store_that_is_out_of_reach_is_no_reason_to_refuse(submit, monkeypatch):
    class Away(MemoryStore):
        def exists(self, key):
            raise StorageTransient("away")

    submit()
    monkeypatch.setattr(module, "open_store", lambda url: Away())
    assert submit()[::2] == (0, 1)


def test_cancel_tells_the_driver_soon_where_the_store_is_out_of_reach(submit, cluster, monkeypatch, capsys):
    patience = []

    class Away(MemoryStore):
        def put(self, key, data, create=False):
            raise StorageTransient("away")

    submit()
    monkeypatch.setattr(module, "open_store", lambda url: Away())
    monkeypatch.setattr(module, "with_patience", lambda store, seconds: patience.append(seconds) or store)
    job = cluster.known[0].submission_id
    assert main(["cancel", job]) == 0
    assert patience == [10.0] and "telling the driver alone" in capsys.readouterr().out
    assert cluster.known[0].status not in RUNNING


@pytest.mark.parametrize(
    "here, given, base",
    [
        (True, [], "."),
        (False, [], None),
        (False, ["--shared-folders"], "."),
        (False, ["--base", "{}/other"], "other"),
        (True, ["--base", "{}/other"], "other"),
    ],
)
def test_a_check_looks_where_the_nodes_have_the_folders(cluster, tmp_path, monkeypatch, here, given, base):
    monkeypatch.setattr(cluster_check, "follow", lambda jobs, job: 0)
    cluster._here = here
    given = [text.format(tmp_path) for text in given]
    assert main(["cluster", "check", str(tmp_path / "x.yaml"), *given]) == 0
    command = cluster.known[0].command
    told = command[command.index("--base") + 1] if "--base" in command else None
    assert told == (None if base is None else str(tmp_path / base))
