"""What tasks of the step `scores` are sent, and the segments of scores that they read."""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from fake_io import FakeIO
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.curation import Curation, Endpoint, Scores
from stages.params import PrepareParams
from stages.prepare.chunks import Part
from stages.prepare.later import Mixture
from stages.prepare.score_cache import process_cache
from stages.prepare.score_parts import Answered, Asked, ScorePart, score_parts

CURATE = Curation(scores=Scores(endpoint=Endpoint(base_url="http://127.0.0.1/v1", model="m")))


class Sent(FakeIO):
    """Keeps what is sent to tasks, and answers that every sample is good."""

    def stream(self, function, items):
        self.sent: list[Asked] = list(items)
        for asked in self.sent:
            scores = [("general", 9.0, float(row)) for row in asked.rows]
            yield Answered(asked.part.number, asked.rows, scores, [], 0, 0)


def run(folder: Path, kept, rejected=(), segments=()) -> tuple[list[Asked], dict]:
    """(what was sent, tables): one part, numbered from 5, for each number of kept samples."""
    (folder / "shared" / "scores").mkdir(parents=True)
    for name in segments:
        (folder / "shared" / "scores" / name).touch()
    io = Sent(folder, PrepareParams.model_validate({"data": "d", "max_tokens": 64, "max_tiles": 1}))
    parts = [Part(i + 5, "set", "", f"part{i}", [], n, 0, {"": n}, []) for i, n in enumerate(kept)]
    mixture = Mixture(parts, io.work_folder("parts"), folder / "late")
    mixture.left[list(rejected)] = False
    tables = score_parts(io, mixture, CURATE, np.zeros(sum(kept), bool))
    return io.sent, tables


def test_what_a_task_is_sent_does_not_grow_with_the_segments(tmp_path):
    names = [hashlib.sha256(bytes([i % 256, i // 256])).hexdigest() + ".jsonl" for i in range(2000)]
    (few,), _ = run(tmp_path / "few", [3], segments=names[:1])
    (many,), _ = run(tmp_path / "any", [3], segments=[*names, "notes.txt"])
    assert len(pickle.dumps(many)) < len(pickle.dumps(few)) + 100
    assert json.loads(many.folder.get([many.segments])[0]) == sorted(names), "and all are listed"


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_each_task_gets_the_rows_of_its_part_that_are_left(tmp_path_factory, data):
    kept = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=8))
    rejected = data.draw(st.sets(st.integers(0, sum(kept) - 1))) if sum(kept) else set()
    sent, tables = run(tmp_path_factory.mktemp("parts"), kept, rejected)
    found, start = {asked.part.number: asked.rows.tolist() for asked in sent}, 0
    for i, count in enumerate(kept):
        rows = [row for row in range(count) if start + row not in rejected]
        assert found.get(i + 5, []) == rows
        if rows:
            column = tables[i + 5]["repetition"].to_pylist()
            assert column == [float(row) if row in rows else None for row in range(count)]
        start += count


def segment(folder, number: int) -> str:
    key = hashlib.sha256(bytes([number])).hexdigest()
    data = json.dumps({"key": key, "value": float(number)}) + "\n"
    name = hashlib.sha256(data.encode()).hexdigest() + ".jsonl"
    folder.create(name, data.encode())
    return key


@pytest.fixture
def asked(tmp_path):
    """A task that may read three segments, and their keys."""
    process_cache.cache_clear()
    io = FakeIO(tmp_path, None)
    cache, folder = io.shared_folder("scores"), io.work_folder("parts")
    keys = [segment(cache, number) for number in range(3)]
    folder.create("list.json", json.dumps(cache.names()).encode())
    part = Part(0, "set", "", "part0", [], 1, 0, {"": 1}, [])
    yield Asked(part, np.arange(1), folder, cache, "list.json", CURATE.scores), keys
    process_cache.cache_clear()


def test_a_process_reads_the_list_and_the_segments_once(asked, tmp_path):
    task, keys = asked
    scorer = ScorePart()
    scorer._read(task, tmp_path / "known")
    task.cache.clear()
    task.folder.clear()
    scorer._read(task, tmp_path / "known")
    assert scorer.cache.get_many(keys) == {key: float(i) for i, key in enumerate(keys)}


def test_a_segment_that_is_gone_is_asked_again(asked, tmp_path, caplog):
    task, keys = asked
    gone = task.cache.names()[1]
    (tmp_path / "shared" / "scores" / gone).unlink()
    scorer = ScorePart()
    scorer._read(task, tmp_path / "known")
    assert len(scorer.cache.get_many(keys)) == 2 and gone in caplog.text


def test_a_segment_that_is_there_and_cannot_be_read_is_no_lost_score(asked, tmp_path, monkeypatch):
    task, _ = asked

    def fetch(self, name, folder):
        raise ConnectionError("storage")

    monkeypatch.setattr(type(task.cache), "fetch", fetch)
    with pytest.raises(ConnectionError, match="storage"):
        ScorePart()._read(task, tmp_path / "known")
