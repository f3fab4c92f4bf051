"""wandb through drivers that are killed: offline what its own reader finds in all folders together, online what reaches
the server, here a small one of the test's that speaks as much of wandb's protocol as a run needs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import pytest

from orchestrator.store import FileStore
from orchestrator.tracking.about import About
from orchestrator.tracking.params import WandbParams
from orchestrator.tracking.wandb_run import WandbRun

P, RUN = "stages/train/0123456789abcdef", "0123456789abcdef-a1b2c3"
RECORD = f"{P}/tracking/wandb.json"

PATIENCE_S = 120.0
BLOCK = 32 * 1024  # bytes that wandb writes at once, or 15 s late

# a driver that passes on rows until there are N, or wandb has written more than a block; then it waits to be killed
DRIVER = """
import sys, time
from pathlib import Path
from test_tracking_wandb import begin, BLOCK, rows
run = begin(sys.argv[1])
run.open()
if sys.argv[2] == "block":
    written = lambda: sum(file.stat().st_size for file in Path(run._record["folder"]).glob("run-*.wandb"))
    while written() <= BLOCK and run.last < 10_000:
        run.log(rows(run.last + 1, run.last + 50))
        time.sleep(0.05)
else:
    run.log(rows(run.last + 1, int(sys.argv[2])))
