"""Connects a driver to Ray, or starts one on loopback; and the end of it.

Invariant: nothing that a Ray of our own has started outlives this process, however far its start had come.
"""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, NoReturn

import psutil

from modeling.errors import UserError
from orchestrator import warmup
from orchestrator.observe.links import dashboard_url
from orchestrator.raytoken import keep_token

# what an idle worker imports of ray before it is asked for anything; it touches no accelerator
PRELOADED = "orchestrator.launch,ray.train.torch,ray.train.v2._internal.execution.controller.controller,ray.util.state"
STARTS = 3  # of a Ray of our own

log = logging.getLogger(__name__)


def start_ray(address: str | None) -> None:
    """Connect to `address`, or start a Ray of our own on loopback.

    Where all its nodes are on this machine, worker processes come from a fork server of this driver (warmup.py).
    """
    if not address:  # else its servers listen on all interfaces; read when Ray is imported
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    with _our_signals():
        _init(address)


def _init(address: str | None) -> None:
    import ray

    if not ray.is_initialized():
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if address:
            _connect(address, **common)
            if {node["NodeManagerHostname"] for node in ray.nodes()} == {socket.gethostname()}:
                ray.shutdown()  # a job's runtime environment is given when it connects
                _join(address=address, runtime_env=warmup.start(), **common)
        else:
            os.environ.setdefault("RAY_preload_python_modules", PRELOADED)
            os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")  # not one per core: see ahead.py
            environment = warmup.start()  # imports while Ray starts
            keep_token()
            local: dict[str, Any] = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
            _start(lambda: _join(address="local", runtime_env=environment, **local, **common))
        if dashboard_url():  # whose API lists Ray Train's runs then: /api/train/v2/runs/v1
            os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
        threading.Thread(target=import_module, args=("ray.train.torch",), daemon=True).start()  # 3 s that _fit needs


def _start(init: Callable[[], Any]) -> None:
    """On a busy machine Ray's own processes may take longer than the 30 s that it gives them: then once more."""
    import ray

    for left in reversed(range(STARTS)):
        try:
            init()
            return
        except Exception as error:
            if not left or "timed out during startup" not in str(error):
                raise
            log.warning("Ray did not start within its time; the machine is busy: trying again")
            ray.shutdown()


def _connect(address: str, **common: Any) -> None:
    from cluster.gcs import reachable

    host, _, port = address.rpartition(":")
    remedy = "start the cluster (ray start --head), or correct the address"
    if host and "//" not in host and port.isdigit() and not reachable(host, int(port)):
        raise UserError(f"nobody listens at {address}", where="--address", remedy=remedy)
    try:
        _join(address=address, **common)
    except ConnectionError as error:
        raise UserError(f"no Ray cluster at {address}: {error}", where="--address", remedy=remedy) from error


def _join(**settings: Any) -> None:
    import ray

    ours = signal.getsignal(signal.SIGTERM)
    ray.init(**settings)
    signal.signal(signal.SIGTERM, ours)  # again: one of Ray's, in C++, ends the process three seconds after a SIGTERM


@contextmanager
def _our_signals() -> Iterator[None]:
    """While Ray starts it would handle SIGTERM itself: by an exception, wherever the main thread happens to be. Python
    only prints one that comes while a module's lock is freed, and the signal is lost."""
    from ray._private import utils

    theirs, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = theirs


def end() -> None:
    """Leave the cluster, or end a Ray of our own."""
    import ray

    ray.shutdown()
    warmup.stop()


def abandon() -> NoReturn:
    """Ends this process with 130, and first all that it has started, in the middle of start_ray(): Ray itself would
    leave agents behind, which miss their raylet a minute late. For a signal handler: it raises nothing, takes no lock,
    and is not entered again."""
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        signal.alarm(0)  # of the handler in C++
        below: set[psutil.Process] = set()
        while more := set(psutil.Process().children(recursive=True)) - below:
            _each(more, psutil.Process.suspend)  # so that none starts another, which nobody would find
            below |= more
        _each(below, psutil.Process.kill)
        warmup.forget()
    finally:
        os._exit(130)


def _each(processes: Iterable[psutil.Process], act: Callable[[psutil.Process], None]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            act(process)
