"""A process that has imported what workers import, and forks one for every worker that Ray starts on this machine.

A worker group is six Python processes (controller, cleaner, synchronization, two workers, and a coordinator once), and
on two cores their imports are most of the time between two stages: torch, torch._dynamo (which any optimizer imports),
transformers and DeepSpeed take 6 s of CPU in a worker, torch and pandas 1.6 s in the controller. Forked: nothing.

Invariants. A forked worker is what a fresh one would be: arguments, environment, folder, open files, blocked signals
are those of the process that Ray started, and an environment that the imports would have met otherwise is refused.
Nothing of Ray is loaded before the fork: it reads its settings from the environment at import, and the children of
one that had imported ray.train would all draw the same ids of placement groups (2.60). No accelerator is touched: CUDA
does not survive a fork. Whoever is refused, or finds no server, starts as plain Python: it only takes longer.

`python -P -m orchestrator.forkserver FOLDER`; listens at FOLDER/socket, and ends, the folder with it, when its standard
input does.
"""

import array
import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

REQUEST_S = 10.0  # for a client to send its request once it was greeted
# What a worker imports until its first step. torch.optim imports torch._dynamo, DeepSpeed's initialize torch._inductor.
SHARED = (
    "torch", "torch.distributed", "torch._dynamo", "torch._inductor.compile_fx", "transformers", "pandas", "pyarrow.fs",
    "pyarrow.parquet", "s3fs", "requests", "jsonschema", "stages.prepare.run", "stages.export",
)  # fmt: skip
# These choose between CPU and GPU at import; which of them a worker gets Ray decides after its start.
CHOOSING = (
    "modeling.engine", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "stages.train", "stages.evaluate.run",
)  # fmt: skip
AT_START = ("PYTHON", "LD_")  # variables that Python and the loader read before any of our code runs
AT_CALL = ("PYTHONBREAKPOINT",)  # but this one later; Ray sets it in its drivers, so in the server's environment too


class Server:
    """before: the environment it was started with; changed: what the imports made of some variables."""

    def __init__(self, folder: str):
        self.folder, self.before = folder, dict(os.environ)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{folder}/socket")
        self.listener.listen(128)  # who comes now waits until all is imported
        preload(self.end_with_driver)
        after = dict(os.environ)
        self.changed = {k: after.get(k) for k in {*self.before, *after} if self.before.get(k) != after.get(k)}
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the children

    def serve(self) -> tuple[dict[str, Any], list[int]]:
        """Serves until standard input ends. Returns only in a child: its request and open files."""
        while True:
            ready, _, _ = select.select([self.listener, 0], [], [])
            if 0 in ready:
                self.end_with_driver()
            connection, _ = self.listener.accept()
            with connection:
                files: list[int] = []
                try:
                    request = receive(connection, files)
                    fits = self.fits(request["env"])
                    if fits and os.fork() == 0:
                        self.listener.close()
                        return self.adapted(request), files
                    connection.sendall(b"f" if fits else b"n")
                except (OSError, ValueError):  # no request, or no memory for a child
                    traceback.print_exc()
                    with contextlib.suppress(OSError):
                        connection.sendall(b"n")
                for file in files:
                    os.close(file)

    def end_with_driver(self) -> None:
        """Ends this process where standard input has ended: nobody writes there, so the driver is gone."""
        if select.select([0], [], [], 0)[0]:
            shutil.rmtree(self.folder, ignore_errors=True)
            os._exit(0)

    def fits(self, env: dict[str, str]) -> bool:
        """Whether the imports would have met the same environment in this process, or what they make of it: who
        started Ray may have imported the same."""
        names = {name for name in {*env, *self.before} if name.startswith(AT_START)} - {*AT_CALL} | {*self.changed}
        after = self.before | self.changed
        return all(env.get(name) in (self.before.get(name), after.get(name)) for name in names)

    def adapted(self, request: dict[str, Any]) -> dict[str, Any]:
        """The request with what the imports did to the environment."""
        env = {k: v for k, v in (request["env"] | self.changed).items() if v is not None}
        return request | {"env": env}


def preload(between: Callable[[], None]) -> None:
    """Import all that can be shared; `between` is called after each."""
    for module in SHARED:
        importlib.import_module(module)
        between()
    import torch

    if not torch.cuda.is_available():  # asks NVML (warmup.py), so that CUDA stays untouched
        for module in CHOOSING:
            importlib.import_module(module)
            between()
    assert "ray" not in sys.modules and not torch.cuda.is_initialized()
    gc.collect()
    gc.freeze()  # a child's collector writes into no page that it shares


def receive(connection: socket.socket, files: list[int]) -> dict[str, Any]:
    """Greets, then returns the request; the open files that come with it are added to `files`.

    Raises OSError or ValueError where the client is gone or sends none.
    """
    connection.settimeout(REQUEST_S)
    connection.sendall(b"r")
    head, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    for _level, _type, data in ancillary:
        received = array.array("i")
        received.frombytes(data)
        files.extend(received)
    if len(head) < 8 or len(files) != 3:
        raise ConnectionError("a client sent no request")
    size, data = int.from_bytes(head, "big"), b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError("a client sent half a request")
        data += part
    return json.loads(data)


def become(request: dict[str, Any], files: list[int]) -> NoReturn:
    """Run the request's script in this process, as `python SCRIPT ARGUMENTS...` would."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    os.setpgid(0, 0)
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(request["oom_score_adj"]))
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    reseed()
    sys.argv = request["argv"]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    code: Any = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
        code = 1
    leave(code)


def leave(code: Any) -> NoReturn:
    """End this process as multiprocessing ends those it forked: threads joined, exit functions run, output flushed.

    But nothing freed: to free every module of the server's takes half a second, in which a stage could start.
    """
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    if code is not None and not isinstance(code, int):  # sys.exit("a message")
        print(code, file=sys.stderr)
        code = 1
    with contextlib.suppress(OSError, ValueError):  # a closed pipe
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit((code or 0) & 0xFF)


def reseed() -> None:
    """Or all children would draw the same numbers. Python's own generator reseeds by itself."""
    import numpy
    import torch

    numpy.random.seed()
    torch.default_generator.seed()


if __name__ == "__main__":
    become(*Server(sys.argv[1]).serve())
