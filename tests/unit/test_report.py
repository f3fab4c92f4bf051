"""The report's page: what it says of an experiment with a past, that it is closed, and what is left out."""

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from pages import HOSTILE, Outline
from report_run import PLOT, Run, evaluation, lived, row

from orchestrator.cli.main import main
from orchestrator.report.build import write_report
from orchestrator.report.scaling import plot, told


@pytest.fixture(scope="module")
def past(tmp_path_factory) -> Run:
    return lived(tmp_path_factory.mktemp("past"))


class Page(Outline):
    """said: its texts, one by one."""

    def __init__(self, page: Path):
        self.said: list[str] = []
        super().__init__(page)

    def handle_data(self, data: str) -> None:
        super().handle_data(data)
        if not self._inside:
            self.said.append(data)


def page_of(run: Run, *arguments: str) -> Page:
    path = run.experiment.path.parent / "out" / "report.html"
    write_report(run.experiment, run.store, path, arguments, now=run.now)
    return Page(path)


def words(outline: Page) -> str:
    """What a reader sees, cells apart from each other."""
    return re.sub(r"\s+", " ", " ".join(outline.said))


def check_closed(page: Path) -> None:
    """Nothing runs, nothing is loaded, and the policy lets the browser do neither."""
    outline = Outline(page)
    names = {name for name, _ in outline.tags}
    assert not names & {"script", "base", "embed", "iframe", "link", "object", "video", "form", "use", "foreignobject"}
    assert not outline.comments
    assert all(value.startswith("data:image/svg+xml;base64,") for value in outline.values("src"))
    loading = {"srcset", "style", "action", "formaction", "poster", "background", "srcdoc", "xlink:href"}
    assert not [name for _, name, _ in outline.attributes if name in loading or name.startswith("on")]
    assert {tag for tag, name, _ in outline.attributes if name == "href"} <= {"a"}
    assert not [value for value in outline.values("href") if re.match(r"[a-z]+:|//", value, re.I)]
    assert not re.search(r"url\(|@import", outline.raw["style"])
    (policy,) = [v for _, name, v in outline.attributes if name == "content" and "default-src" in v]
    digest = base64.b64encode(hashlib.sha256(outline.raw["style"].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"style-src 'sha256-{digest}'" in policy and "script-src 'none'" in policy
    ids = outline.values("id")
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in outline.values("href") if value.startswith("#")} <= set(ids)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ufeff]", page.read_text("utf-8"))


def test_the_page_needs_nothing_and_lets_nothing_run(past):
    page_of(past)
    check_closed(past.experiment.path.parent / "out" / "report.html")


def test_it_says_where_every_stage_stands(past):
    text = words(page_of(past))
    assert "Of 8 stages: 6 completed, 1 failed, 1 blocked. second failed: out of memory." in text
    assert "last failure, 2025-06-16 15:10 UTC, out of memory: rank 1: 81 of 80 GB asked" in text
    assert "evaluate_second evaluate blocked" in text and "waits for second, which failed" in text


def test_attempts_with_their_ends_saves_and_lost_steps(past):
    text = words(page_of(past))
    assert re.search(r"mlp_warmup 1 .*? lost node node 10\.0\.0\.7 is gone 48 s 4 30 10 ", text)
    assert re.search(r"mlp_warmup 2 .*? preempted drained: spot 48 s 2 70 ", text)
    assert "full_finetune .845 1 min 00 s 1 min 11 s 0" in text  # 60 s of steps in 8 + 60 + 3 s
    assert "training goodput" in text


def test_growth_and_a_stop_are_no_preemptions(tmp_path):
    run = Run(tmp_path)
    for origin in ("notice", "grown", "asked"):
        run.start("mlp_warmup", started=0)
        run.append("mlp_warmup", "preempted", step=1, reason=f"why {origin}", origin=origin)
    text = words(page_of(run))
    assert "attempts 3 1 preempted, 1 grown, 1 stopped" in text
    for number, ending, origin in ((1, "preempted", "notice"), (2, "grown", "grown"), (3, "stopped", "asked")):
        assert re.search(rf"mlp_warmup {number} .*? {ending} why {origin} ", text)


def test_curves_are_of_the_surviving_lineage(past):
    """Steps 31 to 40 were trained twice: the page counts them once, and marks where the later attempts went on."""
    outline = page_of(past)
    assert "660,000" in outline.text  # (100 + 60 + 5) steps of 4,000 tokens, none twice
    titles = re.findall(r"a new attempt goes on with step (\d+)", outline.text)
    assert titles == ["31", "71"] * 4


def test_the_freeze_table_and_packing(past):
    text = words(page_of(past))
    assert (
        "vit 291,552 0 frozen mlp 66,560 66,560 trains language 845,184 0 frozen all 1,203,296 66,560 5.5% trains"
        in text
    )
    assert "token fill .980 .980 .980" in text and "100 packs of 9,990 samples in 100 steps" in text


