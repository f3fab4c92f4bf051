"""The audit of dependencies against a stand-in for OSV on loopback: it says "0 open" with an answer alone."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import audit

VULNERABILITY = {
    "id": "GHSA-test", "aliases": ["CVE-2026-1"], "summary": "reads what it should not",
    "affected": [{"package": {"name": "pyyaml", "ecosystem": "PyPI"},
                  "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.0"}]}]}],
}  # fmt: skip


@pytest.fixture
def service(monkeypatch):
    """vulnerable: the packages that it knows something about; asked: those it was asked about."""

    class Service(BaseHTTPRequestHandler):
        vulnerable: ClassVar[set[str]] = set()
        asked: ClassVar[set[str]] = set()

        def do_POST(self):
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = query["package"]["name"]
            self.asked.add(name)
            body = json.dumps({"vulns": [VULNERABILITY]} if name in self.vulnerable else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("STAGELINE_OSV_URL", f"http://127.0.0.1:{server.server_port}/v1/query")
    yield Service
    server.shutdown()
    server.server_close()


def test_a_service_that_is_not_there_is_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setenv("STAGELINE_OSV_URL", "http://127.0.0.1:9/v1/query")
    assert audit.main() == 0
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and "not done" in told and "vulnerabilities" not in told


def test_a_known_vulnerability_fails_unless_it_is_ignored_with_a_reason(service, capsys):
    service.vulnerable = {"pyyaml"}
    assert audit.main({}) == 1
    told = capsys.readouterr().out
    assert "pyyaml" in told.lower() and "GHSA-test" in told and "99.0" in told and "1 open" in told
    assert {"pyyaml", "ray", "torch", "transformers"} <= service.asked
    assert audit.main({"CVE-2026-1": "we read our own files only"}) == 0
    told = capsys.readouterr().out
    assert "ignored: we read our own files only" in told and "0 open vulnerabilities, 1 ignored" in told
