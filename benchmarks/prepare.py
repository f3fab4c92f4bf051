"""A million samples through `prepare`, killed twice on the way: memory, what is done again, and samples a second.

    python benchmarks/prepare.py [--samples 1000000] [--curate] [--output DIR]

Samples are made first: .45 of them Parquet rows with a small PNG each, .35 lines of text, .1 in WebDataset archives, .1
lines that name picture files; one in a hundred is damaged. Then `stageline run` on this machine, SIGKILL of the driver
when three and when six tenths of the parts are made, and run again each time. To hold: no finished part is made again
(the files of a part keep their inode), every sample is kept or rejected for the planted reason, and the index holds
each kept one once. Beside it, in the same run: the same functions in one process without Ray, on every 40th part.
--curate: with text checks and the search for copies.

Memory is resident set size, looked at twice a second: of the driver, of the largest worker, of all processes together.
Exit code 1 where something does not hold.
"""

import argparse
import io
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from modeling.meta import read_meta  # noqa: E402
from modeling.shards import ShardReader  # noqa: E402
from orchestrator.folders import StoreFolder  # noqa: E402
from orchestrator.spec import load_spec  # noqa: E402
from stages.prepare.chunks import Work, measure_chunk  # noqa: E402
from stages.prepare.measuring import chunks_of  # noqa: E402

SHARES = {"rows": 0.45, "text": 0.35, "archives": 0.1, "files": 0.1}
DAMAGED = 100  # one sample in so many
FILES = 5000  # different picture files
PICTURES = 20_000  # different pictures in rows and archives
KILLS = (0.3, 0.6)  # of the parts
EVERY = 40  # parts, of those that the single process measures
TEXT = "the a of small large red blue digit picture shows seven three two row left right it and is with"
WORDS = TEXT.split()
YAML = """
name: million
storage: storage
model: {{vision: micro-vit, language: micro-qwen2}}
data:
  million: {{meta: {meta}, system: ""}}
stages:
  data: {{kind: prepare, data: million, max_rejected: 0.02, resources: {{workers: {workers}}}{curate}}}
"""


def tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