def test_evaluations_of_both_formats(past):
    text = words(page_of(past))
    assert "sum 400 exact .612 [.582, .632] 12.5 tokens .013 .812 [.782, .832] 12.5 tokens .013 .812 cot" in text
    assert "maximum of these" in text
    assert "yes direct F1 .874, precision .900, recall .850, yes rate .480" in text
    assert (
        "sum cot direct" not in text and "sum greedy cot direct +.200 [+.150, +.250] < .001 mcnemar 100 20 400" in text
    )
    assert "-.004 [-.020, +.012] .610 sign flips" in text
    assert "mlp_warmup .063 [.043, .091]" in text  # of scores.json


def test_every_method_has_a_name_a_colour_and_dashes_of_its_own(past):
    path = past.experiment.path.parent / "out" / "report.html"
    page_of(past)
    chart = re.search(r"<svg[^>]*t1-0s-title.*?</svg>", path.read_text(), re.S)
    assert chart is not None
    kinds = re.findall(r'class="line (k\d)"', chart[0])
    assert len(kinds) == len(set(kinds)) == 8
    style = Outline(path).raw["style"]
    dashes = dict(re.findall(r"\.line\.(k\d) \{ stroke-dasharray: ([^;}]+)", style))
    assert len(set(dashes.values())) == 7 and set(dashes) == set(kinds) - {"k0"}


def test_the_data_card_is_linked_from_where_the_report_lies(past):
    outline = page_of(past)
    (link,) = {value for value in outline.values("href") if not value.startswith("#")}
    card = (past.experiment.path.parent / "out" / link).resolve()
    assert card == Path(past.store.folder) / past.prefix("data") / "card.html" and card.exists()


def test_the_commands_quote_what_the_shell_would_read(past):
    text = page_of(past, "stages.second.lr=2e-3", "name=a b").text
    assert f"stageline run {past.experiment.path} stages.second.lr=2e-3 'name=a b'" in text


def test_before_anything_ran(tmp_path):
    run = Run(tmp_path)
    text = words(page_of(run))
    assert "Of 8 stages: 8 not run yet." in text
    headings = ("Training", "Attempts", "Evaluation", "Scaling", "Data")
    assert not [word for word in headings if f" {word} " in text.split("Make it again")[0]]
    assert list(Path(tmp_path).glob("storage/*")) == []  # only reads


def test_a_stage_that_runs(tmp_path):
    run = Run(tmp_path)
    run.start("mlp_warmup", started=0)
    run.rows("mlp_warmup", 1, 7, 100)
    text = words(page_of(run))
    assert "1 running" in text and "at step 7 of 100" in text and "mlp_warmup mlp_warmup running 7 of 100" in text


def test_nothing_from_storage_becomes_markup(tmp_path):
    """Names of tasks, methods, prompts, messages and logs come from data, samples and exceptions."""
    run = Run(tmp_path)
    found = evaluation("full_finetune")
    score = found["tables"]["cot"]["sum"]
    found["tables"] = {HOSTILE: {HOSTILE: score | {"metric": HOSTILE, "f1": 0.5, "categories": {HOSTILE: score}}}}
    found["curves"] = {HOSTILE: [dict(found["curves"]["sum"][0], method=HOSTILE, prompt=HOSTILE)]}
    found["comparisons"] = [dict(found["comparisons"][0], a=HOSTILE, task=HOSTILE)]
    found["maximum"] = {HOSTILE: {"prompt": HOSTILE, "accuracy": 0.5}}
    found["losses"] = {HOSTILE: {HOSTILE: {"nats": 1.0, "tokens": 1}}}
    run.start("evaluate_full")
    run.complete("evaluate_full", {}, {"evaluation.json": json.dumps(found).encode()})
    run.start("study")
    files = {"scaling.json": json.dumps({HOSTILE: [{HOSTILE: HOSTILE}]}).encode(), "law.svg": b"<svg onload='x()'/>"}
    run.complete("study", {}, files)
    stored = HOSTILE.replace("\ud800", "")
    run.start("second", started=0, logs=f"9 packs of {stored}")
    run.append("second", "failed", error_class="user", message=HOSTILE, step=0)
    outline = page_of(run, HOSTILE)
    check_closed(tmp_path / "out" / "report.html")
    assert outline.text.count("<script>alert(1)</script>") > 10, "it is shown as text"
    assert "not shown" in outline.text


def test_a_damaged_result_is_one_message_with_its_place(tmp_path, capsys):
    run = Run(tmp_path)
    run.start("evaluate_full")
    broken = evaluation("full_finetune")
    broken["curves"]["sum"][0]["low"] = [0.1]
    run.complete("evaluate_full", {}, {"evaluation.json": json.dumps(broken).encode()})
    output = tmp_path / "r.html"
    assert main(["report", str(run.experiment.path), "--output", str(output)]) == 2
    told = capsys.readouterr().err
    assert "evaluation.json: not the result of an evaluation: curves.sum.0" in told and "Traceback" not in told
    assert not output.exists()


