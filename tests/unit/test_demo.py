"""`stageline demo` without its page: what is asked, how the vote is counted and shown, and what is refused."""

import socket
from pathlib import Path

import pytest
from conftest import picture
from hypothesis import given
from hypothesis import strategies as st

from modeling.errors import UserError
from modeling.internvl import save_model
from modeling.weights import open_source
from orchestrator.cli.main import main
from orchestrator.demo.asking import FORMS, LONG, SHORT, Served, ask, reply
from orchestrator.demo.page import _free, answer_html, responses_html, votes_html
from orchestrator.fingerprint import fingerprint
from orchestrator.ledger import Ledger
from orchestrator.plan import record_mapping, stage_prefix
from orchestrator.store import FileStore
from stages.evaluate.items import Item
from stages.evaluate.prompts import official
from stages.evaluation import Prompt
from stages.export import export_folder


def item(kind="number"):
    return Item("demo", "demo", "?", kind, "exact", ())


def said(*texts, kind="number", cut=False):
    return reply(item(kind), [(text, 5, cut) for text in texts])


def test_votes_are_on_answers_and_not_on_their_spelling():
    """Raw strings would elect 7, which is there twice in one spelling."""
    found = said("It is 7.", "It is 7.", r"\boxed{0.5}", r"so \boxed{1/2}", "Answer: 0.50", "I cannot tell.")
    assert found.votes == [("0.5", 3), ("7", 2)] and found.answer == "0.5" and found.unreadable == 1
    assert [its.answer for its in found.responses] == ["7", "7", "0.5", "1/2", "0.5", None]


def test_of_equal_counts_the_first_to_reach_it_wins_and_is_shown_first():
    found = said("3", "4", "4", "3")
    assert found.answer == "4" and found.votes == [("4", 2), ("3", 2)]


def test_where_nothing_can_be_read_nothing_wins():
    found = said("who knows", "", kind="number")
    assert (found.answer, found.votes, found.unreadable) == (None, [], 2)
    assert "No answer could be read" in answer_html(found) and "2 could not be read" in answer_html(found)


def test_an_answer_cut_at_its_limit_counts_only_where_it_is_stated():
    assert said("first 3 and then 4", cut=True).answer is None
    assert said(r"\boxed{3} and more", cut=True).answer == "3"


@given(st.lists(st.sampled_from(["1", "2", "3.0", "3", "none of it"]), min_size=1, max_size=12))
def test_all_samples_are_accounted_for(texts):
    found = said(*texts)
    assert sum(votes for _, votes in found.votes) + found.unreadable == len(texts) == len(found.responses)
    assert [votes for _, votes in found.votes] == sorted((votes for _, votes in found.votes), reverse=True)


def test_what_a_model_writes_is_shown_as_text():
    hostile = "<script>alert(1)</script> & <img src=x onerror=alert(2)>"
    found = said(hostile, hostile, hostile[::-1], kind="text")
    for shown in (answer_html(found), votes_html(found), responses_html(found)):
        assert "<script" not in shown and "<img" not in shown and "&lt;script&gt;" in shown


def test_bars_are_as_long_as_the_votes_and_one_sample_has_none():
    shown = votes_html(said("1", "1", "1", "2", "?"))
    assert [part.split("%")[0] for part in shown.split("width:")[1:]] == ["60.0", "20.0", "20.0"]
    assert "could not be read" in shown and votes_html(said("1")) == ""
    assert responses_html(said("1")).count("<details open>") == 1
    assert responses_html(said("1", "2")).count("<details>") == 2


# -- the model is asked as in evaluation -------------------------------------------------------------------


@pytest.fixture
def served(micro, monkeypatch):
    """A served micro model, and the calls of `sample`."""
    from modeling import sampling

    calls, original = [], sampling.sample

    def noting(model, tokenizer, questions, keys, **options):
        calls.append((questions[0], options))
        return original(model, tokenizer, questions, keys, **options | {"max_new_tokens": 4})

    monkeypatch.setattr(sampling, "sample", noting)
    return Served("micro", micro.build(seed=1), micro.tokenizer, ""), calls


