"""Notices of preemption: what the clouds' metadata services say, and that each notice reaches Ray once."""

import json
import logging
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster import agent as agent_module
from cluster import notice as notice_module
from cluster.agent import Agent, nodes_of
from cluster.gcs import Gcs, Node, Unanswered, reachable
from cluster.notice import AwsSource, FileSource, GcpSource, Notice, SigtermSource, Unreadable, open_source
from modeling.errors import UserError

SPOT = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
PREEMPTED = "/computeMetadata/v1/instance/preempted"
MAINTENANCE = "/computeMetadata/v1/instance/maintenance-event"


class Metadata(ThreadingHTTPServer):
    """A metadata service: `entries` by path, and for AWS the one token it takes now. None as a token: no IMDSv2."""

    def __init__(self, token: str | None = None, flavor: str = "Google"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.flavor = token, flavor
        self.entries: dict[str, str] = {}
        self.status = 200
        self.tokens_given = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self):
        if self.server.token is None or self.path != "/latest/api/token":
            return self._answer(404)
        assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.server.tokens_given += 1
        self._answer(200, self.server.token)

    def do_GET(self):
        if self.server.status != 200:
            return self._answer(self.server.status)
        if self.server.token is not None:
            if self.headers["X-aws-ec2-metadata-token"] != self.server.token:
                return self._answer(401)
        elif self.headers["Metadata-Flavor"] != "Google":
            return self._answer(403)
        found = self.server.entries.get(self.path)
        self._answer(404) if found is None else self._answer(200, found)

    def _answer(self, code: int, text: str = ""):
        self.send_response(code)
        self.send_header("Metadata-Flavor", self.server.flavor)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """The services here share a process with who asks them."""
    monkeypatch.setattr(notice_module, "TIMEOUT_S", 30.0)


@contextmanager
def metadata(**options):
    server = Metadata(**options)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def aws():
    with metadata(token="first") as server:
        yield server


@pytest.fixture
def gcp():
    with metadata() as server:
        server.entries = {PREEMPTED: "FALSE\n", MAINTENANCE: "NONE"}
        yield server


