"""What a submitted job takes along: the code as it is here and the experiment, nothing else."""

import subprocess
import sys

import pytest

import orchestrator
from modeling.errors import UserError
from orchestrator.bundle import EXPERIMENT, PACKAGES, make_bundle


def test_the_bundle_is_the_code_and_the_experiment(tmp_path):
    (tmp_path / "in").mkdir()
    experiment, out = tmp_path / "in" / "my.yaml", tmp_path / "out"
    experiment.write_text("name: x\n")
    (tmp_path / "in" / ".env").write_text("SECRET=1")
    (tmp_path / "in" / "data.json").write_text("{}")
    out.mkdir()
    make_bundle(experiment, out)
    assert (out / EXPERIMENT).read_text() == "name: x\n"
    assert {path.name for path in out.iterdir()} == {*PACKAGES, "experiment.yaml"}
    files = [path for path in out.rglob("*") if path.is_file()]
    assert not [path for path in files if "__pycache__" in path.parts or path.name.startswith(".")]
    assert sum(path.stat().st_size for path in files) < 5e6

    # a process that sees nothing but the bundle runs its code, and finds the files that are no code
    code = "import orchestrator.cli.main, orchestrator.report.build, stages.prepare.card; print(orchestrator.__file__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(out)!r}); {code}"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out / "orchestrator" / "__init__.py") != orchestrator.__file__
    source = {path.relative_to(out).as_posix() for path in files}
    assert {"orchestrator/report/pages/report.html", "stages/prepare/pages/review.js"} <= source


def test_no_text_travels_that_holds_a_key(tmp_path):
    experiment = tmp_path / "my.yaml"
    experiment.write_text("name: x\n# aws_secret_access_key: wJalrXUtnFEMI/K7MDENG/bPxRfiCY\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"my\.yaml:2: holds what looks like a key"):
        make_bundle(experiment, tmp_path / "out")
    assert not (tmp_path / "out" / EXPERIMENT).exists()
    experiment.write_text("name: x  # für später\n", encoding="utf-8")
    make_bundle(experiment, tmp_path / "out")
    assert (tmp_path / "out" / EXPERIMENT).read_text(encoding="utf-8") == "name: x  # für später\n"
