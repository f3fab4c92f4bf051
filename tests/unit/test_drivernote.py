"""What a driver tells of itself in storage, and the request to stop."""

import pytest

from orchestrator import drivernote
from orchestrator.drivernote import QUEUED, DriverNote, ask_job_to_stop, read_note, submitted_as
from orchestrator.errors import StorageTransient
from orchestrator.store import MemoryStore


@pytest.fixture(autouse=True)
def look_always(monkeypatch):
    monkeypatch.setattr(drivernote, "POLL_S", -1.0)


def test_the_note_of_the_newest_driver_and_its_queue():
    store = MemoryStore()
    assert read_note(store, "x") is None
    note = DriverNote(store, "x", "x-1", {"dashboard": "http://127.0.0.1:8265"})
    note.event("mlp_warmup", f"{QUEUED}no node is there")
    note.event("mlp_warmup", f"{QUEUED}2 GPUs are taken")
    note.event("full_finetune", f"{QUEUED}mlp_warmup runs")
    read = read_note(store, "x")
    assert read is not None and read["job"] == "x-1" and read["links"] == {"dashboard": "http://127.0.0.1:8265"}
    assert read["queued"] == {"mlp_warmup": "2 GPUs are taken", "full_finetune": "mlp_warmup runs"}
    note.event("mlp_warmup", "started")
    read = read_note(store, "x")
    assert read is not None and read["queued"] == {"full_finetune": "mlp_warmup runs"} and not read["stopped"]
    note.stopped()
    read = read_note(store, "x")
    assert read is not None and read["queued"] == {} and read["stopped"]
    DriverNote(store, "x", None, {})
    read = read_note(store, "x")
    assert read is not None and read["job"] is None and read["queued"] == {} and not read["stopped"]


def test_a_request_reaches_the_job_it_names_and_no_later_one():
    store = MemoryStore()
    note, other, local = (DriverNote(store, "x", job, {}) for job in ("x-1", "x-2", None))
    assert note.asked_to_stop() is None
    ask_job_to_stop(store, "x", "x-1", 30.0, "cancelled")
    assert note.asked_to_stop() == (30.0, "cancelled") and note.asked
    assert other.asked_to_stop() is None and local.asked_to_stop() is None and not other.asked


def test_the_id_of_the_job_comes_from_ray(monkeypatch):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert submitted_as() is None
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {}, "metadata": {"job_submission_id": "x-1"}}')
    assert submitted_as() == "x-1"


def test_a_store_that_is_away_fails_no_stage(caplog):
    class Away(MemoryStore):
        def put(self, *args, **more):
            raise StorageTransient("away")

    DriverNote(Away(), "x", "x-1", {}).event("mlp_warmup", f"{QUEUED}no node")
    assert "could not be stored" in caplog.text
