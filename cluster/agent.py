"""The notice agent: one process per machine that reads the cloud's notice and has Ray drain the node.

    python -m cluster.agent --address HOST:PORT --source auto

Invariant: a notice is passed on once it can be, and only once: a drain that GCS did not answer is tried again every
second; one that it took is repeated only if a later notice ends sooner (a rebalance recommendation that is followed by
an interruption). Nothing in Ray reads these notices itself. The agent is no Ray driver and holds no resources.

In a pod (`--on-sigterm SECONDS`) SIGTERM is a notice too: Kubernetes sends it to all containers of a pod at once, so
the agent of a sidecar drains the node and leaves, while a preStop hook lets the container of Ray work on.
"""

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable

from cluster.gcs import Gcs, Node, Unanswered, here
from cluster.notice import SigtermSource, Source, Unreadable, open_source
from modeling.errors import UserError

RETRY_S = 1.0  # while a drain is not yet taken
SOONER_S = 1.0  # by which a later notice must end before the one that was passed on
SLICE_S = 0.2  # of a sleep that a signal is to end
DEFAULT_LEAD_S = 120.0  # of a rebalance recommendation that is acted on: as long as an interruption notice gives
# Of Ray's client, read when Ray is imported: it would wait 40 s for a mute GCS, and end the process after a minute.
RAY_CLIENT = {
    "RAY_gcs_rpc_server_connect_timeout_s": "1",
    "RAY_py_gcs_connect_timeout_s": "2",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "86400",
}

log = logging.getLogger("cluster.agent")


class Agent:
    """source: whom to ask. drain(seconds, message): tells Ray; raises Unanswered or LookupError when it could not."""

    def __init__(
        self, source: Source, drain: Callable[[float, str], None], clock: Callable[[], float] = time.monotonic
    ):
        self._source, self._drain, self._clock = source, drain, clock
        self._end: float | None = None  # of the notice that stands, on the clock
        self._told: float | None = None  # the end that Ray was told
        self._reason = ""
        self.homeless = False  # whether the last drain found no node to tell of
        self._said: dict[str, str] = {}  # the last line of each kind: a lasting state is logged once

    @property
    def pending(self) -> bool:
        """Whether Ray has yet to be told of a notice."""
        return self._end is not None and (self._told is None or self._end < self._told - SOONER_S)

    def poll(self) -> None:
        """Read the source once, and pass on what Ray does not know yet."""
        self._read()
        if not self.pending:
            return
        assert self._end is not None
        left = max(0.0, self._end - self._clock())
        self.homeless = False
        try:
            self._drain(left, self._reason)
        except (Unanswered, LookupError) as error:
            self.homeless = isinstance(error, LookupError)
            self._say("drain", f"cannot drain yet, trying on: {error}", logging.WARNING)
            return
        self._told = self._end
        self._say("drain", f"draining, {left:.1f} s left: {self._reason}", logging.WARNING)

    def _read(self) -> None:
        try:
            notice = self._source.poll()
        except Unreadable as error:
            self._say("source", f"{self._source.name} cannot be read, asking on: {error}", logging.WARNING)
            return
        if "source" in self._said:
            self._say("source", f"{self._source.name} answers again")
        if self._source.advice:
            self._say("advice", f"{self._source.advice}; --act-on-rebalance would drain now")
        if notice is None:
            if self._told is not None:
                log.warning("the notice was withdrawn; a drain cannot be: restart the node to use it again")
            self._end = self._told = None
            return
        end = self._clock() + notice.deadline_s
        if self._end is None or end < self._end:
            self._end, self._reason = end, f"{notice.source}: {notice.reason}"

    def _say(self, kind: str, line: str, level: int = logging.INFO) -> None:
        if self._said.get(kind) != line:
            log.log(level, line)
        self._said[kind] = line


def drainer(address: str, node_id: str | None) -> Callable[[float, str], None]:
    """drain(seconds, message) for `node_id`, or for every node on this machine: they all go with it."""

    def drain(seconds: float, message: str) -> None:
        gcs = Gcs.connect(address)
        for node in nodes_of(gcs, node_id):
            gcs.drain(node.id, seconds, message)

    return drain


