"""StageIO over a store and a ledger: what a stage sees of the outside, in the driver or in a worker.

Invariants: results and checkpoints lie under the token of the attempt that wrote them, so an attempt that was
given up can never overwrite a later one's files; a checkpoint or result exists once its ledger entry does, and only
the holder of the newest token can append that entry (design.md, "The ledger").
"""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling.errors import CheckpointError
from orchestrator.errors import Preempted
from orchestrator.ledger import Ledger
from orchestrator.progress import Recorder, read_metrics, token_name
from orchestrator.store import Missing, Store, open_store
from stages.io import Input, ResumePoint, Signal
from stages.kinds import KINDS

FENCE_CHECK_S = 2.0  # between two looks at the ledger for a higher token


@dataclass(frozen=True)
class ParentRef:
    """A parent's finished result in the store."""

    name: str
    kind: str
    fingerprint: str
    folder: str  # store prefix of the result's files
    params: dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Everything one attempt of a stage needs; crosses process borders."""

    storage: str
    prefix: str
    stage: str
    kind: str
    fingerprint: str
    params: Any
    model: Any
    sources: dict[str, Any]
    parents: tuple[ParentRef, ...]
    token: tuple[int, int]
    keep: int = 3  # checkpoints


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_folder(store: Store, prefix: str, scratch: Path) -> Path:
    """All objects under a prefix as a local folder: in place where the store is one, else downloaded."""
    local = store.local_path(prefix)
    if local is not None:
        return local
    folder = scratch / prefix.replace("/", "_")
    for key in store.list(prefix + "/"):
        store.get_file(key, folder / key[len(prefix) + 1 :])
    return folder


class StoreIO:
    """One rank of one attempt. `mapper` runs the parallel parts of a stage that is no training stage."""

    def __init__(self, task: Task, rank: int = 0, world: int = 1, mapper: Callable | None = None):
        self.task, self.rank, self.world = task, rank, world
        self.stage, self.fingerprint = task.stage, task.fingerprint
        self.params, self.model, self.sources = task.params, task.model, task.sources
        self.store = open_store(task.storage)
        self.ledger = Ledger(self.store, task.prefix)
        self.scratch = Path(tempfile.mkdtemp(prefix=f"stageline-{task.stage}-"))
        self.inputs = {
            parent.name: Input(
                parent.name, parent.kind, parent.fingerprint,
                fetch_folder(self.store, parent.folder, self.scratch), parent.params,
            )
            for parent in task.parents
        }  # fmt: skip
        # a training stage's plan is made by the driver, under a log of its own
        log_name = token_name(task.token) + ("-0plan" if mapper and KINDS[task.kind].trains else "")
        self._recorder = Recorder(self.store, task.prefix, task.token, log_name)
        self._mapper = mapper
        self._fence_checked = 0.0

    def close(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)

    def log(self, message: str) -> None:
        self._recorder.log(message)

    def flush(self, step: int) -> None:
        self._recorder.flush()

    def tick(self, step: int, total: int, row: dict[str, Any]) -> Signal:
        self._recorder.row(step, total, row)
        now = time.monotonic()
        if now - self._fence_checked >= FENCE_CHECK_S:
            self._fence_checked = now
            self.ledger.check(self.task.token)
        return Signal()

    def stopped(self, step: int) -> None:
        raise Preempted(f"stopped after step {step} as asked")

    # -- checkpoints ---------------------------------------------------------------------------------

    def _checkpoint_prefix(self, step: int) -> str:
        return f"{self.task.prefix}/checkpoints/checkpoint-{step:08d}/{token_name(self.task.token)}"

    def put_shard(self, step: int, name: str, path: Path) -> dict[str, Any]:
        digest, size = sha256_of(path), path.stat().st_size
        self.store.put_file(f"{self._checkpoint_prefix(step)}/{name}", path)
        return {"name": name, "size": size, "sha256": digest}

    def commit(self, step: int, files: list[dict[str, Any]], meta: dict[str, Any]) -> None:
        prefix = self._checkpoint_prefix(step)
        manifest = {"step": step, "token": list(self.task.token), "files": files, **meta}
        self.store.put(f"{prefix}/manifest.json", json.dumps(manifest, indent=1).encode())
        self.ledger.append("checkpoint", self.task.token, step=step, manifest=f"{prefix}/manifest.json")
        self.log(f"checkpoint of step {step} committed")
        for old in self.ledger.state().checkpoints[self.task.keep :]:
            self.ledger.append("retired", self.task.token, step=old.step, manifest=old.manifest)
            remove_folder(self.store, old.manifest.rsplit("/", 1)[0])

    def resume_point(self) -> ResumePoint | None:
        for checkpoint in self.ledger.state().checkpoints:  # newest first
            try:
                return self._verified(checkpoint.step, checkpoint.manifest)
            except CheckpointError as error:
                if self.rank == 0:
                    self.log(f"checkpoint of step {checkpoint.step} cannot be used, trying the one before: {error}")
        return None

    def _verified(self, step: int, manifest_key: str) -> ResumePoint:
        prefix = manifest_key.rsplit("/", 1)[0]
        try:
            manifest = json.loads(self.store.get(manifest_key))
            folder = fetch_folder(self.store, prefix, self.scratch)
            for item in manifest["files"]:
                path = folder / item["name"]
                if not path.is_file() or sha256_of(path) != item["sha256"]:
                    raise CheckpointError(f"{item['name']} is missing or damaged", where=prefix)
        except (Missing, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"its manifest is missing or damaged ({error!r})", where=manifest_key) from error
        return ResumePoint(step, folder, manifest)

    # -- results -------------------------------------------------------------------------------------

    def keep(self, name: str, path: Path) -> None:
        self.store.put_file(f"{self.task.prefix}/{name}", path)

    def fetch(self, name: str) -> Path:
        key = f"{self.task.prefix}/{name}"
        local = self.store.local_path(key)
        if local is None:
            local = self.scratch / name
            self.store.get_file(key, local)
        return local

    def complete(self, folder: Path, summary: dict[str, Any]) -> None:
        prefix = f"{self.task.prefix}/result/{token_name(self.task.token)}"
        files = []
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = path.relative_to(folder).as_posix()
            self.store.put_file(f"{prefix}/{name}", path)
            files.append({"name": name, "size": path.stat().st_size, "sha256": sha256_of(path)})
        self._recorder.flush()
        rows = read_metrics(self.store, self.task.prefix)
        if rows:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            self.store.put(f"{self.task.prefix}/metrics.jsonl", text.encode())
        self.ledger.append("completed", self.task.token, manifest={"folder": prefix, "files": files}, summary=summary)

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        assert self._mapper is not None, "a training stage maps nothing"
        return self._mapper(function, items, self.params.resources)


def remove_folder(store: Store, prefix: str) -> None:
    for key in store.list(prefix + "/"):
        store.delete(key)
