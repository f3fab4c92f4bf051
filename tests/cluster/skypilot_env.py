"""SkyPilot in a virtual environment of its own, for tests: its pins and this project's do not go together.

Made once beside the project's packages (`.venv/skypilot-VERSION`, 460 MB, one to three minutes). Where PyPI cannot be
reached `skypilot` skips with one line (with CI=true it fails). No cloud is asked anything: what SkyPilot would look up
in its catalogue of machines is a file with the few rows that the tests name.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

VERSION = "0.14.1"
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / f".venv/skypilot-{VERSION}"
CATALOG = ROOT / "tests/data/manifests/catalog"  # <cloud>/vms.csv
CATALOG_SCHEMA = "v8"  # of this version


@pytest.fixture(scope="session")
def skypilot(tmp_path_factory):
    """run(script, *arguments) -> CompletedProcess, by a Python that has SkyPilot, in an empty home."""
    python = FOLDER / "bin/python"
    if not (FOLDER / "installed").exists():
        _install(python)
    home = tmp_path_factory.mktemp("skypilot-home")
    shutil.copytree(CATALOG, home / f".sky/catalogs/{CATALOG_SCHEMA}")

    def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"HOME": str(home), "PATH": os.environ["PATH"], "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
        command = [str(python), "-c", script, *arguments]
        return subprocess.run(command, env=environment, cwd=home, text=True, capture_output=True, timeout=300)

    return run


def _install(python: Path) -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "-q", f"skypilot=={VERSION}"], text=True, capture_output=True
    )
    if done.returncode == 0:
        (FOLDER / "installed").touch()
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    reason = f"no SkyPilot: pip install skypilot=={VERSION} failed: {done.stderr.strip().splitlines()[-1]}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
