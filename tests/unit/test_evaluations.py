"""What an evaluation could only fail at later is refused when its file is read, and `stageline eval` keeps edits."""

import argparse
from pathlib import Path

import pytest
import yaml

from modeling.errors import UserError
from orchestrator.cli import eval as cli
from orchestrator.spec import load_spec

GOOD = """name: good
storage: runs
models: {m: {folder: model}}
eval:
  a: {format: jsonl, path: a.jsonl}
stages:
  evaluate:
    kind: evaluate
    model: m
    sets: [a]
    prompts: {direct: {}, cot: {}}
    sampling: {samples: 4}
    rerank: {likelihood: {kind: likelihood}, judge: {kind: verifier}}
"""


def load(folder: Path, *changes: tuple[str, str]):
    text = GOOD
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "e.yaml").write_text(text)
    return load_spec(folder / "e.yaml")


def test_a_whole_evaluation_is_read(tmp_path):
    load(tmp_path)
    load(
        tmp_path,
        ("cot: {}", "brief: {suffix: ''}"),
        ("model: m\n", "model: m\n    engine: vllm\n    resources: {gpus: 2}\n"),
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sets: [a]", "sets: [a, a]", r":10: .*'a' is listed twice → remove one"),
        ("path: a.jsonl", "path: a.jsonl, frames: [16, 16]", "frames names 16 twice"),
        ("samples: 4", "samples: 4, prompts: [cot, cot]", "prompts names cot twice"),
        ("cot: {}", "brief: {}", "the prompt 'brief' has no words → give it a 'suffix:'"),
        ("cot: {}", "cot: {suffix: 'See <image>'}", "holds <image>, which stands for a picture .* → take"),
        ("cot: {}", "cot: {suffix: '<video>'}", "holds <video>"),
        ("  a: {", "  A.b: {format: jsonl, path: x}\n  a: {", r":5: 'A\.b' is not a valid name of a set → use"),
        ("judge: {", "certainty: {", "the name is reserved, and the kind is verifier → give it another name"),
        ("likelihood: {kind: likelihood}", "likelihood: {kind: certainty}", "reserved, and the kind is certainty"),
        ("model: m\n", "model: m\n    resources: {gpus: 2}\n", "each worker answers on one GPU → .*engine: vllm"),
        ("judge: {kind: verifier}}", "c: {kind: certainty}}\n    engine: vllm", "vllm gives no certainty"),
    ],
)  # fmt: skip
def test_what_could_only_fail_later_is_refused(tmp_path, old, new, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, (old, new))


@pytest.fixture
def stageline(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "run", lambda options: 0)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")

    def call(*given: str) -> Path:
        parser = argparse.ArgumentParser()
        cli.arguments(parser)
        out = tmp_path / "out"
        assert cli.evaluate(parser.parse_args([str(tmp_path / "model"), "--output", str(out), *given])) == 0
        return out

    return call


def test_stageline_eval_keeps_an_edited_file(stageline, capsys):
    path = stageline("--set", "a=a.jsonl") / "eval.yaml"
    first = path.read_text()
    stageline("--set", "a=a.jsonl")
    assert [one.name for one in path.parent.iterdir()] == ["eval.yaml"]
    for number in (1, 2):
        path.write_text(f"edited: {number}\n")
        capsys.readouterr()
        stageline("--set", "a=a.jsonl")
        assert path.read_text() == first and f"eval.yaml.{number}: what" in capsys.readouterr().out
        assert path.with_name(f"eval.yaml.{number}").read_text() == f"edited: {number}\n"


def test_stageline_eval_takes_the_length_of_answers_for_all_prompts(stageline):
    path = stageline("--set", "a=a.jsonl", "--max-new-tokens", "64") / "eval.yaml"
    words = {"max_new_tokens": 64}
    assert yaml.safe_load(path.read_text())["stages"]["evaluate"]["prompts"] == {"direct": words, "cot": words}
    prompts = load_spec(path).stages["evaluate"].params.prompts
    assert [its.max_new_tokens for its in prompts.values()] == [64, 64]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--set", "a=x.tsv", "--set", "a=y.tsv"), "--set a=y.tsv: the set 'a' is given twice"),
        (("--set", "MMMU=x.tsv"), "'MMMU' is not a valid name of a set"),
    ],
)
def test_stageline_eval_refuses_what_it_would_lose(stageline, tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        stageline(*given)
    assert not (tmp_path / "out").exists()
