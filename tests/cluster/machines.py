"""A Ray cluster of machines with addresses, host names, files, shared memory and processes of their own, on this one.

Each machine is a set of Linux namespaces on a bridge: nothing that it writes is seen by another, and losing it is one
SIGKILL to its first process, with which the kernel ends all others. Needs root and iproute2; elsewhere `machines` skips
with one line (with CI=true it fails). Token authentication is on; the clients are outside, on the bridge's own address.
"""

import asyncio
import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
PORT, DASHBOARD = 6379, 8265
PATIENCE_S = 180.0
SCRIPT = """
set -e
hostname {name}
mount -t tmpfs tmpfs {folder}
mount -t tmpfs tmpfs /dev/shm
{command} > {folder}/ray.log 2>&1 &
ray=$!
{beside}
wait $ray
"""


@dataclass(eq=False)
class Machine:
    """address: on the bridge. process: outside of it; its only child is the machine's first process."""

    name: str
    address: str
    process: subprocess.Popen
    folder: str  # for temporary files; the same path on all machines, and a disk of its own on each

    @property
    def first(self) -> psutil.Process:
        return psutil.Process(self.process.pid).children()[0]

    def processes(self) -> list[psutil.Process]:
        """All that run on it."""
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            return self.first.children(recursive=True)
        return []

    def shell(self, command: str) -> str:
        """Runs on the machine; what it printed."""
        enter = ["nsenter", "-t", str(self.first.pid), "--mount", "--uts", "--pid", "--net", "sh", "-c", command]
        return subprocess.run(enter, check=True, capture_output=True, text=True).stdout

    def notice(self, deadline_s: float) -> None:
        """The cloud says that it goes in so many seconds; its agent reads that."""
        self.shell(f"cd {self.folder}; echo {deadline_s} > notice.draft && mv notice.draft notice")


