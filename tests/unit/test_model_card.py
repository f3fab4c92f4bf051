"""The model card: its figures are the evaluation's to the letter, its program runs without this project, and the hub
reads its front matter."""

import json

import numpy as np
import pytest
from fake_io import FakeIO
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modeling.errors import DataError
from modeling.generate import Question, answer
from modeling.internvl import load_model, save_model
from stages.evaluate.figures import share, with_interval
from stages.export import export
from stages.io import Input
from stages.params import DataParams, ExportParams

ROW = {"n": 400, "right": 365, "accuracy": 0.9125, "low": 0.8808, "high": 0.9364, "metric": "relaxed"}
EVALUATION = {
    "stage": "full",
    "checkpoints": ["full"],
    "tables": {
        "direct": {"sum": ROW | {"unparsable": 0.0}, "a|b": ROW | {"accuracy": 1.0, "low": 0.99, "high": 1.0}},
        "cot": {"sum": ROW | {"accuracy": 0.9501, "low": 0.924, "high": 0.9676, "unparsable": 0.0125}},
    },
    "maximum": {"sum": {"prompt": "cot", "accuracy": 0.9501, "n": 400}},
    "curves": {
        "sum": [
            {"prompt": "cot", "checkpoint": "full", "method": "majority", "k": [1, 8], "samples": [1.0, 8.0],
             "tokens": [30.0, 240.4], "accuracy": [0.9, 0.9712], "low": [0.87, 0.95], "high": [0.92, 0.985]}
        ]
    },
    "sampling": {"samples": 8, "temperature": 0.7, "top_p": 1.0, "seed": 0},
}  # fmt: skip


def evaluated(folder, name="evaluate_full", files=None, needs=("heldout_data", "full")):
    folder.mkdir(parents=True)
    for file, content in (files or {"evaluation.json": EVALUATION}).items():
        (folder / file).write_text(json.dumps(content))
    return Input(name, "evaluate", "3" * 64, folder, {"needs": list(needs)})


@pytest.fixture
def exported(micro, tmp_path):
    """exported(*evaluations): the folder that the stage leaves."""
    save_model(micro.build(seed=4), micro.tokenizer, tmp_path / "trained", 32)

    def run(*evaluations):
        (tmp_path / "trained" / "trained.json").write_text(json.dumps({"system": ""}))
        trained = Input("full", "train", "2" * 64, tmp_path / "trained", {"lr": 4e-5})
        inputs = {"full": trained} | {its.name: its for its in evaluations}
        io = FakeIO(tmp_path / "run", ExportParams(), inputs=inputs, sources={"mix": DataParams(meta="a", system="")})
        export(io)
        return io.result

    return run


def cells(card, first):
    """The cells of the one table row that begins so."""
    (line,) = [line for line in card.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("| ").split(" | ")]


def test_the_cards_program_answers_as_this_project_does(exported, tmp_path, monkeypatch, capsys):
    """As it stands but for the folder's name; tests/cluster/test_exported.py runs it without this project."""
    folder = exported()
    program = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 150, 3), dtype=np.uint8))
    image.save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(program.replace("THIS_FOLDER", str(folder)), {})
    model, tokenizer = load_model(folder)
    turns = [{"from": "human", "value": "<image>\nWhat is in the picture?"}]
    (expected,) = answer(model, tokenizer, [Question(turns, [image])], system="", max_new_tokens=64)
    assert expected and capsys.readouterr().out.strip() == expected


def test_the_figures_are_those_of_the_evaluation(exported, tmp_path):
    card = (exported(evaluated(tmp_path / "e")) / "README.md").read_text()
    tables = EVALUATION["tables"]
    assert cells(card, "sum | relaxed") == [
        "sum", "relaxed", "400", with_interval(tables["direct"]["sum"]), ".000",
        with_interval(tables["cot"]["sum"]), ".013", ".950 (cot)",
    ]  # fmt: skip
    assert ".912 [.881, .936]" in card  # to the letter; .9125 is a little less in binary
    assert "maximum is the better prompt's figure" in card
    assert cells(card, "sum | cot") == ["sum", "cot", "majority", "8", "240", ".971 [.950, .985]"]
    assert "generate(do_sample=True, temperature=0.7, top_p=1.0, top_k=0)" in card
    assert "| a\\|b | relaxed | 400 | 1.000 [.990, 1.000] |" in card