def test_the_command(tmp_path, capsys, monkeypatch):
    run = lived(tmp_path)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    monkeypatch.chdir(tmp_path)
    before = {path for path in tmp_path.rglob("*")}
    assert main(["report", "family.yaml", "stages.mlp_warmup.lr=0.5"]) == 0
    assert "report.html" in capsys.readouterr().out
    assert {path for path in tmp_path.rglob("*")} - before == {tmp_path / "report.html"}
    text = words(Page(tmp_path / "report.html"))
    assert "the file has changed since: lr: 0.001 → 0.5" in text  # the figures are those of what ran
    assert main(["report", "family.yaml", "--output", str(tmp_path)]) == 2
    assert "this is a folder" in capsys.readouterr().err
    assert main(["report", "family.yaml", "--output", "family.yaml/report.html"]) == 2
    assert "family.yaml is a file" in capsys.readouterr().err
    assert run.experiment.name in text


def test_two_names_of_one_stage_are_shown_once(tmp_path, monkeypatch):
    run = Run(tmp_path)
    own = Run.fingerprint
    monkeypatch.setattr(Run, "fingerprint", lambda self, name: own(self, "full_finetune" if name == "second" else name))
    for name in ("full_finetune", "second"):
        run.tokens.pop(name, None)
        run.start(name, started=0)
    run.rows("second", 1, 60, 60)
    run.complete("second", {"steps": 60}, train_s=60.0)
    text = words(page_of(run))
    assert "the same stage as full_finetune: made once" in text
    assert text.count("What it is") + text.count("Packing, over the steps.") == 1


@pytest.mark.parametrize(
    "inside",
    [
        "<script>x()</script>",
        "<foreignObject/>",
        '<g onload="x()"/>',
        '<image href="https://example.com/x.png"/>',
        '<use href="https://example.com/x.svg#a"/>',
        '<rect fill="url(https://example.com/x)"/>',
        "<style>@import 'https://example.com/x.css';</style>",
        "<style>rect { fill: url('//example.com/x') }</style>",
        "<style>rect { fill: u\\72l(//example.com/x) }</style>",
        '<rect fill="x" xmlns:x="u" x:onclick="y"/>',
        "<h:p xmlns:h='http://www.w3.org/1999/xhtml'/>",
        "<rect",
    ],
)
def test_a_plot_that_is_more_than_a_drawing_is_not_shown(inside):
    found = plot("law.svg", PLOT.replace(b"</svg>", inside.encode() + b"</svg>"))
    assert found.uri == "" and found.note.startswith("not shown")


def test_a_plot_with_references_within_itself_is_shown():
    inside = (
        b'<clipPath id="c"><rect width="9" height="9"/></clipPath><g clip-path="url(#c)"><use href="#c"/></g></svg>'
    )
    found = plot("law.svg", PLOT.replace(b"</svg>", inside))
    assert found.title == "L(N, D)" and b"url(#c)" in base64.b64decode(found.uri.partition(",")[2])


def test_an_entity_is_not_expanded():
    assert plot("a.svg", b'<!DOCTYPE svg [<!ENTITY a "b">]>' + PLOT).uri == ""


def test_what_a_scaling_study_says():
    point = {"stage": "a", "loss": 2.3456, "vision": 1e7, "part": "held out", "accuracy": {"sum": 1}}
    law = {"coefficients": {"E": {"value": 0.75312, "low": 0.4861, "high": 0.9}}, "fitted_on": list("abcdef")}
    curves = [{"method": "pass", "samples": [1, 2]}]
    facts, tables = told({"points": [point], "law": law, "curves": curves})
    assert facts == [
        ("law.coefficients.E", "0.753 [0.486, 0.9]"),
        ("law.fitted_on", "a, b, c, d, and 2 more"),
    ]
    assert [(table.name, table.columns, table.rows) for table in tables] == [
        ("points", ["stage", "loss", "vision", "part"], [("a", "2.35", "10,000,000", "held out")])
    ]


def test_rows_that_are_not_finite_are_gaps(tmp_path):
    run = Run(tmp_path)
    run.start("mlp_warmup", started=0)
    run.rows("mlp_warmup", 1, 3, 100)
    run.rows("mlp_warmup", 4, 4, 100, loss=None, grad_norm=None, skipped=1)
    run.rows("mlp_warmup", 5, 9, 100)
    page_of(run)
    text = (tmp_path / "out" / "report.html").read_text()
    loss = text.index(">Loss<")
    assert text[loss : text.index("</svg>", loss)].count("<polyline") == 2
    assert row(1, 2)["loss"] > 0
