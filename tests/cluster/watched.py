"""A Ray head with its dashboard and a token, all on loopback, as a person starts one: `ray start --head`.

Invariant: it has ports and a folder of its own, and it is ended through the process that was started here.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from prometheus import free_port

PATIENCE_S = 120.0
# what a GPU node and a stage on it report: this machine has none. Names and tags are those of Ray's reporter.
STAND_IN = """
import sys, time
import ray
from ray.dashboard.modules.reporter.reporter_agent import GPU_TAG_KEYS, METRICS_GAUGES
from ray.util.metrics import Gauge
ray.init(address=sys.argv[1], log_to_driver=False)
tags = dict.fromkeys(GPU_TAG_KEYS, "") | {"GpuIndex": "0", "GpuDeviceName": "stand-in"}
gpu = {"node_gpus_utilization": 50, "node_gram_used": 1024, "node_gram_available": 1024}
assert set(gpu) <= set(METRICS_GAUGES)
gauges = {Gauge(name, METRICS_GAUGES[name].description, tuple(tags)): value for name, value in gpu.items()}
labels = ("experiment", "stage", "kind")
mfu = Gauge("stageline_mfu_ratio", "", labels)
while True:
    for gauge, value in gauges.items():
        gauge.set(value, tags)
    mfu.set(0.4, dict(zip(labels, ("on_gpus", "on_gpus", "train"))))
    time.sleep(0.5)
"""


class Head:
    """A context manager; all is gone after the block. `environment`: what a driver and a command need to join."""

    def __init__(self, cpus: int = 2):
        self._cpus = cpus
        self._stand_in: subprocess.Popen | None = None

    def __enter__(self) -> "Head":
        self.folder = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))  # short: paths of sockets end at 107 characters
        self.token_file = self.folder / "token"
        self.token = secrets.token_hex(32)
        self.token_file.write_text(self.token)
        self.token_file.chmod(0o600)
        self._port, self._dashboard = free_port(), free_port()
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(self.folder),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's name for: keep to loopback
            "RAY_metrics_report_interval_ms": "1000",  # 10 s otherwise: tests would wait
            "DASHBOARD_METRIC_PORT": str(free_port()),
            "AUTOSCALER_METRIC_PORT": str(free_port()),
        }
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
            f"--port={self._port}", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self._dashboard}", f"--num-cpus={self._cpus}", f"--temp-dir={self.folder}",
            # of which Ray's defaults are the same for every head of a machine; an agent without its port serves no logs
            f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}",
        ]  # fmt: skip
        with (self.folder / "head.log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=self._whole(), start_new_session=True, cwd=self.folder
            )
        try:
            self._until_it_answers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self._stand_in, self._process):
            if process is not None and process.poll() is None:
                process.terminate()
                try:
                    process.wait(PATIENCE_S)  # killed, it would leave Ray's other processes behind
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def address(self) -> str:
        """Of GCS."""
        return f"127.0.0.1:{self._port}"

    @property
    def url(self) -> str:
        """Of the dashboard."""
        return f"http://127.0.0.1:{self._dashboard}"

    def pretend_gpus(self) -> None:
        """From now on something reports to Ray what a GPU node does, beside all that is real."""
        command = [sys.executable, "-c", STAND_IN, self.address]
        with (self.folder / "stand-in.log").open("wb") as log:
            self._stand_in = subprocess.Popen(command, stdout=log, stderr=log, env=self._whole())

    def get(self, path: str) -> Any:
        """JSON of the dashboard's API, as whoever has the token."""
        asked = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return json.load(answer)

    def _whole(self) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | self.environment

    def _until_it_answers(self) -> None:
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                if self.get("/api/prometheus/sd"):
                    return
            except urllib.error.HTTPError as error:
                assert error.code >= 500, error
            except OSError:
                pass
            text = (self.folder / "head.log").read_text()
            assert self._process.poll() is None and time.monotonic() < until, text
            time.sleep(0.2)