class Machines:
    """A head that trains nothing and workers with `cpus` each. A context manager; all is gone after the block.

    environment: variables of every machine, a store's keys among them: no client sends them.
    """

    def __init__(self, environment: dict[str, str]):
        self.token = secrets.token_hex(16)
        self._folder = tempfile.mkdtemp(prefix="sl-", dir="/tmp")  # short: paths of sockets end at 107 characters
        self._mark = f"sl{secrets.token_hex(2)}"
        self._net = f"10.231.{secrets.randbelow(250)}"
        self._environment = os.environ | environment | {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": self._folder, "TMPDIR": self._folder,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "5",
            "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
        }  # fmt: skip
        self._environment.pop("RAY_ADDRESS", None)
        self._made = 1
        self.workers: list[Machine] = []

    def __enter__(self) -> "Machines":
        try:
            _ip("link", "add", self._mark, "type", "bridge")
            _ip("addr", "add", f"{self._net}.1/24", "dev", self._mark)
            _ip("link", "set", self._mark, "up")
            self.head = self._start("head", "--head", f"--port={PORT}", f"--dashboard-host={self._net}.2",
                                    f"--dashboard-port={DASHBOARD}", "--num-cpus=0")  # fmt: skip
            self._until(lambda: self._answers(), "the dashboard")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for machine in [*self.workers, *([self.head] if hasattr(self, "head") else [])]:
            self.kill(machine)
        subprocess.run(["ip", "link", "del", self._mark], check=False, capture_output=True)
        shutil.rmtree(self._folder)

    @property
    def outside(self) -> str:
        """The address of the clients' side of the bridge."""
        return f"{self._net}.1"

    @property
    def dashboard(self) -> str:
        return f"http://{self._net}.2:{DASHBOARD}"

    def add(self, cpus: float = 1, **labels: str) -> Machine:
        """A worker, which has joined on return, with its notice agent."""
        given = ",".join(f"{name}={value}" for name, value in labels.items())
        options = [f"--address={self._net}.2:{PORT}", f"--num-cpus={cpus:g}"] + ([f"--labels={given}"] if given else [])
        machine = self._start(f"worker{self._made}", *options)
        self.workers.append(machine)
        self._until(lambda: machine.address in self._alive(), f"{machine.name} joins")
        return machine

    def kill(self, machine: Machine) -> None:
        """It is gone at once, with all that ran on it."""
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            machine.first.kill()
        machine.process.wait()
        _ip("netns", "del", f"{self._mark}-{machine.name}")
        if machine in self.workers:
            self.workers.remove(machine)

    def files_with(self, text: str) -> list[str]:
        """Files of the machines that hold it, packages of jobs and all logs among them."""
        found = []
        for machine in (self.head, *self.workers):
            printed = machine.shell(f"grep -rlF -- '{text}' {self._folder} || true")
            found += [f"{machine.name}:{name}" for name in printed.splitlines()]
        return found

    def driver(self) -> psutil.Process | None:
        """The driver that Ray runs on the head."""
        for process in self.head.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                line = process.cmdline()
                if "orchestrator.cli.main" in line and process.name() != "sh":
                    return process
        return None

    def _start(self, name: str, *options: str) -> Machine:
        self._made += 1
        space, address = f"{self._mark}-{name}", f"{self._net}.{self._made}"
        inside, outside = f"{self._mark}i{self._made}", f"{self._mark}o{self._made}"
        _ip("netns", "add", space)
        _ip("link", "add", outside, "type", "veth", "peer", "name", inside, "netns", space)
        _ip("link", "set", outside, "master", self._mark, "up")
        _ip("-n", space, "addr", "add", f"{address}/24", "dev", inside)
        _ip("-n", space, "link", "set", inside, "up")
        _ip("-n", space, "link", "set", "lo", "up")
        ray = f"{RAY} start --block --node-ip-address={address} --object-store-memory=200000000 {' '.join(options)}"
        agent = f"{sys.executable} -m cluster.agent --address {self._net}.2:{PORT} --source file:{self._folder}/notice"
        beside = f"{agent} --poll 0.5 > {self._folder}/agent.log 2>&1 &" if name != "head" else ""
        script = SCRIPT.format(name=name, folder=self._folder, command=ray, beside=beside)
        unshare = ["unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        process = subprocess.Popen(
            ["ip", "netns", "exec", space, *unshare, "sh", "-c", script],
            cwd=ROOT, env=self._environment, start_new_session=True, preexec_fn=_end_with_parent,
        )  # fmt: skip
        return Machine(name, address, process, self._folder)

    def _answers(self) -> bool:
        import requests

        with contextlib.suppress(requests.RequestException):
            return requests.get(f"{self.dashboard}/api/version", headers=self._headers, timeout=2).ok
        return False

    def _alive(self) -> set[str]:
        import requests

        with contextlib.suppress(requests.RequestException, KeyError):  # it is slow, or not up yet
            answer = requests.get(f"{self.dashboard}/nodes?view=summary", headers=self._headers, timeout=10).json()
            nodes = answer["data"]["summary"]
            return {node["raylet"]["nodeManagerAddress"] for node in nodes if node["raylet"].get("state") == "ALIVE"}
        return set()

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def _until(self, holds, what: str) -> None:
        until = time.monotonic() + PATIENCE_S
        while not holds():
            if time.monotonic() > until:
                logs = [
                    m.shell(f"tail -n 30 {self._folder}/ray.log") for m in [self.head, *self.workers] if m.processes()
                ]
                raise AssertionError(f"not within {PATIENCE_S:.0f} s: {what}\n" + "\n".join(logs))
            time.sleep(0.2)


class Forward:
    """What arrives at `address`:port goes to the same port of loopback. A context manager."""

    def __init__(self, address: str, port: int):
        self._address, self._port = address, port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="forward", daemon=True)

    def __enter__(self) -> str:
        """The address of the service, seen from the machines and from here alike."""
        self._thread.start()
        serve = asyncio.start_server(self._connected, self._address, self._port)
        self._server = asyncio.run_coroutine_threadsafe(serve, self._loop).result(PATIENCE_S)
        return f"http://{self._address}:{self._port}"

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(PATIENCE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _end(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:  # the service is down: so is this
            return writer.close()
        with contextlib.suppress(asyncio.CancelledError):  # the end of the block
            await asyncio.gather(_copy(reader, inner_writer), _copy(inner_reader, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


def _end_with_parent() -> None:
    """Between fork and exec: SIGKILL to the machine when the tests are killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.fixture
def namespaces() -> Iterator[None]:
    """Whether this machine can make them."""
    missing = [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]
    problem = "network namespaces need root" if os.geteuid() else f"no {', '.join(missing)}" if missing else ""
    if not problem:
        name = f"sl{secrets.token_hex(3)}"
        done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
        problem = done.stderr.strip()
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    if problem:
        reason = f"{problem} (apt-get install iproute2 util-linux)"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    yield
