"""`stageline cluster monitoring`: the files with which Prometheus and Grafana watch a cluster, and what to start."""

import argparse
import math
import os
import re
from pathlib import Path

from cluster.monitoring.grafana import RAY_DASHBOARDS
from cluster.monitoring.write import PROMETHEUS, PROVISIONING, write
from modeling.errors import UserError
from orchestrator.cli.outputs import writing

ADDRESS = re.compile(r"https?://[^@/?#\s]+")
RAY_GRAFANA, RAY_PROMETHEUS = "RAY_GRAFANA_HOST", "RAY_PROMETHEUS_HOST"


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--output", required=True, metavar="DIR", help="a folder for the files")
    sub.add_argument("--head", default="http://127.0.0.1:8265", help="of the Ray dashboard (default: %(default)s)")
    sub.add_argument("--prometheus", default="http://127.0.0.1:9090", help="where it will listen (%(default)s)")
    sub.add_argument("--grafana", default="http://127.0.0.1:3000", help="where it will listen (%(default)s)")
    sub.add_argument("--interval", type=float, default=10.0, metavar="S", help="between two scrapes (%(default)g)")
    text = "with Ray's token, for Prometheus (default: RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token where there is one)"
    sub.add_argument("--token-file", metavar="FILE", help=text)


def run(options: argparse.Namespace) -> int:
    folder = Path(options.output)
    if not 1 <= options.interval < math.inf:
        raise UserError("not a number of seconds from 1 on", where=f"--interval {options.interval}", remedy="give 10")
    head, prometheus, grafana = (_address(options, name) for name in ("head", "prometheus", "grafana"))
    token = _token_file(options.token_file)
    with writing(folder):
        paths = write(folder, head, prometheus, options.interval, str(token) if token else None)
    for path in paths:
        print(path)
    if token:
        print(f"\nRay's token: Prometheus reads {token}; a cluster without a token needs none.")
    else:
        print("\nRay's token: none found, right for a cluster without one; else give --token-file.")
    print(_next_steps(folder.absolute(), head, prometheus, grafana))
    return 0


def _token_file(given: str | None) -> Path | None:
    """Where Ray finds its own token, unless another file was given: without it the head answers 401."""
    usual = Path.home() / ".ray" / "auth_token"
    where, named = ("--token-file", given) if given else ("RAY_AUTH_TOKEN_PATH", os.environ.get("RAY_AUTH_TOKEN_PATH"))
    if not named:
        return usual if usual.is_file() else None
    path = Path(named).expanduser().absolute()
    if not path.is_file():
        raise UserError("no such file", where=f"{where} {path}", remedy="give the file that holds Ray's token")
    return path


def _address(options: argparse.Namespace, name: str) -> str:
    given = getattr(options, name).rstrip("/")
    if not ADDRESS.fullmatch(given):
        raise UserError("not an address", where=f"--{name}", remedy="write http://host:port, without a user or path")
    return given


def _next_steps(folder: Path, head: str, prometheus: str, grafana: str) -> str:
    listen, (host, _, port) = prometheus.split("://")[1], grafana.split("://")[1].partition(":")
    return f"""
Start the head so that its dashboard shows Grafana's panels:
  {RAY_PROMETHEUS}={prometheus} {RAY_GRAFANA}={grafana} ray start --head
Prometheus, on a machine that reaches {head} and port 8080 or --metrics-export-port of every node:
  prometheus --config.file={folder / PROMETHEUS} --web.listen-address={listen} --storage.tsdb.path={folder / "data"}
Grafana, where it reads {RAY_DASHBOARDS} of the head:
  GF_PATHS_PROVISIONING={folder / PROVISIONING} GF_SERVER_HTTP_ADDR={host} GF_SERVER_HTTP_PORT={port or 3000} \\
  GF_SECURITY_ALLOW_EMBEDDING=true GF_AUTH_ANONYMOUS_ENABLED=true GF_AUTH_ANONYMOUS_ORG_ROLE=Viewer grafana server
Then {grafana}/d/stageline, or the Metrics tab of {head}.
Ray serves metrics on all interfaces of each node, without a token: let a firewall keep strangers from these ports."""
