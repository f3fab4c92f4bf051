"""The stage: every question in every form, pools that are made once, figures that are a function of them."""

import json

import pytest
from fake_io import FakeIO, Stopped
from hypothesis import given
from hypothesis import strategies as st
from videos import MOST, prepared_videos

from modeling import sampling
from modeling.errors import DataError
from modeling.generate import Question, answer
from modeling.internvl import load_model, save_model
from modeling.sampling import Generation
from modeling.shards import ShardReader
from stages.evaluate import generations
from stages.evaluate.ensemble import Rule
from stages.evaluate.generations import batches
from stages.evaluate.items import Item
from stages.evaluate.run import evaluate
from stages.evaluate.statistics import wilson
from stages.evaluation import EvalSet
from stages.io import Input
from stages.params import DataParams, EvaluateParams, ModelParams, PrepareParams


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


@pytest.fixture(scope="module")
def trained(micro, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "model"
    save_model(micro.build(seed=1), micro.tokenizer, folder, 32)
    return folder


@pytest.fixture(scope="module")
def videos(micro, tmp_path_factory):
    return prepared_videos(tmp_path_factory.mktemp("videos") / "data", micro)


def staged(folder, data, *models, known=None, stop_at=None, workers=1, shared=None, **fields):
    """A FakeIO of an evaluation of `models` (folders) on prepared data (None: on sets alone)."""
    inputs = {}
    if data is not None:
        params = PrepareParams(data="d").model_dump(mode="json")
        inputs["test_data"] = Input("test_data", "prepare", "1" * 64, data, params)
    for i, model in enumerate(models):
        inputs[f"model{i}"] = Input(f"model{i}", "train", f"{i + 2}" * 64, model)
    return FakeIO(
        folder, EvaluateParams(max_new_tokens=3, **fields), sources={"d": DataParams(meta="m.json", system="")},
        inputs=inputs, sets=known, stop_at=stop_at, workers=workers, shared=shared,
    )  # fmt: skip


def run(*args, **fields):
    io = staged(*args, **fields)
    evaluate(io)
    return io, {name: read(io, name) for name in ("evaluation.json", "predictions.jsonl", "samples.jsonl")}


def read(io, name):
    text = (io.result / name).read_text()
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]


SAMPLED = {
    "prompts": {"direct": {}, "cot": {"suffix": "Think.", "max_new_tokens": 4}},
    "sampling": {"samples": 4, "temperature": 2.0},
}


def test_the_stage_asks_every_question_and_stores_every_answer(tmp_path, prepared, trained):
    io, found = run(tmp_path / "a", prepared, trained)
    rows = found["predictions.jsonl"]
    assert sorted(row["id"] for row in rows) == [f"s{i}" for i in range(5)]
    table = found["evaluation.json"]["tables"]["direct"]
    assert {task: row["n"] for task, row in table.items()} == {"one": 3, "text": 1, "two": 1}
    for task, row in table.items():
        assert row["right"] == sum(one["right"] for one in rows if one["task"] == task)
    assert io.summary["stage"] == "model0" and io.summary["data"] == "test_data"
    assert io.summary["scores"] == read(io, "scores.json") and io.ticks[-1][0] == io.ticks[-1][1] == 10
    many, same = run(tmp_path / "b", prepared, trained, resources={"workers": 3, "cpus": 2})
    assert same == found and many.summary == io.summary


def test_greedy_answers_are_those_of_generate(tmp_path, prepared, trained):
    _, found = run(tmp_path, prepared, trained, batch=2)
    (model, tokenizer), reader = load_model(trained), ShardReader(prepared)
    for i, row in enumerate(sorted(found["predictions.jsonl"], key=lambda row: row["id"])):
        turns, images = reader.sample(i)
        assert turns[-1]["value"] == row["reference"]
        asked = Question(turns[:-1], images, 6)
        assert [row["response"]] == answer(model, tokenizer, [asked], system="", max_new_tokens=3)


def test_a_limit_counts_per_task(tmp_path, prepared, trained):
    _, found = run(tmp_path, prepared, trained, limit=1)
    assert sorted(row["id"] for row in found["predictions.jsonl"]) == ["s0", "s2", "s3"]