def nodes_of(gcs: Gcs, node_id: str | None) -> list[Node]:
    """Raises LookupError where there is none (yet)."""
    alive = gcs.alive()
    nodes = [node for node in alive if node.id == node_id] if node_id else here(alive)
    if not nodes:
        what = f"has the id {node_id}" if node_id else "has an address of this machine"
        raise LookupError(f"no living node of the cluster at {gcs.address} {what}")
    return nodes


def main(arguments: list[str] | None = None) -> int:
    """Runs until SIGINT or SIGTERM; with --on-sigterm, until that notice was passed on or no node is left to drain.

    Exit code: 0 when asked to end, 2 for a mistake in the options.
    """
    parser = argparse.ArgumentParser(prog="python -m cluster.agent", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--address", required=True, help="of Ray's GCS, host:port, as `ray start --head` prints it")
    parser.add_argument("--source", default="auto", help="auto (default), aws, gcp or file:PATH")
    parser.add_argument("--node-id", help="the node to drain, hex (default: every node of this machine)")
    parser.add_argument("--poll", type=float, default=5.0, metavar="SECONDS", help="between two looks (default 5)")
    parser.add_argument(
        "--act-on-rebalance",
        type=float,
        nargs="?",
        const=DEFAULT_LEAD_S,
        metavar="SECONDS",
        help=f"drain on AWS's early recommendation too, as if so many seconds were left (default {DEFAULT_LEAD_S:.0f})",
    )
    parser.add_argument(
        "--on-sigterm",
        type=float,
        metavar="SECONDS",
        help="SIGTERM is a notice: drain as if so many seconds were left, as in a pod's terminationGracePeriodSeconds",
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    for name, value in RAY_CLIENT.items():
        os.environ.setdefault(name, value)
    try:
        _check(options.address, options.poll, options.on_sigterm)
        source = _open(options.source, options.act_on_rebalance, options.on_sigterm)
        agent = Agent(source, drainer(options.address, options.node_id))
        _greet(options.address, options.node_id, source)
        return _watch(agent, source, options.poll)
    except UserError as error:
        print(f"agent: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


def _open(name: str, rebalance_lead_s: float | None, sigterm_lead_s: float | None) -> Source:
    """With --on-sigterm a machine in no cloud is no mistake: SIGTERM is announcement enough."""
    if sigterm_lead_s is None:
        return open_source(name, rebalance_lead_s=rebalance_lead_s)
    try:
        cloud = open_source(name, rebalance_lead_s=rebalance_lead_s)
    except UserError as error:
        if name != "auto":
            raise
        log.info("SIGTERM alone will announce the end: %s", error.message)
        cloud = None
    source = SigtermSource(sigterm_lead_s, cloud)
    signal.signal(signal.SIGTERM, lambda *_: source.announce())
    return source


def _watch(agent: Agent, source: Source, poll: float) -> int:
    def told_to_end() -> bool:
        return isinstance(source, SigtermSource) and source.announced

    while True:
        last = told_to_end()  # before the look, which then has seen it
        agent.poll()
        if last and (agent.homeless or not agent.pending):
            return 0
        until = time.monotonic() + (min(RETRY_S, poll) if agent.pending else poll)
        while time.monotonic() < until and (agent.pending or not told_to_end()):
            time.sleep(min(SLICE_S, poll))


def _check(address: str, poll: float, sigterm_lead_s: float | None) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"{address!r} is not host:port", where="--address", remedy="e.g. 10.0.0.1:6379")
    if poll <= 0:
        raise UserError(f"{poll:g} seconds between two looks", where="--poll", remedy="a positive number")
    if sigterm_lead_s is not None and sigterm_lead_s < 0:
        raise UserError(f"{sigterm_lead_s:g} seconds left", where="--on-sigterm", remedy="0 or more")


def _greet(address: str, node_id: str | None, source: Source) -> None:
    """Say at the start which node a drain would reach; a cluster that is not up yet is no mistake."""
    try:
        nodes = ", ".join(str(node) for node in nodes_of(Gcs.connect(address), node_id))
        log.info("watching %s for node %s", source.name, nodes)
    except (Unanswered, LookupError) as error:
        log.warning("watching %s; a drain would fail now: %s", source.name, error)


if __name__ == "__main__":
    sys.exit(main())
