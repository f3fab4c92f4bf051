"""The published family: sizes, settings, and who shares whose vision encoder (arXiv 2412.05271, Tables 1 to 3)."""

from pathlib import Path

import pytest

from modeling.errors import UserError
from modeling.estimate import human, measure, skeleton
from modeling.presets import LANGUAGE, PUBLISHED, VISION, language_fields, resolve, sizes, vision_fields
from orchestrator.cli.main import main
from orchestrator.fingerprint import stage_identities
from orchestrator.spec import load_spec
from stages.params import ModelParams

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
# Table 2, and recipe Table 1: model -> (vision, language, printed parameters in billions)
FAMILY = {
    "1b": ("internvit-300m", "qwen2.5-0.5b", "0.9"), "2b": ("internvit-300m", "internlm2.5-1.8b", "2.2"),
    "4b": ("internvit-300m", "qwen2.5-3b", "3.7"), "8b": ("internvit-300m", "internlm2.5-7b", "8.1"),
    "26b": ("internvit-6b", "internlm2.5-20b", "25.5"), "38b": ("internvit-6b", "qwen2.5-32b", "38.4"),
    "78b": ("internvit-6b", "qwen2.5-72b", "78.4"),
}  # fmt: skip


def by_hand(vision: str, language: str) -> dict[str, int]:
    """Parameters of every module from its configuration, written out."""
    v, t = vision_fields(vision), language_fields(language)
    width, inner, depth = v["hidden_size"], v["intermediate_size"], v["num_hidden_layers"]
    norm = width if v.get("norm_type") == "rms_norm" else 2 * width
    block = 4 * width * width + width + (3 * width if v["attention_bias"] else 0)  # q, k, v, o; o always has a bias
    block += 2 * width if v.get("use_qk_norm") else 0
    block += 2 * width * inner + inner + width + 2 * norm + 2 * width  # mlp, norms, layer scales
    patches = (v["image_size"] // v["patch_size"]) ** 2
    vit = depth * block + width * 3 * v["patch_size"] ** 2 + width + width + (patches + 1) * width
    hidden, layers = t["hidden_size"], t["num_hidden_layers"]
    head = hidden // t["num_attention_heads"]
    keys = head * t["num_key_value_heads"]
    mlp = 2 * 4 * width + 4 * width * hidden + hidden + hidden * hidden + hidden
    bias = hidden + 2 * keys if t["model_type"] == "qwen2" else 0
    layer = 2 * hidden * hidden + 2 * hidden * keys + bias + 3 * hidden * t["intermediate_size"] + 2 * hidden
    return {"vit": vit, "mlp": mlp, "language": layers * layer + hidden + 2 * t["vocab_size"] * hidden}


@pytest.mark.parametrize("name", FAMILY)
def test_parameters_are_the_published_ones_and_exactly_the_configurations(name):
    vision, language, printed = FAMILY[name]
    found = measure(skeleton(vision_fields(vision), language_fields(language)))
    assert found.parameters == by_hand(vision, language)
    assert f"{found.total / 1e9:.1f}" == printed and found.tokens_per_tile == 256
    assert human(found.total) == ("938M" if name == "1b" else f"{printed}B")


def test_the_vision_encoders_are_those_of_table_1():
    """0.3B and 5.5B."""
    counts = [by_hand(name, "qwen2.5-0.5b")["vit"] for name in ("internvit-300m", "internvit-6b")]
    assert [f"{count / 1e9:.1f}" for count in counts] == ["0.3", "5.5"]


def test_a_folder_that_is_not_there_yet_has_the_sizes_of_its_published_name(tmp_path):
    for name, preset in PUBLISHED.items():
        field = "vision" if preset in VISION else "language"
        params = ModelParams(**{"vision": "micro-vit", "language": "micro-qwen2"} | {field: f"{tmp_path}/{name}"})
        known = sizes(params)
        assert known is not None
        assert known[field == "language"] == (vision_fields if field == "vision" else language_fields)(preset)
    assert sizes(ModelParams(vision="micro-vit", language=f"{tmp_path}/mine")) is None


def test_a_preset_without_a_tokenizer_says_so():
    published = next(name for name in LANGUAGE if LANGUAGE[name]["tokenizer"] is None)
    with pytest.raises(UserError, match=r"model\.tokenizer"):
        resolve(ModelParams(vision="internvit-300m", language=published))


# Table 3: model -> stage -> (lr, packed batch, drop path, weight decay)
TABLE_3 = {
    "1b": {"mlp_warmup": (2e-4, 512, 0.0, 0.01), "full_finetune": (4e-5, 512, 0.1, 0.01)},
    "2b": {"mlp_warmup": (2e-4, 512, 0.0, 0.01), "full_finetune": (4e-5, 512, 0.1, 0.01)},
    "4b": {"mlp_warmup": (2e-4, 512, 0.0, 0.01), "full_finetune": (4e-5, 512, 0.1, 0.01)},
    "8b": {
        "mlp_warmup": (2e-4, 512, 0.0, 0.05), "vit_incremental": (1e-5, 1024, 0.1, 0.05),
        "full_finetune": (4e-5, 512, 0.1, 0.05),
    },
    "26b": {
        "mlp_warmup": (2e-4, 512, 0.0, 0.05), "vit_incremental": (1e-5, 1024, 0.4, 0.05),
        "full_finetune": (2e-5, 512, 0.4, 0.05),
    },
    "38b": {"mlp_warmup": (2e-4, 512, 0.0, 0.05), "full_finetune": (2e-5, 512, 0.4, 0.05)},
    "78b": {"mlp_warmup": (2e-4, 512, 0.0, 0.05), "full_finetune": (2e-5, 512, 0.4, 0.05)},
}  # fmt: skip
TOKENS = {  # Table 3, billions
    "1b": {"mlp_warmup": 191, "full_finetune": 176}, "2b": {"mlp_warmup": 277, "full_finetune": 176},
    "4b": {"mlp_warmup": 164, "full_finetune": 88},
    "8b": {"mlp_warmup": 22, "vit_incremental": 76, "full_finetune": 44},
    "26b": {"mlp_warmup": 31, "vit_incremental": 146, "full_finetune": 44},
    "38b": {"mlp_warmup": 107, "full_finetune": 44}, "78b": {"mlp_warmup": 76, "full_finetune": 44},
}  # fmt: skip


def check_table(stages: dict, name: str) -> None:
    assert set(stages) == set(TABLE_3[name])
    for kind, stage in stages.items():
        params = stage.params
        found = (params.lr, params.global_batch, params.drop_path, params.weight_decay)
        assert found == TABLE_3[name][kind], (name, kind)
        assert (params.packing.max_tokens, params.packing.max_tiles) == (16384, 48)
        assert params.steps * params.global_batch * 16384 / 1e9 == pytest.approx(TOKENS[name][kind], rel=0.06)


@pytest.mark.parametrize("name", TABLE_3)
def test_one_model_alone_has_the_papers_settings(name):
    experiment = load_spec(EXPERIMENTS / f"internvl2_5-{name}.yaml")
    check_table({s.kind_name: s for s in experiment.stages.values() if s.kind.trains}, name)


def test_the_family_has_the_papers_settings_and_shares_its_vision_encoders():
    experiment = load_spec(EXPERIMENTS / "family.yaml")
    for name in TABLE_3:
        mine = [s for s in experiment.stages.values() if s.kind.trains and s.params.model == name]
        check_table({s.kind_name: s for s in mine}, name)
        fields = sizes(experiment.models[name])
        assert fields is not None
        assert fields == tuple(f(p) for f, p in zip((vision_fields, language_fields), FAMILY[name]))
    lent = {s.params.model: s.params.vision_from for s in experiment.stages.values() if s.kind.trains
            and s.params.vision_from}  # fmt: skip
    small, large = "vit_incremental_8b", "vit_incremental_26b"
    assert lent == {"1b": small, "2b": small, "4b": small, "38b": large, "78b": large}
    assert small in experiment.needs["mlp_warmup_1b"]


def test_plan_shows_the_family(capsys):
    assert main(["plan", str(EXPERIMENTS / "family.yaml")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "vit_incremental_8b makes the vision encoder of 1b, 2b, 4b: they skip ViT incremental learning" in out
    assert "vit_incremental_26b makes the vision encoder of 38b, 78b: they skip ViT incremental learning" in out
    for name, (vision, language, printed) in FAMILY.items():
        counts = by_hand(vision, language)
        for module in counts.values():
            assert f"{module:,}" in out
        assert ("938M" if name == "1b" else f"{printed}B") in out


SHARED = """name: x
storage: runs
models:
  large: {vision: micro-vit, language: micro-qwen2}
  small: {vision: micro-vit, language: tiny-qwen2}
data: {a: {meta: a.json}}
defaults: {lr: 1e-3, global_batch: 4}
stages:
  a_data: {kind: prepare, model: large, data: a}
  mlp_warmup: {needs: [a_data], model: large, steps: 10}
  vit_incremental: {needs: [a_data, mlp_warmup], steps: 10}
  small_warmup: {kind: mlp_warmup, needs: [a_data], model: small, vision_from: vit_incremental, steps: 10}
  small_finetune: {kind: full_finetune, needs: [a_data, small_warmup], steps: 10}
"""


def identities(folder, *overrides, text=SHARED):
    (folder / "x.yaml").write_text(text)
    return stage_identities(load_spec(folder / "x.yaml", overrides), lambda stage: {"sha": "1"})


def test_a_stage_that_takes_a_vision_encoder_is_another_one_when_that_changes(tmp_path):
    before, after = identities(tmp_path), identities(tmp_path, "stages.vit_incremental.lr=2e-3")
    assert before["small_warmup"] != after["small_warmup"] and before["mlp_warmup"] == after["mlp_warmup"]
    assert "vision" in before["small_warmup"]["parents"] and "train" not in before["small_warmup"]["parents"]
    assert before["small_finetune"] != after["small_finetune"]


def test_models_with_one_tokenizer_and_tile_share_their_data(tmp_path):
    other = SHARED.replace("{kind: prepare, model: large", "{kind: prepare, model: small")
    assert identities(tmp_path)["a_data"] == identities(tmp_path, text=other)["a_data"]


def test_a_stage_goes_on_with_the_model_of_the_one_before(tmp_path):
    (tmp_path / "x.yaml").write_text(SHARED)
    experiment = load_spec(tmp_path / "x.yaml")
    assert [experiment.stages[name].params.model for name in ("vit_incremental", "small_finetune")] == [
        "large",
        "small",
    ]
    assert experiment.model_of(experiment.stages["small_finetune"]).language == "tiny-qwen2"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("model: small, vision", "model: smal, vision", "unknown model 'smal'"),
        ("[a_data, mlp_warmup],", "[a_data, mlp_warmup], model: small,", "trains model 'small'"),
        ("model: small, vision", "vision", "says no model"),
        ("vision_from: vit_incremental", "vision_from: a_data", "unknown training stage 'a_data'"),
        ("[a_data, small_warmup],", "[a_data, small_warmup], vision_from: mlp_warmup,", "has a vision encoder"),
        ("vision_from: vit_incremental", "vision_from: nowhere", "unknown training stage 'nowhere'"),
    ],
)
def test_a_wrong_model_or_vision_source_is_refused(tmp_path, old, new, said):
    assert old in SHARED
    (tmp_path / "x.yaml").write_text(SHARED.replace(old, new))
    with pytest.raises(UserError, match=said):
        load_spec(tmp_path / "x.yaml")