def test_of_a_video_only_tiles_are_held(tmp_path, videos, trained, monkeypatch):
    """Frames in full would be 1.1 GB a question at 4K."""
    asked, original = [], sampling.sample
    monkeypatch.setattr(sampling, "sample", lambda *a, **k: asked.extend(a[2]) or original(*a, **k))
    run(tmp_path, videos, trained, loss=False)
    asked = [question for question in asked if question.images]
    assert [len(question.images) for question in asked] == [MOST] * 4 and all(question.video for question in asked)
    assert {image.size for question in asked for image in question.images} == {(32, 32)}


def test_a_pool_is_made_once_whatever_is_counted_on_it(tmp_path, prepared, trained, monkeypatch):
    """Another threshold, another re-ranker, an evaluation that was stopped: no answer is generated again."""
    io, found = run(tmp_path / "a", prepared, trained, **SAMPLED)
    assert len(found["samples.jsonl"]) == 20 and {row["prompt"] for row in found["samples.jsonl"]} == {"cot"}
    assert list(found["evaluation.json"]["tables"]) == ["direct", "cot"]

    def refuse(*args, **kwargs):
        raise AssertionError("generated again")

    monkeypatch.setattr(sampling, "sample", refuse)
    other, same = run(
        tmp_path / "b", prepared, trained, shared=io.shared, **SAMPLED, ensemble={"threshold": 0.9},
        rerank={"judge": {"kind": "verifier"}},
    )  # fmt: skip
    strip = [{key: row[key] for key in row if key != "scores"} for row in same["samples.jsonl"]]
    assert strip == [{key: row[key] for key in row if key != "scores"} for row in found["samples.jsonl"]]
    assert all(0 <= row["scores"]["judge"] <= 1 for row in same["samples.jsonl"])
    methods = {curve["method"] for curve in same["evaluation.json"]["curves"]["one"]}
    assert {"pass", "majority", "best of, judge", "weighted, judge", "best of, likelihood", "dynamic"} <= methods
    assert other.ticks[-1][2]["known"] == 5 + 5 + 20 + 5


def test_killed_half_way_it_goes_on_with_what_is_there(tmp_path, prepared, trained, monkeypatch):
    monkeypatch.setattr(generations, "ROWS", 4)  # a part for each question of the pool
    whole, wanted = run(tmp_path / "whole", prepared, trained, **SAMPLED)
    io = staged(tmp_path / "a", prepared, trained, stop_at=13, **SAMPLED)
    with pytest.raises(Stopped):
        evaluate(io)
    made = [path.name for path in (tmp_path / "a").rglob("*.jsonl")]
    asked, original = [], sampling.sample
    monkeypatch.setattr(sampling, "sample", lambda *a, **k: asked.extend(a[3]) or original(*a, **k))
    again, found = run(tmp_path / "a", prepared, trained, **SAMPLED)
    assert found == wanted and again.summary == whole.summary
    assert 0 < len(asked) < 15 and again.ticks[0][2]["known"] >= 13 and len(made) >= 4


def test_what_an_answer_depends_on_makes_another_pool(tmp_path, prepared, trained):
    io, _ = run(tmp_path / "a", prepared, trained, limit=1, loss=False, **SAMPLED)
    kept = len(list(io.shared.rglob("*.jsonl")))
    for i, change in enumerate(({"temperature": 1.0}, {"seed": 1}, {"top_p": 0.5}, {"samples": 3})):
        fields = {**SAMPLED, "sampling": {**SAMPLED["sampling"], **change}}
        run(tmp_path / f"b{i}", prepared, trained, shared=io.shared, limit=1, loss=False, **fields)
        now = len(list(io.shared.rglob("*.jsonl")))
        assert now > kept, change
        kept = now


def test_any_text_survives_being_kept():
    """U+2028, U+2029 and U+0085 are ends of lines to str.splitlines, and no JSON escapes them."""
    rows = [[{"text": "a\u2028b\u2029c\x85d\ud800\x0b"}], [{"text": "\n"}]]
    assert generations.decode(generations.encode(rows)) == rows