print(run.last, flush=True)
sys.stdin.read()
"""


def begin(folder, mode: Literal["online", "offline"] = "offline") -> WandbRun:
    def cards(where: Path) -> list[Path]:
        (where / "data-card-x.html").write_text("<html>")
        return [where / "data-card-x.html"]

    about = About(RUN, "exp", "stage", "train", {"lr": 0.5}, FileStore(f"{folder}/storage"), P, cards)
    return WandbRun(WandbParams(mode=mode, folder=f"{folder}/files", project="p", tags=("t",)), about)


def rows(first, last):
    return [{"step": step, "attempt": "e0001a0001", "loss": 1 / step, "pad": 0.5} for step in range(first, last + 1)]


def killed(folder: Path, last: int | str, wait: Callable[[], bool] = lambda: True) -> int:
    """The last step that a driver passed on before it was killed, once wait() is true."""
    command = [sys.executable, "-c", DRIVER, str(folder), str(last)]
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    environment.pop("WANDB_SERVICE", None)  # else this process's own wandb would serve it
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as driver:
        assert driver.stdout is not None
        passed_on, until = int(driver.stdout.readline()), time.monotonic() + PATIENCE_S
        while not wait():
            assert time.monotonic() < until and driver.poll() is None, "wandb has not written in time"
            time.sleep(1.0)
        driver.send_signal(signal.SIGKILL)
    return passed_on


def folders(folder: Path) -> list[Path]:
    return sorted((folder / "files" / "wandb").glob("offline-run-*"))


def history(where: list[Path]) -> list[tuple[int, float]]:
    """(step, loss) over the folders in their order, as `wandb sync` would send them."""
    out = []
    for folder in [folder for folder in where if list(folder.glob("run-*.wandb"))]:  # a killed driver's may have none
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
        environment = os.environ | {"WANDB_MODE": "offline"}
        text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        for line in text.splitlines():
            if (found := json.loads(line))["type"] == "history":
                out.append((int(found["history"]["step"]["num"]), found["history"]["item"]["loss"]))
    return out


def whole(last: int) -> list[tuple[int, float]]:
    return [(step, pytest.approx(1 / step)) for step in range(1, last + 1)]


def finish_from(folder: Path, last: int) -> WandbRun:
    run = begin(folder)
    run.open()
    run.log(rows(run.last + 1, last))
    run.finish(True)
    return run


@pytest.mark.parametrize("written", ["as it comes", "a block", "all"])
def test_a_killed_drivers_rows_are_there_once(tmp_path, written):
    """Killed at once, with a block of them written and the next ones not, or with all written."""
    if written == "a block":
        passed_on = killed(tmp_path, "block")
        (file,) = folders(tmp_path)[0].glob("run-*.wandb")
        assert file.stat().st_size > BLOCK
    elif written == "all":
        passed_on = killed(tmp_path, 40, lambda: history(folders(tmp_path)) == whole(40))
    else:
        passed_on = killed(tmp_path, 5)
    finish_from(tmp_path, passed_on + 20)
    first, second = folders(tmp_path)
    assert history([first, second]) == whole(passed_on + 20)
    assert written == "as it comes" or history([first]), "what is read back was there"
    assert {folder.name.rsplit("_", 1)[1].split("-", 1)[1] for folder in (first, second)} == {RUN}


def test_killed_before_wandb_made_its_file_all_is_passed_on_again(tmp_path):
    killed(tmp_path, 5, lambda: bool(list(folders(tmp_path)[0].glob("run-*.wandb"))))
    for file in folders(tmp_path)[0].glob("run-*.wandb"):
        file.unlink()
    time.sleep(1.1)  # the next one's name is of another second
    assert finish_from(tmp_path, 8).last == 8
    assert history(folders(tmp_path)[1:]) == whole(8)


def test_folders_are_copied_to_storage(tmp_path):
    killed(tmp_path, 5)
    finish_from(tmp_path, 8)
    copies = sorted((tmp_path / "storage/experiments/exp/wandb").iterdir())
    assert [copy.name for copy in copies] == [folder.name for folder in folders(tmp_path)]
    assert history(copies) == whole(8)
    assert all((copy / "files/data-card-x.html").is_file() for copy in copies)


def test_a_folder_that_was_synced_and_removed_repeats_nothing(tmp_path):
    run = begin(tmp_path)
    run.open()
    run.log(rows(1, 10))
    run.finish(False)
    shutil.rmtree(folders(tmp_path)[0])
    time.sleep(1.1)  # the next one's name is of another second
    finish_from(tmp_path, 15)
    assert [step for step, _ in history(folders(tmp_path))] == [11, 12, 13, 14, 15]


def test_what_went_with_another_machine_is_told_again(tmp_path):
    """All but what is in storage."""
    run = begin(tmp_path)
    run.open()
    run.log(rows(1, 4))
    run.finish(False)
    time.sleep(1.1)
    killed(tmp_path, 10)
    shutil.rmtree(tmp_path / "files")
    (tmp_path / "files" / "wandb").mkdir(parents=True)  # by another stage, on the new disk
    record = json.loads((tmp_path / "storage" / RECORD).read_text())
    assert (record["step"], record["stored"]) == (10, 4)
    finish_from(tmp_path, 12)
    copies = sorted((tmp_path / "storage/experiments/exp/wandb").iterdir())
    assert history(copies) == whole(12)


def test_nothing_is_collected_beside_what_is_passed_on(tmp_path):
    """No command line, environment, git remote, packages, code or output."""
    finish_from(tmp_path, 2)
    (folder,) = folders(tmp_path)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files <= {f"run-{RUN}.wandb", "files/data-card-x.html", "logs/debug.log", "logs/debug-internal.log",
                     "logs/debug-core.log"}  # fmt: skip
    data = (folder / f"run-{RUN}.wandb").read_bytes()
    assert b"pytest" not in data and b".git" not in data


# -- online ----------------------------------------------------------------------------------------------

ONLINE = """
import sys
from test_tracking_wandb import begin, rows
run = begin(sys.argv[1], "online")
run.open()
run.log(rows(run.last + 1, int(sys.argv[2])))
run.finish(True)
"""


class Server:
    """Keeps the history lines of one run."""

    def __init__(self):
        self.history: list[dict] = []
        self.configs: list[dict] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                answer = json.dumps(owner.answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_PUT = do_GET = do_POST

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, path: str, body: bytes) -> dict:
        if path.endswith("/file_stream"):
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl")
            if history:
                del self.history[history["offset"] :]
                self.history += map(json.loads, history["content"])
        if path != "/graphql":
            return {}
        asked = json.loads(body)
        entity = {"id": "e", "name": "e"}
        if "upsertBucket" in asked["query"]:
            self.configs.append(json.loads(asked["variables"]["config"]))
            bucket = {
                "id": "Qg==",
                "name": RUN,
                "displayName": "d",
                "config": "{}",
                "historyLineCount": len(self.history),
                "project": {"id": "p", "name": "p", "entity": entity},
            }
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": not self.history}}}
        if "RunResumeStatus" in asked["query"]:
            return {"data": {"model": {"id": "m", "name": "p", "entity": entity, "bucket": self._resumed()}}}
        if "reateRunFiles" in asked["query"]:
            files = [{"name": name, "uploadUrl": f"{self.url}/up"} for name in asked["variables"]["files"]]
            return {"data": {"createRunFiles": {"runID": RUN, "uploadHeaders": [], "files": files}}}
        return {"data": {"viewer": {"id": "v", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}},
                         "serverInfo": None}}  # fmt: skip

    def _resumed(self) -> dict | None:
        if not self.history:
            return None
        tail, step = json.dumps(self.history[-1]), self.history[-1]["_step"]
        return {"id": "Qg==", "name": RUN, "displayName": "d", "config": "{}", "tags": [], "eventsTail": "[]",
                "historyLineCount": len(self.history), "logLineCount": 0, "eventsLineCount": 0,
                "historyTail": json.dumps([tail]), "summaryMetrics": json.dumps({"_step": step}),
                "wandbConfig": json.dumps({"t": 1})}  # fmt: skip


def test_online_the_server_says_where_to_go_on(tmp_path):
    server = Server()
    environment = os.environ | {
        "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567", "HOME": str(tmp_path),
        "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
    }  # fmt: skip
    environment.pop("WANDB_SERVICE", None)
    for last in (5, 8):
        command = [sys.executable, "-c", ONLINE, str(tmp_path), str(last)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    server.http.shutdown()
    assert [(line["_step"], line["loss"]) for line in server.history] == whole(8)
    assert server.configs[0]["lr"]["value"] == 0.5
