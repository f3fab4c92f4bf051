"""Experiment files: what is accepted means what it says, and every mistake is told once, at its place."""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from modeling.errors import UserError
from orchestrator import yamlfile
from orchestrator.problems import nearest
from orchestrator.spec import load_spec

MALFORMED = sorted((Path(__file__).parents[1] / "data" / "malformed").glob("*.yaml"))
EXPERIMENTS = sorted((Path(__file__).parents[2] / "experiments").glob("*.yaml"))
GOOD = """name: good
storage: runs
seed: 3
model: {vision: tiny-vit, language: tiny-qwen2}
data:
  captions: {meta: data/captions.json}
defaults:
  packing: {max_tokens: 2048, max_tiles: 24}
  precision: fp32
stages:
  caption_data: {kind: prepare, data: captions}
  mlp_warmup: {needs: [caption_data], lr: 1e-3, global_batch: 4, steps: 10}
  full_finetune:
    needs: [caption_data, mlp_warmup]
    lr: 2e-4
    global_batch: 4
    steps: 10
    seed: 5
    packing: {max_tokens: 1024}
"""


def write(folder: Path, text: str = GOOD) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", MALFORMED, ids=lambda p: p.stem)
def test_a_malformed_file_is_refused_with_line_and_remedy(path):
    expected = re.findall(r"^# expect: (\d+): (.*)$", path.read_text(), re.M)
    with pytest.raises(UserError) as caught:
        load_spec(path)
    lines = str(caught.value).split("\n")
    assert len(lines) == len(expected), lines
    for line, (number, fragment) in zip(lines, expected):
        assert line.startswith(f"{path}:{number}: ")
        assert fragment in line
        assert " → " in line, "no remedy"


def test_there_are_enough_malformed_files():
    assert len(MALFORMED) >= 40


def test_a_secret_is_not_repeated():
    path = next(p for p in MALFORMED if p.stem == "secret_not_shown")
    with pytest.raises(UserError) as caught:
        load_spec(path)
    with pytest.raises(UserError) as overridden:
        load_spec(EXPERIMENTS[0], ["tracking.api_key=hunter2"])
    assert "hunter2" not in str(caught.value) + str(overridden.value)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_the_experiments_of_the_repository_are_valid(path):
    assert load_spec(path).stages


def test_the_1b_recipe_is_the_papers():
    stages = load_spec(next(p for p in EXPERIMENTS if p.stem == "internvl2_5-1b")).stages
    warmup, finetune = stages["mlp_warmup"].params, stages["full_finetune"].params
    assert (warmup.lr, warmup.global_batch, warmup.weight_decay, warmup.drop_path) == (2e-4, 512, 0.01, 0.0)
    assert (finetune.lr, finetune.global_batch, finetune.weight_decay, finetune.drop_path) == (4e-5, 512, 0.01, 0.1)
    assert warmup.train == ("mlp",) and finetune.train == ("vit", "mlp", "language")
    assert warmup.schedule.horizon == 100_000 and finetune.steps == 22_000
    assert warmup.steps * 512 * 16384 == pytest.approx(191e9, rel=0.01)
    assert (finetune.packing.max_tokens, finetune.packing.max_tiles) == (16384, 48)
    assert finetune.betas == (0.9, 0.999) and finetune.eps == 1e-8 and finetune.max_grad_norm == 1.0
    assert finetune.loss.weight == "square" and finetune.precision == "bf16"


def test_paths_are_relative_to_the_file_and_defaults_give_way_to_the_stage(tmp_path):
    experiment = load_spec(write(tmp_path))
    warmup, finetune = experiment.stages["mlp_warmup"], experiment.stages["full_finetune"]
    assert experiment.storage == str(tmp_path / "runs")
    assert experiment.data["captions"].meta == str(tmp_path / "data" / "captions.json")
    assert list(experiment.stages) == ["caption_data", "mlp_warmup", "full_finetune"]
    assert (warmup.kind_name, warmup.line, warmup.params.train) == ("mlp_warmup", 12, ("mlp",))
    assert (warmup.params.seed, finetune.params.seed) == (3, 5)
    assert warmup.params.precision == finetune.params.precision == "fp32"
    assert (warmup.params.packing.max_tokens, warmup.params.packing.max_tiles) == (2048, 24)
    assert (finetune.params.packing.max_tokens, finetune.params.packing.max_tiles) == (1024, 24)


def test_a_prepare_stage_follows_the_smallest_packs_that_use_it(tmp_path):
    params = load_spec(write(tmp_path)).stages["caption_data"].params
    assert (params.max_tokens, params.max_tiles_per_sample) == (1024, 24)
    said = GOOD.replace("data: captions}", "data: captions, max_tokens: 512}")
    assert load_spec(write(tmp_path, said)).stages["caption_data"].params.max_tokens == 512


