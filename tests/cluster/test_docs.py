"""A new user's way, by the pages alone: from a clone to a finished quickstart, an experiment of one's own, and a job
that is submitted to a cluster with a token.

All commands of the pages in WALK are typed into one shell, page by page, as they stand, but for the cluster's ports,
which may be taken here. The quickstart is its short form; STAGELINE_WALK=full makes a real clone and runs
`make quickstart` (ten minutes and an installation).
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import blocks  # noqa: E402

WALK = [ROOT / "docs" / "quickstart.md", blocks.README, ROOT / "docs" / "experiment.md", ROOT / "docs" / "cluster.md"]
FULL = os.environ.get("STAGELINE_WALK") == "full"
PATIENCE_S = 3000.0 if FULL else 900.0


@pytest.fixture
def clone():
    """A home whose folder `stageline` is as after `git clone` and `make install`. Whatever was started from it is ended
    with it, by pid."""
    folder = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))  # short: paths of Ray's sockets end at 107 characters
    if FULL:
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder / "stageline")], check=True)
    else:
        (folder / "stageline").mkdir()
        shutil.copytree(ROOT / "experiments", folder / "stageline" / "experiments")
        (folder / "stageline" / ".venv").symlink_to(sys.prefix)
    yield folder
    while started := started_from(folder):  # one that is killed may have started another
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(started, timeout=10)
    shutil.rmtree(folder)


def started_from(folder: Path) -> list[psutil.Process]:
    """Processes whose home is the folder: only those that the pages' commands have started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("HOME") == str(folder):
                found.append(process)
    return found


def free_ports(count: int) -> list[int]:
    """Different ones: all are held until the last is found."""
    with contextlib.ExitStack() as held:
        return [held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)]


def taken(block: blocks.Block) -> bool:
    """Whether the walk has this block: the short quickstart, or in full what takes time in its place."""
    if block.value == "time":
        return FULL and block.page != blocks.README
    return block.mark == "run" and not (FULL and block.value.endswith("short"))


def test_a_new_user_gets_from_a_clone_to_a_submitted_job(clone):
    text = blocks.script([block for page in WALK for block in blocks.blocks(page) if taken(block)])
    gcs, dashboard, agent, client = free_ports(4)
    more = f"ray start --head --dashboard-agent-listen-port {agent} --ray-client-server-port {client}"
    here = {"6379": str(gcs), "8265": str(dashboard), "ray start --head": more}
    text = re.sub("|".join(here), lambda found: here[found[0]], text)
    blocks.write_files(clone / "stageline", WALK)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_", "STAGELINE_", "PYTEST_"))}
    environment |= {
        "HOME": str(clone),
        "RAY_TMPDIR": str(clone),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    output = clone / "output.txt"
    with output.open("wb") as out:  # no pipe: Ray's daemons would hold it open
        done = subprocess.run(
            ["bash", "-c", text], cwd=clone / "stageline", env=environment, stdout=out, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, timeout=PATIENCE_S,
        )  # fmt: skip
    told = output.read_text()
    print(told)
    assert done.returncode == 0, told[-3000:]
    assert "all 13 stages done" in told, "the quickstart"
    assert len(re.findall(r"all 6 stages done", told)) == 3, "an experiment of one's own, twice, and as a job"
    assert re.search(r"mine-\S+\s+mine\s.*succeeded", told), "the list of jobs"
    assert "Traceback" not in told
    token = (clone / ".ray" / "auth_token").read_text().strip()
    assert token and token not in told