@pytest.fixture
def files(tmp_path) -> list[Path]:
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(picture(i, 32, 32))
    return [tmp_path / "0.png", tmp_path / "1.png"]


def asked(served, *arguments, **options):
    """(text of the turn, question, options of `sample`, reply)"""
    found = ask(served[0], *arguments, **options)
    question, how = served[1][-1]
    return question.conversation[0]["value"], question, how, found


def test_the_question_is_put_as_in_training_and_evaluation(served, files):
    assert asked(served, " two plus two ")[0] == "two plus two"
    assert asked(served, "Which digit?", files[:1])[0] == "<image>\nWhich digit?"
    text, question, _, _ = asked(served, "Which is larger?", files)
    assert text == "Image-1: <image>\nImage-2: <image>\nWhich is larger?" and len(question.images) == 2
    assert asked(served, "Is <image> larger than <image>?", files)[0] == "Is <image> larger than <image>?"
    text = asked(served, "two plus two", form="cot", kind="number")[0]
    assert text == "two plus two\n" + official("cot", "number", "en")


def test_one_sample_is_greedy_and_several_are_drawn(served):
    _, _, how, found = asked(served, "two plus two")
    assert (how["temperature"], list(how["samples"]), how["max_new_tokens"], how["system"]) == (0, [0], SHORT, "")
    assert len(found.responses) == 1
    _, _, how, found = asked(served, "two plus two", form="cot", samples=5, temperature=0.9, seed=3)
    assert (how["temperature"], list(how["samples"]), how["max_new_tokens"]) == (0.9, [0, 1, 2, 3, 4], LONG)
    assert len(found.responses) == 5 and found == asked(served, "two plus two", form="cot", samples=5,
                                                        temperature=0.9, seed=3)[3]  # fmt: skip
    assert found != asked(served, "two plus two", form="cot", samples=5, temperature=0.9, seed=4)[3]


@pytest.mark.parametrize(
    ("question", "options", "message"),
    [
        ("  \n", {}, "there is no question"),
        ("a <image>?", {}, "more placeholders"),
        ("x", {"samples": 0}, "0 samples"),
        ("x", {"samples": 1000}, "1000 samples"),
        ("x", {"samples": 2, "temperature": 0}, "all the same"),
        ("a <IMG_CONTEXT>?", {}, "stands for pictures"),
    ],
)
def test_a_mistake_is_a_message(served, question, options, message):
    with pytest.raises(UserError, match=message):
        ask(served[0], question, **options)


def test_pictures_that_do_not_fit_are_told(served, files, tmp_path):
    with pytest.raises(UserError, match=r"fewer placeholders than images.*one <image> for each picture"):
        ask(served[0], "only <image>", files)
    (tmp_path / "letter.png").write_bytes(picture(0, 32, 32)[:60])
    with pytest.raises(UserError, match=r"^letter\.png: cannot be read") as caught:
        ask(served[0], "What?", [tmp_path / "letter.png"])
    assert str(tmp_path) not in str(caught.value)


# -- what is served -------------------------------------------------------------------------------------------

SPEC = """name: x
storage: runs
model: {vision: micro-vit, language: micro-qwen2}
data: {a: {meta: a.json, system: Be brief.}}
stages:
  a_data: {kind: prepare, data: a}
  mlp_warmup: {needs: [a_data], lr: 1e-3, global_batch: 4, steps: 10}
  evaluate:
    needs: [a_data, mlp_warmup]
    prompts: {direct: {}, cot: {suffix: Show your work., max_new_tokens: 48}}
  export: {needs: [mlp_warmup, evaluate]}
  official: {kind: export, needs: [mlp_warmup], layout: official}
  later: {kind: mlp_warmup, needs: [a_data], lr: 2e-3, global_batch: 4, steps: 10}
"""


