"""From a laptop to a cluster of three machines: submitted, watched, a worker drained, one lost, the driver killed,
submitted again, finished, with the weights of an undisturbed run."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from chaos import STAGE, View, assert_undisturbed, fetched, on_s3
from harness import COMMAND, LONGER, PATIENCE_S, Experiment
from machines import Forward, Machines, namespaces  # noqa: F401 (a fixture)

from orchestrator.store import open_store

OVERRIDES = (*LONGER, f"stages.{STAGE}.checkpoint.every=1000")
DEADLINE_S = 8.0
PLANTED = "planted-6f1c9a52e7"  # a secret of the laptop, which has no business on the cluster


class Laptop:
    """Outside the cluster: it knows the dashboard, the token and the store, and no file is shared."""

    def __init__(self, machines: Machines, experiment: Experiment):
        self._path = str(experiment.path)
        self._environment = os.environ | {
            "RAY_API_SERVER_ADDRESS": machines.dashboard, "RAY_AUTH_TOKEN": machines.token, "MY_DB_PASSWORD": PLANTED,
        }  # fmt: skip

    def __call__(self, verb: str, *arguments: str, code: int = 0, **more: str) -> str:
        """Runs a verb to its end; what it printed."""
        command = [*COMMAND, verb, *arguments]
        environment = self._environment | more
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment)
        print(f"$ stageline {' '.join(command[1:])} -> {done.returncode}\n{done.stdout}{done.stderr}")
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self) -> str:
        """The job's id."""
        said = self("submit", self._path, *OVERRIDES)
        self.job = said.split("submitted ")[1].split()[0]
        return self.job

    def status(self) -> str:
        return self("status", self._path, *OVERRIDES)

    def until(self, holds, what: str, patience: float = PATIENCE_S) -> None:
        """Waits for it; where the job ends before, or never gets there, what it said is printed."""
        end = time.monotonic() + patience
        while not holds():
            if time.monotonic() > end:
                self("logs", self.job)
                raise AssertionError(f"not within {patience:.0f} s: {what}")
            time.sleep(0.2)


def holds(path: Path, secret: str) -> bool:
    return secret.encode() in path.read_bytes()


def since_resume(view: View, token: tuple[int, int]) -> int:
    """Steps that an attempt later than `token` has trained; -1 while there is none."""
    started = [entry.fields["step"] for entry in view.entries() if entry.type == "started" and entry.token > token]
    step = view.step()
    return step - started[-1] if started and step is not None else -1


@pytest.fixture
def machines(namespaces, ceph, monkeypatch):  # noqa: F811
    for name, value in ceph.environment.items():
        monkeypatch.setenv(name, value)
    with Machines(ceph.environment) as cluster:
        yield cluster


def put_data(experiment: Experiment, bucket: str, endpoint: str) -> None:
    """The experiment's sources in the bucket, and its file says so."""
    store = open_store(f"s3://{bucket}/data?endpoint_url={endpoint}")
    for path in sorted(Path(experiment.data).rglob("*")):
        if path.is_file():
            store.put_file(path.relative_to(experiment.data).as_posix(), path)
    text = experiment.path.read_text()
    for name in ("mix", "heldout"):
        there = f"meta: s3://{bucket}/data/{name}.json, endpoint_url: '{endpoint}'"
        text = text.replace(f"meta: {experiment.data}/{name}.json", there)
    experiment.path.write_text(text)


def test_submitted_drained_killed_and_submitted_again(before_finetune, longer, ceph, machines, tmp_path):
    bucket = ceph.bucket()
    with Forward(machines.outside, int(ceph.endpoint_url.rpartition(":")[2])) as endpoint:
        experiment, store = on_s3(before_finetune, tmp_path / "cluster", f"s3://{bucket}/cluster", endpoint)
        put_data(experiment, bucket, endpoint)
        laptop = Laptop(machines, experiment)
        first, second = machines.add(), machines.add()
        check = laptop("cluster", "check", str(experiment.path), *OVERRIDES)
        assert "3 nodes, 0 problems" in check and "all-reduce: gloo, 2 nodes" in check
        job = laptop.submit()
        view = View(experiment, store, OVERRIDES)
        laptop.until(lambda: (view.step() or 0) >= 30, "30 steps")
        assert f"runs already as {job}" in laptop("submit", str(experiment.path), *OVERRIDES)
        assert job in laptop("list") and "running" in laptop("status", job)
        assert "running" in laptop.status()
        assert "resumed" not in laptop("logs", str(experiment.path), STAGE)

        # announced: the worker is drained; nothing is trained that is thrown away
        assert view.attempt() is not None, "it was faster than this test: give it more steps"
        token, at = view.token(), time.time()
        first.notice(DEADLINE_S)
        laptop.until(lambda: view.attempt() is None or view.token() > token, "it saves and stops")
        saved = max(e.time for e in view.entries() if e.type == "checkpoint" and e.token == token)
        assert 0 < saved - at < DEADLINE_S
        laptop.until(lambda: "queued" in laptop.status(), "why it waits is told")
        machines.kill(first)
        machines.add()
        laptop.until(lambda: since_resume(view, token) >= 20, "it goes on with a fresh machine")

        # unannounced: a machine is gone
        token = view.token()
        machines.kill(second)
        machines.add()
        laptop.until(lambda: since_resume(view, token) >= 10, "it goes on after the loss")

        driver, token = machines.driver(), view.token()
        assert driver is not None
        driver.kill()
        laptop.until(lambda: "failed" in laptop("status", job), "the cluster knows that the driver is gone")
        again = laptop.submit()
        assert again != job
        laptop.until(lambda: since_resume(view, token) >= 10, "the second driver trains")

        # cancelled: it saves, and the cluster knows it as stopped
        said = laptop("cancel", again)
        assert "asked all stages to save and stop" in said and f"{again}: stopped" in said
        assert "stopped" in laptop("status", again)
        last = laptop.submit()
        said = laptop("logs", last, "--follow")
        assert "stages done" in said and "succeeded" in laptop("status", last)
        fetched(experiment, store)
        for secret in (PLANTED, ceph.environment["AWS_SECRET_ACCESS_KEY"], machines.token):
            assert machines.files_with(secret) == []
            assert [path for path in experiment.storage.rglob("*") if path.is_file() and holds(path, secret)] == []
    account = experiment.account(STAGE)
    print(account.causes, [attempt.lost for attempt in account.attempts])
    assert account.causes["preempted"] == 2, "the notice and the cancel"
    assert all(attempt.lost <= 1 for attempt in account.attempts if attempt.cause == "preempted")
    assert_undisturbed(experiment, longer)
