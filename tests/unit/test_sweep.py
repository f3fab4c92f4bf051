"""A sweep: which stages it makes, what they share, and that a mistake is told once, at its line."""

import re
from typing import Any

import pytest

from modeling.errors import UserError
from orchestrator.fingerprint import fingerprint, stage_identities
from orchestrator.ledger import Ledger
from orchestrator.placement import Machine
from orchestrator.plan import make_plan, write_identity
from orchestrator.scheduler import run_all
from orchestrator.sharing import distinct_needs, saving, shared_with, told
from orchestrator.spec import load_spec
from orchestrator.store import MemoryStore

GRID = """name: grid
storage: runs
sweep:
  vision: [tiny-vit-s, tiny-vit]
  language: [tiny-qwen2-s, tiny-qwen2]
  fraction: [0.25, 1.0]
model:
  vision: ${vision}
  language: ${language}
models:
  words: {vision: tiny-vit-s, language: "${language}"}
data: {a: {meta: a.json}}
defaults: {lr: 1e-3, global_batch: 4}
stages:
  a_data: {kind: prepare, data: a}
  language_pretrain: {needs: [a_data], model: words, steps: 10}
  mlp_warmup: {needs: [a_data], language_from: language_pretrain, steps: 10}
  full_finetune:
    needs: [a_data, mlp_warmup]
    steps: 10
    fraction: ${fraction}
  evaluate: {needs: [a_data, full_finetune]}
  scaling: {needs: [evaluate]}
"""


def load(folder, text=GRID, *overrides) -> Any:
    (folder / "grid.yaml").write_text(text)
    return load_spec(folder / "grid.yaml", overrides)


def planned(experiment, store=None):
    found = stage_identities(experiment, lambda mixture: {"sha": "1"})
    plans = make_plan(experiment, found, store)
    identities = {name: identity for name, identity in found.items() if identity is not None}
    assert len(identities) == len(found)
    return identities, plans


def test_a_stage_becomes_one_for_each_combination_of_its_own_axes(tmp_path):
    text = GRID.replace("{kind: prepare, data: a}", "{kind: prepare, data: a, model: plain}").replace(
        "models:\n", "models:\n  plain: {vision: tiny-vit, language: tiny-qwen2}\n"
    )
    stages = load(tmp_path, text).stages
    count = {
        name: sum(key.startswith(name) for key in stages) for name in ("a_data", "language", "mlp", "full", "eval")
    }
    assert count == {"a_data": 1, "language": 2, "mlp": 4, "full": 8, "eval": 8} and len(stages) == 24
    one = stages["full_finetune-tiny-vit-tiny-qwen2-s-0_25"].params
    assert one.needs == ("a_data", "mlp_warmup-tiny-vit-tiny-qwen2-s") and one.fraction == 0.25
    assert one.model == "model-tiny-vit-tiny-qwen2-s"
    warmup = stages["mlp_warmup-tiny-vit-tiny-qwen2-s"].params
    assert warmup.language_from == "language_pretrain-tiny-qwen2-s" and warmup.fraction == 1.0


def test_the_model_of_a_variant_is_that_of_its_values(tmp_path):
    experiment = load(tmp_path)
    stage = experiment.stages["full_finetune-tiny-vit-s-tiny-qwen2-1_0"]
    assert (experiment.model_of(stage).vision, experiment.model_of(stage).language) == ("tiny-vit-s", "tiny-qwen2")
    assert experiment.model is None
    assert experiment.sweep.chosen[stage.name] == {"vision": "tiny-vit-s", "language": "tiny-qwen2", "fraction": 1.0}
    assert experiment.model_of(experiment.stages["scaling"]) is not None


def test_what_collects_needs_all_variants_and_varies_only_by_its_own_references(tmp_path):
    assert len(load(tmp_path).stages["scaling"].params.needs) == 8
    by_vision = GRID.replace("{needs: [evaluate]}", "{needs: [evaluate], task: '${vision}'}")
    stages = load(tmp_path, by_vision).stages
    assert stages["scaling-tiny-vit"].params.needs == tuple(n for n in stages if n.startswith("evaluate-tiny-vit-tiny"))
    assert len(stages["scaling-tiny-vit-s"].params.needs) == 4