def test_a_prepared_choice_is_read_by_its_options():
    """As InternVL's own data write it: options are lines of the question, the answer a letter with or without text."""
    from stages.evaluate.questions import options_of

    assert options_of("<image>\nWhich?\nA. one\nB. two") == {"A": "one", "B": "two"}
    assert options_of("Which?\n(A) one\n(B) two\n(C) it is C. or D.") == {"A": "one", "B": "two", "C": "it is C. or D."}
    assert options_of("Which?\nB. one\nC. two") == {} == options_of("What does A. stand for?")


def test_more_samples_than_a_batch_are_drawn_in_turns(tmp_path, prepared, trained, monkeypatch):
    _, wanted = run(tmp_path / "a", prepared, trained, **SAMPLED)
    drawn, original = [], sampling.sample
    monkeypatch.setattr(sampling, "sample", lambda *a, **k: drawn.append(len(k["samples"])) or original(*a, **k))
    _, found = run(tmp_path / "b", prepared, trained, batch=3, **SAMPLED)
    texts = [[(row["id"], row["sample"], row["response"]) for row in its["samples.jsonl"]] for its in (wanted, found)]
    assert max(drawn) == 3 and texts[0] == texts[1]


def test_a_task_that_nobody_asks_is_a_slip_of_the_pen(tmp_path, prepared, trained):
    with pytest.raises(DataError, match="no prepared question is of the task 'onee'"):
        run(tmp_path, prepared, trained, answers={"onee": {"kind": "number"}})


def test_a_set_that_was_edited_after_planning_is_refused(tmp_path, trained):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"id": "a", "question": "two plus two?", "answer": "4"}) + "\n")
    io = staged(tmp_path / "a", None, trained, known={"own": EvalSet(format="jsonl", path=str(path))}, sets=("own",))
    io.digests = {"own": {"files": "another"}}
    with pytest.raises(DataError, match="edited after"):
        evaluate(io)


def test_a_free_score_may_have_a_name_of_its_own(tmp_path, prepared, trained):
    _, found = run(tmp_path, prepared, trained, **SAMPLED, rerank={"sure": {"kind": "certainty"}})
    assert all(row["scores"]["sure"] == row["scores"]["certainty"] for row in found["samples.jsonl"])


def test_a_live_vote_draws_what_the_full_pool_would_have_shown_to_suffice(tmp_path, prepared, trained):
    """Its samples are the first ones of the pool; it goes on exactly as long as the rule is not content."""
    _, pool = run(tmp_path / "a", prepared, trained, **SAMPLED)
    _, live = run(tmp_path / "b", prepared, trained, **SAMPLED, ensemble={"live": True, "threshold": 0.7})
    rule, whole = Rule(4, 0.7, "stays"), {(row["id"], row["sample"]): row for row in pool["samples.jsonl"]}
    drawn: dict[str, list] = {}
    for row in live["samples.jsonl"]:
        assert row["response"] == whole[row["id"], row["sample"]]["response"]
        drawn.setdefault(row["id"], []).append(row["answer"])
    assert all(rule.done(answers) and not rule.done(answers[:-1]) for answers in drawn.values() if len(answers) > 1)
    table = live["evaluation.json"]["tables"]["cot, vote of up to 4"]
    assert table["one"]["samples"] == pytest.approx(sum(len(drawn[f"s{i}"]) for i in (0, 1, 4)) / 3)
    assert not live["evaluation.json"]["curves"]


def test_questions_whose_vote_is_settled_are_not_drawn_again():
    """By hand: of at most 4, the first two agree and three of four is then sure enough at .8, P = 1 - .1."""
    said = {0: ["7", "7", "7", "7"], 1: ["1", "2", "2", "2"]}
    asked = []

    def draw(places, numbers):
        asked.append((list(places), list(numbers)))
        return [[Generation(said[i][j], 1, 0.0, 0.0, False) for j in numbers] for i in places]

    items = [Item(str(i), "t", "?", "number", "exact", ("7",)) for i in range(2)]
    found = generations.until_settled(items, draw, Rule(4, 0.8, "stays"))
    assert [[one.text for one in row] for row in found] == [["7", "7"], ["1", "2", "2", "2"]]
    assert asked == [([0, 1], [0, 1]), ([1], [2, 3])]


