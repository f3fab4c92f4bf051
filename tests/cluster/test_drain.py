"""A notice on a real Ray cluster: from a file, through the agent, to a node that takes no more work.

The cluster is this module's own: three nodes beside the head, on loopback, with a folder of its own for Ray's session
and address, so that it runs beside other clusters.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from nodes import add_node

from cluster.gcs import Gcs, Unanswered
from cluster.nodes import draining, places

ADDRESS = "127.0.0.1"
PATIENCE_S = 60.0
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    # Ray's name for: keep to loopback. Without it a driver replaces 127.0.0.1 by the machine's outer address.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
ROOT = Path(__file__).parents[2]


def free_by_node() -> dict[str, dict[str, float]]:
    return {place.id: place.free for place in places()}


def total_by_node() -> dict[str, dict[str, float]]:
    return {place.id: place.total for place in places()}


@pytest.fixture(scope="module")
def cluster():
    folder = tempfile.mkdtemp(prefix="sl-", dir="/tmp")  # short: paths of Unix sockets end at 107 characters
    patch = pytest.MonkeyPatch()
    for name, value in ENVIRONMENT.items():
        patch.setenv(name, value)
    patch.setenv("RAY_TMPDIR", folder)
    patch.delenv("RAY_ADDRESS", raising=False)
    import ray
    from ray._private import ray_constants
    from ray.cluster_utils import Cluster

    patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)  # as the environment says, if Ray was imported before
    nodes = Cluster(shutdown_at_exit=False)
    try:
        add_node(nodes, num_cpus=0, node_ip_address=ADDRESS, include_dashboard=False)
        for _ in range(4):
            add_node(nodes, num_cpus=2, node_ip_address=ADDRESS)
        ray.init(address=nodes.address, log_to_driver=False, logging_level="error")
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()
        patch.undo()
        shutil.rmtree(folder, ignore_errors=True)  # agents of a raylet that was killed may still write


@pytest.fixture
def idle(cluster) -> list[str]:
    """The nodes that no test has drained or killed yet, in their order: each test that spoils one takes the first."""
    usable = total_by_node()
    return [node.node_id for node in sorted(cluster.worker_nodes, key=_number) if node.node_id in usable]


def _number(node) -> str:
    return node.raylet_socket_name


def _kill_raylet(cluster, node_id: str) -> None:
    node = next(node for node in cluster.worker_nodes if node.node_id == node_id)
    raylet = node.all_processes["raylet"][0].process
    raylet.kill()
    raylet.wait()  # workers go on beside a raylet that is a zombie: to them its pid still exists


def _until(holds, what: str, patience: float = PATIENCE_S):
    until = time.monotonic() + patience
    while not (value := holds()):
        assert time.monotonic() < until, f"not within {patience:.0f} s: {what}"
        time.sleep(0.05)
    return value


def _alive() -> set[str]:
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _hold(node_id: str):
    """An actor that holds one CPU of a node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Holder:  # local, so that it travels as code: Ray's workers cannot import this module
        def node(self) -> str:
            return ray.get_runtime_context().get_node_id()

        def free(self) -> dict[str, dict[str, float]]:
            from cluster.nodes import places

            return {place.id: place.free for place in places()}

    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    actor = ray.remote(num_cpus=1)(Holder).options(scheduling_strategy=there).remote()
    assert ray.get(actor.node.remote()) == node_id
    return actor


class AgentProcess:
    """`python -m cluster.agent` on one node, with a file as its source."""

    def __init__(self, cluster, node_id: str, folder: Path, *options: str):
        self.notice, self._output = folder / "notice", folder / "agent.log"
        command = [sys.executable, "-m", "cluster.agent", "--address", cluster.address, "--node-id", node_id]
        command += ["--source", f"file:{self.notice}", "--poll", "0.2", *options]
        with self._output.open("w") as output:
            self.process = subprocess.Popen(command, stderr=output, cwd=ROOT)

    def said(self, words: str) -> bool:
        return words in self.log()

    def log(self) -> str:
        return self._output.read_text()

    def announce(self, text: str) -> None:
        draft = self.notice.with_suffix(".draft")
        draft.write_text(text)
        draft.rename(self.notice)

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=PATIENCE_S)


@pytest.fixture
def start_agent(cluster, tmp_path):
    agents = []

    def start(node_id: str, *options: str) -> AgentProcess:
        folder = tmp_path / str(len(agents))
        folder.mkdir()
        agents.append(AgentProcess(cluster, node_id, folder, *options))
        _until(lambda: agents[-1].said("watching "), f"the agent's first line: {agents[-1].log()}")
        return agents[-1]

    yield start
    for agent in agents:
        if agent.process.poll() is None:
            agent.process.kill()
            agent.process.wait()


