"""A Ray cluster of several nodes on this machine: a head without CPUs, and nodes that are announced, killed, replaced.

Invariant: it is a cluster of its own (an address of loopback, a folder for Ray's session and notices), and whatever it
started is ended through its own handles. Losing a node is SIGKILL of the raylet and of all that it started at once, as
when a machine goes. Environment variables that Ray reads while it starts are set inside the `with` block only.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ADDRESS = "127.0.0.2"  # for 127.0.0.1 Ray's driver puts in the machine's outer address, where these nodes do not listen
# Read by Ray's processes: no token that a local `ray.init()` of this user may have left, no usage reports.
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0
STARTS = 3  # of one node


def add_node(cluster: Any, **settings: Any) -> Any:
    """`cluster.add_node`, again where a busy machine was too slow: a raylet whose agents take longer than a fixed time
    ends, and Ray then says that the node timed out. Of a start that failed nothing is left."""
    for left in reversed(range(STARTS)):
        before = psutil.Process().children()
        try:
            return cluster.add_node(**settings)
        except Exception as error:
            failed = [process for process in psutil.Process().children() if process not in before]
            for process in [*failed, *(child for one in failed for child in one.children(recursive=True))]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(failed, timeout=PATIENCE_S)  # to its agents a raylet that is a zombie still exists
            if not left or "timed out during startup" not in str(error):
                raise


@dataclass(eq=False)
class RayNode:
    """One node beside the head, with the notice agent that watches for it (`notice` is the file it reads)."""

    handle: Any
    agent: subprocess.Popen
    notice: Path

    @property
    def id(self) -> str:
        return self.handle.node_id

    @property
    def raylet(self) -> int:
        return self.handle.all_processes["raylet"][0].process.pid

    def processes(self) -> list[psutil.Process]:
        """The raylet and everything below it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            raylet = psutil.Process(self.raylet)
            return [raylet, *raylet.children(recursive=True)]
        return []


class Nodes:
    """`count` nodes with `cpus` CPUs each beside the head. A context manager; all is gone after the block.

    environment: variables of the nodes, which their workers inherit (a store's keys: no driver sends them).
    """

    def __init__(self, count: int = 2, cpus: float = 1, environment: dict[str, str] | None = None):
        self._count, self._cpus = count, cpus
        self._more = environment or {}
        self._nodes: list[RayNode] = []
        self._before: dict[str, str | None] = {}
        self._made = 0

    def __enter__(self) -> "Nodes":
        self.folder = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))  # short: paths of sockets end at 107 characters
        self.environment = ENVIRONMENT | {"RAY_TMPDIR": str(self.folder)} | self._more
        for name in (*self.environment, "RAY_ADDRESS"):
            self._before[name] = os.environ.pop(name, None)
        os.environ.update(self.environment)
        from ray._raylet import GcsClientOptions, GlobalStateAccessor  # pyright: ignore[reportAttributeAccessIssue]
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(shutdown_at_exit=False)
        try:
            add_node(self._cluster, num_cpus=0, node_ip_address=ADDRESS, include_dashboard=False)
            self._gcs = GlobalStateAccessor(GcsClientOptions.create(self.address, None, True, False))
            self._gcs.connect()
            for _ in range(self._count):
                self.add()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in list(self._nodes):
            self.remove(node)
        self._cluster.shutdown()
        for name, value in self._before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        shutil.rmtree(self.folder, ignore_errors=True)  # agents of a raylet that was killed may still write

    @property
    def address(self) -> str:
        """Of GCS, host:port."""
        address = self._cluster.address
        assert address is not None
        return address

    @property
    def living(self) -> list[RayNode]:
        """The nodes that were not killed or removed, oldest first."""
        return list(self._nodes)

    def add(self) -> RayNode:
        """A fresh node, which counts for GCS on return, with its notice agent."""
        handle = add_node(self._cluster, num_cpus=self._cpus, node_ip_address=ADDRESS)
        self._made += 1
        notice = self.folder / f"notice-{self._made}"
        command = [sys.executable, "-m", "cluster.agent", "--address", self.address, "--node-id", handle.node_id]
        command += ["--source", f"file:{notice}", "--poll", "0.5"]
        with notice.with_suffix(".log").open("wb") as log:
            agent = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        node = RayNode(handle, agent, notice)
        self._nodes.append(node)
        return node

    def drain(self, node: RayNode, deadline_s: float) -> None:
        """The cloud's notice: the node goes in so many seconds. Its agent reads it within half a second."""
        draft = node.notice.with_suffix(".draft")
        draft.write_text(f'{{"deadline_s": {deadline_s}}}')
        draft.rename(node.notice)

    def drained(self, node: RayNode) -> None:
        """Waits until the agent has told Ray of the notice."""
        log, until = node.notice.with_suffix(".log"), time.monotonic() + PATIENCE_S
        while "draining, " not in log.read_text():
            assert time.monotonic() < until and node.agent.poll() is None, log.read_text()
            time.sleep(0.05)

    def announce(self, deadline_s: float, fresh_early: bool) -> float:
        """A notice to a node that holds a worker, which is killed at the deadline; returns when that was, as unix time.

        fresh_early: a fresh node comes right after the notice, else after the end of the old one.
        """
        node, began = next(iter(self.workers().values())), time.monotonic()
        self.drain(node, deadline_s)
        if fresh_early:
            self.add()
        time.sleep(max(0.0, began + deadline_s - time.monotonic()))
        self.kill_raylet(node)
        killed = time.time()
        if not fresh_early:
            self.add()
        return killed

    def workers(self) -> dict[psutil.Process, RayNode]:
        """The processes that train, and where."""
        found = {}
        for node in self._nodes:
            for process in self._processes(node):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process.name().startswith("ray::RayTrainW"):
                        found[process] = node
        return found

    def _processes(self, node: RayNode) -> list[psutil.Process]:
        """The raylet and all that works for it: what is below it, and what a driver's fork server made for it."""
        from ray.core.generated.gcs_pb2 import WorkerTableData  # pyright: ignore[reportAttributeAccessIssue]

        processes = node.processes()
        for entry in map(WorkerTableData.FromString, self._gcs.get_worker_table()):
            if entry.is_alive and entry.worker_address.node_id.hex() == node.id:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process = psutil.Process(entry.pid)
                    ours = process.name().startswith("ray::")  # pids come back
                    if ours and process not in processes:
                        processes.append(process)
        return processes

    def kill_raylet(self, node: RayNode) -> None:
        """SIGKILL of the raylet, of all that works for it and of the agent, all at once; the machine is gone."""
        for process in self._processes(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.remove(node)

    def remove(self, node: RayNode) -> None:
        """Ends what is left of the node; of one that has left the cluster after a drain, too."""
        node.agent.kill()
        node.agent.wait()
        below = self._processes(node)
        self._cluster.remove_node(node.handle, allow_graceful=False)
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._nodes.remove(node)
