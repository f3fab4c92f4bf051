"""A folder of a killed process is removed by the next one that needs a folder; one in use is not."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.scratch import NEWBORN_S, drop_scratch, make_scratch

MAKE = "from orchestrator.scratch import make_scratch; print(make_scratch('train'), flush=True); input()"


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def older(folder: Path) -> None:
    long_ago = time.time() - 2 * NEWBORN_S
    os.utime(folder, (long_ago, long_ago))


def test_what_a_killed_process_left_goes_and_what_is_in_use_stays(temporary):
    environment = os.environ | {"TMPDIR": str(temporary)}
    with subprocess.Popen(
        [sys.executable, "-c", MAKE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        (theirs / "model").write_bytes(b"1")
        older(theirs)
        mine = make_scratch("train")
        assert theirs.exists()
        other.kill()
        other.wait()
        older(mine)
        drop_scratch(make_scratch("train"))
        assert mine.exists() and not theirs.exists()
    drop_scratch(mine)
    drop_scratch(mine)
    assert not list(temporary.iterdir())


def test_a_newborn_one_is_left_alone(temporary):
    newborn = temporary / "stageline-at-train-x"
    newborn.mkdir()
    drop_scratch(make_scratch("train"))
    assert newborn.exists()
    older(newborn)
    drop_scratch(make_scratch("train"))
    assert not newborn.exists()
