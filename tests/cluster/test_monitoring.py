"""A run as it is watched: Prometheus scrapes it by the written file, each query of the dashboard finds data, and a
browser shows the run in the Ray dashboard.

Ray's head asks for a token, so Prometheus and the browser have to bring it. There is no GPU and no Grafana here: what a
GPU node reports comes from a stand-in (watched.py), and the queries of the Grafana file are asked of Prometheus itself.
"""

import contextlib
import json
import os
import re
import subprocess
import time
from pathlib import Path
from urllib.parse import quote, urlencode

import debian
import pytest
from harness import COMMAND, PATIENCE_S, SMALL, Experiment
from prometheus import Prometheus, free_port
from watched import Head

from cluster.monitoring.catalogue import exported
from orchestrator.accounts import account

try:
    from playwright.sync_api import TimeoutError as PlaywrightTimeout
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None

STAGES = """
name: cluster
storage: storage
seed: 0
model: {{vision: micro-vit, language: micro-qwen2}}
stages:
  mix_data: {{kind: prepare, data: mix}}
  mlp_warmup: {{needs: [mix_data], steps: 200, lr: 1e-3}}
  full_finetune:
    needs: [mix_data, mlp_warmup]
    steps: 100000
    lr: 5e-3
    checkpoint: {{every: 20, keep: 2}}
    resources: {{workers: 2, cpus: 1}}
"""
ALL = 100_000  # more than are trained while the tests look
STEPS = 40  # seen before it is preempted, and again before it may end
SETTLE_S = 30.0  # for what was reported to be scraped
SHOTS = os.environ.get("STAGELINE_SCREENSHOTS")  # a folder, to look at them; docs/pictures come from here


@pytest.fixture(scope="module")
def watched(data, tmp_path_factory):
    """(head, Prometheus, experiment, folder of the written files, the driver) of a run whose full_finetune was
    preempted once and trains again."""
    debian.need(("prometheus",), "prometheus")
    folder = tmp_path_factory.mktemp("watched")
    experiment = Experiment(folder / "experiment", data, STAGES + SMALL)
    files, url = folder / "files", f"http://127.0.0.1:{free_port()}"
    with Head() as head:
        command = [*COMMAND, "cluster", "monitoring", "--output", str(files), "--head", head.url, "--prometheus", url]
        command += ["--interval", "1", "--token-file", str(head.token_file)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert head.token not in done.stdout + "".join(p.read_text() for p in files.rglob("*") if p.is_file())
        with Prometheus(files / "prometheus.yml", folder, url) as prometheus:
            driver = experiment.start("--address", head.address, environment=head.environment)
            try:
                head.pretend_gpus()
                driver.wait_for_step(STEPS, "full_finetune")
                experiment.command("preempt", "--deadline", "1")
                until = time.monotonic() + PATIENCE_S
                while experiment.state("full_finetune").attempts < 2:
                    assert driver.process.poll() is None and time.monotonic() < until, driver.output
                    time.sleep(0.1)
                driver.wait_for_step(experiment.state("full_finetune").checkpoints[0].step + 1, "full_finetune")
                yield head, prometheus, experiment, files, driver
            finally:
                driver.end()


@pytest.fixture(autouse=True)
def it_runs(watched):
    """What is looked at is a run, not what one has left."""
    driver = watched[4]
    assert driver.process.poll() is None, driver.output
    yield
    assert driver.process.poll() is None, driver.output


def eventually(look, seconds=SETTLE_S):
    """What look() returns once it is true."""
    until = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < until, "not seen in time"
        time.sleep(0.3)
    return found


def panels(files: Path) -> dict[str, list[str]]:
    """The queries of each panel of the written dashboard, for any experiment and stage."""
    text = (files / "grafana" / "dashboards" / "stageline.json").read_text()
    text = text.replace("$experiment", ".*").replace("$stage", ".*").replace("$__rate_interval", "20s")
    return {p["title"]: [t["expr"] for t in p["targets"]] for p in json.loads(text)["panels"] if "targets" in p}


def test_every_query_of_the_dashboard_finds_data(watched):
    _, prometheus, _, files, _ = watched
    wanted = [(title, query) for title, queries in panels(files).items() for query in queries]
    assert len(wanted) > 25
    left = wanted
    until = time.monotonic() + SETTLE_S
    while left and time.monotonic() < until:
        left = [(title, query) for title, query in left if not prometheus.over_time(query, 60)]
    assert left == []
    variables = json.loads((files / "grafana" / "dashboards" / "stageline.json").read_text())["templating"]["list"]
    for variable in variables:
        metric, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]).groups()
        metric = metric.replace("$experiment", "cluster")
        assert prometheus.query(f"last_over_time({metric}[15s])")[0]["metric"][label]


