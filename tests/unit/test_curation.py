"""The steps of curation inside the stage: each verdict with its reason, what is exempt, what a person has said."""

import io as bytes_io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from corpus import digit_pictures
from fake_io import FakeIO
from PIL import Image
from test_formats import LIMITS, MODEL, bytes_tokenizer  # noqa: F401
from test_scorers import Service, quick  # noqa: F401

from modeling.errors import DataError
from modeling.shards import ShardReader
from stages.params import DataParams, PrepareParams
from stages.prepare.run import prepare


def scene(numbers, side: int = 96) -> Image.Image:
    """Nine digits on a grid: a picture with something to see."""
    pictures, _ = digit_pictures()
    grid = np.concatenate([np.concatenate([pictures[n] for n in numbers[i : i + 3]], 1) for i in (0, 3, 6)])
    return Image.fromarray(grid).resize((side, side)).convert("RGB")


def saved(image: Image.Image, kind: str, **options) -> bytes:
    out = bytes_io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


class Mixtures:
    """Meta files in one folder, and a prepare stage over one of them. line: (id, question, answer, picture or None)."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.sources: dict[str, DataParams] = {}
        (folder / "media").mkdir()

    def add(self, name: str, **sets: list[tuple[str, str, str, bytes | None]]) -> None:
        meta = {}
        for title, lines in sets.items():
            with open(self.folder / f"{name}-{title}.jsonl", "w") as file:
                for id, question, answer, picture in lines:
                    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
                    record = {"id": id, "conversations": turns}
                    if picture is not None:
                        (self.folder / "media" / f"{name}-{id}").write_bytes(picture)
                        record["image"] = f"{name}-{id}"
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
            meta[title] = {"root": "media", "annotation": f"{name}-{title}.jsonl"}
        (self.folder / f"{name}.json").write_text(json.dumps(meta))
        self.sources[name] = DataParams(meta=str(self.folder / f"{name}.json"), system="")

    def prepare(self, out: str, data: str = "train", curate: dict | None = None, **params) -> FakeIO:
        params = PrepareParams.model_validate({"data": data, "curate": curate or {}, **LIMITS, **params})
        io = FakeIO(self.folder / out, params, model=MODEL, sources=self.sources, shared=self.folder / "shared")
        prepare(io)
        return io


@pytest.fixture
def mixtures(tmp_path) -> Mixtures:
    return Mixtures(tmp_path)


def verdicts(io: FakeIO) -> dict[str, dict]:
    return {row["id"]: row for row in pq.read_table(io.kept / "verdicts.parquet").to_pylist()}


def reasons(io: FakeIO) -> dict[str, str]:
    """By id; and what is in the result agrees with it."""
    found = {id: row["reason"] for id, row in verdicts(io).items()}
    assert sorted(ShardReader(io.result).index["id"]) == sorted(id for id, reason in found.items() if not reason)
    assert io.summary is not None and io.summary["samples"] == len(found)
    assert io.summary["kept"] + sum(io.summary["reasons"].values()) == len(found)
    return found


LONG = (
    "The picture shows nine handwritten digits on a grid of three rows, each drawn with a thick pen, in grey on black. "
)
ASK = "<image>\nDescribe the picture in detail."


def test_copies_are_found_over_all_sets_and_the_first_is_kept(mixtures):
    one, other = scene(range(9)), scene(range(20, 29))
    png = saved(one, "PNG")
    mixtures.add(
        "train",
        a=[
            ("first", ASK, LONG, png),
            ("same words, other picture", ASK, LONG, saved(other, "PNG")),
            ("same picture, other words", "<image>\nHow many digits?", "Nine of them, I think.", png),
            ("text", "Hi, who are you today?", LONG + "It was made by hand.", None),
        ],
        b=[
            ("exact", ASK, LONG, png),
            ("scaled", ASK, LONG.upper(), saved(one.resize((200, 200)), "JPEG", quality=80)),
            ("text again", "hi, who are you today", LONG + " It was made by hand!", None),
        ],
    )
    assert set(reasons(mixtures.prepare("without")).values()) == {""}
    io = mixtures.prepare("out", curate={"duplicates": {}})
    found = reasons(io)
    assert {id: reason for id, reason in found.items() if reason} == {
        "exact": "duplicate", "scaled": "near_duplicate", "text again": "near_duplicate",
    }  # fmt: skip
    rows = verdicts(io)
    assert rows["exact"]["detail"] == "the same as first (train-a.jsonl:1)" and rows["exact"]["step"] == "duplicates"
    assert rows["text again"]["detail"] == "nearly text (train-a.jsonl:4)"
    exempt = mixtures.prepare("exempt", curate={"duplicates": {}, "exempt": {"duplicates": ["b"]}})
    assert set(reasons(exempt).values()) == {""}


def test_samples_of_an_evaluation_set_are_found(mixtures):
    one, other = scene(range(9)), scene(range(20, 29))
    mixtures.add(
        "eval", test=[("q1", ASK, "secret", saved(one, "PNG")), ("q2", "What is the capital of Ruritania?", "Z", None)]
    )
    mixtures.add(
        "train",
        a=[
            ("leaked", ASK, LONG, saved(one.resize((150, 150)), "JPEG", quality=90)),
            ("same question", ASK, LONG, saved(other, "PNG")),
            ("same picture", "<image>\nWhich digit is on the top left?", "Zero.", saved(one, "PNG")),
            ("text", "what is the capital of ruritania", "Strelsau.", None),
        ],
    )
    io = mixtures.prepare("out", curate={"contamination": {"against": ["eval"]}})
    assert reasons(io) == {"leaked": "contaminated", "same question": "", "same picture": "", "text": "contaminated"}
    assert verdicts(io)["leaked"]["detail"] == "in eval: q1 (eval-test.jsonl:1)"
    io = mixtures.prepare("image", curate={"contamination": {"against": ["eval"], "match": "image"}})
    assert {id for id, reason in reasons(io).items() if reason} == {"leaked", "same picture", "text"}


LOOP = "I see a cat and a dog. " * 40


def test_a_person_has_the_last_word(mixtures):
    mixtures.add(
        "train",
        a=[
            ("good", "Tell me something.", LONG, None),
            ("loop", "Tell me more.", LOOP, None),
            ("song", "Sing!", "La la la, we sing. " * 30, None),
            ("tiny", "<image>\nWhat?", "A dot.", saved(scene(range(9), 9), "PNG")),
        ],
    )
    curate = {"text": {}, "images": {"min_side": 16}}
    io = mixtures.prepare("out", curate=curate)
    assert reasons(io) == {"good": "", "loop": "repetition", "song": "repetition", "tiny": "odd_shape"}
    page = (io.kept / "review.html").read_text()
    assert all(id in page for id in ("loop", "song", "tiny")) and "data:image/jpeg;base64" in page
    digests = {id: row["digest"] for id, row in verdicts(io).items()}
    decided = {digests["song"]: "keep", digests["good"]: "drop"}
    (mixtures.folder / "decided.json").write_text(json.dumps({"version": 1, "mixture": "train", "verdicts": decided}))
    curate["review"] = str(mixtures.folder / "decided.json")
    io = mixtures.prepare("again", curate=curate)
    assert reasons(io) == {"good": "review", "loop": "repetition", "song": "", "tiny": "odd_shape"}
    exempt = {"text": ["a"], "images": ["a"]}
    assert set(reasons(mixtures.prepare("exempt", curate={**curate, "review": None, "exempt": exempt})).values()) == {
        ""
    }


def test_curation_that_leaves_nothing_says_where_to_look(mixtures):
    mixtures.add("train", a=[("loop", "Tell me more.", LOOP, None)])
    with pytest.raises(DataError, match=r"no sample is left: 1 rejected \(repetition 1\) → look at review\.html"):
        mixtures.prepare("out", curate={"text": {}})
    assert "loop" in (mixtures.folder / "out" / "kept" / "review.html").read_text()


def test_scores_reject_and_are_never_asked_twice(mixtures):
    picture = saved(scene(range(9)), "PNG")
    mixtures.add(
        "train",
        a=[
            ("good", "Say it.", "grade=9. It is well said.", None),
            ("fair", "Say it.", "grade=6. It is said.", None),
            ("poor", "<image>\nSay it.", "grade=2. Badly said, badly said.", picture),
        ],
        exempted=[("not asked", "Say it.", "grade=0.", None)],
    )
    service = Service()
    try:
        endpoint = {"base_url": service.url, "model": "judge"}
        scores = {"endpoint": endpoint, "classify": False}
        curate = {"scores": scores, "exempt": {"scores": ["exempted"]}}
        io = mixtures.prepare("out", curate=curate)
        assert reasons(io) == {"good": "", "fair": "low_quality", "poor": "repetitive", "not asked": ""}
        rows = verdicts(io)
        assert (rows["good"]["quality"], rows["good"]["repetition"], rows["good"]["domain"]) == (9, 9, "general")
        assert (rows["poor"]["quality"], rows["poor"]["repetition"]) == (None, 2)
        assert (rows["not asked"]["quality"], rows["not asked"]["domain"]) == (None, "")
        asked = service.asked.total()
        assert asked == 5
        io = mixtures.prepare("lower", curate={**curate, "scores": {**scores, "quality": 5, "repetition": 1}})
        assert reasons(io) == {"good": "", "fair": "", "poor": "", "not asked": ""}
        mixtures.add(
            "train",
            a=[("more", "Say it.", "grade=8. New.", None), ("good", "Say it.", "grade=9. It is well said.", None)],
        )
        io = mixtures.prepare("more", curate={"scores": scores})
        assert reasons(io) == {"more": "", "good": ""}
        assert service.asked.total() == asked + 2, "only the new sample"
    finally:
        service.close()


def test_a_scorer_that_talks_nonsense_stops_the_stage(mixtures):
    mixtures.add("train", a=[(f"s{i}", "Say it.", f"No grade here, number {i}.", None) for i in range(5)])
    service = Service()
    try:
        scores = {"endpoint": {"base_url": service.url, "model": "judge"}, "classify": False}
        with pytest.raises(DataError, match=r"5 of 5 samples have no score that can be read.*give another scorer"):
            mixtures.prepare("out", curate={"scores": scores})
        io = mixtures.prepare("kept", curate={"scores": {**scores, "not_scored": "keep"}})
        assert set(reasons(io).values()) == {""}
    finally:
        service.close()


def test_an_evaluation_set_that_cannot_be_read_is_no_clean_bill(mixtures):
    mixtures.add("train", a=[("leaked", ASK, LONG, saved(scene(range(9)), "PNG"))])
    mixtures.add("eval", test=[("q", ASK, "x", b"no picture")])
    with pytest.raises(
        DataError, match=r"1 of 1 records of the evaluation set eval cannot be read: .*unreadable_image"
    ):
        mixtures.prepare("out", curate={"contamination": {"against": ["eval"]}})


def test_an_evaluation_set_needs_no_answers_and_may_be_long(mixtures):
    mixtures.add(
        "train", a=[("leaked", ASK, LONG, saved(scene(range(9)), "PNG")), ("clean", "Hi there!", "Hello.", None)]
    )
    picture = mixtures.folder / "media" / "question.png"
    picture.write_bytes(saved(scene(range(9), 200), "PNG"))
    record = {"id": "q", "image": picture.name, "conversations": [{"from": "human", "value": ASK}]}
    text = {"id": "t", "conversations": [{"from": "human", "value": "word " * 3000}]}
    (mixtures.folder / "q.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(text))
    (mixtures.folder / "q.json").write_text(json.dumps({"questions": {"root": "media", "annotation": "q.jsonl"}}))
    mixtures.sources["q"] = DataParams(meta=str(mixtures.folder / "q.json"), system="")
    io = mixtures.prepare("out", curate={"contamination": {"against": ["q"]}})
    assert reasons(io) == {"leaked": "contaminated", "clean": ""}


def test_a_picture_that_does_not_decode_is_damage_though_only_headers_are_verified(mixtures):
    cut = saved(scene(range(9)), "JPEG")
    lines = [("cut", ASK, LONG, cut[: len(cut) // 2]), ("whole", ASK, LONG, cut)]
    mixtures.add("train", a=lines)
    io = mixtures.prepare("out", curate={"duplicates": {}}, verify="header", max_rejected=1)
    assert reasons(io) == {"cut": "unreadable_image", "whole": ""}


def test_clips_of_one_video_are_no_copies(mixtures):
    from corpus import mp4

    pictures, _ = digit_pictures()
    (mixtures.folder / "media" / "v.mp4").write_bytes(mp4(pictures[:40]))
    turns = [{"from": "human", "value": "<video>\nIs a seven shown?"}, {"from": "gpt", "value": "Yes."}]
    clips = {"first": [0, 1], "second": [2, 3], "again": [0, 1]}
    lines = [{"id": id, "video": "v.mp4", "clip": clip, "conversations": turns} for id, clip in clips.items()]
    (mixtures.folder / "v.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (mixtures.folder / "v.json").write_text(json.dumps({"clips": {"root": "media", "annotation": "v.jsonl"}}))
    mixtures.sources["v"] = DataParams(meta=str(mixtures.folder / "v.json"), system="")
    io = mixtures.prepare("out", data="v", curate={"duplicates": {}})
    assert reasons(io) == {"first": "", "second": "", "again": "duplicate"}
    shares = io.summary["shares"] if io.summary else {}
    mean = np.mean([np.mean(row["frame_tokens"]) for row in (ShardReader(io.result).row(i) for i in range(2))])
    assert shares["tokens_per_epoch"] == pytest.approx(2 * mean, abs=2), "what an epoch trains, not the most it could"


def test_an_evaluation_picture_that_was_missing_is_looked_at_again(mixtures):
    mixtures.add("train", a=[("leaked", ASK, LONG, saved(scene(range(9)), "PNG"))])
    mixtures.add("eval", test=[("q", ASK, "x", saved(scene(range(9)), "PNG"))])
    picture = mixtures.folder / "media" / "eval-q"
    picture.rename(away := picture.with_name("away"))
    with pytest.raises(DataError, match="missing_image"):
        mixtures.prepare("out", curate={"contamination": {"against": ["eval"]}}, max_rejected=0.5)
    away.rename(picture)
    mixtures.add("train", a=[("leaked", ASK, LONG, saved(scene(range(9)), "PNG")), ("clean", "Hi!", "Hello.", None)])
    assert reasons(mixtures.prepare("fresh", curate={"contamination": {"against": ["eval"]}}))["leaked"]
    manifests = list((mixtures.folder / "out" / "parts" / "against" / "eval").glob("*.json"))
    assert not manifests, "the part with the missing picture is made again"
