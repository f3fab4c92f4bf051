"""The command on broken experiment files: one message with the place, exit code 2, no traceback, nothing written."""

import shutil
from pathlib import Path

import pytest

from orchestrator.cli.main import main

MALFORMED = sorted((Path(__file__).parents[1] / "data" / "malformed").glob("*.yaml"))


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("verb", ["plan", "run", "status"])
@pytest.mark.parametrize("malformed", MALFORMED, ids=lambda path: path.stem)
def test_a_malformed_experiment_is_refused_in_one_message(verb, malformed, tmp_path, capsys):
    path = tmp_path / "experiment" / malformed.name  # its storage is ../runs: inside tmp_path
    path.parent.mkdir()
    shutil.copy(malformed, path)
    before = contents(tmp_path)
    assert main([verb, str(path)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"stageline: {path}:")
    assert told.err.count("stageline: ") == 1
    assert "Traceback" not in told.err
    assert " → " in told.err
    assert contents(tmp_path) == before


def test_a_file_that_is_not_there(tmp_path, capsys):
    assert main(["run", str(tmp_path / "absent.yaml")]) == 2
    told = capsys.readouterr().err
    assert "absent.yaml" in told and told.count("\n") == 1 and "Traceback" not in told
    assert list(tmp_path.iterdir()) == []