class Material:
    def __init__(self, folder: Path, samples: int, seed: int):
        self.folder, self.random = folder, random.Random(seed)
        self.counts = {name: int(samples * share) for name, share in SHARES.items()}
        self.damaged: Counter[str] = Counter()
        rng = np.random.default_rng(seed)
        self.pictures = [self._png(rng.integers(0, 256, (24, 24), dtype=np.uint8)) for _ in range(PICTURES)]

    def make(self) -> Path:
        (self.folder / "media").mkdir(parents=True)
        for i in range(FILES):
            (self.folder / "media" / f"{i}.png").write_bytes(self.pictures[i])
        self._rows(self.counts["rows"])
        for name in ("text", "files"):
            with open(self.folder / f"{name}.jsonl", "w") as file:
                for i in range(self.counts[name]):
                    file.write(self._line(name, i) + "\n")
        self._archives(self.counts["archives"])
        annotations = {"rows": "rows-*.parquet", "text": "text.jsonl", "archives": "*.tar", "files": "files.jsonl"}
        meta = {name: {"root": "media", "annotation": annotation} for name, annotation in annotations.items()}
        (self.folder / "meta.json").write_text(json.dumps(meta))
        return self.folder / "meta.json"

    def _line(self, name: str, i: int) -> str:
        record: dict[str, Any] = {"id": f"{name}-{i}", "conversations": self._turns(name == "files")}
        if name == "files":
            record["image"] = f"{self.random.randrange(FILES)}.png"
        if i % DAMAGED == 7:
            if name == "text":
                self.damaged["bad_json"] += 1
                return json.dumps(record)[:-3]
            self.damaged["missing_image"] += 1
            record["image"] = "none.png"
        return json.dumps(record)

    def _rows(self, count: int) -> None:
        for start in range(0, count, 50_000):
            rows = []
            for i in range(start, min(count, start + 50_000)):
                data = self.pictures[self.random.randrange(PICTURES)]
                if i % DAMAGED == 7:
                    self.damaged["unreadable_image"] += 1
                    data = data[: len(data) // 2]
                picture = {"bytes": data, "path": f"{i}.png"}
                rows.append({"id": f"rows-{i}", "conversations": self._turns(True), "image": picture})
            table = pa.Table.from_pylist(rows)
            pq.write_table(table, self.folder / f"rows-{start:08d}.parquet", row_group_size=5000)

    def _archives(self, count: int) -> None:
        for start in range(0, count, 2000):
            with tarfile.open(self.folder / f"{start:08d}.tar", "w") as archive:
                for i in range(start, min(count, start + 2000)):
                    record = json.dumps({"id": f"archives-{i}", "conversations": self._turns(True)}).encode()
                    if i % DAMAGED == 7:
                        self.damaged["not_an_object"] += 1
                        record = b"[]"
                    for suffix, data in (("json", record), ("png", self.pictures[self.random.randrange(PICTURES)])):
                        info = tarfile.TarInfo(f"{i:08d}.{suffix}")
                        info.size = len(data)
                        archive.addfile(info, io.BytesIO(data))

    def _turns(self, picture: bool) -> list[dict[str, str]]:
        words = self.random.choices(WORDS, k=self.random.randint(4, 60))
        question = ("<image>\n" if picture else "") + " ".join(words[:4]) + f" {self.random.randrange(10**6)}?"
        answer = " ".join(words) + f" {self.random.randrange(10**9)}."
        return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]

    @staticmethod
    def _png(pixels: np.ndarray) -> bytes:
        out = io.BytesIO()
        Image.fromarray(pixels // 32 * 32).save(out, "PNG", compress_level=1)
        return out.getvalue()


class Memory(threading.Thread):
    """The largest resident sizes of a driver and its processes, in bytes."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.over = pid, threading.Event()
        self.driver = self.worker = self.together = 0

    def run(self) -> None:
        while not self.over.wait(0.5):
            try:
                driver = psutil.Process(self.pid)
                sizes = {child: child.memory_info().rss for child in driver.children(recursive=True)}
                own = driver.memory_info().rss
                workers = [size for child, size in sizes.items() if child.name().startswith("ray::")]
            except psutil.Error:  # one that has just ended
                continue
            self.driver, self.worker = max(self.driver, own), max(self.worker, *workers, 0)
            self.together = max(self.together, own + sum(sizes.values()))


def made(storage: Path) -> dict[str, int]:
    """Inode by file of all finished parts."""
    out = {}
    for path in storage.glob("stages/prepare/*/parts/*.json"):
        folder = path.with_name(json.loads(path.read_text())["folder"])
        out |= {str(inner): inner.stat().st_ino for inner in [path, *folder.rglob("*")]}
    return out


def finished(storage: Path) -> int:
    return sum(1 for _ in storage.glob("stages/prepare/*/parts/*.json"))


class Run:
    def __init__(self, folder: Path):
        self.folder, self.storage = folder, folder / "storage"
        self.failed: list[str] = []
        self.memory: list[Memory] = []

    def check(self, what: str, holds: bool) -> None:
        tell(f"{'holds' if holds else 'FAILS'}: {what}")
        if not holds:
            self.failed.append(what)

    def attempt(self, until: int | None) -> float:
        """Run until so many parts are made, then SIGKILL; seconds."""
        command = [str(Path(sys.executable).with_name("stageline")), "run", str(self.folder / "million.yaml")]
        began = time.monotonic()
        with open(self.folder / "log.txt", "ab") as log:
            driver = subprocess.Popen(command, stdout=log, stderr=log)
        memory = Memory(driver.pid)
        memory.start()
        self.memory.append(memory)
        workers: list[psutil.Process] = []
        while driver.poll() is None:
            time.sleep(0.5)
            if until is not None and finished(self.storage) >= until:
                children = psutil.Process(driver.pid).children(recursive=True)
                workers = [child for child in children if child.name().startswith("ray::Map")]
                driver.send_signal(signal.SIGKILL)
        memory.over.set()
        psutil.wait_procs(workers, timeout=60)
        if until is None:
            assert driver.returncode == 0, (self.folder / "log.txt").read_text()[-3000:]
        return time.monotonic() - began


def single(folder: Path, meta: Path) -> Iterator[tuple[int, float]]:
    """(samples, seconds) of every EVERYth part, measured in this process."""
    spec = load_spec(folder / "million.yaml")
    stage = spec.stages["data"]
    with tempfile.TemporaryDirectory(dir=folder) as out:
        store = StoreFolder(out, "parts")
        chunks = list(chunks_of(read_meta(meta), spec.model_of(stage), stage.params, "", Path(out)))
        measure_chunk(Work(chunks[0], store))  # imports, tokenizer
        for chunk in chunks[1::EVERY]:
            before = time.perf_counter()
            part = measure_chunk(Work(chunk, store))
            yield part.records, time.perf_counter() - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--curate", action="store_true")
    parser.add_argument("--output", type=Path, help="a folder to work in (default: a temporary one)")
    options = parser.parse_args()
    tell(f"{platform.machine()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB; {options}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        run = Run(folder)
        before = time.monotonic()
        material = Material(folder / "material", options.samples, options.seed)
        meta = material.make()
        tell(f"{sum(material.counts.values()):,} samples made in {time.monotonic() - before:.0f} s")
        curate = ", curate: {text: {}, duplicates: {}}" if options.curate else ""
        text = YAML.format(meta=meta, workers=options.workers, curate=curate)
        (folder / "million.yaml").write_text(text)
        alone = list(single(folder, meta))
        rate_alone = sum(count for count, _ in alone) / sum(seconds for _, seconds in alone)
        tell(f"one process without Ray: {rate_alone:,.0f} samples/s ({sum(count for count, _ in alone):,} samples)")

        spec = load_spec(folder / "million.yaml")
        stage = spec.stages["data"]
        total = len(list(chunks_of(read_meta(meta), spec.model_of(stage), stage.params, "", folder)))
        seconds, known = [], {}
        for share in KILLS:
            seconds.append(run.attempt(int(share * total)))
            now = made(run.storage)
            run.check(f"no part of before was made again ({len(known):,} files)", known.items() <= now.items())
            tell(f"killed after {seconds[-1]:.0f} s with {finished(run.storage)} of {total} parts")
            known = now
        seconds.append(run.attempt(None))
        tell(f"finished after another {seconds[-1]:.0f} s")
        shards = {path.stat().st_ino for path in run.storage.glob("stages/*/*/result/*/shards/*.tar")}
        of_before = {inode for name, inode in known.items() if name.endswith(".tar") and "/review/" not in name}
        run.check("the shards of parts made before the last kill are the result's", of_before <= shards)
        (result,) = run.storage.glob("stages/prepare/*/result/*")
        summary = json.loads((result / "summary.json").read_text())
        damage = {reason: count for reason, count in summary["reasons"].items() if reason in material.damaged}
        run.check(f"rejected as planted: {damage}", damage == dict(material.damaged))
        run.check("samples = kept + rejected", summary["samples"] == summary["kept"] + summary["rejected"])
        run.check(f"{summary['samples']:,} samples read", summary["samples"] == sum(material.counts.values()))
        ids = ShardReader(result).index["id"].codes()[1]
        run.check("every kept sample is in the index once", len(ids) == summary["kept"] == len(ShardReader(result)))
        tell(f"summary: { ({k: summary[k] for k in ('samples', 'kept', 'rejected', 'tokens')}) }, {summary['reasons']}")
        rate = summary["samples"] / sum(seconds)
        tell(
            f"{options.workers} workers: {rate:,.0f} samples/s over {sum(seconds):.0f} s with starts, kills and the end"
        )
        tell(f"beside one process: {rate / rate_alone:.2f} times")
        for what in ("driver", "worker", "together"):
            tell(f"peak memory, {what}: {max(getattr(one, what) for one in run.memory) / 2**20:,.0f} MiB")
    return bool(run.failed)


if __name__ == "__main__":
    sys.exit(main())