@pytest.fixture(scope="module")
def folder(micro, tmp_path_factory):
    """An experiment whose stages mlp_warmup and export are completed."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "x.yaml").write_text(SPEC)
    store = FileStore(folder / "runs")
    save_model(micro.build(seed=1), micro.tokenizer, folder / "saved", 32)
    for stage, kind in (("mlp_warmup", "train"), ("export", "export"), ("official", "export"), ("a_data", "prepare")):
        identity = {"kind": kind, "stage": stage}
        prefix = stage_prefix(kind, fingerprint(identity))
        record_mapping(store, "x", stage, identity, fingerprint(identity))
        ledger = Ledger(store, prefix)
        token = ledger.start_attempt(ledger.claim({"host": "h"}), 1)
        result = f"{prefix}/result/e0001a0001"
        export_folder(open_source(folder / "saved"), folder / "runs" / result, "hf", f"From {stage}.")
        ledger.append("completed", token, manifest={"folder": result, "files": []}, summary={}, train_s=1.0)
    return folder


@pytest.fixture
def shown(monkeypatch):
    """(served, host, port) that reach the page, which is not served."""
    calls = []
    monkeypatch.setattr("orchestrator.demo.page.check_library", lambda: None)
    monkeypatch.setattr("orchestrator.demo.page.serve", lambda *arguments: calls.append(arguments))
    return calls


def test_a_trained_stage_is_asked_with_the_system_prompt_of_its_data_and_the_words_of_its_evaluation(folder, shown):
    assert main(["demo", str(folder / "x.yaml"), "mlp_warmup"]) == 0
    (served, host, port) = shown[0]
    assert (served.title, served.system, host, port) == ("x: mlp_warmup", "Be brief.", "127.0.0.1", 7860)
    assert served.forms == {"direct": Prompt(suffix=""), "cot": Prompt(suffix="Show your work.", max_new_tokens=48)}


def test_an_export_and_a_folder_are_asked_with_the_system_prompt_of_their_template(folder, shown, tmp_path):
    assert main(["demo", str(folder / "x.yaml"), "export", "--port", "8000"]) == 0
    templates = (folder / "runs" / "stages" / "export").glob("*/result/*/chat_template.jinja")
    (exported,) = (path for path in templates if "From export." in path.read_text())
    assert main(["demo", str(exported.parent)]) == 0
    assert [served.system for served, _, _ in shown] == ["From export."] * 2
    assert "cot" in shown[0][0].forms and shown[0][0].forms["cot"].suffix == "Show your work."
    assert shown[1][0].forms == FORMS
    assert main(["demo", str(folder / "saved")]) == 0
    assert shown[2][0].system is None  # no template: the official one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.yaml"], "stageline demo FOLDER, or stageline demo EXPERIMENT.yaml STAGE"),
        (["x.yaml", "absent"], "no stage 'absent'"),
        (["x.yaml", "later"], "was not run yet"),
        (["x.yaml", "a_data"], "leaves no model to ask"),
        (["x.yaml", "official"], "leaves no model to ask"),
        (["absent.yaml", "mlp_warmup"], "absent.yaml"),
        (["saved", "mlp_warmup"], "a folder has no stages"),
        (["runs"], "no config.json"),
    ],
)
def test_what_cannot_be_served_is_told_in_one_message(folder, shown, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    assert main(["demo", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and told.startswith("stageline: ") and told.count("\n") == 1 and not shown


def test_other_addresses_than_loopback_are_warned_about(folder, shown, capsys):
    assert main(["demo", str(folder / "saved"), "--host", "0.0.0.0"]) == 0
    assert "without a password" in capsys.readouterr().err and shown[0][1] == "0.0.0.0"


def test_without_gradio_it_says_how_to_install_it(folder, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo", str(folder / "saved")]) == 2
    told = capsys.readouterr().err
    assert "pip install --no-deps -r" in told and Path(told.split("-r ")[1].strip()).is_file()


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="--port"):
        _free("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match="--port"):
        _free("127.0.0.1", 70_000)
