"""The data, and one undisturbed run that the other tests compare with or go on from."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness import SEED, Experiment

ROOT = Path(__file__).parents[2]


def pytest_report_header() -> str:
    return f"seed of the kills: {SEED} (STAGELINE_TEST_SEED)"


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Handwritten digits in all shapes (one tile, many tiles, two pictures, text), with fractional repeat factors."""
    folder = tmp_path_factory.mktemp("digits")
    script = [sys.executable, str(ROOT / "experiments" / "digits.py"), "--output", str(folder), "--share", "0.02"]
    subprocess.run([*script, "--seed", "0"], check=True)
    instructions = json.loads((folder / "instructions.json").read_text())
    text = json.loads((folder / "text.json").read_text())
    mix = {
        "digit": instructions["instructions_digit"] | {"repeat_time": 1.5},
        "row": instructions["instructions_row"] | {"repeat_time": 0.5},
        "larger": instructions["instructions_larger"] | {"repeat_time": 0.25},
        "words": text["text_words"] | {"repeat_time": 2},
    }
    (folder / "mix.json").write_text(json.dumps(mix))
    return folder


@pytest.fixture(scope="session")
def undisturbed(data, tmp_path_factory) -> Experiment:
    """All stages done in one run, with two workers under ZeRO 1. Not to be changed: copy it."""
    experiment = Experiment(tmp_path_factory.mktemp("undisturbed"), data)
    done = experiment.run()
    (experiment.folder / "output.txt").write_text(done.stdout)
    return experiment


@pytest.fixture
def before_finetune(undisturbed, tmp_path) -> Experiment:
    """A copy that ends with full_finetune, which has not run yet."""
    return undisturbed.before_finetune(tmp_path / "copy")


@pytest.fixture
def start(request):
    """start(experiment, *overrides): a driver that does not outlive the test."""

    def begin(experiment: Experiment, *overrides: str):
        driver = experiment.start(*overrides)
        request.addfinalizer(driver.end)
        return driver

    return begin
