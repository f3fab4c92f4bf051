"""Identities: what changes a result changes the fingerprint, what does not leaves it alone."""

import enum
from pathlib import Path

import pytest

from modeling import digests as weights
from modeling.errors import DataError
from orchestrator.fingerprint import canonical, fingerprint, source_digest_of, stage_identities
from orchestrator.spec import load_spec

SPEC = """name: x
storage: runs
model: {{vision: {vision}, language: {language}}}
data:
  a: {{meta: a.json}}
  b: {{meta: b.json}}
stages:
  a_data: {{kind: prepare, data: a}}
  b_data: {{kind: prepare, data: b}}
  mlp_warmup: {{needs: [a_data], lr: 1e-3, global_batch: 4, steps: 10}}
  full_finetune: {{needs: [b_data, mlp_warmup], lr: 1e-3, global_batch: 4, steps: 10}}
  evaluate: {{needs: [a_data, full_finetune]}}
  export: {{needs: [full_finetune]}}
"""


def identities(folder: Path, *overrides: str, digests=None, edit=(), vision="tiny-vit", language="tiny-qwen2"):
    text = SPEC.format(vision=vision, language=language)
    for old, new in edit:
        assert old in text
        text = text.replace(old, new)
    (folder / "x.yaml").write_text(text)
    experiment = load_spec(folder / "x.yaml", overrides)
    table = {"a_data": {"sha": "1"}, "b_data": {"sha": "2"}} if digests is None else digests
    return stage_identities(experiment, lambda mixture: table.get(f"{mixture}_data"))


def changed(folder: Path, *overrides: str, **how) -> set[str]:
    before, after = identities(folder), identities(folder, *overrides, **how)
    return {name for name in before if fingerprint(before[name]) != fingerprint(after[name])}


def test_canonical_form():
    assert canonical({"b": (1, 2.0), "a": {"x": None, "y": True}}) == '{"a":{"x":null,"y":true},"b":[1,2]}'
    assert canonical(1) == canonical(1.0) and canonical(-0.0) == canonical(0)
    assert canonical(0.1) == "0.1" and canonical(True) != canonical(1)
    assert canonical("é\ud800") == '"\\u00e9\\ud800"'


def test_fingerprints_do_not_change_with_a_release():
    """Those in users' storage were made by earlier versions."""
    expected = "d2bd87f0dec857bba8a915023b6f22fc02a6c8dfd66d58ad588cc3dc96ba0ef0"
    assert fingerprint({"lr": 1e-5, "a": [1, "x"]}) == expected == fingerprint({"a": (1.0, "x"), "lr": 0.00001})


@pytest.mark.parametrize(
    "value", [{1, 2}, b"x", Path("x"), object(), {1: 2}, {"deep": [{"x": {3}}]}, enum.Enum("E", "a")]
)
def test_what_json_has_no_word_for_is_refused(value):
    with pytest.raises(TypeError, match="cannot fingerprint value"):
        canonical(value)


@pytest.mark.parametrize("value", [float("nan"), [float("inf")]])
def test_numbers_that_are_none_are_refused(value):
    with pytest.raises(ValueError, match="is not a number"):
        canonical(value)


@pytest.mark.parametrize(
    "override",
    [
        "stages.mlp_warmup.resources.workers=4", "stages.mlp_warmup.deepspeed=2",
        "stages.mlp_warmup.checkpoint.every=7", "stages.evaluate.batch=3", "storage=/elsewhere",
        "name=other", "data.a.meta=moved.json",
    ],
)  # fmt: skip
def test_how_a_stage_runs_is_not_what_it_is(tmp_path, override):
    assert changed(tmp_path, override) == set()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.full_finetune.lr=1e-4", {"full_finetune", "evaluate", "export"}),
        ("stages.full_finetune.precision=fp32", {"full_finetune", "evaluate", "export"}),
        ("stages.mlp_warmup.global_batch=8", {"mlp_warmup", "full_finetune", "evaluate", "export"}),
        ("stages.b_data.max_tiles=6", {"b_data", "full_finetune", "evaluate", "export"}),
        ("stages.evaluate.limit=5", {"evaluate"}),
        ("data.b.system=hello", {"b_data", "full_finetune", "evaluate", "export"}),
        ("model.drop_path=0.1", {"mlp_warmup", "full_finetune", "evaluate", "export"}),
        ("seed=1", {"mlp_warmup", "full_finetune", "evaluate", "export"}),
    ],
)
def test_a_change_reaches_the_stage_and_what_depends_on_it(tmp_path, override, expected):
    assert changed(tmp_path, override) == expected


