"""Who says that this machine will be taken away, and when: AWS, Google Cloud, a pod's SIGTERM, or a file for tests.

Invariant: a source only reads. None means "no notice"; anything that is not an answer raises Unreadable, and is never
taken for one. Metadata services are asked directly, past any proxy of the environment.
Sources: Amazon EC2 User Guide, "Spot Instance interruption notices", "EC2 instance rebalance recommendations" and
"Use IMDSv2"; Compute Engine documentation, "Spot VMs" (preemption process) and "Monitor and plan for a host
maintenance event"; Kubernetes documentation, "Pod Lifecycle" (termination of pods).
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from modeling.errors import UserError

AWS_URL = "http://169.254.169.254"
GCP_URL = "http://metadata.google.internal"
TIMEOUT_S = 2.0  # of one request; both services answer within milliseconds
TOKEN_TTL_S = 21600  # of AWS: the longest there is
GCP_LEAD_S = 30.0  # between a preemption's notice and its end
FILE_LEAD_S = 30.0  # of a file that says nothing
SETTLE_S = 1.0  # an empty file may be one whose writer is not done

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Notice:
    """deadline_s: seconds until the machine goes, counted from when this was read. source: the name of one below."""

    deadline_s: float
    reason: str
    source: str


class Unreadable(Exception):
    """The source did not answer, or not in its own format. Ask again."""


class Source(Protocol):
    name: str
    advice: str  # something to tell the user that is no notice

    def poll(self) -> Notice | None:
        """The notice that stands now. Raises Unreadable."""
        ...


class AwsSource:
    """IMDSv2: the spot interruption notice (two minutes ahead), and the rebalance recommendation before it.

    rebalance_lead_s: take a recommendation, which has no deadline, for a notice of that many seconds; None: only
    `advice` tells of it.
    """

    name = "aws"

    def __init__(
        self,
        url: str = AWS_URL,
        rebalance_lead_s: float | None = None,
        now: Callable[[], float] = time.time,
    ):
        self.advice = ""  # a rebalance recommendation that is not acted on, in words
        self._url, self._lead, self._now = url.rstrip("/"), rebalance_lead_s, now
        self._token = ""

    def poll(self) -> Notice | None:
        """Raises Unreadable."""
        action = self._get("/latest/meta-data/spot/instance-action")
        if action is not None:
            fields = _fields(action)
            reason = f"spot instance: {fields.get('action', 'interruption')}"
            return Notice(max(0.0, _utc(fields.get("time")) - self._now()), reason, self.name)
        rebalance = self._get("/latest/meta-data/events/recommendations/rebalance")
        if rebalance is None:
            self.advice = ""
            return None
        text = f"rebalance recommended at {_fields(rebalance).get('noticeTime')}"
        if self._lead is None:
            self.advice = text
            return None
        return Notice(self._lead, text, self.name)

    def probe(self) -> None:
        """Raises Unreadable where there is no IMDSv2."""
        self._token = _request(
            f"{self._url}/latest/api/token",
            {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_TTL_S)},
            method="PUT",
        )[0]

    def _get(self, path: str) -> str | None:
        """None where there is no such entry (404). A token that has run out (401) is replaced once."""
        for attempt in range(2):
            if not self._token:
                self.probe()
            try:
                return _request(self._url + path, {"X-aws-ec2-metadata-token": self._token})[0]
            except _Status as status:
                if status.code == 404:
                    return None
                if status.code != 401 or attempt:
                    raise
                self._token = ""
        raise AssertionError("the second attempt returns or raises")


class GcpSource:
    """The metadata server's `preempted` and `maintenance-event`.

    It does not say when the notice came, so the 30 seconds count from the last look that found none.
    """

    name, advice = "gcp", ""

    def __init__(self, url: str = GCP_URL, clock: Callable[[], float] = time.monotonic):
        self._url, self._clock = url.rstrip("/"), clock
        self._clear: float | None = None  # when there was last none

    def poll(self) -> Notice | None:
        """Raises Unreadable."""
        asked = self._clock()
        if self._get("preempted").upper() == "TRUE":
            reason = "preempted"
        elif self._get("maintenance-event") == "TERMINATE_ON_HOST_MAINTENANCE":
            reason = "host maintenance, terminate"
        else:
            self._clear = asked
            return None
        since = 0.0 if self._clear is None else self._clock() - self._clear
        return Notice(max(0.0, GCP_LEAD_S - since), reason, self.name)

    def probe(self) -> None:
        """Raises Unreadable where there is no such server."""
        self._get("preempted")

    def _get(self, entry: str) -> str:
        text, headers = _request(f"{self._url}/computeMetadata/v1/instance/{entry}", {"Metadata-Flavor": "Google"})
        if headers.get("Metadata-Flavor") != "Google":
            raise Unreadable(f"{self._url} answers, but not as Google's metadata server")
        return text.strip()


class FileSource:
    """A file whose appearance is the notice. Content: seconds, {"deadline_s": seconds}, or nothing (30 s)."""

    name, advice = "file", ""

    def __init__(self, path: str | Path, now: Callable[[], float] = time.time):
        self._path, self._now = Path(path), now

    def poll(self) -> Notice | None:
        """Raises Unreadable."""
        try:
            text, written = self._path.read_text().strip(), self._path.stat().st_mtime
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise Unreadable(f"{self._path}: {error}") from error
        if not text:
            settled = self._now() - written >= SETTLE_S
            return Notice(FILE_LEAD_S, f"{self._path} appeared", self.name) if settled else None
        try:
            content = json.loads(text)
            seconds = float(content["deadline_s"] if isinstance(content, dict) else content)
        except (ValueError, TypeError, KeyError) as error:
            raise Unreadable(f'{self._path} holds {text[:80]!r}, neither seconds nor {{"deadline_s": 30}}') from error
        return Notice(max(0.0, seconds), f"{self._path} appeared", self.name)


class SigtermSource:
    """The SIGTERM of Kubernetes: a pod is told `lead_s` seconds before it is killed, whatever takes its node.

    beside: a cloud's source that is read until then, and which may know earlier; None where there is none.
    """

    def __init__(self, lead_s: float, beside: Source | None, clock: Callable[[], float] = time.monotonic):
        self.name = f"{beside.name} and SIGTERM" if beside else "SIGTERM"
        self.advice = ""  # of the source beside
        self._lead, self._beside, self._clock = lead_s, beside, clock
        self._since: float | None = None

    @property
    def announced(self) -> bool:
        return self._since is not None

    def announce(self) -> None:
        """To be called by the signal's handler. A second signal moves nothing."""
        if self._since is None:
            self._since = self._clock()

    def poll(self) -> Notice | None:
        """Raises Unreadable."""
        if self._since is None:
            if self._beside is None:
                return None
            notice = self._beside.poll()
            self.advice = self._beside.advice
            return notice
        left = self._lead - (self._clock() - self._since)
        return Notice(max(0.0, left), "the pod is being ended", "SIGTERM")


