"""The fork server and its client, with next to nothing imported: what a forked process has, and who is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import orchestrator.forkserver

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fork server is Linux only")

CLIENT = Path(orchestrator.forkserver.__file__).with_name("forkclient.py")
# imports nothing, but changes the environment as imports do
SERVER = """
import os, sys
import orchestrator.forkserver as forkserver
forkserver.preload = lambda between: os.environ.update(PATH="/first:" + os.environ["PATH"], CHOSEN="cpu")
forkserver.reseed = lambda: None
forkserver.become(*forkserver.Server(sys.argv[1]).serve())
"""
SCRIPT = """
import json, os, signal, sys
print(json.dumps({
    "argv": sys.argv, "name": __name__, "pid": os.getpid(), "parent": os.getppid(), "cwd": os.getcwd(),
    "env": dict(os.environ), "path": sys.path[0], "blocked": [int(s) for s in signal.pthread_sigmask(0, [])],
    "forked": "orchestrator.forkserver" in sys.modules,
}))
print("to stderr", file=sys.stderr)
"""


class Served:
    """A server, and the script that its clients ask for."""

    def __init__(self, folder: Path):
        self.folder, self.script = folder / "server", folder / "script.py"
        self.folder.mkdir()
        self.socket = self.folder / "socket"
        self.script.write_text(SCRIPT)
        self.process = subprocess.Popen([sys.executable, "-c", SERVER, str(self.folder)], stdin=subprocess.PIPE)
        until = time.monotonic() + 60
        while not self.socket.exists():
            assert time.monotonic() < until
            time.sleep(0.01)

    def ask(self, *arguments: str, **options) -> dict:
        """What the script says of the process it runs in."""
        command = [sys.executable, "-I", "-S", str(CLIENT), str(self.socket), sys.executable, str(self.script)]
        # the client's end is not the script's: read until all writers are gone
        client = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        out, err = client.communicate(timeout=60)
        assert client.returncode == 0 and err == b"to stderr\n", err
        return json.loads(out)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin
        self.process.stdin.close()


@pytest.fixture
def served(tmp_path):
    server = Served(tmp_path)
    yield server
    server.end()


def test_forked_process_is_what_the_client_would_have_become(served, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    seen = served.ask(
        "--flag", "a b", cwd=tmp_path / "elsewhere", env=os.environ | {"OF_CLIENT": "1", "CUDA_VISIBLE_DEVICES": ""},
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]),
    )  # fmt: skip
    assert seen["forked"] and seen["parent"] == served.process.pid
    assert seen["argv"] == [str(served.script), "--flag", "a b"] and seen["name"] == "__main__"
    assert seen["cwd"] == str(tmp_path / "elsewhere") and seen["path"] == str(tmp_path)
    assert seen["blocked"] == [signal.SIGINT]
    assert (seen["env"]["OF_CLIENT"], seen["env"]["CUDA_VISIBLE_DEVICES"]) == ("1", "")
    assert seen["env"]["CHOSEN"] == "cpu" and seen["env"]["PATH"] == "/first:" + os.environ["PATH"]
    assert served.ask()["pid"] != seen["pid"]


@pytest.mark.parametrize("variables", [{"PYTHONPATH": "/elsewhere"}, {"LD_LIBRARY_PATH": "/x"}, {"CHOSEN": "cuda"}])
def test_what_the_imports_would_have_met_otherwise_starts_as_python(served, variables):
    seen = served.ask(env=os.environ | variables)
    assert not seen["forked"] and variables.items() <= seen["env"].items()


def test_without_a_server_it_starts_as_python(served):
    served.end()
    assert not served.ask()["forked"]


def test_it_ends_with_its_driver(served):
    served.process.stdin.close()
    assert served.process.wait(timeout=60) == 0
    assert not served.folder.exists()


def test_it_ends_with_its_driver_while_it_still_imports(tmp_path):
    code = """
import sys, time
import orchestrator.forkserver as forkserver
forkserver.SHARED = ("json",) * 10**6
forkserver.importlib.import_module = lambda name: time.sleep(0.01)
forkserver.Server(sys.argv[1])
"""
    folder = tmp_path / "server"
    folder.mkdir()
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE)
    try:
        until = time.monotonic() + 60
        while not (folder / "socket").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        assert process.poll() is None and process.stdin
        process.stdin.close()
        assert process.wait(timeout=60) == 0 and not folder.exists()
    finally:
        process.kill()
        process.wait()


LAST = """
import atexit, threading, time
atexit.register(print, "exit function")
threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
"""
LEAVING = """
import os, sys
import orchestrator.forkserver as forkserver
forkserver.reseed = lambda: None
request = {"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd(), "oom_score_adj": 0, "blocked": []}
if os.fork() == 0:
    forkserver.become(request, [os.dup(0), os.dup(1), os.dup(2)])
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("", 0, ""),
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('refused')", 1, "refused"),
        ("raise SystemExit", 0, ""),
        ("1 / 0", 1, "ZeroDivisionError"),
    ],
)
def test_a_forked_process_ends_as_python_does(tmp_path, end, code, said):
    """After its threads and exit functions, with its code and its output, although it frees nothing."""
    script = tmp_path / "script.py"
    script.write_text(LAST + end)
    done = subprocess.run([sys.executable, "-c", LEAVING, str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "thread\nexit function\n") and said in done.stderr
