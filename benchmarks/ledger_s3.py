"""How long it takes to read the ledger of a long stage on S3: in runs (the product), and one by one.

    python benchmarks/ledger_s3.py [--entries 100 4000] [--rounds 3]

Whoever resumes reads the whole ledger first, so this is the part of a resume that grows with what was trained. Entries
are those of one long attempt that saves and retires, on Ceph's gateway on loopback; --delay adds milliseconds to every
request, as a store in another building has them. Prints medians of alternating rounds.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "cluster"))

from ceph import Ceph, missing

from orchestrator.ledger import Ledger
from orchestrator.s3 import S3Store
from orchestrator.store import MemoryStore, one_by_one, open_store


def written(entries: int, prefix: str) -> MemoryStore:
    store = MemoryStore()
    ledger = Ledger(store, prefix)
    token = ledger.start_attempt(ledger.claim({"host": "h"}), 8)
    for step in range(0, 50 * (entries - 2), 50):
        kind = "checkpoint" if step % 100 == 0 else "retired"
        fields = {"step": step, "manifest": f"{prefix}/checkpoints/checkpoint-{step:08d}/e0001a0001/manifest.json"}
        ledger.append(kind, token, **fields, **({"train_s": 40.0} if kind == "checkpoint" else {}))
    return store


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--entries", type=int, nargs="+", default=[100, 4000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--delay", type=float, default=20.0, metavar="MS", help="added to every request (default 20)")
    options = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    load = f"load {os.getloadavg()[0]:.1f}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {load}, {options.delay:g} ms added to every request")
    original = S3Store.get

    def delayed(self, key):
        time.sleep(options.delay / 1000)
        return original(self, key)

    with tempfile.TemporaryDirectory(prefix="ledger-") as folder, Ceph(Path(folder)) as ceph:
        os.environ |= ceph.environment
        store = open_store(f"s3://{ceph.bucket()}/ledgers")
        for entries in options.entries:
            prefix = f"stages/train/{entries:016d}"
            source = written(entries, prefix)
            with ThreadPoolExecutor(16) as pool:
                list(pool.map(lambda key, source=source: store.put(key, source.get(key)), source.list()))
            S3Store.get = delayed
            seconds: dict[str, list[float]] = {"in runs": [], "one by one": []}
            for _ in range(options.rounds):
                for how in seconds:
                    reader = Ledger(store, prefix)
                    if how == "one by one":
                        reader.store = OneByOne(store)
                    began = time.perf_counter()
                    assert len(reader.entries()) == entries
                    seconds[how].append(time.perf_counter() - began)
            S3Store.get = original
            told = ", ".join(f"{how} {median(values):.2f} s" for how, values in seconds.items())
            print(f"{entries:,} entries: {told}", flush=True)
    return 0


class OneByOne:
    """The store without its own way to read many objects."""

    def __init__(self, store):
        self._store = store

    def __getattr__(self, name):
        return getattr(self._store, name)

    def get_run(self, keys):
        return one_by_one(self._store, keys)


if __name__ == "__main__":
    sys.exit(main())
