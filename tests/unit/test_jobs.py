"""What the Jobs API's client does of itself: addresses, tokens, three ways in which a request fails, broken logs."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from modeling.errors import UserError
from orchestrator import jobs as module
from orchestrator.cli import jobs as cli
from orchestrator.cli.main import main, parse
from orchestrator.jobs import Jobs, address_of


@pytest.fixture
def service(monkeypatch):
    """serve(status): the address of one that answers everything with it."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    servers = []

    def serve(status: int) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(b"no")

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "option, variable, address",
    [
        (None, None, "http://127.0.0.1:8265"),
        (None, "http://head:1", "http://head:1"),
        ("head:8265", "http://other", "http://head:8265"),
        ("https://ray.example.com/", None, "https://ray.example.com"),
    ],
)
def test_the_address(monkeypatch, option, variable, address):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    if variable:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", variable)
    assert address_of(option) == address


@pytest.mark.parametrize(
    "address",
    ["ray://head:10001", "http://", "https:///", "http://:8265", "http://[::1", "http://head:x", "head:99999"],
)
def test_what_is_no_address_of_a_dashboard_is_told(address):
    with pytest.raises(UserError, match="no address of a Ray dashboard"):
        address_of(address)


@pytest.mark.parametrize(
    "status, told",
    [
        (404, "answers: Version check returned 404"),
        (401, "the cluster at .* (asks for a|refuses this) token → set RAY_AUTH_TOKEN"),
        (403, "the cluster at .* (asks for a|refuses this) token"),
        (500, "no Ray dashboard answers"),
    ],
)
def test_a_service_that_does_not_answer_as_a_cluster_does(service, status, told):
    with pytest.raises(UserError, match=told):
        Jobs(service(status))


def test_nobody_there(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UserError, match=r"no Ray dashboard answers at http://127.0.0.1:9 → start the cluster"):
        Jobs("http://127.0.0.1:9")


def ended(job):
    return SimpleNamespace(value="SUCCEEDED")


def jobs_with(client: Any) -> Jobs:
    jobs = Jobs.__new__(Jobs)
    jobs.address, jobs._client = "http://head:8265", client
    return jobs


def test_a_log_whose_connection_breaks_goes_on_where_it_was(capsys, monkeypatch):
    """Ray sends it from the beginning again."""
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    cuts = [2, 3, None]

    async def tail(job):
        cut = cuts.pop(0)
        for number, line in enumerate(["one\n", "two\n", "three\n", "four\n"]):
            if number == cut:
                raise RuntimeError("WebSocket connection closed unexpectedly while job is still running")
            yield line

    jobs_with(SimpleNamespace(tail_job_logs=tail, get_job_status=ended)).follow("x-1")
    assert capsys.readouterr().out == "one\ntwo\nthree\nfour\n" and cuts == []


@pytest.mark.parametrize("first", ["RUNNING", ConnectionError("the dashboard starts anew")])
def test_a_log_that_is_closed_in_good_order_goes_on_while_the_job_runs(capsys, monkeypatch, first):
    """And where the job ended before the dashboard could be asked, its last lines are printed too."""
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    cuts, statuses = [1, 3], [first, "SUCCEEDED"]

    async def tail(job):
        for line in ["one\n", "two\n", "three\n"][: cuts.pop(0)]:
            yield line

    def status(job):
        its = statuses.pop(0)
        if isinstance(its, Exception):
            raise its
        return SimpleNamespace(value=its)

    jobs_with(SimpleNamespace(tail_job_logs=tail, get_job_status=status)).follow("x-1")
    assert capsys.readouterr().out == "one\ntwo\nthree\n" and cuts == statuses == []


def test_a_log_of_a_job_that_the_cluster_has_forgotten_is_given_up_at_once(monkeypatch):
    request: Any = SimpleNamespace(real_url="http://head:8265")
    monkeypatch.setattr(module.time, "sleep", lambda seconds: pytest.fail("it had to wait"))

    async def tail(job):
        raise aiohttp.WSServerHandshakeError(request, (), status=404)
        yield

    with pytest.raises(UserError, match="no job 'x-1' on http://head:8265"):
        jobs_with(SimpleNamespace(tail_job_logs=tail, list_jobs=list)).follow("x-1")