def test_names_of_stages_and_mixtures_are_not_identity(tmp_path):
    before = identities(tmp_path)
    digests = {"a_data": {"sha": "1"}, "bb_data": {"sha": "2"}}
    after = identities(
        tmp_path, digests=digests, edit=[("b_data", "more"), ("  b: ", "  bb: "), ("data: b}", "data: bb}")]
    )
    assert fingerprint(before["export"]) == fingerprint(after["export"])


def test_the_order_of_modules_and_equal_numbers_do_not_matter(tmp_path):
    line = "full_finetune: {{needs: [b_data, mlp_warmup], lr: 1e-3".replace("{{", "{")
    assert (
        changed(tmp_path, edit=[(line, line + ", train: [language, mlp, vit], weight_decay: 1e-2, max_grad_norm: 1")])
        == set()
    )


def test_two_stages_that_make_the_same_are_one(tmp_path):
    ids = identities(tmp_path, edit=[("  export:", "  again: {kind: export, needs: [full_finetune]}\n  export:")])
    assert fingerprint(ids["again"]) == fingerprint(ids["export"])


def test_unknown_sources_make_unknown_what_depends_on_them(tmp_path):
    ids = identities(tmp_path, digests={"a_data": {"sha": "1"}})
    assert {name for name, identity in ids.items() if identity is None} == {
        "b_data",
        "full_finetune",
        "evaluate",
        "export",
    }


def test_new_data_changes_what_is_made_of_it(tmp_path):
    expected = {"b_data", "full_finetune", "evaluate", "export"}
    assert changed(tmp_path, digests={"a_data": {"sha": "1"}, "b_data": {"sha": "3"}}) == expected


def model_folder(folder: Path, weight: bytes = b"1234") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "model.safetensors").write_bytes(weight)
    return folder


def test_model_folders_count_by_content(tmp_path):
    a = model_folder(tmp_path / "a" / "qwen")
    b = model_folder(tmp_path / "b" / "qwen")
    first, second = identities(tmp_path, language=str(a)), identities(tmp_path, language=str(b))
    assert first == second
    (b / "model.safetensors").write_bytes(b"1235")
    third = identities(tmp_path, language=str(b))
    assert third["mlp_warmup"] != first["mlp_warmup"]
    assert third["a_data"] == first["a_data"], "weights do not change the length of a sample"
    (b / "tokenizer.json").write_text('{"version": "1.1"}')
    assert identities(tmp_path, language=str(b))["a_data"] != first["a_data"]


def test_absent_weights_are_unknown(tmp_path):
    ids = identities(tmp_path, language="./nowhere")
    assert all(identity is None for identity in ids.values())
    folder = model_folder(tmp_path / "no-weights")
    (folder / "model.safetensors").unlink()
    ids = identities(tmp_path, language=str(folder))
    assert ids["a_data"] is not None and ids["mlp_warmup"] is None


def test_large_weights_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SMALL", 1 << 20)
    folder = model_folder(tmp_path / "m", bytes(8 << 20))
    before = weights.weights_digest(folder)
    with (folder / "model.safetensors").open("r+b") as file:  # one tensor of one MiB, the rest as it was
        file.seek((3 << 20) + 12345)
        file.write(b"\1" * (1 << 20))
    assert weights.weights_digest(folder) != before


def test_source_digests_of_real_files(tmp_path):
    (tmp_path / "x.yaml").write_text(SPEC.format(vision="tiny-vit", language="tiny-qwen2"))
    experiment = load_spec(tmp_path / "x.yaml")
    digest = source_digest_of(experiment)
    assert digest("a") is None
    (tmp_path / "a.json").write_text('{"a": {"root": ".", "annotation": "a.jsonl"}}')
    assert source_digest_of(experiment)("a") is None
    line = '{"id": 0, "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}\n'
    (tmp_path / "a.jsonl").write_text(line)
    first = source_digest_of(experiment)("a")
    (tmp_path / "a.jsonl").write_text(line * 2)
    assert first is not None and source_digest_of(experiment)("a") != first
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError):
        source_digest_of(experiment)("a")