def test_values_keep_their_type_and_are_written_out_in_text(tmp_path):
    text = GRID.replace("fraction: [0.25, 1.0]", "fraction: [0.25, 1.0]\n  steps: [20, 40]").replace(
        "    steps: 10\n", "    steps: ${steps}\n"
    ).replace("{needs: [a_data, full_finetune]}", "{needs: [a_data, full_finetune], prompts: "
              "{direct: {suffix: 'after ${steps} at ${fraction}, not $${steps}'}}}")  # fmt: skip
    stages = load(tmp_path, text).stages
    assert stages["full_finetune-tiny-vit-tiny-qwen2-0_25-40"].params.steps == 40
    suffix = stages["evaluate-tiny-vit-tiny-qwen2-0_25-40"].params.prompts["direct"].suffix
    assert suffix == "after 40 at 0.25, not ${steps}"


def test_a_name_of_a_variant_can_be_needed(tmp_path):
    text = GRID + "  export: {needs: [full_finetune-tiny-vit-tiny-qwen2-1_0]}\n"
    assert load(tmp_path, text).stages["export"].params.needs == ("full_finetune-tiny-vit-tiny-qwen2-1_0",)


def test_overrides_set_all_variants_one_variant_or_an_axis(tmp_path):
    one = "full_finetune-tiny-vit-tiny-qwen2-1_0"
    stages = load(tmp_path, GRID, "stages.full_finetune.lr=5e-4", f"stages.{one}.lr=7e-4").stages
    rates = {name: s.params.lr for name, s in stages.items() if name.startswith("full")}
    assert rates.pop(one) == 7e-4 and set(rates.values()) == {5e-4}
    few = load(tmp_path, GRID, "sweep.vision=[tiny-vit]", "sweep.fraction=[0.5]").stages
    assert [name for name in few if name.startswith("full")] == [
        "full_finetune-tiny-vit-tiny-qwen2-s-0_5", "full_finetune-tiny-vit-tiny-qwen2-0_5"
    ]  # fmt: skip


def line_of(text, part):
    return next(i for i, line in enumerate(text.split("\n"), 1) if part in line)


