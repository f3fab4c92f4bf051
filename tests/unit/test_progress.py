"""Metrics, logs and the progress note: the surviving lineage, one row per step."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import progress
from orchestrator.progress import Recorder, read_logs, read_metrics, read_progress, token_name
from orchestrator.store import MemoryStore

P = "stages/train/0123456789abcdef"


@pytest.fixture
def store():
    return MemoryStore()


def record(store, token, first, last, segments=()):
    """An attempt's rows first..last, flushed after each step in `segments` and at the end; returns its recorder."""
    recorder = Recorder(store, P, token)
    for step in range(first, last + 1):
        recorder.row(step, 100, {"by": token_name(token)})
        if step in segments:
            recorder.flush()
    recorder.flush()
    return recorder


def lineage(store):
    return [(row["step"], row["by"]) for row in read_metrics(store, P)]


def test_one_attempt_in_several_segments(store):
    record(store, (1, 1), 1, 30, segments=(10, 12))
    assert lineage(store) == [(step, "e0001a0001") for step in range(1, 31)]
    assert [key.rsplit("/", 1)[1] for key in store.list(f"{P}/metrics/")] == [
        f"e0001a0001-{first:08d}.jsonl" for first in (1, 11, 13)
    ]


def test_what_lies_beyond_the_resume_point_is_dropped(store):
    """The first attempt got to 20, its last checkpoint was of step 10; the second has so far reached 12."""
    record(store, (1, 1), 1, 20, segments=(10,))
    record(store, (1, 2), 11, 12)
    assert lineage(store) == [(s, "e0001a0001") for s in range(1, 11)] + [(s, "e0001a0002") for s in (11, 12)]


def test_a_new_driver_and_a_fall_back_to_an_earlier_checkpoint(store):
    record(store, (1, 1), 1, 20)
    record(store, (1, 2), 21, 25)
    record(store, (2, 1), 11, 30, segments=(15, 22))
    assert lineage(store) == [(s, "e0001a0001") for s in range(1, 11)] + [(s, "e0002a0001") for s in range(11, 31)]


def test_a_late_segment_of_an_earlier_attempt_changes_nothing(store):
    zombie = Recorder(store, P, (1, 1))
    for step in range(1, 16):
        zombie.row(step, 100, {"by": "zombie"})
        if step == 10:
            zombie.flush()
    record(store, (1, 2), 11, 20)
    zombie.flush()
    assert [by for step, by in lineage(store) if step > 10] == ["e0001a0002"] * 10


def test_tokens_sort_as_numbers(store):
    record(store, (1, 9), 1, 5)
    record(store, (1, 10), 3, 4)
    record(store, (10, 1), 4, 4)
    assert lineage(store) == [(1, "e0001a0009"), (2, "e0001a0009"), (3, "e0001a0010"), (4, "e0010a0001")]


attempts = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 4), st.booleans()), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(attempts)
def test_every_surviving_step_has_exactly_its_row(lives):
    """Attempts of some steps each, with a flush and a commit every so many, some with a flush before death."""
    store, committed, expected = MemoryStore(), 0, []
    for number, (length, every, flushed) in enumerate(lives, 1):
        recorder, start = Recorder(store, P, (1, number)), committed
        expected = expected[:start]
        for step in range(start + 1, start + length + 1):
            recorder.row(step, 1000, {"by": number})
            expected.append((step, number))
            if step % every == 0:
                recorder.flush()
                committed = step
        if flushed:
            recorder.flush()
    rows = [(row["step"], row["by"]) for row in read_metrics(store, P)]
    assert rows[:committed] == expected[:committed]
    if lives[-1][2]:
        assert rows == expected
    assert [step for step, _ in rows] == list(range(1, len(rows) + 1))


def test_a_row_keeps_what_the_stage_measured(store):
    recorder = Recorder(store, P, (1, 1))
    recorder.row(1, 3, {"loss": 2.5, "data/consumed/a": 4})
    recorder.flush()
    recorder.flush()
    (row,) = read_metrics(store, P)
    assert row == {"step": 1, "attempt": "e0001a0001", "loss": 2.5, "data/consumed/a": 4}
    assert len(store.list(f"{P}/metrics/")) == 1, "an empty flush writes nothing"


def test_the_note_says_where_it_is_and_when_it_ends(store, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    assert read_progress(store, P) is None
    recorder = Recorder(store, P, (3, 2))
    for step in range(11, 16):
        recorder.row(step, 20, {"loss": 1.0})
        recorder.write()
        now[0] += 2.0
    note = read_progress(store, P)
    assert (note["token"], note["step"], note["total"], note["row"]) == ([3, 2], 15, 20, {"loss": 1.0})
    assert note["eta_s"] == pytest.approx(2.0 * 5)


def test_notes_and_segments_are_written_when_due(store, monkeypatch):
    """Not at every step: a note a second, a segment every 15 seconds, the last of both at the end."""
    now, puts = [100.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    original = store.put
    monkeypatch.setattr(store, "put", lambda key, data, create=False: puts.append(key) or original(key, data, create))
    recorder = Recorder(store, P, (1, 1))
    for step in range(1, 401):
        recorder.row(step, 400, {})
        recorder.write()
        now[0] += 0.1
    recorder.flush()
    notes = [key for key in puts if key.endswith("progress.json")]
    segments = [key for key in puts if "/metrics/" in key]
    assert 38 <= len(notes) <= 42 and len(segments) == 3
    assert json.loads(store.get(notes[-1]))["step"] == 400


def test_a_put_that_fails_loses_no_row_and_no_line(store, monkeypatch):
    recorder, original = Recorder(store, P, (1, 1)), store.put
    recorder.behind = True
    recorder.log("a line")
    recorder.row(1, 3, {})
    monkeypatch.setattr(store, "put", lambda *_: (_ for _ in ()).throw(ConnectionError()))
    with pytest.raises(ConnectionError):
        recorder.flush()
    monkeypatch.setattr(store, "put", original)
    recorder.row(2, 3, {})
    recorder.flush()
    assert [row["step"] for row in read_metrics(store, P)] == [1, 2] and read_progress(store, P)["step"] == 2
    assert "a line" in read_logs(store, P)["e0001a0001.log"]


def test_logs_by_attempt(store):
    one = Recorder(store, P, (1, 1))
    one.log("first\nsecond")
    one.log("third")
    Recorder(store, P, (1, 2)).log("again")
    Recorder(store, P, (1, 2), "e0001a0002-0plan").log("planned")
    logs = read_logs(store, P)
    assert list(logs) == ["e0001a0001.log", "e0001a0002-0plan.log", "e0001a0002.log"]
    assert [line.split(" ", 1)[1] for line in logs["e0001a0001.log"].splitlines()] == ["first", "second", "third"]
    assert read_logs(store, "stages/train/other") == {}
