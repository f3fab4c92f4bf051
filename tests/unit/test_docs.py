"""The documentation against the code: the site builds without a warning, its commands run, its words are the code's."""

import argparse
import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import blocks  # noqa: E402
import reference  # noqa: E402

from orchestrator.cli.main import parser  # noqa: E402
from orchestrator.spec import TOP_KEYS  # noqa: E402
from stages.evaluation import EvalSet  # noqa: E402
from stages.kinds import KINDS  # noqa: E402
from stages.params import DataParams, ModelParams  # noqa: E402

PAGES = blocks.pages()
ALL = [block for page in PAGES for block in blocks.blocks(page)]
QUICK = [page for page in PAGES if any(b.mark == "run" and not b.value for b in blocks.blocks(page))]
NEEDS = [block for block in ALL if block.mark in ("needs", "usage")]


def test_every_block_of_commands_says_how_it_is_tried(capsys):
    assert not [b.place for b in ALL if b.commands and b.mark not in ("run", "needs", "usage")]
    assert not [b.place for b in ALL if b.mark and b.mark not in blocks.KINDS]
    assert {b.value for b in ALL if b.mark == "run"} <= {"", "ray", "ray, short"}
    with capsys.disabled():
        print("\nnot run by a test: " + ", ".join(f"{b.place} ({b.value})" for b in NEEDS if b.mark == "needs"))


@pytest.mark.parametrize("page", QUICK, ids=lambda page: page.stem)
def test_what_a_page_has_the_reader_type_runs(page, tmp_path):
    found = blocks.blocks(page)
    done = run([b for b in found if b.mark == "run" and not b.value], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    named = [name for b in found if b.mark == "needs" for name in blocks.files_named(b.text)]
    assert not [name for name in named if not (tmp_path / name).is_file()], "named, and neither there nor written"


def run(found: list[blocks.Block], folder: Path) -> subprocess.CompletedProcess:
    """The blocks in a folder that looks like a clone after `make install`."""
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "experiments").mkdir()
    for path in (ROOT / "experiments").glob("*.*"):
        (folder / "experiments" / path.name).write_bytes(path.read_bytes())
    blocks.write_files(folder, PAGES)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))}
    environment |= {"PATH": f"{Path(sys.prefix, 'bin')}:{environment['PATH']}", "HOME": str(folder)}
    command = ["bash", "-c", blocks.script(found)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def verbs(top: argparse.ArgumentParser, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], argparse.ArgumentParser]:
    """By its words, every verb; those of groups too."""
    out = {}
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                out |= {(*prefix, name): sub} | verbs(sub, (*prefix, name))
    return out


VERBS = verbs(parser())


def check_options(words: list[str]) -> None:
    """That the verb and the options exist; arguments may be placeholders."""
    verb = tuple(words[:2]) if tuple(words[:2]) in VERBS else tuple(words[:1])
    assert verb in VERBS, f"stageline {' '.join(words)}: no such verb"
    known = {option for action in VERBS[verb]._actions for option in action.option_strings}
    for word in words:
        option = word.strip("[],").partition("=")[0]
        assert not option.startswith("-") or option in known, f"stageline {' '.join(words)}: no option {option}"


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_does_something(verb):
    assert VERBS[verb].get_default("function") or VERBS[verb[:1]].get_default("function")


@pytest.mark.parametrize("block", NEEDS, ids=lambda block: block.place)
def test_a_command_that_is_not_run_is_one_of_ours(block, capsys):
    for command in blocks.stageline_commands(block.text):
        if block.mark == "usage":
            check_options(command.split())
        else:
            parser().parse_args(shlex.split(command))  # ends the test by SystemExit where it is none


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_within_sentences_exist(page):
    for text in re.findall(r"(?<!`)`stageline ([^`]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.S)):
        if not text.startswith("SRC"):
            check_options(text.replace("\n", " ").split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_row_of_a_table_has_the_cells_of_its_head(page):
    """A bare | ends a cell, within code too: what is behind it would be in the wrong column, or in none."""
    head = 0
    for line in re.sub(r"```.*?```", "", page.read_text(), flags=re.S).splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not cells or not head or cells == head, f"{page.name}: {line}"
        head = cells


YAML = [block for block in ALL if block.language == "yaml"]


@pytest.mark.parametrize("block", YAML, ids=lambda block: block.place)
def test_yaml_in_the_pages_has_keys_that_exist(block):
    read = yaml.safe_load(block.text)
    assert set(read) <= set(TOP_KEYS)
    models = {"tracking": reference.TrackingParams, "cluster": reference.ClusterParams}
    for key in models.keys() & read.keys():
        models[key].model_validate(read[key])
    for key, model in (("data", DataParams), ("eval", EvalSet)):
        for one in read.get(key, {}).values():
            model.model_validate(one)
    if "model" in read:
        ModelParams.model_validate(read["model"])
    for name, stage in read.get("stages", {}).items():
        kind = KINDS[stage.get("kind", name)]
        assert set(stage) <= {"kind", *kind.params.model_fields}, f"stages.{name}"


def test_the_reference_pages_are_those_of_the_code():
    for name, page in reference.PAGES.items():
        assert (ROOT / "docs" / name).read_text() == page(), f"run `make docs`: docs/{name} is not the code's"


def test_every_key_and_every_option_is_described():
    assert reference.undescribed() == [], "give it a description= in its model"
    assert reference.unexplained() == [], "give it a help="


def literals() -> list[str]:
    """All texts of the code, what is filled in as one …"""
    out = []
    for package in ("orchestrator", "stages", "modeling", "cluster"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    out.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = [str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values]
                    out.append("".join(parts))
    return out


def test_the_messages_of_the_troubleshooting_page_are_the_codes():
    texts = literals()
    rows = re.findall(r"^\| (`.+?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    assert len(rows) >= 25
    quoted = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    absent = [message for message in quoted if not any(said(message, text) for text in texts)]
    assert not absent, "no code says this any more"


def said(message: str, text: str) -> bool:
    return re.search(".*".join(map(re.escape, message.split("…"))), text) is not None


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", "-d", str(tmp_path / "trees")]
    done = subprocess.run([*command, str(ROOT / "docs"), str(tmp_path / "site")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|link)\b[^>]*(?:src|href)=\"((?:https?:)?//[^\"]+)\"", page.read_text())
        assert not loaded, f"{page.name} loads {loaded} from the web"