class Clock:
    def __init__(self, now: float = 1000.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


# -- sources ---------------------------------------------------------------------------------------------


def test_aws_interruption_has_the_deadline_that_amazon_names(aws):
    source = AwsSource(aws.url, now=Clock(1505722800.0))  # 2017-09-18T08:20:00Z
    assert source.poll() is None
    aws.entries[SPOT] = json.dumps({"action": "terminate", "time": "2017-09-18T08:22:00Z"})
    assert source.poll() == Notice(120.0, "spot instance: terminate", "aws")
    aws.entries[SPOT] = json.dumps({"action": "hibernate", "time": "2017-09-18T08:19:00Z"})
    assert source.poll() == Notice(0.0, "spot instance: hibernate", "aws")


def test_aws_token_is_fetched_once_and_replaced_when_it_has_run_out(aws):
    source = AwsSource(aws.url)
    assert source.poll() is None and source.poll() is None
    assert aws.tokens_given == 1
    aws.token = "second"
    assert source.poll() is None
    assert aws.tokens_given == 2


def test_a_token_that_is_never_taken_ends_in_an_error_not_in_a_loop(aws):
    aws.status = 401
    with pytest.raises(Unreadable, match="401"):
        AwsSource(aws.url).poll()
    assert aws.tokens_given == 2


def test_aws_rebalance_is_advice_unless_it_is_to_be_acted_on(aws):
    aws.entries[REBALANCE] = json.dumps({"noticeTime": "2017-09-18T08:20:00Z"})
    source = AwsSource(aws.url)
    assert source.poll() is None and "2017-09-18T08:20:00Z" in source.advice
    eager = AwsSource(aws.url, rebalance_lead_s=300.0, now=Clock(1505722800.0))
    assert eager.poll() == Notice(300.0, "rebalance recommended at 2017-09-18T08:20:00Z", "aws")
    aws.entries[SPOT] = json.dumps({"action": "stop", "time": "2017-09-18T08:22:00Z"})
    assert eager.poll() == Notice(120.0, "spot instance: stop", "aws")


@pytest.mark.parametrize("said", ["<html>", "[1]", '{"action": "stop"}', '{"action": "stop", "time": "soon"}'], ids=str)
def test_what_amazon_never_says_is_no_notice_and_no_silence(aws, said):
    aws.entries[SPOT] = said
    with pytest.raises(Unreadable):
        AwsSource(aws.url).poll()


@pytest.mark.parametrize(
    "entries, reason",
    [
        ({PREEMPTED: "TRUE\n"}, "preempted"),
        ({MAINTENANCE: "TERMINATE_ON_HOST_MAINTENANCE"}, "host maintenance, terminate"),
        ({MAINTENANCE: "MIGRATE_ON_HOST_MAINTENANCE"}, None),
    ],
)
def test_gcp_counts_from_the_last_look_that_found_nothing(gcp, entries, reason):
    clock = Clock()
    source = GcpSource(gcp.url, clock)
    assert source.poll() is None
    gcp.entries |= entries
    clock.now += 4.0
    assert source.poll() == (None if reason is None else Notice(26.0, reason, "gcp"))
    fresh = GcpSource(gcp.url, clock).poll()
    assert fresh == (None if reason is None else Notice(30.0, reason, "gcp"))


def test_a_notice_that_has_stood_longer_than_its_lead_leaves_nothing(gcp):
    clock = Clock()
    source = GcpSource(gcp.url, clock)
    source.poll()
    gcp.entries[PREEMPTED] = "TRUE"
    clock.now += 45.0
    assert source.poll() == Notice(0.0, "preempted", "gcp")


def test_a_server_that_is_not_googles_is_not_believed():
    with metadata(flavor="Other") as server:
        server.entries = {PREEMPTED: "TRUE"}
        with pytest.raises(Unreadable, match="not as Google"):
            GcpSource(server.url).poll()


def test_metadata_is_asked_directly_whatever_proxy_is_set(gcp, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert GcpSource(gcp.url).poll() is None


@pytest.mark.parametrize("code", [403, 500, 503])
def test_an_error_of_the_service_is_not_taken_for_no_notice(aws, gcp, code):
    aws.status = gcp.status = code
    for source in (AwsSource(aws.url), GcpSource(gcp.url)):
        with pytest.raises(Unreadable, match=str(code)):
            source.poll()


@pytest.mark.parametrize("content, seconds", [("25", 25.0), ('{"deadline_s": 7.5}', 7.5), ("-3", 0.0), ("", 30.0)])
def test_the_appearance_of_a_file_is_a_notice(tmp_path, content, seconds):
    path = tmp_path / "notice"
    source = FileSource(path, now=lambda: time.time() + 2.0)
    assert source.poll() is None
    path.write_text(content)
    notice = source.poll()
    assert notice is not None and notice.deadline_s == seconds and str(path) in notice.reason


def test_a_file_being_written_is_not_read_yet(tmp_path):
    path = tmp_path / "notice"
    path.touch()
    assert FileSource(path, now=lambda: path.stat().st_mtime + 0.5).poll() is None


@pytest.mark.parametrize("content", ["soon", '{"deadline": 3}', "[]", "null"])
def test_a_file_that_says_neither_is_told(tmp_path, content):
    (tmp_path / "notice").write_text(content)
    with pytest.raises(Unreadable, match="neither seconds nor"):
        FileSource(tmp_path / "notice").poll()


def test_auto_takes_the_cloud_that_answers(aws, gcp, tmp_path):
    nobody = "http://127.0.0.1:1"
    assert open_source("auto", aws_url=aws.url, gcp_url=nobody).name == "aws"
    assert open_source("auto", aws_url=gcp.url, gcp_url=gcp.url).name == "gcp"
    assert isinstance(open_source(f"file:{tmp_path}/x"), FileSource)
    with pytest.raises(UserError, match="no cloud's metadata service") as caught:
        open_source("auto", aws_url=nobody, gcp_url=nobody)
    assert "leave the agent out" in caught.value.remedy
    for unknown in ("azure", "file:"):
        with pytest.raises(UserError, match="unknown source"):
            open_source(unknown)


# -- the agent -------------------------------------------------------------------------------------------


class Script:
    """A source that says what the test put into `says`, and a drain that fails with what is in `fails`."""

    name, advice = "script", ""

    def __init__(self):
        self.says: Notice | Exception | None = None
        self.fails: Exception | None = None
        self.drained: list[tuple[float, str]] = []
        self.clock = Clock()
        self.agent = Agent(self, self.drain, self.clock)

    def poll(self) -> Notice | None:
        if isinstance(self.says, Exception):
            raise self.says
        return self.says

    def drain(self, seconds: float, message: str) -> None:
        if self.fails:
            raise self.fails
        self.drained.append((seconds, message))

    def polls(self, times: int = 1, apart: float = 1.0) -> None:
        for _ in range(times):
            self.agent.poll()
            self.clock.now += apart


def test_a_notice_is_passed_on_once_however_often_it_is_read():
    script = Script()
    script.polls(3)
    script.says = Notice(30.0, "preempted", "gcp")
    script.polls(5)
    assert script.drained == [(30.0, "gcp: preempted")] and not script.agent.pending


def test_a_drain_that_is_not_answered_is_tried_again_with_the_time_that_is_left():
    script = Script()
    script.says, script.fails = Notice(30.0, "preempted", "gcp"), Unanswered("no GCS")
    script.polls(4)
    assert script.agent.pending
    script.says = Unreadable("the metadata service went away too")
    script.fails = LookupError("the node has not joined")
    script.polls(2)
    script.fails = None
    script.polls(3)
    assert script.drained == [(24.0, "gcp: preempted")]


def test_only_a_notice_that_ends_sooner_is_passed_on_after_another():
    script = Script()
    script.says = Notice(120.0, "rebalance", "aws")
    script.polls(1, apart=10.0)
    script.says = Notice(109.5, "the same, half a second off", "aws")
    script.polls(1, apart=0.0)
    script.says = Notice(200.0, "later", "aws")
    script.polls(1, apart=0.0)
    script.says = Notice(60.0, "interruption", "aws")
    script.polls(2)
    assert script.drained == [(120.0, "aws: rebalance"), (60.0, "aws: interruption")]


def test_after_a_withdrawn_notice_the_next_one_counts(caplog):
    script = Script()
    script.says = Notice(30.0, "first", "file")
    script.polls()
    script.says = None
    script.polls(2)
    assert caplog.text.count("withdrawn") == 1
    script.says = Notice(30.0, "second", "file")
    script.polls(2)
    assert [message for _, message in script.drained] == ["file: first", "file: second"]


def test_a_lasting_fault_is_logged_once_and_so_is_its_end(caplog):
    caplog.set_level(logging.INFO)
    script = Script()
    script.polls(2)
    script.says = Unreadable("timed out")
    script.polls(3)
    script.says = None
    script.polls(3)
    script.advice = "rebalance recommended"
    script.polls(3)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(",")[0] for line in lines[:1]] == ["script cannot be read"]
    assert lines[1:] == ["script answers again", "rebalance recommended; --act-on-rebalance would drain now"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--address", "localhost"], "not host:port"),
        (["--address", "127.0.0.1:1", "--poll", "0"], "between two looks"),
        (["--address", "127.0.0.1:1", "--source", "azure"], "unknown source"),
    ],
)
def test_mistakes_in_the_options_are_one_line_and_exit_2(capsys, monkeypatch, arguments, says):
    monkeypatch.setattr(agent_module.signal, "signal", lambda *_: None)
    for name in agent_module.RAY_CLIENT:
        monkeypatch.setenv(name, "60")  # so that main() leaves the environment of this process alone
    assert agent_module.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("agent: ") and says in error and error.count("\n") == 1


