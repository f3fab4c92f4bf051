"""Where a running experiment can be watched in a browser.

Invariant: no link holds a secret: a user name or password in an address is left out.
"""

import os
from urllib.parse import urlencode

from cluster.monitoring.grafana import UID
from orchestrator.address import redact


def links(experiment: str = "") -> dict[str, str]:
    """What to open, by name: of the Ray cluster that this process is connected to, and of the Grafana that the head was
    told of (RAY_GRAFANA_IFRAME_HOST, RAY_GRAFANA_HOST). Empty where there is neither."""
    found = {}
    if dashboard := dashboard_url():
        found["dashboard"] = f"{dashboard}/#/jobs"
    grafana = os.environ.get("RAY_GRAFANA_IFRAME_HOST") or os.environ.get("RAY_GRAFANA_HOST")
    if grafana and "://" in grafana:  # Ray takes DISABLED, too
        query = f"?{urlencode({'var-experiment': experiment})}" if experiment else ""
        found["grafana"] = f"{redact(grafana).rstrip('/')}/d/{UID}{query}"
    return found


def dashboard_url() -> str:
    """http://host:port; empty where this process is not connected to Ray, or its head has no dashboard."""
    import ray
    from ray._private.worker import get_dashboard_url  # ray.init() returns it once; nothing public tells it later

    address = ray.is_initialized() and get_dashboard_url()
    return f"http://{address}" if address else ""
