"""The reasoning experiment's data: chains that are right, splits kept apart, a pure function of the seed."""

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from modeling.meta import read_meta
from modeling.sources import Sample, read_samples
from modeling.template import encode_conversation
from modeling.tiles import count_tiles
from modeling.tokenizer import build_tokenizer
from stages.evaluate.extract import extract
from stages.evaluate.items import Item
from stages.evaluate.prompts import asked
from stages.evaluation import Prompt

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def sums():
    sys.path.insert(0, str(EXPERIMENTS))
    yield importlib.import_module("sums")
    sys.path.remove(str(EXPERIMENTS))
    for name in ("sums", "digits"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def made(sums, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sums")
    assert sums.make(folder, seed=0, share=0.01)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def samples(folder: Path, mixture: str) -> list[Sample]:
    found = [sample for dataset in read_meta(folder / f"{mixture}.json") for sample in read_samples(dataset)]
    assert all(isinstance(sample, Sample) for sample in found)
    return found  # pyright: ignore[reportReturnType]


def turns(sample: Any) -> tuple[str, str]:
    human, model = sample.conversation
    return human["value"], model["value"]


def test_every_line_of_a_chain_is_true_and_its_box_is_the_sum(sums):
    rng = np.random.default_rng(0)
    for _ in range(200):
        row = sums.drawn(rng)
        for side in (0, 1):
            first, *steps, last = sums.chain(row, side).split("\n")
            assert [int(c) for c in first.split()[-1]] == (row if side == 0 else row[::-1])
            total = int(first.split()[-1][0])
            for line, digit in zip(steps, first.split()[-1][1:], strict=True):
                before, added, after = map(int, re.split(r"[+=]", line))
                assert (before, added, after) == (total, int(digit), total + int(digit))
                total = after
            assert extract("\n".join([first, *steps, last]), "number") == str(sum(row)) == str(total)


def test_answers_follow_from_typed_digits(sums):
    rng = np.random.default_rng(0)
    for i in range(100):
        for make in (sums.text_sum, sums.text_steps):
            example = make(i, rng)
            shown = example.question.split("\n")[0]
            answer = extract(example.answer, "number")
            if not shown.startswith("<img>"):
                assert str(sum(map(int, shown))) == answer
            else:
                tiles = [shown[5:][k : k + 16] for k in range(0, 16 * sums.COUNT, 16)]
                assert sum(int(max(tile.replace(".", ""))) for tile in tiles) == int(answer or -1)
        example = sums.text_add(i, rng)
        one, other = example.question.rstrip("=").split("+")
        assert int(one) + int(other) == int(example.answer)


def test_what_is_read_has_no_words_for_the_form_of_an_answer(made, sums):
    for mixture in ("validation", "heldout"):
        for sample in samples(made, mixture):
            question, answer = turns(sample)
            assert sample.task == "sum" and question == f"<image>\n{sums.ASK}" and answer.isdigit()
    found = {turns(sample)[0] for sample in samples(made, "instructions") if sample.task == "steps"}
    assert found == {f"<image>\n{sums.ASK}{sums.STEPS}"}


def test_the_experiment_asks_as_was_trained(sums):
    stages = yaml.safe_load((EXPERIMENTS / "digits_reasoning.yaml").read_text())["stages"]
    evaluations = [stage for stage in stages.values() if stage.get("kind") == "evaluate"]
    assert len(evaluations) == 4
    item = Item("0", "sum", f"<image>\n{sums.ASK}", "number", "exact", ("23",))
    for stage in evaluations:
        words = {name: asked(item, name, Prompt(**prompt)) for name, prompt in stage["prompts"].items()}
        assert words == {"direct": f"<image>\n{sums.ASK}", "cot": f"<image>\n{sums.ASK}{sums.STEPS}"}
        assert stage["answers"] == {"sum": {"kind": "number", "metric": "exact"}}, "near is not right"


def test_a_picture_is_of_its_own_split(sums):
    splits = sums.split_digits(0)
    known = {split: {bytes(picture) for pool in pools.values() for picture in pool} for split, pools in splits.items()}
    for split, parts in sums.mixtures(0).items():
        source = {"captions": "train", "instructions": "train"}.get(split, split)
        for part in parts:
            maker: Any = getattr(getattr(part.make, "func", part.make), "__self__", None)
            if split == "text":
                assert maker is None
                continue
            shown = {bytes(picture) for pool in maker.pools.values() for picture in pool}
            assert shown == known[source]
            assert not any(shown & known[other] for other in known if other != source)
            assert maker.vary == (source == "train")


def test_a_picture_has_one_tile_per_digit_and_a_thumbnail(made, sums):
    tiles = sums.COUNT + 1
    assert count_tiles(sums.COUNT * 32, 32, tiles, tile_size=32) == tiles
    tokenizer = build_tokenizer("tiny-bpe")
    for sample in samples(made, "instructions"):
        encoded = encode_conversation(sample.conversation, tokenizer, [tiles], 16, system="")
        assert len(encoded.input_ids) <= 256, "four samples or more share a pack"
        assert encoded.answer_spans[0][1] - encoded.answer_spans[0][0] <= 80, "max_new_tokens of the experiment"


def test_a_pure_function_of_the_seed(sums, made, tmp_path, capsys):
    assert sums.main(["--output", str(made), "--seed", "0", "--share", "0.01"]) == 0
    assert "already there" in capsys.readouterr().out
    sums.make(tmp_path, seed=0, share=0.01)
    assert contents(tmp_path) == contents(made)
    sums.make(tmp_path, seed=1, share=0.01)
    assert json.loads((tmp_path / "sums.json").read_text())["seed"] == 1
    assert contents(tmp_path)["annotations/heldout_sum.jsonl"] != contents(made)["annotations/heldout_sum.jsonl"]
