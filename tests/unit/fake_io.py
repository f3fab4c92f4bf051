"""A StageIO in memory, for running a stage without a driver."""

import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from orchestrator.checkpoints import sha256_of
from orchestrator.folders import StoreFolder
from stages.io import Input, Signal


class Stopped(Exception):
    """What `stopped` raises."""


class FakeIO:
    """Records what the stage reports. workers: threads of `map`. stop_at: answers `stop` from that step on."""

    def __init__(
        self,
        folder: Path,
        params: Any,
        *,
        model: Any = None,
        sources: dict[str, Any] | None = None,
        sets: dict[str, Any] | None = None,
        inputs: dict[str, Input] | None = None,
        workers: int = 1,
        stop_at: int | None = None,
        shared: Path | None = None,
    ):
        self.stage, self.fingerprint = "stage", "0" * 64
        self.params, self.model = params, model
        self.sources, self.sets, self.inputs = sources or {}, sets or {}, inputs or {}
        self.digests: dict[str, Any] = {}
        self.rank, self.world = 0, 1
        self.folder, self.scratch = folder, folder / "scratch"
        shutil.rmtree(self.scratch, ignore_errors=True)  # an attempt's own
        self.scratch.mkdir(parents=True)
        self.workers, self.stop_at = workers, stop_at
        self.shared = shared or folder / "shared"
        self.ticks: list[tuple[int, int, dict[str, Any]]] = []
        self.lines: list[str] = []
        self.summary: dict[str, Any] | None = None

    @property
    def result(self) -> Path:
        return self.folder / "result"

    @property
    def kept(self) -> Path:
        return self.folder / "kept"

    def tick(self, step: int, total: int, row: dict[str, Any]) -> Signal:
        self.ticks.append((step, total, row))
        return Signal(stop=self.stop_at is not None and step >= self.stop_at)

    def stopped(self, step: int) -> None:
        raise Stopped(step)

    def log(self, message: str) -> None:
        self.lines.append(message)

    def __getattr__(self, name: str) -> Any:
        if name in ("checkpoints", "load", "put_shard", "saving", "commit", "hung"):
            raise AssertionError(f"not a training stage, {name} is not its")
        raise AttributeError(name)

    def keep(self, name: str, path: Path) -> None:
        self.kept.mkdir(exist_ok=True)
        shutil.copyfile(path, self.kept / name)

    def fetch(self, name: str) -> Path:
        return self.kept / name

    def complete(
        self, folder: Path, summary: dict[str, Any], train_s: float = 0.0, stored: Sequence[dict[str, Any]] = ()
    ) -> None:
        assert self.summary is None, "a stage completes once"
        shutil.copytree(folder, self.result, dirs_exist_ok=True)
        for file in stored:
            path = self.result / file["name"]
            assert path.stat().st_size == file["size"] and sha256_of(path) == file["sha256"]
        self.summary = summary

    def result_folder(self) -> StoreFolder:
        return StoreFolder(str(self.folder), "result")

    def work_folder(self, name: str) -> StoreFolder:
        return StoreFolder(str(self.folder), name)

    def shared_folder(self, name: str) -> StoreFolder:
        return StoreFolder(str(self.shared), name)

    def stream(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """In an order of its own, as a cluster would; each thread has its own object of a class."""
        mine = threading.local()

        def call(item: Any) -> Any:
            if isinstance(function, type) and not hasattr(mine, "object"):
                mine.object = function()
            return mine.object(item) if isinstance(function, type) else function(item)

        if self.workers == 1:
            yield from map(call, reversed(items))
            return
        with ThreadPoolExecutor(self.workers) as pool:
            for future in as_completed([pool.submit(call, item) for item in items]):
                yield future.result()

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        if self.workers == 1:
            yield from map(function, items)
            return
        with ThreadPoolExecutor(self.workers) as pool:
            yield from pool.map(function, items)
