"""prepare on Ray: real pictures through five formats, and a driver that is killed twice on the way."""

import json
import random
import re
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fashion import fashion  # noqa: F401
from harness import PATIENCE_S, SEED, Experiment

from modeling.batches import Batcher
from modeling.epochs import plan_steps
from modeling.frames import FrameChoices
from modeling.shards import ShardReader

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from corpus import FORMATS, make_samples, write

LINES = 12_000  # 12 parts
FIVE = """
name: cluster
storage: storage
model: {vision: micro-vit, language: micro-qwen2}
data:
%s
stages:
%s
"""
ONE = """
name: cluster
storage: storage
model: {{vision: micro-vit, language: micro-qwen2}}
data: {{lines: {{meta: {data}/meta.json, system: ""}}}}
stages:
  lines: {{kind: prepare, data: lines, resources: {{workers: 2}}, curate: {{text: {{}}, duplicates: {{}}}}}}
"""


def rows(folder: Path) -> dict[str, tuple]:
    """What training sees of each sample alone: ids, targets and pixels."""
    from modeling.presets import resolve
    from stages.params import ModelParams

    model = resolve(ModelParams(vision="micro-vit", language="micro-qwen2"))
    reader = ShardReader(folder)
    index = reader.index
    plan = plan_steps(
        index["tokens"], index["tiles"], index["repeat"], max_tokens=20_000, max_tiles=60, global_batch=1, seed=0,
        epochs=1, choices=FrameChoices.of(index),
    )  # fmt: skip
    batcher = Batcher(
        reader, plan, model.tokenizer(), tile_size=model.tile_size, tokens_per_tile=model.tokens_per_tile, system="",
        reduction="square", unit="conversation", seed=0,
    )  # fmt: skip
    out = {}
    for occurrence, sample in enumerate(plan.sample):
        batch = batcher.batch(0, [occurrence])
        pixels = None if batch.pixels is None else batch.pixels.numpy().tobytes()
        out[index["id"][int(sample)]] = (batch.input_ids.tolist(), batch.targets.tolist(), pixels)
    return out


def test_five_formats_of_real_pictures_give_identical_rows(fashion, tmp_path):  # noqa: F811
    pictures, names = fashion
    samples = make_samples(pictures[:60], names[:60])
    for form in FORMATS:
        write(samples, form, tmp_path / form)
    data = "\n".join(f"  {form}: {{meta: {tmp_path / form}/meta.json, system: ''}}" for form in FORMATS)
    stages = "\n".join(f"  {form}: {{kind: prepare, data: {form}, min_frames: 2, max_frames: 8}}" for form in FORMATS)
    experiment = Experiment(tmp_path / "run", tmp_path, (FIVE % (data, stages)).replace("{", "{{").replace("}", "}}"))
    experiment.run()
    planned = experiment.command("plan").stdout
    assert "Mixtures, by tokens of an epoch" in planned and re.search(r"video \d\d\.\d%, ", planned), planned
    assert "things 100.0%" in planned
    reference = rows(experiment.result("internvl"))
    assert set(reference) == {sample.id for sample in samples}
    for form in FORMATS[1:]:
        assert rows(experiment.result(form)) == reference, form


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lines")
    draw = random.Random(SEED)
    with open(folder / "a.jsonl", "w") as file:
        for i in range(LINES):
            words = " ".join(f"word{draw.randrange(1000)}" for _ in range(40))
            answer = "again and again " * 30 if i % 100 == 3 else words
            turns = [{"from": "human", "value": f"Say {i}."}, {"from": "gpt", "value": answer}]
            file.write(json.dumps({"id": f"line-{i}", "conversations": turns}) + "\n" if i % 400 else "{\n")
    (folder / "meta.json").write_text(json.dumps({"d": {"annotation": "a.jsonl"}}))
    return folder


def parts(experiment: Experiment) -> dict[str, int]:
    """Inodes of the files of finished parts."""
    out = {}
    for path in experiment.storage.glob("stages/prepare/*/parts/0*.json"):
        folder = path.with_name(json.loads(path.read_text())["folder"])
        out |= {str(inner.relative_to(experiment.storage)): inner.stat().st_ino for inner in [path, *folder.rglob("*")]}
    return out


def test_a_killed_driver_loses_no_finished_part(lines, tmp_path, start):
    whole = Experiment(tmp_path / "whole", lines, ONE)
    whole.run()
    killed = Experiment(tmp_path / "killed", lines, ONE)
    known: dict[str, int] = {}
    for share in (3, 7):
        driver = start(killed)
        deadline = time.monotonic() + PATIENCE_S
        while sum(name.endswith(".json") for name in parts(killed)) < share:
            assert driver.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        driver.kill()
        now = parts(killed)
        assert known.items() <= now.items(), "a finished part was made again"
        known = now
    done = killed.run()
    assert "parts were made before" in "".join(killed.logs("lines").values()) + done.stdout
    for path in sorted(whole.result("lines").rglob("*")):
        if path.is_file():
            other = killed.result("lines") / path.relative_to(whole.result("lines"))
            assert other.read_bytes() == path.read_bytes(), path.name
    summary = json.loads((killed.result("lines") / "summary.json").read_text())
    assert summary["samples"] == LINES == summary["kept"] + sum(summary["reasons"].values())
    assert summary["reasons"] == {"bad_json": LINES // 400, "repetition": LINES // 100}
    assert pq.read_metadata(killed.prefix("lines") / "verdicts.parquet").num_rows == LINES
    assert not list(killed.storage.glob("stages/prepare/*/parts/*")), "parts stay until the result is there, no longer"
    assert (killed.prefix("lines") / "review.html").stat().st_size > 10_000
