"""The data, and one undisturbed run that the other tests compare with or go on from."""

from pathlib import Path

import pytest
from ceph import ceph  # noqa: F401 (a fixture)
from harness import LONGER, SEED, Experiment, make_data


def pytest_report_header() -> str:
    return f"seed of the kills: {SEED} (STAGELINE_TEST_SEED)"


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Handwritten digits in all shapes (one tile, many tiles, two pictures, text), with fractional repeat factors."""
    return make_data(tmp_path_factory.mktemp("digits"))


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


@pytest.fixture(scope="session")
def longer(undisturbed, tmp_path_factory) -> Experiment:
    """full_finetune with LONGER in one undisturbed run, for tests that stop it in the middle by what they see of it:
    the usual one may end on a fast machine before the kill arrives. Not to be changed."""
    experiment = undisturbed.before_finetune(tmp_path_factory.mktemp("longer") / "copy")
    experiment.run(*LONGER)
    return experiment


@pytest.fixture
def start(request):
    """start(experiment, *overrides, environment=None): a driver that does not outlive the test."""

    def begin(experiment: Experiment, *overrides: str, **more):
        driver = experiment.start(*overrides, **more)
        request.addfinalizer(driver.end)
        return driver

    return begin