def test_two_checkpoints_are_counted_alone_and_together(tmp_path, prepared, trained, micro):
    folder = tmp_path / "other"
    save_model(micro.build(seed=2), micro.tokenizer, folder, 32)
    _, found = run(tmp_path / "a", prepared, trained, folder, **SAMPLED)
    told = found["evaluation.json"]
    assert set(told["tables"]) == {f"{form} · model{i}" for form in ("direct", "cot") for i in (0, 1)}
    sizes = {(curve["checkpoint"], max(curve["samples"])) for curve in told["curves"]["one"]
             if curve["method"] == "majority"}  # fmt: skip
    assert sizes == {("model0", 4), ("model1", 4), ("model0 + model1", 8)}


def test_another_checkpoint_scores_the_samples(tmp_path, prepared, trained, micro):
    folder = tmp_path / "scorer"
    save_model(micro.build(seed=3), micro.tokenizer, folder, 32)
    io = staged(tmp_path / "a", prepared, trained, folder, **SAMPLED, limit=1, rerank={
        "other": {"kind": "outcome", "model": "model1"}, "own": {"kind": "outcome"},
    })  # fmt: skip
    evaluate(io)
    rows = read(io, "samples.jsonl")
    assert {row["checkpoint"] for row in rows} == {"model0"}
    assert any(row["scores"]["other"] != row["scores"]["own"] for row in rows)


def test_the_loss_is_that_of_the_references(tmp_path, prepared, trained):
    from modeling.judging import answer_loss

    _, found = run(tmp_path, prepared, trained)
    told = found["evaluation.json"]
    (model, tokenizer), reader = load_model(trained), ShardReader(prepared)
    sums = []
    for i in range(5):
        turns, images = reader.sample(i)
        sums += answer_loss(model, tokenizer, [Question(turns[:-1], images, 6)], [turns[-1]["value"]], system="")
    nats, tokens = sum(nats for nats, _ in sums), sum(n for _, n in sums)
    assert told["loss"]["all"] == {"nats": pytest.approx(nats / tokens, rel=1e-4), "tokens": tokens}
    assert told["parameters"]["vision"] == sum(p.numel() for p in model.model.vision_tower.parameters())
    assert sum(told["parameters"].values()) == sum(p.numel() for p in model.parameters())


def test_a_set_is_asked_of_a_model_folder_without_any_training(tmp_path, trained):
    path = tmp_path / "own.jsonl"
    rows = [
        {"id": "a", "question": "two plus two?", "answer": "4", "kind": "number", "task": "sums"},
        {"id": "b", "question": "Is it so?", "answer": "yes", "kind": "yes_no", "task": "polls"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = {"own": EvalSet(format="jsonl", path=str(path))}
    io = staged(tmp_path / "a", None, known=known, sets=("own",), **SAMPLED)
    io.model = ModelParams(folder=str(trained))
    evaluate(io)
    told = read(io, "evaluation.json")
    tasks = [task for task in told["tables"]["direct"]]
    assert len(tasks) == 2 and told["loss"] == {} and told["maximum"][tasks[0]]["label"].startswith("maximum over")
    assert told["stage"] == trained.name


@given(tiles=st.lists(st.integers(0, 40), max_size=60), most=st.integers(1, 9), most_tiles=st.integers(1, 64))
def test_a_batch_has_so_many_questions_and_so_many_tiles(tiles, most, most_tiles):
    cut = list(batches(tiles, most, most_tiles))
    assert [place for batch in cut for place in batch] == list(range(len(tiles)))
    for batch, following in zip(cut, [*cut[1:], None]):
        assert 0 < len(batch) <= most and (len(batch) == 1 or sum(tiles[i] for i in batch) <= most_tiles)
        if following and len(batch) < most:
            assert sum(tiles[i] for i in [*batch, following[0]]) > most_tiles