def test_a_quiet_log_whose_connection_breaks_every_two_minutes_is_followed(capsys, monkeypatch):
    clock = iter(range(0, 10_000, 120))
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    breaks = [True, True, True, False]

    async def tail(job):
        if breaks.pop(0):
            raise RuntimeError("WebSocket connection closed unexpectedly while job is still running")
        yield "done\n"

    statuses = ["RUNNING"] * 2 + ["SUCCEEDED"]

    def status(job):
        return SimpleNamespace(value=statuses.pop(0))

    jobs_with(SimpleNamespace(tail_job_logs=tail, get_job_status=status)).follow("x-1")
    assert capsys.readouterr().out == "done\n" and breaks == statuses == []


@pytest.mark.parametrize("status", ["FAILED", ConnectionError("nobody there")])
def test_a_log_that_stays_out_of_reach_is_given_up(monkeypatch, status):
    """Also where each try takes long to fail: the job has ended and its node is gone, or nobody answers."""
    clock = iter(range(0, 10_000, 40))
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))

    async def tail(job):
        raise RuntimeError("WebSocket connection closed unexpectedly")
        yield

    def asked(job):
        if isinstance(status, Exception):
            raise status
        return SimpleNamespace(value=status)

    with pytest.raises(UserError, match="WebSocket connection closed"):
        jobs_with(SimpleNamespace(tail_job_logs=tail, get_job_status=asked)).follow("x-1")


def test_a_running_experiment_is_found_by_name_and_storage():
    def job(number: int, status: str, **about: str):
        return SimpleNamespace(submission_id=f"x-{number}", status=status, metadata=about, start_time=number)

    here = {"experiment": "x", "storage": "s3://b/x"}
    known = [job(1, "FAILED", **here), job(2, "RUNNING", experiment="x", storage="s3://other"), job(3, "RUNNING")]
    experiment: Any = SimpleNamespace(name="x", storage="s3://b/x")
    assert jobs_with(SimpleNamespace(list_jobs=lambda: known)).running(experiment) is None
    known.append(job(4, "PENDING", **here, grace="30"))
    assert jobs_with(SimpleNamespace(list_jobs=lambda: known)).running(experiment) == "x-4"
    assert [its.submission_id for its in jobs_with(SimpleNamespace(list_jobs=lambda: known)).list()] == [
        "x-4",
        "x-2",
        "x-1",
    ]
    with pytest.raises(UserError, match=r"no job 'x-9' on .* \(there are: x-4, x-2, x-1\)"):
        jobs_with(SimpleNamespace(list_jobs=lambda: known)).info("x-9")


def test_settings_and_options_in_any_order():
    options = parse(["logs", "e.yaml", "-f", "full_finetune"])
    assert options.follow and options.stage == "full_finetune" and options.overrides == []
    options = parse(["submit", "e.yaml", "--address", "http://head:8265", "a.b=1", "-f", "c=2"])
    assert options.follow and options.overrides == ["a.b=1", "c=2"]
    options = parse(["report", "e.yaml", "a=1", "--output", "r.html", "b=2"])
    assert options.overrides == ["a=1", "b=2"]
    for wrong in (["run", "e.yaml", "--no-such"], ["list", "e.yaml"], ["cancel", "x-1", "x-2"]):
        with pytest.raises(SystemExit):
            parse(wrong)


def test_no_key_travels_with_an_experiment(tmp_path, capsys, monkeypatch):
    """Not even in a comment; and the message does not repeat it. Nobody is asked before."""
    monkeypatch.setattr(cli, "Jobs", lambda address: pytest.fail("the cluster was asked"))
    key = "AKIA" + "ABCDEFGHIJKLMNOP"
    text = "name: x\nstorage: s3://bucket/x\nmodel: {vision: micro-vit, language: micro-qwen2}\n"
    text += "data: {a: {meta: s3://bucket/a.json}}\nstages:\n  a_data: {kind: prepare, data: a}\n"
    (tmp_path / "x.yaml").write_text(f"{text}# {key}\n")
    assert main(["submit", str(tmp_path / "x.yaml")]) == 2
    said = capsys.readouterr().err
    assert "x.yaml:7" in said and key not in said


def test_what_another_wrote_of_a_job_is_listed_as_it_is(monkeypatch, capsys):
    about = {"experiment": "x", "storage": "/mnt/[/old]/[red]runs"}
    job = SimpleNamespace(
        metadata=about, end_time=None, start_time=1, submission_id="x-1", status=SimpleNamespace(value="RUNNING")
    )
    monkeypatch.setattr(cli, "Jobs", lambda address: SimpleNamespace(list=lambda: [job]))
    assert cli.list_jobs(parse(["list"])) == 0
    assert about["storage"] in capsys.readouterr().out