def test_a_gcs_that_is_not_there_is_told_at_once():
    started = time.monotonic()
    assert not reachable("127.0.0.1", 1)
    with pytest.raises(Unanswered, match="nobody listens"):
        Gcs.connect("127.0.0.1:1")
    assert time.monotonic() - started < 10


class Nodes:
    """Stands in for Gcs: two nodes on this machine and one elsewhere."""

    address = "10.9.8.7:6379"

    def alive(self) -> list[Node]:
        places = {"a1": "127.0.0.1", "a2": "127.0.0.1", "b1": "203.0.113.9"}
        return [Node(node, place, 1, head=False) for node, place in places.items()]


def test_all_nodes_of_the_machine_go_with_it_and_no_other():
    def found(node_id):
        return [node.id for node in nodes_of(Nodes(), node_id)]

    assert found(None) == ["a1", "a2"]
    assert found("b1") == ["b1"]
    with pytest.raises(LookupError, match="has the id c1"):
        found("c1")


def test_in_a_pod_sigterm_is_a_notice_whatever_the_cloud_says(tmp_path):
    clock = iter([100.0, 130.0, 400.0])
    cloud = FileSource(tmp_path / "notice")
    source = SigtermSource(120.0, cloud, clock=lambda: next(clock))
    assert source.poll() is None and source.name == "file and SIGTERM"
    (tmp_path / "notice").write_text("300")
    assert source.poll() == Notice(300.0, f"{tmp_path / 'notice'} appeared", "file")
    source.announce()  # at 100
    source.announce()
    assert source.poll() == Notice(90.0, "the pod is being ended", "SIGTERM")
    assert source.poll() == Notice(0.0, "the pod is being ended", "SIGTERM")


def test_in_no_cloud_sigterm_alone_announces_and_a_lost_node_lets_the_agent_go(monkeypatch, caplog):
    def nowhere(name, **_):
        raise UserError("no cloud's metadata service answers on this machine", where="--source auto")

    monkeypatch.setattr(agent_module, "open_source", nowhere)
    monkeypatch.setattr(agent_module.signal, "signal", lambda number, handler: handlers.append(handler))
    handlers, drained = [], []
    source = agent_module._open("auto", None, 60.0)
    assert isinstance(source, SigtermSource) and source.poll() is None
    with pytest.raises(UserError):
        agent_module._open("aws", None, 60.0)

    def drain(seconds: float, message: str) -> None:
        drained.append((seconds, message))
        raise LookupError("no living node") if len(drained) > 1 else Unanswered("mute")

    handlers[0](15, None)
    monkeypatch.setattr(agent_module, "RETRY_S", 0.01)
    assert agent_module._watch(Agent(source, drain), source, poll=0.01) == 0
    assert len(drained) == 2 and 55 < drained[0][0] <= 60 and drained[0][1] == "SIGTERM: the pod is being ended"
