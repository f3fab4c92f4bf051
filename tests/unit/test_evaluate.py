"""Evaluation: exact match per task, with honest intervals, over every question."""

import json

import pytest
from fake_io import FakeIO
from hypothesis import given
from hypothesis import strategies as st
from videos import MOST, prepared_videos

from modeling.internvl import load_model, save_model
from modeling.shards import ShardReader
from stages.evaluate.run import Part, answer_part, batches, evaluate, score, wilson
from stages.io import Input
from stages.params import DataParams, EvaluateParams, PrepareParams


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (5, 10, 0.2366, 0.7634)],
)
def test_wilson_intervals(right, n, low, high):
    """(81, 263) is the example of Newcombe, Statistics in Medicine 17 (1998), 857-872, method 3."""
    assert wilson(right, n) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_an_interval_narrows_holds_the_share_and_knows_nothing_of_nothing():
    assert wilson(0, 0) == (0.0, 1.0)
    widths = []
    for n in (10, 100, 1000):
        low, high = wilson(9 * n // 10, n)
        assert 0 <= low < 0.9 < high <= 1
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)


def test_scores_per_task():
    rows = [{"task": t, "right": r} for t, r in [("b", True), ("a", False), ("a", True), ("a", True), ("a", True)]]
    scores = score(rows)
    assert list(scores) == ["a", "b"]
    low, high = wilson(3, 4)
    assert scores["a"] == {"n": 4, "right": 3, "accuracy": 0.75, "low": low, "high": high}
    assert scores["b"]["accuracy"] == 1.0 and score([]) == {}


@pytest.fixture(scope="module")
def trained(micro, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "model"
    save_model(micro.build(seed=1), micro.tokenizer, folder, 32)
    return folder


@pytest.mark.parametrize("batch", [1, 4])
def test_predictions_come_in_order_whatever_the_batch(prepared, trained, batch):
    rows = answer_part(Part(str(trained), str(prepared), [4, 0, 3, 2], batch, 4, "", 2))
    assert [row["id"] for row in rows] == ["s0", "s2", "s3", "s4"]
    assert [row["reference"] for row in rows] == ["7", "the second", "four", "seven"]
    assert [row["task"] for row in rows] == ["one", "two", "text", "one"]
    assert all(row["right"] == (row["answer"] == row["reference"]) for row in rows)
    assert rows == answer_part(Part(str(trained), str(prepared), [0, 2, 3, 4], 2, 4, "", 2))


def test_an_answer_is_right_only_to_the_letter(prepared, trained, monkeypatch):
    from modeling import generate

    said = {"<image>\nWhat?": "7", "two plus two": "Four", "<image>\nSpell it.": "seve"}
    monkeypatch.setattr(
        generate, "answer", lambda _model, _tokenizer, asked, **_: [said[q.conversation[0]["value"]] for q in asked]
    )
    rows = answer_part(Part(str(trained), str(prepared), [0, 3, 4], 8, 4, "", 2))
    assert [(row["answer"], row["right"]) for row in rows] == [("7", True), ("Four", False), ("seve", False)]


@pytest.fixture(scope="module")
def videos(micro, tmp_path_factory):
    return prepared_videos(tmp_path_factory.mktemp("videos") / "data", micro)


def test_of_a_video_only_tiles_are_held(videos, trained, monkeypatch):
    """Frames in full would be 1.1 GB a question at 4K; the answers are those to the middle frames all the same."""
    from modeling import generate

    asked, original = [], generate.answer
    monkeypatch.setattr(generate, "answer", lambda *args, **kwargs: asked.extend(args[2]) or original(*args, **kwargs))
    rows = answer_part(Part(str(trained), str(videos), [0, 1, 2, 3], 2, 4, "", 2))
    assert [len(question.images) for question in asked] == [MOST] * 4 and all(question.video for question in asked)
    assert {image.size for question in asked for image in question.images} == {(32, 32)}
    model, tokenizer = load_model(trained)
    reader = ShardReader(videos)
    for i, row in enumerate(rows):
        conversation, frames = reader.sample(i)
        assert {frame.size for frame in frames} == {(40, 40)}
        question = generate.Question(conversation[:-1], frames, video=True)
        assert row["answer"] == original(model, tokenizer, [question], system="", max_new_tokens=4)[0]


@given(tiles=st.lists(st.integers(0, 40), max_size=60), most=st.integers(1, 9), most_tiles=st.integers(1, 64))
def test_a_batch_has_so_many_questions_and_so_many_tiles(tiles, most, most_tiles):
    rows = list(range(len(tiles)))[::-1]
    cut = list(batches(rows, tiles, most, most_tiles))
    assert [row for batch in cut for row in batch] == rows
    for batch, following in zip(cut, [*cut[1:], None]):
        assert 0 < len(batch) <= most and (len(batch) == 1 or sum(tiles[row] for row in batch) <= most_tiles)
        if following and len(batch) < most:
            assert sum(tiles[row] for row in [*batch, following[0]]) > most_tiles


def run(folder, prepared, trained, **fields):
    data = Input("test_data", "prepare", "1" * 64, prepared, PrepareParams(data="d").model_dump(mode="json"))
    model = Input("full", "train", "2" * 64, trained)
    io = FakeIO(
        folder, EvaluateParams(max_new_tokens=3, **fields), sources={"d": DataParams(meta="m.json", system="")},
        inputs={"test_data": data, "full": model},
    )  # fmt: skip
    evaluate(io)
    lines = (io.result / "predictions.jsonl").read_text().splitlines()
    return io, [json.loads(line) for line in lines]


def test_the_stage_asks_every_question_and_stores_every_answer(tmp_path, prepared, trained):
    io, predictions = run(tmp_path / "a", prepared, trained)
    scores = json.loads((io.result / "scores.json").read_text())
    assert sorted(row["id"] for row in predictions) == [f"s{i}" for i in range(5)]
    assert scores == score(predictions) and {task: s["n"] for task, s in scores.items()} == {
        "one": 3, "text": 1, "two": 1,
    }  # fmt: skip
    assert io.summary == {"stage": "full", "data": "test_data", "scores": scores}
    assert io.ticks[-1][:2] == (5, 5)
    many, same = run(tmp_path / "b", prepared, trained, resources={"workers": 3, "cpus": 2})
    assert sorted(same, key=str) == sorted(predictions, key=str) and many.summary == io.summary


def test_a_limit_counts_per_task(tmp_path, prepared, trained):
    _, predictions = run(tmp_path / "a", prepared, trained, limit=1)
    assert sorted(row["id"] for row in predictions) == ["s0", "s2", "s3"]