@pytest.mark.parametrize(
    ("old", "new", "at", "said"),
    [
        ("fraction: ${fraction}", "fraction: ${fractoin}", "${fractoin}", "unknown axis 'fractoin' → did you mean"),
        ("fraction: ${fraction}", "fraction: 0.5", "[0.25, 1.0]", "sweep.fraction: no stage depends on it"),
        ("[0.25, 1.0]", "[]", "fraction: []", "sweep.fraction: has no values"),
        ("[0.25, 1.0]", "0.25", "fraction: 0.25", "sweep.fraction: must be a list, found 0.25"),
        ("[0.25, 1.0]", "[0.25, 0.25]", "[0.25, 0.25]", "would both be called '0_25'"),
        ("[0.25, 1.0]", "[{a: 1}]", "[{a: 1}]", "must be text or a number"),
        ("fraction: [", "Fraction: [", "Fraction: [", "'Fraction' is not a valid name of an axis"),
        ("[0.25, 1.0]", "[0.25, 2]", "fraction: ${", "stages.full_finetune.fraction: must be less than or equal to 1"),
        ("[tiny-vit-s, tiny-vit]", "[tiny-vot]", "vision: ${", "'tiny-vot' is neither a preset nor a folder"),
        ("needs: [a_data, mlp_warmup]", "needs: [a_data, mlp_wamup]", "mlp_wamup", "unknown stage 'mlp_wamup'"),
        ("    steps: 10", "    stepz: 10", "stepz", "stages.full_finetune: unknown key 'stepz'"),
        ("meta: a.json", "meta: '${vision}.json'", "meta: '${v", "the axis 'vision' has no meaning here"),
        ("words: {", "model: {vision: tiny-vit, language: tiny-qwen2}\n  words: {", "  model: {", "takes this name"),
        ("[a_data], model: words", "[a_data, mlp_warmup], model: words", "language_pretrain: {", "a cycle: "),
        ("  scaling:", "  evaluate-tiny-vit-tiny-qwen2-1_0: {kind: export}\n  scaling:", "evaluate: {", "two of them"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_once_at_the_line_of_its_template(tmp_path, old, new, at, said):
    assert old in GRID
    text = GRID.replace(old, new, 1)
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    told = [line for line in str(caught.value).split("\n") if said in line]
    assert len(told) == 1, str(caught.value)
    assert re.match(rf".*grid\.yaml:{line_of(text, at)}: ", told[0]), told[0]


def test_a_lender_has_the_part_that_it_lends(tmp_path):
    """Its fingerprint stands for that part of the borrower, so two language models would become one."""
    swept = GRID.replace('words: {vision: tiny-vit-s, language: "${language}"}',
                         "words: {vision: tiny-vit-s, language: tiny-qwen2}")  # fmt: skip
    with pytest.raises(UserError) as caught:
        planned(load(tmp_path, swept))
    told = str(caught.value).split("\n")
    assert len(told) == 2 and all("the language model of 'language_pretrain" in one for one in told)
    assert f"grid.yaml:{line_of(swept, '  mlp_warmup:')}: stages.mlp_warmup-tiny-vit-s-tiny-qwen2-s" in told[0]
    vision = LENT.replace("language_from", "vision_from")
    with pytest.raises(UserError, match=r"mlp_warmup.vision_from: the vision encoder .* hidden_size 48, not 96"):
        planned(load(tmp_path, vision))
    words = LENT.replace("large: {vision: tiny-vit, language: tiny-qwen2",
                         "large: {vision: tiny-vit, language: tiny-qwen2, tokenizer: bytes")  # fmt: skip
    with pytest.raises(UserError, match="its tokenizer is not this one's"):
        planned(load(tmp_path, words))
    absent = LENT.replace("large: {vision: tiny-vit,", "large: {vision: ./not-there,")
    experiment = load(tmp_path, absent)
    assert stage_identities(experiment, lambda mixture: {"sha": "1"})["mlp_warmup"] is None, "nothing is guessed"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("language_from: language_pretrain", 'language_from: "${source}"'),
        ("needs: [a_data, mlp_warmup]", 'needs: [a_data, "${source}"]'),
        ("[a_data, full_finetune]}", "[a_data, full_finetune], sampling: {samples: 2}, "
         'rerank: {best: {model: "${source}"}}}'),
    ],
)  # fmt: skip
def test_a_reference_that_stands_for_a_swept_stage_is_refused(tmp_path, old, new):
    assert old in GRID
    text = GRID.replace(old, new).replace("sweep:\n", "sweep:\n  source: [language_pretrain, a_data]\n")
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert "stands for 'language_pretrain', which is swept itself" in str(caught.value), str(caught.value)
    assert f"grid.yaml:{line_of(text, '${source}')}: " in str(caught.value)


def test_a_reference_may_stand_for_a_model_that_is_swept(tmp_path):
    text = (
        GRID.replace("model: words, steps", 'model: "${which}", steps')
        .replace("models:\n", "models:\n  plain: {vision: tiny-vit, language: tiny-qwen2}\n")
        .replace("sweep:\n", "sweep:\n  which: [words, plain]\n")
        .replace("language_from: language_pretrain, ", "")
    )
    stages = load(tmp_path, text).stages
    models = {name: stage.params.model for name, stage in stages.items() if name.startswith("language_pretrain")}
    for language in ("tiny-qwen2-s", "tiny-qwen2"):
        assert models[f"language_pretrain-words-tiny-vit-{language}"] == f"words-{language}"
        assert models[f"language_pretrain-plain-tiny-vit-{language}"] == "plain"


@pytest.mark.parametrize("swept", [True, False])
def test_a_reference_in_a_key_is_told(tmp_path, swept):
    text = LENT.replace("full_finetune: {", 'full_finetune: {packing: {"${size}": 5}, ')
    text = text.replace("stages:\n", "sweep: {size: [max_tokens]}\nstages:\n") if swept else text
    with pytest.raises(UserError, match=r"full_finetune.packing.* a key cannot refer to an axis"):
        load(tmp_path, text)


def test_without_a_sweep_references_in_text_are_told_and_escapes_are_text(tmp_path):
    with_prompt = "{} evaluate: {{needs: [a_data, full_finetune], prompts: {{direct: {{suffix: 'of {}{{name}}'}}}}}}\n"
    with pytest.raises(UserError, match=r"refers to an axis 'name', and there is no 'sweep:'.*'\$\$\{name\}'"):
        load(tmp_path, with_prompt.format(LENT + " ", "$"))
    stages = load(tmp_path, with_prompt.format(LENT + " ", "$$")).stages
    assert stages["evaluate"].params.prompts["direct"].suffix == "of ${name}"


def test_an_override_that_is_wrong_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"^override 'stages.full_finetune.lr=-1': stages.full_finetune.lr: must be"
    ) as e:
        load(tmp_path, GRID, "stages.full_finetune.lr=-1")
    assert str(e.value).count("found -1") == 1
    with pytest.raises(UserError, match="unknown stage 'full_finetune-tiny-vot'"):
        load(tmp_path, GRID, "stages.full_finetune-tiny-vot.lr=1")


def test_a_reference_without_a_sweep_is_told(tmp_path):
    text = re.sub(r"sweep:\n(  .*\n)+", "", GRID, count=1)
    with pytest.raises(UserError, match="refers to an axis 'vision', and there is no 'sweep:'"):
        load(tmp_path, text)


