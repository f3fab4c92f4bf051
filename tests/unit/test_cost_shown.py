"""Where a user reads of money: `plan` before, `status` and the report after; and nothing of it without prices."""

import io
import json
import re
import time
from dataclasses import replace

import pytest
from report_run import YAML, Run, lived
from rich.console import Console
from test_report import check_closed, page_of, words

from cluster.shape import ClusterParams
from orchestrator.accounts import account
from orchestrator.cli.expected import MFU, expected, show_expected
from orchestrator.cli.main import main
from orchestrator.ledger import Ledger, state
from orchestrator.liveness import TIMEOUT_S, Heartbeat, owner
from orchestrator.places import Places, write_places
from orchestrator.plan import StagePlan
from orchestrator.report.read import billed_until
from orchestrator.spec import load_spec
from orchestrator.store import MemoryStore
from stages.params import TrainParams

CLUSTER = """
cluster:
  head: {price: 0.5}
  currency: EUR
  nodes:
    spot: {accelerator: H100, gpus: 8, cpus: 192, price: 32, spot: true}
    steady: {accelerator: H100, gpus: 8, cpus: 192, price: 80}
"""
PRICED = YAML.replace("lr: 1e-3}", "lr: 1e-3, resources: {workers: [2, 4], gpus: 1, cpus: 8}}") + CLUSTER


def run_on(monkeypatch, tmp_path, node: str | None = "spot") -> Run:
    """The past of report_run.py with prices; each training attempt left a note of its nodes."""
    started = Run.start

    def start(self, name, workers=2, started_=None, logs="", **more):
        started(self, name, workers, more.get("started", started_), logs)
        if self.experiment.stages[name].kind.trains and node is not None:
            nodes = tuple({"stageline.io/node-type": node} for _ in range(workers))
            write_places(self.store, self.prefix(name), self.tokens[name], Places(8, 1, nodes))

    monkeypatch.setattr(Run, "start", start)
    made = Run.__init__
    monkeypatch.setattr(Run, "__init__", lambda self, folder: made(self, folder, PRICED))
    return lived(tmp_path)