def test_all_metrics_that_are_told_are_known_to_prometheus_and_say_what_the_ledger_does(watched):
    _, prometheus, experiment, _, _ = watched
    names = set(prometheus.get("label/__name__/values"))
    assert exported() <= names
    mine = '{experiment="cluster", stage="full_finetune"}'
    eventually(lambda: prometheus.query(f"ray_stageline_attempts{mine} == 2 and ray_stageline_step{mine}"))

    def value(name):
        (found,) = prometheus.query(f"last_over_time(ray_stageline_{name}{mine}[15s])")  # a scrape may fail
        assert found["metric"]["kind"] == "full_finetune"
        return float(found["value"][1])

    spent = account(experiment.entries("full_finetune"))
    assert value("preemptions") == 1 and value("workers") == 2 and value("stage_running") == 1
    assert value("steps_lost") == spent.steps_lost == 0
    assert 0 < value("goodput_ratio") <= 1
    trained = read_step(experiment)
    eventually(lambda: value("step") >= trained)
    shown = value("step")
    assert shown <= read_step(experiment) and value("steps") == ALL
    rows = read_rows(experiment)  # of the steps that are saved
    each = sum(row["tokens"] for row in rows) / len(rows)
    assert 0.5 * each * shown <= value("tokens_total") <= 1.2 * each * read_step(experiment)


def read_step(experiment):
    return json.loads((experiment.prefix("full_finetune") / "progress.json").read_text())["step"]


def read_rows(experiment):
    folder = experiment.prefix("full_finetune") / "metrics"
    return [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]


# -- in a browser -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if sync_playwright is None:
        reason = "playwright is needed: pip install playwright"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=debian.chromium(), args=["--no-sandbox"])
        yield chromium
        chromium.close()


def shot(page, name, full_page=False):
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{name}.png", full_page=full_page)


@pytest.fixture
def dashboard(browser, watched):
    """A page that brings the token."""
    head = watched[0]
    page = browser.new_page(viewport={"width": 1440, "height": 760}, extra_http_headers=bearer(head))
    page.set_default_timeout(60_000)
    yield page
    page.close()


def bearer(head):
    return {"Authorization": f"Bearer {head.token}"}


def test_the_ray_dashboard_shows_the_stages_their_attempts_and_how_far_they_are(dashboard, watched):
    head = watched[0]
    dashboard.goto(f"{head.url}/#/actors")
    dashboard.get_by_label("Class", exact=True).fill("StageAttempt")
    dashboard.keyboard.press("Enter")
    for stage, attempt in (("mix_data", 1), ("mlp_warmup", 1), ("full_finetune", 1), ("full_finetune", 2)):
        row = dashboard.locator("tr", has_text=f"cluster/{stage}/e0001a000{attempt}")
        row.wait_for()
        assert ("ALIVE" if attempt == 2 else "DEAD") in row.inner_text()
    shot(dashboard, "dashboard-actors")
    dashboard.locator("tr", has_text="a0002").locator("a").first.click()
    eventually(lambda: refreshed(dashboard, rf"step [\d,]+ of {ALL:,}\s+loss \d.*tokens/s\s+goodput \d"), PATIENCE_S)
    shot(dashboard, "dashboard-attempt", full_page=True)


def refreshed(page, pattern):
    """Whether an actor's log has such a line now."""
    page.reload()
    found = page.get_by_text(re.compile(pattern)).first
    with contextlib.suppress(PlaywrightTimeout):
        found.wait_for(timeout=10_000)
    return found.is_visible()


def test_rays_own_list_of_training_runs_names_stage_and_attempt(watched):
    """The API alone: Ray 2.60's dashboard has no page of it."""
    head = watched[0]
    runs = {run["name"]: run["status"] for run in head.get("/api/train/v2/runs/v1")["train_runs"]}
    for stage, attempts in (("mlp_warmup", 1), ("full_finetune", 2)):
        assert sum(bool(re.search(rf"{stage}-[0-9a-f]{{16}}-e0001a000\d$", name)) for name in runs) == attempts
    assert "RUNNING" in {status for name, status in runs.items() if name.endswith("a0002")}


def test_prometheus_draws_the_metrics_of_the_stages(browser, watched):
    _, prometheus, _, files, _ = watched
    asked = panels(files)
    drawn = [asked["Loss"][0], asked["Tokens a second"][0]]
    query = "&".join(
        urlencode({f"g{i}.expr": expr, f"g{i}.tab": 0, f"g{i}.range_input": "3m"}, quote_via=quote)
        for i, expr in enumerate(drawn)
    )
    page = browser.new_page(viewport={"width": 1280, "height": 1300})
    page.goto(f"{prometheus.url}/graph?{query}")
    for i in range(len(drawn)):
        page.locator("svg").nth(i).locator("path").first.wait_for(state="attached")
    page.evaluate("window.scrollTo(0, 0)")
    shot(page, "prometheus")
    page.close()


def test_a_stage_that_is_over_has_no_metrics_any_more_and_its_past_stays(watched):
    prometheus = watched[1]
    eventually(lambda: prometheus.query('ray_stageline_stage_running{stage="full_finetune"}'))  # a scrape may fail
    for name in ("loss", "stage_running", "goodput_ratio"):
        eventually(lambda name=name: not prometheus.query(f'ray_stageline_{name}{{stage="mlp_warmup"}}'))
    assert prometheus.over_time('ray_stageline_loss{stage="mlp_warmup"}', 600)
