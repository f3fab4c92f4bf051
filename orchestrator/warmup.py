"""The driver's side of the fork server: started beside Ray, ended after it.

A hand-off between two training stages of a micro model takes two fifths of the time where the processes are forked
(benchmarks/handoff.py; forkserver.py has the rules). Nothing depends on it: without a server, or with
STAGELINE_FORK_SERVER=0, the same processes start as plain Python. It serves the machine it runs on, by Ray's documented
`py_executable` of a job's runtime environment.
"""

import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

_server: "ForkServer | None" = None  # of this process


def start() -> dict[str, str]:
    """Start this process's fork server; the runtime environment of a Ray job whose workers it forks.

    Empty where there is none: on Linux only do the libraries survive a fork, and open files cross to another process.
    """
    global _server
    if sys.platform != "linux" or os.environ.get("STAGELINE_FORK_SERVER", "1") == "0":
        return {}
    _server = _server or ForkServer()
    return {"py_executable": _server.py_executable}


def running() -> bool:
    return _server is not None


def stop() -> None:
    """End it where there is one, after Ray: what asks from now on starts slowly."""
    global _server
    if _server:
        _server.stop()
        _server = None


def forget() -> None:
    """Where its process was killed: what it leaves on the disk. Takes no lock and raises nothing."""
    if _server:
        shutil.rmtree(_server.folder, ignore_errors=True)


class ForkServer:
    """A running fork server; it imports for some seconds, and ends with this process however that ends."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="stageline-fork-")  # 0700: nobody else may connect
        self.folder = self._folder.name
        self._socket, self._log = Path(self._folder.name) / "socket", Path(self._folder.name) / "log"
        # what cold workers get from Ray, for one CPU; a stage sets its own number of threads
        env = {"OMP_NUM_THREADS": "1", **os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "TORCH_WARM_POOL": "0"}
        with self._log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "orchestrator.forkserver", self._folder.name],
                stdin=subprocess.PIPE, stdout=file, stderr=file, env=env, process_group=0,  # no Ctrl-C
            )  # fmt: skip

    @property
    def py_executable(self) -> str:
        """For a runtime environment: a piece of shell, to be followed by script and arguments."""
        client = Path(__file__).with_name("forkclient.py")
        return shlex.join([sys.executable, "-I", "-S", str(client), str(self._socket), sys.executable])

    def stop(self) -> None:
        """End the server, not the workers it forked. Says why where it had ended by itself."""
        code = self._process.poll()
        if code is not None:
            tail = self._log.read_text(errors="replace").strip().splitlines()[-1:]
            log.warning("the fork server had ended with %s, so workers started slowly: %s", code, " ".join(tail))
        self._process.terminate()
        self._process.wait()
        self._folder.cleanup()
