"""An S3 service for the fast ring: moto, and a proxy in front of it that fails as told."""

import atexit
import functools
import http.client
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.address import S3Address
from orchestrator.retry import Retries
from orchestrator.s3 import S3Store

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "an-access-key", "AWS_SECRET_ACCESS_KEY": "a-secret-key", "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}  # fmt: skip
SYSTEMS: dict[str, dict[int, object]] = {}
ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>as told</Message></Error>"


class Time:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)

    def retries(self, patience: float = 120.0, **settings) -> Retries:
        return Retries(patience, sleep=self.sleep, clock=lambda: self.now, draw=random.Random(0).uniform, **settings)


@functools.cache
def moto() -> str:
    """The endpoint of a moto server that ends with this process; started once. It takes parts of 2 kB."""
    # it takes a free port itself and says which: one that is chosen here may be gone when it has started
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", "0"]
    with tempfile.TemporaryFile() as log:
        environment = os.environ | {"S3_UPLOAD_PART_MIN_SIZE": "2000", "PYTHONUNBUFFERED": "1"}
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        atexit.register(server.kill)
        deadline = time.monotonic() + 120
        while not (found := re.search(rb"Running on (http://127\.0\.0\.1:\d+)", os.pread(log.fileno(), 2**16, 0))):
            running = server.poll() is None and time.monotonic() < deadline
            assert running, f"moto_server does not start: {os.pread(log.fileno(), 2**16, 0).decode()}"
            time.sleep(0.02)
    return found[1].decode()


def s3_store(monkeypatch, endpoint: str = "", **settings) -> S3Store:
    """A store in a fresh bucket; the stores for one endpoint share their connections."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    bucket = f"b-{uuid.uuid4().hex}"
    connection = http.client.HTTPConnection(urlsplit(moto()).netloc)
    signed = "AWS4-HMAC-SHA256 Credential=an-access-key/20260101/us-east-1/s3/aws4_request"
    connection.request("PUT", f"/{bucket}", headers={"Authorization": signed})
    assert connection.getresponse().status == 200
    connection.close()
    store = S3Store(S3Address(bucket, "some/prefix", endpoint or moto()), **settings)
    store._systems = SYSTEMS.setdefault(store.endpoint, {})
    return store


@dataclass
class Proxy:
    """Passes requests to moto, but for those that `faults` names.

    faults: (which, what) for the next request of a method, and with a text in its path ("PUT", "PUT partNumber=1"):
    "drop" it before it arrives, "hang" five seconds and drop it, "mute" the answer to it, "tear" the body of the
    answer, or answer with an error such as "503 SlowDown".
    strip: forget If-None-Match, as some gateways do. seen: (method, path) of every request.
    """

    strip: bool = False
    faults: list[tuple[str, str]] = field(default_factory=list)
    seen: list[tuple[str, str]] = field(default_factory=list)

    def __enter__(self) -> "Proxy":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, self))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fault(self, method: str, path: str) -> str:
        for i, (wanted, what) in enumerate(self.faults):
            first, *parts = wanted.split()
            if first == method and all(part in path for part in parts):
                del self.faults[i]
                return what
        return ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, proxy: Proxy, *arguments):
        self.proxy = proxy
        super().__init__(*arguments)

    def answer(self) -> None:
        self.proxy.seen.append((self.command, self.path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.fault(self.command, self.path)
        if fault[:3].isdigit():
            status, code = fault.split()
            return self.reply(int(status), [], ERROR.format(code=code).encode())
        if fault == "hang":
            time.sleep(5)
        if fault in ("drop", "hang"):
            return self.cut()
        kept = {k: v for k, v in self.headers.items() if not (self.proxy.strip and k.lower() == "if-none-match")}
        connection = http.client.HTTPConnection(urlsplit(moto()).netloc, timeout=30)
        connection.request(self.command, self.path, body, kept)
        response = connection.getresponse()
        headers, data = response.getheaders(), response.read()
        connection.close()
        if fault == "mute":
            return self.cut()
        self.reply(response.status, headers, data, torn=fault == "tear")

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

    def reply(self, status: int, headers: list[tuple[str, str]], data: bytes, torn: bool = False) -> None:
        self.send_response_only(status)
        length = str(len(data))
        for name, value in headers:
            if self.command == "HEAD" and name.lower() == "content-length":
                length = value
            elif name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data[: len(data) // 2] if torn else data)
        if torn:
            self.cut()

    def cut(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *arguments) -> None:
        pass
