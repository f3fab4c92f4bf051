"""The monitoring files, held against Grafana's own types and the metrics that are told; and the command that writes."""

import json
import re

import pytest
import yaml

from cluster.monitoring import catalogue, grafana
from cluster.monitoring.panels import all_panels
from orchestrator.cli.main import main

RAY_OWN = {
    "ray_node_cpu_count", "ray_node_gpus_utilization", "ray_node_gram_used", "ray_node_gram_available",
    "ray_node_mem_used", "ray_object_store_memory", "ray_resources",
}  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """Without a token, whatever the user of this machine has."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    return folder


def written(folder, *options):
    assert main(["cluster", "monitoring", "--output", str(folder), *options]) == 0
    return folder


def token_of(folder):
    (discovery,) = yaml.safe_load((folder / "prometheus.yml").read_text())["scrape_configs"][0]["http_sd_configs"]
    return discovery.get("authorization", {}).get("credentials_file")


def test_prometheus_is_given_the_token_that_ray_itself_would_take(tmp_path, home, monkeypatch, capsys):
    """Without it the head of a cluster with a token answers 401, and Prometheus finds no node."""
    assert token_of(written(tmp_path / "none")) is None
    assert "none found, right for a cluster without one" in capsys.readouterr().out
    usual, named = home / ".ray" / "auth_token", tmp_path / "named"
    usual.parent.mkdir()
    for path in (usual, named):
        path.write_text("hunter2hunter2")
    assert token_of(written(tmp_path / "usual")) == str(usual)
    assert f"Prometheus reads {usual}; a cluster without a token needs none" in capsys.readouterr().out
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(named))
    assert token_of(written(tmp_path / "named-one")) == str(named)
    assert token_of(written(tmp_path / "given", "--token-file", str(usual))) == str(usual)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "gone"))
    assert main(["cluster", "monitoring", "--output", str(tmp_path / "gone-one")]) == 2
    assert "RAY_AUTH_TOKEN_PATH" in capsys.readouterr().err and not (tmp_path / "gone-one").exists()


def test_grafanas_own_types_know_every_field_of_the_dashboard():
    """Read into Grafana's types and written again nothing is lost: a misspelt field would be."""
    sdk = pytest.importorskip("grafana_foundation_sdk.models.dashboard", reason="pip install grafana-foundation-sdk")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins

    register_default_plugins()
    mine = json.loads(json.dumps(grafana.dashboard()))
    again = json.loads(json.dumps(sdk.Dashboard.from_json(json.loads(json.dumps(mine))), cls=JSONEncoder))
    assert lost(mine, again) == []


def lost(mine, again, path=""):
    """Paths of `mine` that are not in `again`, or are something else there."""
    if isinstance(mine, dict):
        return [p for key in mine for p in lost(mine[key], again.get(key) if again else None, f"{path}.{key}")]
    if isinstance(mine, list):
        other = again or []
        return [
            p for i, one in enumerate(mine) for p in lost(one, other[i] if i < len(other) else None, f"{path}[{i}]")
        ]
    return [] if mine == again else [f"{path}: {mine!r} became {again!r}"]


def test_panels_do_not_overlap_and_have_units_and_numbers_of_their_own():
    panels = grafana.dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24
    assert all(panel["fieldConfig"]["defaults"]["unit"] for panel in panels if panel["type"] != "row")


def test_queries_ask_for_metrics_that_are_told_and_each_is_asked_for():
    text = " ".join(query.expr for panel in all_panels() for query in panel.queries)
    asked = set(re.findall(r"\bray_\w+", text))
    assert asked <= catalogue.exported() | RAY_OWN
    unused = catalogue.exported() - asked
    assert unused == {"ray_stageline_stage_running", "ray_stageline_tiles_per_second", "ray_stageline_packing_ratio"}


