"""The quickstart's data: splits made before pictures, idempotent, a pure function of the seed."""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeling.meta import read_meta
from modeling.sources import Sample, read_samples
from modeling.tiles import count_tiles

SCRIPT = Path(__file__).parents[2] / "experiments" / "digits.py"


@pytest.fixture(scope="module")
def digits():
    spec = importlib.util.spec_from_file_location("digits", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["digits"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["digits"]


@pytest.fixture(scope="module")
def made(digits, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    assert digits.make(folder, seed=0, share=0.01)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_splits_are_disjoint_stratified_and_complete(digits):
    from sklearn.datasets import load_digits

    splits = digits.split_digits(0)
    sizes = {split: {digit: len(pool) for digit, pool in pools.items()} for split, pools in splits.items()}
    assert {split: sum(by_digit.values()) for split, by_digit in sizes.items()} == {
        "train": 1200, "validation": 200, "heldout": 397,
    }  # fmt: skip
    for by_digit in sizes.values():
        assert max(by_digit.values()) - min(by_digit.values()) <= 0.1 * max(by_digit.values()) + 1
    every = np.concatenate([pool for pools in splits.values() for pool in pools.values()]).reshape(1797, 64)
    source = (np.asarray(load_digits(return_X_y=True)[0]) * (255 / 16)).round().astype(np.uint8)
    assert sorted(map(bytes, every)) == sorted(map(bytes, source)), "every source picture in exactly one split"


def test_every_mixture_reads_with_unique_ids(made):
    ids = set()
    for mixture in ("text", "captions", "instructions", "validation", "heldout"):
        for dataset in read_meta(made / f"{mixture}.json"):
            samples = list(read_samples(dataset))
            assert len(samples) == dataset.length
            for sample in samples:
                assert isinstance(sample, Sample)
                assert sample.id not in ids and sample.id.startswith(sample.task)
                ids.add(sample.id)
                for path in (media.path for media in sample.images):
                    with Image.open(path) as image:
                        assert image.size == ((128, 32) if sample.task == "row" else (32, 32))


def test_counts_of_the_full_set(digits):
    counts = {name: {part.task: part.count for part in parts} for name, parts in digits.mixtures(0).items()}
    assert counts["heldout"] == {"digit": 397, "row": 400, "larger": 400}
    assert counts["validation"] == {"digit": 200, "row": 300, "larger": 300}
    assert counts["instructions"] == {"digit": 8000, "row": 6000, "larger": 5000}


def test_heldout_shows_each_picture_once_in_mixed_order(digits):
    pools = digits.split_digits(0)["heldout"]
    source = digits.Pictures(pools, vary=False)
    rng = np.random.default_rng(0)
    answers = [(example := source.digit(i, rng)).answer + example.pictures[0].tobytes().hex() for i in range(397)]
    assert len(set(answers)) == 397
    assert len({answer[0] for answer in answers[:60]}) == 10


def test_training_pictures_vary_and_others_do_not(digits):
    picture = digits.split_digits(0)["train"][7][0]
    rng = np.random.default_rng(0)
    assert digits.draw(picture, None).tobytes() == digits.draw(picture, None).tobytes()
    assert len({digits.draw(picture, rng).tobytes() for _ in range(20)}) == 20


def test_answers_follow_from_questions(digits):
    rng = np.random.default_rng(0)
    for i in range(200):
        for make in (digits.text_digit, digits.text_row, digits.text_larger):
            example = make(i, rng)
            typed = example.question.replace("Image-1", "").replace("Image-2", "")
            found = [c for k, c in enumerate(typed) if c.isdigit() and typed[k - 1] != c]
            if make is digits.text_larger:
                assert example.answer == max(c for c in typed if c.isdigit())
            else:
                assert set(example.answer) == set(found)
        example = digits.text_words(i, rng)
        if example.question.startswith("Count"):
            assert example.answer[0] == example.question.split()[2]
            assert example.answer[-1] == example.question.rstrip(".").split()[-1]


def test_a_row_is_cut_into_one_tile_per_digit(digits):
    assert count_tiles(4 * digits.TILE, digits.TILE, 6, tile_size=digits.TILE) == 5


def test_the_data_of_version_1_stay_what_they_are(digits, made):
    """Hash of all annotations, in order of their names, as version 1 was first published: texts and draws."""
    texts = b"".join(path.read_bytes() for path in sorted((made / "annotations").iterdir()))
    assert digits.VERSION == 1
    assert hashlib.sha256(texts).hexdigest() == "7823a31c9da558c879f53cd8d6a5af42da9187ced8cc32c8d34e805a949353c9"


def test_idempotent_and_seeded(digits, made, tmp_path, capsys):
    before = contents(made)
    assert digits.main(["--output", str(made), "--seed", "0", "--share", "0.01"]) == 0
    assert "already there" in capsys.readouterr().out
    digits.make(tmp_path / "again", seed=0, share=0.01)
    assert contents(tmp_path / "again") == before
    digits.make(tmp_path / "again", seed=1, share=0.01)
    other = contents(tmp_path / "again")
    assert json.loads(other["digits.json"])["seed"] == 1
    assert other["annotations/heldout_row.jsonl"] != before["annotations/heldout_row.jsonl"]


def test_an_interrupted_run_starts_again(digits, made, tmp_path):
    digits.make(tmp_path, seed=0, share=0.01)
    (tmp_path / "digits.json").unlink()
    (tmp_path / "text.json").write_text("{")
    assert digits.make(tmp_path, seed=0, share=0.01)
    assert contents(tmp_path) == contents(made)
