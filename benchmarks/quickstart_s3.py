"""The quickstart on Ceph's S3 gateway, which is killed during a checkpoint upload and started again.

    python benchmarks/quickstart_s3.py --folder /tmp/quickstart-s3

Runs experiments/quickstart.yaml on the local folder (reused where it is done) and on s3://. When the full finetune is
about to save, the gateway is stopped (SIGSTOP) until requests of the upload lie unread at its port (the client waits
for its word before it sends the body), killed (SIGKILL), and started again some seconds later. Then the weights of all
four training stages must be those of the local run, to the bit, and nobody may have failed. Exit code 1 where that
does not hold.
"""

import argparse
import hashlib
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "cluster"))

from ceph import Ceph, missing  # noqa: E402

from orchestrator.ledger import Ledger  # noqa: E402
from orchestrator.plan import read_mappings, stage_prefix  # noqa: E402
from orchestrator.progress import read_progress  # noqa: E402
from orchestrator.store import Store, open_store  # noqa: E402

COMMAND = [str(Path(sys.executable).with_name("stageline")), "run", "experiments/quickstart.yaml"]
STAGES = ("language_pretrain", "mlp_warmup", "vit_incremental", "full_finetune")
EVERY = 50  # steps between two saves, in the quickstart
MUCH, LONGEST_PAUSE_S = 1_000_000, 20.0  # unread bytes; seconds in which a save falls due
DOWN_S = 5.0


def prefix(store: Store, stage: str) -> str | None:
    known = read_mappings(store, "quickstart")
    return stage_prefix("train", known[stage]["fingerprint"]) if stage in known else None


def weights(store: Store, stage: str, folder: Path) -> str:
    """sha256 of a stage's final weights."""
    done = Ledger(store, prefix(store, stage) or "").state().completed
    assert done is not None, f"{stage} is not completed"
    store.get_file(f"{done['manifest']['folder']}/model.safetensors", folder / "model")
    return hashlib.sha256((folder / "model").read_bytes()).hexdigest()


def kill_during_upload(ceph: Ceph, store: Store, run: subprocess.Popen) -> tuple[int, int, float]:
    """(step of the last note before, unread bytes when killed, time of the kill)."""
    while True:
        assert run.poll() is None, "the run ended before it could be disturbed"
        where = prefix(store, "full_finetune")
        note = read_progress(store, where) if where else None
        if note is not None and EVERY - 10 <= note["step"] % EVERY < EVERY - 2:
            break
        time.sleep(0.05)
    ceph.pause()
    began = time.monotonic()
    while ceph.unread_bytes() < MUCH and time.monotonic() - began < LONGEST_PAUSE_S:
        time.sleep(0.01)
    unread, killed = ceph.unread_bytes(), time.time()
    ceph.kill()
    time.sleep(DOWN_S)
    ceph.start()
    return note["step"], unread, killed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if reason := missing():
        sys.exit(reason)
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, seed 0", flush=True)
    digits = [sys.executable, "experiments/digits.py", "--output", "runs/digits", "--seed", "0"]
    subprocess.run(digits, cwd=ROOT, check=True)
    began = time.monotonic()
    subprocess.run(COMMAND, cwd=ROOT, check=True)
    print(f"local: {time.monotonic() - began:.0f} s", flush=True)
    with Ceph(options.folder / "ceph") as ceph:
        os.environ |= ceph.environment
        url = f"s3://{ceph.bucket()}/quickstart"
        began = time.monotonic()
        run = subprocess.Popen([*COMMAND, f"storage={url}"], cwd=ROOT)
        store = open_store(url)
        step, unread, killed = kill_during_upload(ceph, store, run)
        print(f"gateway killed after the note of step {step}, {unread:,} bytes unread; down for {DOWN_S} s", flush=True)
        code = run.wait()
        print(f"s3: exit code {code} after {time.monotonic() - began:.0f} s", flush=True)
        entries = Ledger(store, prefix(store, "full_finetune") or "").entries()
        saved = [(e.fields["step"], e.time) for e in entries if e.type == "checkpoint"]
        after = next((s, when - killed) for s, when in saved if when > killed)
        print(f"checkpoint of step {after[0]} committed {after[1]:.1f} s after the kill")
        local = open_store(str(ROOT / "runs" / "storage"))
        same = {}
        for stage in STAGES:
            one, other = weights(local, stage, options.folder), weights(store, stage, options.folder)
            same[stage] = one == other
            print(f"{stage}: {one[:16]} local, {other[:16]} on s3: {'identical' if same[stage] else 'DIFFERENT'}")
        attempts = sum(entry.type == "attempt" for entry in entries)
        print(f"attempts of full_finetune: {attempts}")
        return 0 if code == 0 and all(same.values()) and unread > 0 and attempts == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