def test_the_token_stays_in_its_file(tmp_path, capsys):
    token = tmp_path / "auth_token"
    token.write_text("hunter2hunter2")
    folder = written(tmp_path / "out", "--token-file", str(token), "--head", "http://head:8265/", "--interval", "15")
    (discovery,) = yaml.safe_load((folder / "prometheus.yml").read_text())["scrape_configs"][0]["http_sd_configs"]
    assert discovery["url"] == "http://head:8265/api/prometheus/sd"
    assert discovery["authorization"] == {"type": "Bearer", "credentials_file": str(token)}
    texts = [path.read_text() for path in folder.rglob("*") if path.is_file()]
    assert len(texts) == 5 and not any("hunter2" in text for text in (*texts, capsys.readouterr().out))


def test_grafana_finds_the_dashboard_and_its_source_where_they_were_written(tmp_path):
    folder = written(tmp_path / "a" / "b")
    provisioning = folder / "grafana" / "provisioning"
    ours, rays = yaml.safe_load((provisioning / "dashboards" / "stageline.yml").read_text())["providers"]
    (source,) = yaml.safe_load((provisioning / "datasources" / "stageline.yml").read_text())["datasources"]
    dashboard = json.loads((folder / "grafana" / "dashboards" / "stageline.json").read_text())
    assert ours["options"]["path"] == str(folder / "grafana" / "dashboards") and rays["name"] == "Ray"
    assert source["name"] == "Prometheus" and source["jsonData"]["timeInterval"] == "10s"
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"] if panel["type"] != "row"} == {source["uid"]}


def test_written_again_it_is_the_same_and_other_files_stay(tmp_path):
    folder = written(tmp_path)
    before = {path: path.read_text() for path in folder.rglob("*") if path.is_file()}
    (folder / "data").mkdir()
    (folder / "data" / "mine").write_text("kept")
    written(tmp_path)
    assert {path: path.read_text() for path in before} == before and (folder / "data" / "mine").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--head", "head:8265"], "--head: not an address"),
        (["--head", "http://user:secret@head:8265"], "--head: not an address"),
        (["--interval", "0"], "--interval 0.0: not a number of seconds"),
        (["--token-file", "none"], "no such file"),
    ],
)
def test_mistakes_are_one_message(options, message, tmp_path, capsys):
    assert main(["cluster", "monitoring", "--output", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and "secret" not in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize("given, told", [("2.5", "2500ms"), ("15", "15s"), ("1.0004", "1s"), ("90", "90s")])
def test_intervals_are_written_as_prometheus_reads_them(given, told, tmp_path):
    """Whole numbers alone: model.ParseDuration of prometheus/common."""
    folder = written(tmp_path, "--interval", given)
    texts = "".join(path.read_text() for path in folder.rglob("*.y*ml"))
    found = re.findall(r"(?:interval|timeout|timeInterval): (.*)", texts)
    assert len(found) == 8 and all(re.fullmatch(r"\d+(s|ms)", each) for each in found)
    assert found.count(told) == 8 - (told != "15s" and told != "90s")  # discovery is no faster than every 5 s


def test_the_next_steps_keep_to_loopback(tmp_path, capsys):
    written(tmp_path)
    said = capsys.readouterr().out
    assert "--web.listen-address=127.0.0.1:9090" in said and "GF_SERVER_HTTP_ADDR=127.0.0.1" in said
    assert "RAY_GRAFANA_HOST=http://127.0.0.1:3000" in said and "RAY_PROMETHEUS_HOST=http://127.0.0.1:9090" in said


def test_links_hold_no_secret(monkeypatch):
    from orchestrator.observe import links as module

    monkeypatch.setattr(module, "dashboard_url", lambda: "http://127.0.0.1:8265")
    monkeypatch.setenv("RAY_GRAFANA_HOST", "http://admin:hunter2@grafana:3000/")
    monkeypatch.delenv("RAY_GRAFANA_IFRAME_HOST", raising=False)
    assert module.links("digits") == {
        "dashboard": "http://127.0.0.1:8265/#/jobs",
        "grafana": "http://grafana:3000/d/stageline?var-experiment=digits",
    }
    monkeypatch.setenv("RAY_GRAFANA_HOST", "DISABLED")
    assert set(module.links()) == {"dashboard"}
