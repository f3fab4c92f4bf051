"""The files that Grafana reads when it starts: a data source, where dashboards lie, and the dashboard (panels.py).

Invariant: the uids are fixed, so that links to the dashboard hold and a newer file replaces an older one. The format is
Grafana's classic one, read by versions 10 and later; a test holds it against Grafana's own types.
"""

from pathlib import Path
from typing import Any

from cluster.monitoring.panels import ROWS, Panel
from cluster.monitoring.prometheus import duration

UID = "stageline"
SOURCE_UID = "stageline-prometheus"
SOURCE = {"type": "prometheus", "uid": SOURCE_UID}
WIDTH, HEIGHT, ACROSS = 8, 8, 24  # of a panel and of the page, in Grafana's grid
RAY_DASHBOARDS = "/tmp/ray/session_latest/metrics/grafana/dashboards"  # which the head writes for its own pages


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana's JSON."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "panels": [],
                       "gridPos": {"x": 0, "y": y, "w": ACROSS, "h": 1}})  # fmt: skip
        y += 1
        for i, panel in enumerate(row):
            place = {"x": i * WIDTH % ACROSS, "y": y + i * WIDTH // ACROSS * HEIGHT, "w": WIDTH, "h": HEIGHT}
            panels.append(_panel(panel, len(panels) + 1, place))
        y += -(-len(row) * WIDTH // ACROSS) * HEIGHT
    return {
        "uid": UID,
        "title": "Stageline",
        "description": "Experiments and their stages as their drivers tell of them, and the nodes as Ray does.",
        "tags": ["stageline", "ray"],
        "schemaVersion": 38,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [
            _variable("experiment", "Experiment", "label_values(ray_stageline_stage_running, experiment)"),
            _variable("stage", "Stage", 'label_values(ray_stageline_stage_running{experiment=~"$experiment"}, stage)'),
        ]},
        "panels": panels,
    }  # fmt: skip


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    scale = {"type": "log", "log": 10} if panel.logarithmic else {"type": "linear"}
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "custom": {"drawStyle": "line", "lineWidth": 2, "fillOpacity": 0, "showPoints": "auto",
                   "spanNulls": False, "scaleDistribution": scale},
    }  # fmt: skip
    if panel.ratio:
        defaults |= {"min": 0, "max": 1}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description + (" On GPUs only." if panel.gpus else ""),
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": ["lastNotNull"]},
            "tooltip": {"mode": "multi", "sort": "none"},
        },
        "targets": [
            {"refId": chr(ord("A") + i), "expr": query.expr, "legendFormat": query.legend, "range": True,
             "datasource": SOURCE}
            for i, query in enumerate(panel.queries)
        ],
    }  # fmt: skip


def _variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name, "label": label, "type": "query", "datasource": SOURCE, "query": query, "refresh": 2, "sort": 1,
        "includeAll": True, "multi": True, "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }  # fmt: skip


def data_source(prometheus: str, interval_s: float) -> dict[str, Any]:
    """Grafana's provisioning/datasources. The name is that which the Ray dashboard asks for (RAY_PROMETHEUS_NAME)."""
    source = {
        "name": "Prometheus", "uid": SOURCE_UID, "type": "prometheus", "access": "proxy", "url": prometheus,
        "isDefault": True, "jsonData": {"timeInterval": duration(interval_s), "httpMethod": "POST"},
    }  # fmt: skip
    return {"apiVersion": 1, "datasources": [source]}


def providers(dashboards: Path) -> dict[str, Any]:
    """Grafana's provisioning/dashboards: ours, and those of Ray, which the Ray dashboard embeds."""
    return {
        "apiVersion": 1,
        "providers": [
            {"name": name, "folder": name, "type": "file", "options": {"path": str(path)}}
            for name, path in (("Stageline", dashboards), ("Ray", Path(RAY_DASHBOARDS)))
        ],
    }