def test_what_is_free_is_counted_by_node(cluster, idle):
    import ray

    head = cluster.head_node.node_id
    assert total_by_node() == {head: {"CPU": 0, "GPU": 0}} | {node: {"CPU": 2, "GPU": 0} for node in idle}
    assert draining() == {}

    actor = _hold(idle[0])
    # seen alike from a worker and from several threads at once
    expected = {head: 0, idle[0]: 1} | {node: 2 for node in idle[1:]}
    _until(lambda: {node: free["CPU"] for node, free in free_by_node().items()} == expected, "one CPU is held")
    assert {node: free["CPU"] for node, free in ray.get(actor.free.remote()).items()} == expected
    with ThreadPoolExecutor(8) as pool:
        for free in pool.map(lambda _: free_by_node(), range(40)):
            assert {node: some["CPU"] for node, some in free.items()} == expected
    ray.kill(actor)
    _until(lambda: free_by_node()[idle[0]]["CPU"] == 2, "what the actor held is free again")


def test_a_notice_drains_a_busy_node_once_with_its_deadline(cluster, idle, start_agent):
    import ray

    victim, others = idle[0], idle[1:]
    actor = _hold(victim)
    agent = start_agent(victim)
    assert draining() == {}
    announced = time.monotonic()
    agent.announce('{"deadline_s": 300}')
    _until(draining, f"the drain: {agent.log()}")
    left = draining()  # asked after the agent's look at the clock, so 300 at most
    elapsed = time.monotonic() - announced
    assert set(left) == {victim} and 300 - elapsed - 1 < left[victim] <= 300
    assert victim not in free_by_node() and victim not in total_by_node()
    assert set(free_by_node()) == {cluster.head_node.node_id, *others}

    # the node goes on with its work and gets none; asked again and again, the notice is passed on once
    time.sleep(1.0)
    assert ray.get(actor.node.remote()) == victim and victim in _alive()
    here = ray.remote(num_cpus=1)(lambda: ray.get_runtime_context().get_node_id())
    placed = ray.get([here.remote() for _ in range(8)])
    assert set(placed) <= set(others)
    assert len(re.findall("draining, ", agent.log())) == 1
    assert draining()[victim] < left[victim]
    assert agent.process.poll() is None and agent.end() == 0

    ray.kill(actor)
    _until(lambda: victim not in _alive(), "a drained node without work leaves")
    _until(lambda: draining() == {}, "what has left is not draining")
    assert victim not in free_by_node()


def test_in_a_pod_sigterm_is_a_notice_after_which_the_agent_leaves(cluster, idle, start_agent):
    import ray

    victim = idle[0]
    actor = _hold(victim)
    agent = start_agent(victim, "--on-sigterm", "120")
    beside = start_agent(victim, "--on-sigterm", "120")
    assert agent.end() == 0 and agent.said("draining, 1"), agent.log()
    left = draining()
    assert set(left) == {victim} and 100 < left[victim] <= 120
    assert ray.get(actor.node.remote()) == victim, "what runs there has its time to save"

    ray.kill(actor)
    _until(lambda: victim not in _alive(), "a drained node without work leaves")
    assert beside.end() == 0, "a node that is gone keeps no agent, and so no pod, waiting"


def test_a_drain_waits_for_gcs_and_an_idle_node_leaves_at_once(cluster, idle, start_agent):
    victim = idle[0]
    gcs = cluster.head_node.all_processes["gcs_server"][0].process.pid
    agent = start_agent(victim)
    os.kill(gcs, signal.SIGSTOP)
    try:
        agent.announce("300")
        _until(lambda: agent.said("cannot drain yet"), f"the agent meets a mute GCS: {agent.log()}")
        with pytest.raises(Unanswered, match="Deadline"):
            free_by_node()
        assert agent.process.poll() is None
    finally:
        os.kill(gcs, signal.SIGCONT)
    _until(lambda: agent.said("draining, "), f"the drain: {agent.log()}")
    match = re.search(r"draining, ([\d.]+) s left: file: .*notice appeared", agent.log())
    assert match and 200 < float(match[1]) < 298, "the time without an answer counts"
    _until(lambda: victim not in _alive(), "an idle node that is drained leaves")
    _until(lambda: draining() == {}, "what has left is not draining")
    assert victim not in free_by_node()


def test_a_killed_raylet_counts_no_more_at_once(cluster, idle):
    victim = idle[0]
    assert victim in free_by_node()
    _kill_raylet(cluster, victim)
    _until(lambda: victim not in free_by_node(), "left out", patience=5.0)
    assert victim not in total_by_node()


def test_ray_accepts_any_node_id_but_we_do_not(cluster):
    with pytest.raises(LookupError, match="no node abababab is alive"):
        Gcs.connect(cluster.address).drain("ab" * 28, 30.0, "a node that never was")
    assert draining() == {}
