"""The only file that knows Ray's Jobs API: drivers that run on the head of a cluster, submitted from outside.

Invariant: a request that fails says which of three it was: nobody there, no or a wrong token, or what the cluster says.
What a job is about (experiment, storage, a digest of its settings) is in its metadata: its id alone is enough to find
it again, and to tell whether it is what would be submitted now.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic_core import to_jsonable_python

from cluster import driverjob
from modeling.errors import UserError
from orchestrator.bundle import EXPERIMENT, make_bundle
from orchestrator.fingerprint import fingerprint
from orchestrator.spec import Experiment

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
RECONNECT_S = 60.0  # for which a log that is followed may be out of reach
STOOD_S = 5.0  # after which a connection that broke had been one, however quiet the log
AGENT_S = 30.0  # for a fresh head's agent to come up
# they tell of every upload and connection
CHATTY = (
    "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging",
)  # fmt: skip
RUNNING = ("PENDING", "RUNNING")
TOKEN_REMEDY = "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with it, to the token of the cluster"

T = TypeVar("T")


def address_of(option: str | None) -> str:
    """--address, else RAY_API_SERVER_ADDRESS, else the dashboard of this machine."""
    address = option or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    if "://" not in address:
        address = f"http://{address}"
    if not _is_url(address):
        raise UserError(f"{address} is no address of a Ray dashboard", where="--address",
                        remedy="give http://HEAD:8265, as `ray start --head` prints it")  # fmt: skip
    return address.rstrip("/")


def _is_url(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, half an IPv6 address
        return False


def settings(experiment: Experiment) -> str:
    """A digest of all that an experiment sets, as it counts and not as it is written, overrides included."""
    its = {one.name: getattr(experiment, one.name) for one in fields(experiment)}
    stages = {name: [stage.kind_name, stage.params] for name, stage in experiment.stages.items()}
    del its["path"], its["sweep"]  # where the file lies; how it names many stages, which are all among `stages`
    return fingerprint(to_jsonable_python(its | {"stages": stages}))


class Jobs:
    """Of one cluster. Raises UserError where it cannot be reached or does not let us in."""

    def __init__(self, address: str):
        self.address = address
        _use_token()
        from ray.job_submission import JobSubmissionClient

        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)
        self._client = self._ask(lambda: JobSubmissionClient(address))

    def open_to_anyone(self) -> bool:
        """Whether the cluster answers without a token: whoever reaches it runs code on it."""
        import requests

        return self._ask(lambda: requests.get(f"{self.address}/api/jobs/", timeout=10)).ok

    def here(self) -> bool:
        """Whether all its nodes are on this machine, whose folders they see then; a forwarded port looks alike."""
        import psutil

        mine: set[Any] = {one.address for card in psutil.net_if_addrs().values() for one in card}
        answer = self._ask(lambda: self._client._do_request("GET", "/nodes?view=summary"))
        nodes = answer.json()["data"]["summary"] if answer.ok else []
        return bool(nodes) and all(
            node.get("hostname") == socket.gethostname() and (node["ip"] in mine or node["ip"].startswith("127."))
            for node in nodes
        )

    def submit(
        self, experiment: Experiment, overrides: Sequence[str], base: Path | None, grace: float, python: str = "python"
    ) -> str:
        """Start a driver on the head; its job id. base: the folder that relative paths of the experiment count from.

        python: where it has Ray and what Stageline needs, on every node alike.
        """
        job = f"{experiment.name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
        command = [python, "-m", "orchestrator.cli.main", "run", EXPERIMENT, *overrides]
        command += ["--grace", f"{grace:g}"] + (["--base", str(base)] if base else [])
        metadata = driverjob.metadata(experiment.name, experiment.storage, grace) | {"settings": settings(experiment)}
        return self.start(job, command, experiment.path, metadata, grace)

    def start(
        self,
        job: str,
        command: Sequence[str],
        experiment: Path | None,
        metadata: dict[str, str],
        grace: float = 0.0,
    ) -> str:
        """Any command on the head, with this project's code; the experiment lies beside it as EXPERIMENT.

        grace: seconds that it needs after SIGTERM beyond driverjob.STOP_WAIT_S.
        """
        with TemporaryDirectory(prefix="stageline-bundle-") as folder:
            make_bundle(experiment, Path(folder))
            environment = {"working_dir": folder, "env_vars": driverjob.environment(grace)}
            entrypoint, until = shlex.join(command), time.monotonic() + AGENT_S
            while True:
                try:
                    return self._ask(
                        lambda: self._client.submit_job(
                            entrypoint=entrypoint, submission_id=job, runtime_env=environment, metadata=metadata
                        )
                    )
                except UserError as error:
                    if "No available agent" not in error.message:
                        raise
                    if time.monotonic() > until:
                        raise UserError(
                            f"the head of {self.address} has no agent that starts jobs", where="submit",
                            remedy="look at dashboard_agent.log of the head; where its port is taken, start the head "
                            "with --dashboard-agent-listen-port",
                        ) from error  # fmt: skip
                    time.sleep(1.0)

    def list(self) -> list[Any]:
        """Drivers of experiments, newest first: JobDetails."""
        jobs = self._ask(self._client.list_jobs)
        ours = [job for job in jobs if "experiment" in (job.metadata or {})]
        return sorted(ours, key=lambda job: -(job.start_time or 0))

    def running(self, experiment: Experiment) -> str | None:
        """The job that runs this experiment on this storage, if there is one."""
        about = {"experiment": experiment.name, "storage": experiment.storage}
        for job in self.list():
            its = {name: (job.metadata or {}).get(name) for name in about}
            if its == about and job.status in RUNNING:
                return job.submission_id
        return None

    def info(self, job: str) -> Any:
        """JobDetails. Raises UserError for an id that the cluster does not know."""
        for known in self._ask(self._client.list_jobs):
            if known.submission_id == job:
                return known
        ours = ", ".join(str(known.submission_id) for known in self.list()[:5]) or "none"
        raise UserError(f"no job '{job}' on {self.address} (there are: {ours})", where="the job",
                        remedy="stageline list shows all; an experiment is given by its .yaml file")  # fmt: skip

    def logs(self, job: str) -> str:
        return self._ask(lambda: self._client.get_job_logs(job))

    def follow(self, job: str) -> None:
        """Print what it says until it ends; of a job that has ended, all of it. A broken connection is made again.

        So is one that was closed in good order while the job runs: a dashboard that stops or starts anew does that.
        """
        printed = 0

        async def tail() -> None:
            nonlocal printed
            seen = 0  # Ray begins at the beginning each time
            async for lines in self._client.tail_job_logs(job):
                sys.stdout.write(lines[max(0, printed - seen) :])
                sys.stdout.flush()
                seen += len(lines)
                printed = max(printed, seen)

        lost: float | None = None
        while True:
            before, began = printed, time.monotonic()
            try:
                self._ask(lambda: asyncio.run(tail()))
                if self._status(job) not in RUNNING:
                    return
                lost = None
            except UserError as error:
                if getattr(error.__cause__, "status", None) == 404:
                    self.info(job)  # says so where the cluster, started anew, does not know the job
                now = time.monotonic()
                if lost is None or printed > before or (now - began > STOOD_S and self._runs(job)):
                    lost = now
                if now - lost > RECONNECT_S:
                    raise
            time.sleep(1.0)

    def _runs(self, job: str) -> bool:
        with contextlib.suppress(UserError):
            return self._status(job) in RUNNING
        return False

    def stop(self, job: str) -> None:
        """SIGTERM to the driver, which saves and stops; SIGKILL after driverjob.STOP_WAIT_S."""
        self._ask(lambda: self._client.stop_job(job))

    def wait(self, job: str, patience_s: float) -> str:
        """Its status once it has ended, or when patience is over."""
        until = time.monotonic() + patience_s
        while (status := self._status(job)) in RUNNING:
            if time.monotonic() >= until:
                break
            time.sleep(1.0)
        return status

    def _status(self, job: str) -> str:
        return str(self._ask(lambda: self._client.get_job_status(job)).value)

    def _ask(self, call: Callable[[], T]) -> T:
        import aiohttp
        import requests
        from ray.exceptions import AuthenticationError

        try:
            return call()
        except AuthenticationError as error:
            what = "refuses this token" if _token_known() else "asks for a token"
            raise UserError(f"the cluster at {self.address} {what}", where="--address", remedy=TOKEN_REMEDY) from error
        except (ConnectionError, requests.RequestException, aiohttp.ClientError) as error:
            raise UserError(
                f"no Ray dashboard answers at {self.address}", where="--address",
                remedy="start the cluster with its dashboard (ray start --head), forward the port of its head "
                "(kubectl port-forward, ray dashboard, ssh -L), or correct the address",
            ) from error  # fmt: skip
        except RuntimeError as error:  # Ray's own, for every other answer
            said = str(error).strip().splitlines() or [repr(error)]
            raise UserError(
                f"{self.address} answers: {said[0][:300]}", where="--address",
                remedy="is it the dashboard of a Ray cluster, and of the same version? ray.log on its head says more",
            ) from error  # fmt: skip


def _use_token() -> None:
    """Ray sends a token only in this mode, which is read when it is asked for the first time."""
    if _token_known():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _token_known() -> bool:
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or (Path.home() / ".ray" / "auth_token").exists()