def status_of(run: Run, capsys) -> dict[str, str]:
    """Lines by their first word or what stands before a colon; rows of the table before others."""
    assert main(["status", str(run.experiment.path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    return {line.split(":")[0]: line for line in lines} | {line.split()[0]: line for line in lines}


def test_status_and_report_name_the_same_sums(monkeypatch, tmp_path, capsys):
    """mlp_warmup by hand: 4 workers for 8 + 40 s, 2 for 8 + 40, 4 for 8 + 30 + 3, at 4 EUR an hour each."""
    run = run_on(monkeypatch, tmp_path)
    spent = (4 * 48 + 2 * 48 + 4 * 41) * 4 / 3600
    wasted = (4 * (48 - 30) + 2 * (48 - 40) + 4 * (41 - 30)) * 4 / 3600
    lines = status_of(run, capsys)
    assert f" {spent:.2f} EUR ({wasted:.2f} wasted)" in lines["mlp_warmup"]
    assert "at most" in lines["data"] and "at most" in lines["evaluate_mlp"]
    total = re.fullmatch(
        r"cost of workers: at most ([\d.]+) EUR \(([\d.]+) wasted\); stages .*", lines["cost of workers"]
    )
    assert total and float(total[1]) > spent
    head = re.fullmatch(r"cost of the head: ([\d.]+) EUR, 3 min 53 s in which stages ran", lines["cost of the head"])
    assert head and float(head[1]) == pytest.approx(0.5 * 233 / 3600, abs=0.01), "not of the day in which nothing ran"

    text = words(page_of(run))
    check_closed(run.experiment.path.parent / "out" / "report.html")
    assert f"mlp_warmup {spent:.2f} EUR {wasted:.2f} EUR" in text
    assert f"all workers {total[1]} EUR {total[2]} EUR" in text and f"head {head[1]} EUR" in text
    first = 4 * 48 * 4 / 3600
    assert f"{first:.2f} EUR {4 * 18 * 4 / 3600:.2f} EUR wasted" in text.split("Each bar is an attempt")[1]


def test_attempts_without_a_note_are_of_unknown_cost(monkeypatch, tmp_path, capsys):
    run = run_on(monkeypatch, tmp_path, node=None)
    lines = status_of(run, capsys)
    assert " unknown " in lines["mlp_warmup"] and "+ 5 attempts of unknown cost" in lines["cost of workers"]
    text = words(page_of(run))
    assert "mlp_warmup unknown –" in text and "and 5 attempts of unknown cost" in text


def test_a_driver_elsewhere_that_says_no_more_costs_no_more(monkeypatch, tmp_path, capsys):
    """Three days after the last word of 2 workers, at 4 EUR an hour each: 8 + 10 s that were heard of, and a minute."""
    (tmp_path / "made").mkdir()
    run_on(monkeypatch, tmp_path / "made")  # from here on every Run has prices and notes
    run = Run(tmp_path)
    run.now = time.time() - 72.5 * 3600
    began = run.now + 1
    run.start("mlp_warmup", workers=2, started=0)
    run.rows("mlp_warmup", 1, 10, 100)
    key = f"{run.prefix('mlp_warmup')}/progress.json"
    run.store.put(key, json.dumps({**json.loads(run.store.get(key)), "time": run.now}).encode())
    line = status_of(run, capsys)["mlp_warmup"]
    assert re.search(r" running, last heard 72 h \d\d min ago ", line)
    spent = 2 * (8 + 10 + 2 * TIMEOUT_S) * 4 / 3600
    assert f" {spent:.2f} EUR (" in line
    run.now = time.time()
    monkeypatch.setattr(time, "time", lambda: run.now)  # the clock stands still: what is said is of one moment
    assert f"mlp_warmup {spent:.2f} EUR" in words(page_of(run))
    with Heartbeat(run.store, run.prefix("mlp_warmup"), 1):  # its driver lives: it plans, or compiles
        spent = 2 * (run.now - began) * 4 / 3600
        assert " running  " in (line := status_of(run, capsys)["mlp_warmup"]) and f" {spent:.2f} EUR (" in line
        assert f"mlp_warmup {spent:.2f} EUR" in words(page_of(run))


def test_until_when_an_attempt_is_billed():
    """To now where its driver is seen to live or was heard of lately, else a little longer than it was heard of."""

    def until(who, said_at: float, now: float, ended: bool = False, beat: float = 0.0) -> float | None:
        ledger = Ledger(MemoryStore(), "p", clock=lambda: 1000.0)
        token = ledger.start_attempt(ledger.claim(who), 1)
        if ended:
            ledger.append("preempted", token, step=1, reason="")
        entries = ledger.entries()
        return billed_until(state(entries), account(entries), {"token": list(token), "time": said_at}, beat, now)

    elsewhere, allowed = {**owner(), "host": "elsewhere"}, 2 * TIMEOUT_S
    assert until(owner(), 1500.0, 9000.0) == 9000.0
    assert until(elsewhere, 1500.0, 1500.0 + allowed / 2) == 1500.0 + allowed / 2
    assert until(elsewhere, 1500.0, 9000.0) == 1500.0 + allowed
    assert until(elsewhere, 0.0, 9000.0) == 1000.0 + allowed, "it said nothing since its start"
    assert until(elsewhere, 1500.0, 9000.0, beat=8999.0) == 9000.0, "its driver was heard of"
    assert until({**owner(), "started": 0.0}, 1500.0, 9000.0) is None, "it is known to be gone"
    assert until(elsewhere, 1500.0, 9000.0, ended=True) is None


def test_status_names_the_folder_of_what_was_prepared(tmp_path, capsys, monkeypatch):
    run = lived(tmp_path)
    monkeypatch.chdir(tmp_path)
    main(["status", str(run.experiment.path)])
    assert f"\ndata: storage/{run.prefix('data')}\n" in capsys.readouterr().out
    run.store.delete(f"{run.prefix('data')}/card.html")
    main(["status", str(run.experiment.path)])
    assert "\ndata: " not in capsys.readouterr().out, "nothing lies there yet"
    run.store.put(f"{run.prefix('data')}/rejected.jsonl", b"")  # of a mixture that was refused
    main(["status", str(run.experiment.path)])
    assert f"\ndata: storage/{run.prefix('data')}\n" in capsys.readouterr().out


def test_status_tells_growth_and_stops_from_preemptions(tmp_path, capsys):
    run = Run(tmp_path)
    for origin in ("notice", "grown", "asked"):
        run.start("mlp_warmup", started=0)
        run.append("mlp_warmup", "preempted", step=1, reason=f"why {origin}", origin=origin)
    line = status_of(run, capsys)["mlp_warmup"]
    assert " 3 (1 preempted, 1 grown, 1 stopped) " in line and "stopped: why asked" in line


def test_without_prices_nobody_speaks_of_money(tmp_path, capsys):
    run = lived(tmp_path)
    text = words(page_of(run))
    assert main(["status", str(run.experiment.path)]) == 0
    assert main(["plan", str(run.experiment.path)]) == 0
    for said in (text, capsys.readouterr().out):
        assert not re.search(r"\b([Cc]ost of (workers|the head|training)|wasted|USD)\b|Cost, at", said)


NODES = {
    "spot": {"accelerator": "H100", "gpus": 8, "cpus": 192, "price": 32.0, "spot": True},
    "old": {"accelerator": "A100-80G", "gpus": 8, "cpus": 96, "price": 24.0},
    "cpu": {"cpus": 64, "price": 3.0},
}


def params(**resources) -> TrainParams:
    return TrainParams.model_validate(
        {"train": ("vit",), "lr": 1e-3, "global_batch": 8, "steps": 10,
         "resources": {"workers": (8, 32), "gpus": 1, "cpus": 8, **resources}}
    )  # fmt: skip


def cluster(**nodes) -> ClusterParams:
    return ClusterParams.model_validate({"nodes": nodes or NODES})


def test_the_range_by_hand():
    """1e21 operations: 669 to 1,123 H100 hours or 2,120 to 3,561 of an A100; a GPU costs 4 and 3 an hour."""
    found = expected(cluster(), params(), 1e21)
    assert not isinstance(found, str)
    h100 = [1e21 / (989e12 * mfu) / 3600 for mfu in (MFU[1], MFU[0])]
    a100 = [1e21 / (312e12 * mfu) / 3600 for mfu in (MFU[1], MFU[0])]
    assert [round(hours) for hours in (*h100, *a100)] == [669, 1123, 2120, 3561]
    assert found.gpu_hours == pytest.approx((h100[0], a100[1]))
    assert found.cost == pytest.approx((h100[0] * 4, a100[1] * 3))
    assert found.seconds == pytest.approx((h100[0] * 3600 / 32, a100[1] * 3600 / 8))
    assert found.machines == ("spot", "old")


def test_cores_may_be_the_larger_share_and_a_rank_may_share_a_gpu():
    spot = cluster(spot=NODES["spot"])
    one, wide, half = (expected(spot, params(**more), 1e21) for more in ({}, {"cpus": 48}, {"gpus": 0.5, "cpus": 4}))
    assert not isinstance(one, str) and not isinstance(wide, str) and not isinstance(half, str)
    assert one.cost and wide.cost and half.cost
    assert wide.cost[0] == pytest.approx(2 * one.cost[0]) and wide.gpu_hours == one.gpu_hours
    assert half.gpu_hours == pytest.approx(one.gpu_hours) and half.seconds[0] == pytest.approx(2 * one.seconds[0])


@pytest.mark.parametrize(
    "nodes, resources, why",
    [
        ({}, {"gpus": 0}, "no GPU is asked for"),
        ({}, {"accelerator": "B200"}, "no type of machine fits"),
        ({}, {"gpus": 16}, "no type of machine fits"),
        ({"aws": {"accelerator": "A10G", "gpus": 1, "cpus": 16}}, {}, "no peak is known for the GPUs of aws"),
    ],
)
def test_why_a_range_is_unknown(nodes, resources, why):
    assert expected(cluster(**nodes), params(**resources), 1e21) == why
    fp32 = params().model_copy(update={"precision": "fp32"})
    assert expected(cluster(), fp32, 1e21) == "no peak is known for fp32"


def test_a_type_without_a_price_leaves_the_hours():
    found = expected(cluster(**{**NODES, "spot": {**NODES["spot"], "price": None}}), params(), 1e21)
    assert not isinstance(found, str) and found.cost is None and found.gpu_hours[0] > 0


def test_plan_gives_the_range_of_what_is_left(tmp_path, capsys):
    """Sources are not there, so no stage has a fingerprint yet; steps and sizes are known all the same."""
    path = tmp_path / "x.yaml"
    path.write_text(
        PRICED.replace("steps: 60}", "epochs: 2}")
        .replace("steps: 60,", "steps: 60000000,")
        .replace("steps: 100", "steps: 100000000")
    )
    assert main(["plan", str(path)]) == 0
    said = capsys.readouterr().out
    assert "expected with all packs full and an MFU of 25% to 42%" in said
    table = said[said.index("Expected cost of training") :]
    rows = {line.split()[0]: line for line in table.splitlines() if line.strip()}
    found = re.search(
        r"([\d.,]+) to ([\d.,]+) +[\dhmin ]+ to [\dhmin ]+ +([\d.,]+) to ([\d.,]+) EUR +spot, steady",
        rows["mlp_warmup"],
    )
    assert found
    low, high, cheap, dear = (float(text.replace(",", "")) for text in found.groups())
    assert high / low == pytest.approx(42 / 25, rel=0.02)
    assert (cheap / low, dear / high) == (pytest.approx(4.0, rel=0.02), pytest.approx(10.0, rel=0.02))
    assert "unknown: its steps, until prepare" in rows["full_finetune"]
    assert rows["second"].endswith("spot, steady") and rows["all"].rstrip().endswith("EUR + 1 of unknown cost")
    assert float(re.findall(r"[\d,.]+", rows["all"])[0].replace(",", "")) > low, "the sum of what is known"


def test_what_is_done_or_shared_is_not_expected_again(tmp_path):
    path, out = tmp_path / "x.yaml", io.StringIO()
    path.write_text(PRICED.replace("steps: 100", "steps: 100000000").replace("steps: 60", "steps: 60000000"))
    plans = [
        StagePlan("mlp_warmup", "train", "a" * 64, "resume", step=75_000_000),
        StagePlan("full_finetune", "train", "b" * 64, "reuse"),
        StagePlan("second", "train", "b" * 64, "share", shared="full_finetune"),
    ]
    experiment = load_spec(path)
    for item in (plans, [replace(plans[0], action="run", step=None)], plans[1:]):
        show_expected(Console(file=out, width=200), experiment, item)
    rows = [line.split() for line in out.getvalue().splitlines() if "EUR" in line]
    assert [row[0] for row in rows] == ["mlp_warmup", "mlp_warmup"]
    quarter, whole = (float(row[1].replace(",", "")) for row in rows)
    assert whole / quarter == pytest.approx(4, rel=0.05)
