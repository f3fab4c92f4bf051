"""How Prometheus finds the nodes of a cluster: it asks the head, or the operator of Kubernetes asks for the pods.

Invariant: no token is written, only the path of the file that holds it. The head's `/api/prometheus/sd` names every
living node's endpoint and its own; it asks for the token where the cluster has one, the endpoints themselves never do:
Ray's agents serve metrics on all interfaces, so a firewall has to keep strangers out (Ray 2.60, http_server_head.py).
"""

from typing import Any

REMARK = """\
# Written by `stageline cluster monitoring`.
# The head tells which nodes there are. Of a cluster whose dashboard is not reachable from here, on the head itself:
# replace http_sd_configs by
#   file_sd_configs: [{files: [/tmp/ray/session_latest/prom_metrics_service_discovery.json]}]
# On Kubernetes, with the Prometheus operator, use podmonitor.yaml instead of this file.
"""
POD_REMARK = """\
# Written by `stageline cluster monitoring`: for the Prometheus operator, beside KubeRay.
# kubectl apply -f podmonitor.yaml; its labels have to be those that your Prometheus selects.
"""


def duration(seconds: float) -> str:
    """As Prometheus, its operator and Grafana all read it: whole seconds, else milliseconds. They take no fractions."""
    milliseconds = round(seconds * 1000)
    return f"{milliseconds // 1000}s" if milliseconds % 1000 == 0 else f"{milliseconds}ms"


def configuration(head: str, interval_s: float, token_file: str | None = None) -> dict[str, Any]:
    """prometheus.yml. head: http://host:port of the Ray dashboard. token_file: with the cluster's token."""
    discovery: dict[str, Any] = {"url": f"{head}/api/prometheus/sd", "refresh_interval": duration(max(interval_s, 5))}
    if token_file:
        discovery["authorization"] = {"type": "Bearer", "credentials_file": token_file}
    interval = duration(interval_s)
    return {
        "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
        "scrape_configs": [{"job_name": "ray", "http_sd_configs": [discovery]}],
    }


def pod_monitor(interval_s: float) -> dict[str, Any]:
    """The head's and the workers' pods, by the labels and the name of the port that KubeRay gives them."""
    endpoints = [{"port": port, "interval": duration(interval_s)} for port in ("metrics", "as-metrics", "dash-metrics")]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": "stageline-ray", "labels": {"release": "prometheus"}},
        "spec": {
            "jobLabel": "ray-io",
            "namespaceSelector": {"any": True},
            "selector": {
                "matchExpressions": [{"key": "ray.io/node-type", "operator": "In", "values": ["head", "worker"]}]
            },
            "podMetricsEndpoints": endpoints,
        },
    }