def test_the_hub_reads_the_front_matter(exported, tmp_path):
    card = ModelCard.load(exported(evaluated(tmp_path / "e")) / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text" and card.data.license is None
    found = {(its.dataset_name, its.metric_name): (its.metric_type, its.metric_value) for its in card.data.eval_results}
    assert found == {
        ("sum", "direct, stage evaluate_full"): ("relaxed", 0.912),
        ("sum", "cot, stage evaluate_full"): ("relaxed", 0.95),
        ("a|b", "direct, stage evaluate_full"): ("relaxed", 1.0),
    }


def test_parameters_by_part_add_up(micro, exported):
    card = (exported() / "README.md").read_text()
    parts = [cells(card, name)[-1] for name in ("vision encoder", "projector", "language model", "all")]
    *parts, total = [int(count.replace(",", "")) for count in parts]
    assert sum(parts) == total == sum(p.numel() for p in micro.build().parameters()) and min(parts) > 0


def test_scores_of_an_older_evaluation_are_shown(exported, tmp_path):
    row = {"n": 397, "right": 375, "accuracy": 375 / 397, "low": 0.9175, "high": 0.9631}
    card = (exported(evaluated(tmp_path / "e", files={"scores.json": {"digit": row}})) / "README.md").read_text()
    assert cells(card, "digit") == ["digit", "exact", "397", ".945 [.917, .963]", "–"]
    assert "maximum" not in card


def test_of_an_evaluation_of_several_stages_the_exported_ones_figures_are_taken(exported, tmp_path):
    other = {"sum": ROW | {"accuracy": 0.111}}
    curve = EVALUATION["curves"]["sum"][0]
    several = EVALUATION | {
        "stage": "other", "checkpoints": ["other", "full"],
        "tables": {"direct · other": other, "direct · full": EVALUATION["tables"]["direct"]},
        "maximum": {"sum": {"prompt": "direct · other", "accuracy": 0.99, "n": 400}},
        "curves": {"sum": [curve, curve | {"checkpoint": "other + full", "method": "likelihood"}]},
    }  # fmt: skip
    card = (exported(evaluated(tmp_path / "e", files={"evaluation.json": several})) / "README.md").read_text()
    assert cells(card, "sum | relaxed")[3] == ".912 [.881, .936]" and "| direct |" in card
    assert ".111" not in card and ".990 (" not in card and "likelihood" not in card


@pytest.mark.parametrize("files", [{"evaluation.json": EVALUATION | {"checkpoints": ["mlp"]}}, {"scores.json": {}}])
def test_an_evaluation_of_another_stage_is_refused(exported, tmp_path, files):
    with pytest.raises(DataError, match=r"mlp.* not 'full'") as caught:
        exported(evaluated(tmp_path / "e", files=files, needs=("heldout_data", "mlp")))
    assert "stage evaluate_full" in str(caught.value)


def test_export_may_need_evaluations(tmp_path):
    from orchestrator.spec import load_spec

    (tmp_path / "x.yaml").write_text("""
name: x
storage: runs
model: {vision: tiny-vit, language: tiny-qwen2}
data: {a: {meta: a.json}}
stages:
  a_data: {kind: prepare, data: a}
  mlp_warmup: {needs: [a_data], lr: 1e-3, global_batch: 4, steps: 10}
  evaluate: {needs: [a_data, mlp_warmup]}
  again: {kind: evaluate, needs: [a_data, mlp_warmup], limit: 5}
  export: {needs: [mlp_warmup, evaluate, again]}
""")
    assert load_spec(str(tmp_path / "x.yaml"), []).stages["export"].params.needs == ("mlp_warmup", "evaluate", "again")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.9124, ".912"), (1, "1.000"), (0, ".000"), (-0.02, "-.020"), (-0.0001, ".000"), (None, "–"), (float("nan"), "–"),
     (0.99951, "1.000"), (-1.5, "-1.500")],
)  # fmt: skip
def test_a_share_is_written_with_three_digits(value, text):
    assert share(value) == text


@given(st.floats(-1, 1))
def test_what_is_written_is_the_figure_to_three_digits(value):
    assert abs(float(share(value)) - value) <= 0.0005 + 1e-9


def test_an_interval_that_is_not_there_is_left_out():
    assert with_interval({"accuracy": 0.5}) == ".500" and with_interval({"accuracy": None}) == "–"


def test_an_evaluation_is_known_by_fingerprint_after_a_rename(exported, tmp_path):
    renamed = EVALUATION | {"stage": "old", "checkpoints": ["old"], "fingerprints": ["2" * 64]}
    folder = exported(evaluated(tmp_path / "e", files={"evaluation.json": renamed}))
    assert "| sum | relaxed |" in (folder / "README.md").read_text()
    other = EVALUATION | {"fingerprints": ["4" * 64]}
    with pytest.raises(DataError, match="and not 'full', which is exported"):
        exported(evaluated(tmp_path / "f", files={"evaluation.json": other}))