def open_source(
    name: str, *, rebalance_lead_s: float | None = None, aws_url: str = AWS_URL, gcp_url: str = GCP_URL
) -> Source:
    """`auto`, `aws`, `gcp` or `file:PATH`. `auto` asks both clouds for their metadata service, once.

    Raises UserError for another name, and for `auto` on a machine that is in neither.
    """
    aws, gcp = AwsSource(aws_url, rebalance_lead_s), GcpSource(gcp_url)
    if name.startswith("file:") and len(name) > len("file:"):
        return FileSource(name.removeprefix("file:"))
    if name in ("aws", "gcp"):
        return aws if name == "aws" else gcp
    if name != "auto":
        raise UserError(f"unknown source of notices {name!r}", where="--source", remedy="auto, aws, gcp or file:PATH")
    found = []
    for source in (aws, gcp):
        try:
            source.probe()
            return source
        except Unreadable as error:
            found.append(f"{source.name}: {error}")
    raise UserError(
        f"no cloud's metadata service answers on this machine ({'; '.join(found)})",
        where="--source auto",
        remedy="nothing will announce a preemption here: leave the agent out, or name --source aws|gcp|file:PATH",
    )


class _Status(Unreadable):
    def __init__(self, url: str, code: int):
        super().__init__(f"{url} answers {code}")
        self.code = code


def _request(url: str, headers: dict[str, str], method: str = "GET"):
    """(body, headers). Raises _Status for an HTTP error, Unreadable for everything below it."""
    try:
        with _DIRECT.open(urllib.request.Request(url, headers=headers, method=method), timeout=TIMEOUT_S) as answer:
            return answer.read().decode(), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            raise _Status(url, error.code) from error
    except (OSError, ValueError) as error:  # URLError and timeouts are OSErrors; a body that is no text a ValueError
        raise Unreadable(f"{url}: {getattr(error, 'reason', error)}") from error


def _fields(text: str) -> dict:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise Unreadable(f"the metadata service says {text[:80]!r}, which is no JSON") from error
    if not isinstance(fields, dict):
        raise Unreadable(f"the metadata service says {text[:80]!r}, which is no JSON object")
    return fields


def _utc(text: object) -> float:
    """Unix time of "2017-09-18T08:22:00Z"."""
    try:
        return datetime.strptime(str(text), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
    except ValueError as error:
        raise Unreadable(f"the metadata service gives the time {text!r}, not as 2017-09-18T08:22:00Z") from error
