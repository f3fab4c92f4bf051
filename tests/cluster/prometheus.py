"""A real Prometheus on loopback, with a configuration file of the product and a folder of its own.

debian.py installs the package where it may.
"""

import json
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

PATIENCE_S = 60.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as held:
        return held.getsockname()[1]


class Prometheus:
    """Serves at `url` inside its `with` block."""

    def __init__(self, configuration: Path, folder: Path, url: str):
        self._configuration, self._folder, self.url = configuration, folder, url

    def __enter__(self) -> "Prometheus":
        command = [
            "prometheus", f"--config.file={self._configuration}", f"--storage.tsdb.path={self._folder / 'data'}",
            f"--web.listen-address={self.url.removeprefix('http://')}",
        ]  # fmt: skip
        with (self._folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        until = time.monotonic() + PATIENCE_S
        while not self._ready():
            text = (self._folder / "prometheus.log").read_text()
            assert self._process.poll() is None and time.monotonic() < until, text
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(30)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The result now: [{"metric": labels, "value": [time, text]}, ...]."""
        return self.get("query", query=expression)["result"]

    def over_time(self, expression: str, seconds: float, step_s: float = 1.0) -> list[dict[str, Any]]:
        """The result over the last seconds: [{"metric": labels, "values": [[time, text], ...]}, ...]."""
        now = time.time()
        return self.get("query_range", query=expression, start=now - seconds, end=now, step=step_s)["result"]

    def get(self, path: str, **parameters: Any) -> Any:
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(address, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from error

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5):
                return True
        except OSError:
            return False