def test_overrides_change_the_file_as_if_they_stood_in_it(tmp_path):
    settings = ["stages.mlp_warmup.lr=1e-5", "stages.mlp_warmup.schedule.warmup=7", "storage=/elsewhere", "seed=9"]
    experiment = load_spec(write(tmp_path), settings)
    warmup = experiment.stages["mlp_warmup"].params
    assert (warmup.lr, warmup.schedule.warmup, warmup.seed, experiment.storage) == (1e-5, 7, 9, "/elsewhere")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.mlp_warmup.lrr=1e-5", "override 'stages.mlp_warmup.lrr=1e-5': stages.mlp_warmup: unknown key 'lrr'"),
        (
            "stages.mlp_warmpu.lr=1",
            "override 'stages.mlp_warmpu.lr=1': unknown stage 'mlp_warmpu' → did you mean 'mlp_",
        ),
        ("data.caption.meta=x", "unknown mixture 'caption' → did you mean 'captions'?"),
        ("stages.mlp_warmup.lr=-1", "override 'stages.mlp_warmup.lr=-1': stages.mlp_warmup.lr: must be greater than 0"),
        ("stages.mlp_warmup.lr.x=1", "override 'stages.mlp_warmup.lr.x=1': 'stages.mlp_warmup.lr' has no settings"),
        ("stages.mlp_warmup.needs=[", "the value is not YAML"),
        ("stages.mlp_warmup.lr", "expected path=value"),
        ("=1", "expected path=value"),
        ("modle.vision=x", "override 'modle.vision=x': unknown key 'modle' → did you mean 'model'?"),
    ],
)
def test_a_wrong_override_is_named_instead_of_a_line(tmp_path, override, expected):
    with pytest.raises(UserError) as caught:
        load_spec(write(tmp_path), [override])
    assert expected in str(caught.value).split("\n")[0]


def test_a_deepspeed_file_is_found_beside_the_experiment(tmp_path):
    path = write(tmp_path, GOOD.replace("precision: fp32", "deepspeed: zero.json"))
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    assert load_spec(path).stages["mlp_warmup"].params.deepspeed == tmp_path / "zero.json"
    (tmp_path / "zero.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_spec(path)


@pytest.mark.parametrize("kind", ["missing", "folder", "latin-1", "control"])
def test_a_file_that_cannot_be_read(tmp_path, kind):
    path = tmp_path / "x.yaml"
    expected = {
        "missing": "no such file",
        "folder": "is a folder",
        "latin-1": ":2: not UTF-8",
        "control": ":2: character",
    }
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(b"a: 1\nb: " + (b"\xe9" if kind == "latin-1" else b"\x01") + b"\n")
    with pytest.raises(UserError) as caught:
        load_spec(path)
    assert str(caught.value).startswith(str(path)) and expected[kind] in str(caught.value)


def test_scalars_follow_yaml_1_2():
    text = "{a: 1e-3, b: 1E5, c: no, d: 012, e: 1_000, f: '3', g: 12:30, h: 0x10, i: 2024-01-01, j: ~, k: .5, l: true}"
    data, _ = yamlfile.parse(text, "x")
    assert data == {
        "a": 0.001, "b": 100000.0, "c": "no", "d": 12, "e": 1000, "f": "3", "g": "12:30", "h": 16, "i": "2024-01-01",
        "j": None, "k": 0.5, "l": True,
    }  # fmt: skip
    assert type(data["b"]) is float and type(data["d"]) is int


def test_merge_keys_keep_the_line_of_what_they_merge():
    data, marks = yamlfile.parse("base: &b\n  lr: 1\n  steps: 2\nx:\n  <<: *b\n  lr: 3\n", "x")
    assert data["x"] == {"lr": 3, "steps": 2}
    assert (marks[("x", "lr")], marks[("x", "steps")]) == (6, 3)


def test_aliases_that_multiply_are_stopped():
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(UserError, match="once aliases are expanded"):
        yamlfile.parse("\n".join(levels), "x")


@pytest.mark.parametrize(
    ("word", "valid", "expected"),
    [
        ("leraning_rate", ["lr", "steps"], "lr"),
        ("lr", ["steps", "seed"], None),
        ("batch-size", ["global_batch", "steps"], "global_batch"),
        ("ndees", ["needs", "kind"], "needs"),
    ],
)
def test_nearest(word, valid, expected):
    assert nearest(word, valid) == expected


def test_no_damage_to_a_file_shows_a_traceback(tmp_path):
    """Lines dropped, doubled, moved and re-indented, words swapped: an Experiment or a UserError with a place."""
    rng = random.Random(0)
    words = ["[]", "{}", "null", "-1", "1e999", "true", "caption_data", "''", "&a", "*a", "!!int", "? x", "|", "- 3"]
    refused = 0
    for _ in range(300):
        lines = GOOD.splitlines()
        for _ in range(rng.randint(1, 3)):
            i = rng.randrange(len(lines))
            action = rng.randrange(4)
            if action == 0:
                lines.insert(i, lines[rng.randrange(len(lines))])
            elif action == 1 and len(lines) > 1:
                del lines[i]
            elif action == 2:
                lines[i] = " " * rng.randint(0, 5) + lines[i].lstrip()
            else:
                lines[i] = lines[i].rpartition(" ")[0] + " " + rng.choice(words)
        path = write(tmp_path, "\n".join(lines))
        try:
            load_spec(path)
        except UserError as error:
            refused += 1
            assert str(error).startswith(str(path))
    assert refused > 100


def test_planning_imports_nothing_heavy():
    code = (
        "import sys, orchestrator.plan, orchestrator.policy, orchestrator.liveness; "
        "print([m for m in ('torch', 'ray', 'transformers', 'pyarrow', 'numpy', 'PIL') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
