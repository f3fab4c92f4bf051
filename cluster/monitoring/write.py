"""The folder of monitoring files: what Prometheus and Grafana read.

Invariant: written again it is the same; files of ours are replaced, anything else in the folder stays.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from cluster.monitoring import grafana, prometheus

PROMETHEUS = "prometheus.yml"
POD_MONITOR = "podmonitor.yaml"
PROVISIONING = "grafana/provisioning"
DASHBOARDS = "grafana/dashboards"


def write(
    folder: Path, head: str, prometheus_url: str, interval_s: float = 10.0, token_file: str | None = None
) -> list[Path]:
    """All files below `folder`; their paths. head, prometheus_url: http://host:port."""
    folder = folder.absolute()
    dashboards = folder / DASHBOARDS
    settings = prometheus.configuration(head, interval_s, token_file)
    texts = {
        PROMETHEUS: prometheus.REMARK + _yaml(settings),
        POD_MONITOR: prometheus.POD_REMARK + _yaml(prometheus.pod_monitor(interval_s)),
        f"{PROVISIONING}/datasources/stageline.yml": _yaml(grafana.data_source(prometheus_url, interval_s)),
        f"{PROVISIONING}/dashboards/stageline.yml": _yaml(grafana.providers(dashboards)),
        f"{DASHBOARDS}/stageline.json": json.dumps(grafana.dashboard(), indent=1) + "\n",
    }
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return [folder / name for name in texts]


def _yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False)