def test_equal_stages_are_planned_once_and_the_saving_is_counted(tmp_path):
    experiment = load(tmp_path)
    identities, plans = planned(experiment)
    actions = {item.name: item.action for item in plans}
    # one tokenizer and tile for all models: one prepared mixture; text alone knows nothing of the vision axis
    prepared = [name for name in actions if name.startswith("a_data")]
    assert len(prepared) == 4 and [actions[name] for name in prepared] == ["run", "share", "share", "share"]
    pretrained = [name for name in actions if name.startswith("language_pretrain")]
    assert len(pretrained) == 4 and [actions[name] for name in pretrained] == ["run", "run", "share", "share"]
    shared = shared_with(plans)
    assert all(identities[name] == identities[maker] for name, maker in shared.items())
    found = saving(experiment.sweep, plans)
    distinct = len({fingerprint(identity) for identity in identities.values()})
    # 8 combinations × 5 stages, and the one that collects; 1 + 2 + 4 + 8 + 8 + 1 are different
    assert (found.naive, found.distinct, found.saved) == (41, 24, 17) and distinct == 24
    assert "2 vision × 2 language × 2 fraction = 8 combinations" in told(experiment.sweep, plans)[0]
    assert "24 of them distinct: 17 saved by sharing" in told(experiment.sweep, plans)[1]


def test_only_the_makers_run_and_what_needs_the_others_waits_for_them(tmp_path):
    experiment = load(tmp_path)
    _, plans = planned(experiment)
    shared, started = shared_with(plans), []
    failed = run_all(
        experiment, set(), lambda: [Machine({"CPU": 2.0})], started.append, lambda names: None, shared=shared
    )
    assert not failed and len(started) == 24 and not set(started) & set(shared)
    places = {name: i for i, name in enumerate(started)}
    for name, needs in distinct_needs(experiment.needs, shared).items():
        assert all(places[need] < places[name] for need in needs)


def test_a_finished_stage_is_finished_under_all_its_names(tmp_path):
    experiment, store = load(tmp_path), MemoryStore()
    identities, plans = planned(experiment, store)
    first = plans[0]
    ledger = Ledger(store, write_identity(store, first.kind, identities[first.name]))
    token = ledger.start_attempt(ledger.claim({"host": "h"}), 1)
    ledger.append("completed", token, manifest={}, summary={}, train_s=1.0)
    again = {item.name: item for item in planned(experiment, store)[1]}
    prepared = [again[name] for name in again if name.startswith("a_data")]
    assert {item.action for item in prepared} == {"reuse"} and prepared[
        1
    ].reason == f"completed, shared with {first.name}"
    assert again["language_pretrain-tiny-vit-s-tiny-qwen2-s"].action == "run"


def test_a_fraction_left_out_is_the_stage_it_was_before_there_were_fractions(tmp_path):
    experiment = load(tmp_path)
    whole, part = (experiment.stages[f"full_finetune-tiny-vit-tiny-qwen2-{f}"].params for f in ("1_0", "0_25"))
    assert "fraction" not in whole.identity() and part.identity()["fraction"] == 0.25


LENT = GRID.split("sweep:")[0] + """models:
  small: {vision: tiny-vit-s, language: tiny-qwen2}
  large: {vision: tiny-vit, language: tiny-qwen2}
data: {a: {meta: a.json}}
defaults: {lr: 1e-3, global_batch: 4}
stages:
  a_data: {kind: prepare, data: a, model: small}
  language_pretrain: {needs: [a_data], model: small, steps: 10}
  mlp_warmup: {needs: [a_data], model: large, language_from: language_pretrain, steps: 10}
  full_finetune: {needs: [a_data, mlp_warmup], steps: 10}
"""  # fmt: skip


def test_a_model_that_takes_a_language_model_has_that_as_its_parent(tmp_path):
    identities, _ = planned(load(tmp_path, LENT))
    warmup, pretrain = identities["mlp_warmup"], identities["language_pretrain"]
    assert warmup["parents"]["language"] == [fingerprint(pretrain)] and "train" not in warmup["parents"]
    assert "language" not in warmup["model"] and warmup["model"]["vision"] == "tiny-vit"
    for old, new, said in (
        ("language_from: language_pretrain", "language_from: a_data", "unknown training stage 'a_data'"),
        ("full_finetune: {", "full_finetune: {language_from: language_pretrain, ", "which has a language model"),
        ("language_from: l", "vision_from: language_pretrain, language_from: l", "gives the vision encoder already"),
    ):
        with pytest.raises(UserError, match=said):
            load(tmp_path, LENT.replace(old, new))
