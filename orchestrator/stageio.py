"""StageIO over a store and a ledger: what a stage sees of the outside, in the driver or in a worker.

Invariants: results and checkpoints lie under the token of the attempt that wrote them, so an attempt that was
given up can never overwrite a later one's files; a checkpoint or result exists once its ledger entry does, and only
the holder of the newest token can append that entry (design.md, "The ledger"). Between two steps nothing here
waits for storage: rows, logs and questions are a thread's (courier.py), checkpoints another's (stages/saving.py).
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.cache import Held, held_result
from orchestrator.checkpoints import Checkpoints, sha256_of, token_name, verified
from orchestrator.control import stacks_key
from orchestrator.courier import Courier, Notice
from orchestrator.errors import ErrorClass, Preempted, StorageTransient
from orchestrator.folders import StoredResult, StoreFolder
from orchestrator.ledger import Ledger, state
from orchestrator.pacing import Pacer, failure_interval
from orchestrator.places import Places, write_places
from orchestrator.progress import Recorder, read_metrics
from orchestrator.redaction import redact
from orchestrator.s3 import with_patience
from orchestrator.scratch import drop_scratch, make_scratch
from orchestrator.store import open_store
from stages.io import Input, ResumePoint, Signal
from stages.kinds import KINDS

HUNG_EXIT_CODE = 86
HUNG_PATIENCE_S = 20.0  # with the store, for the stacks
OTHERS_S = 5.0  # for the other ranks to leave theirs: the end of this process ends them too
PLACES_PATIENCE_S = 300.0  # with the store, for the note of where it runs
PLACES_END_S = 2.0  # for that note, when the attempt is over

log = logging.getLogger(__name__)


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
    workers: int = 1
    followers: int = 0  # workers of the training stage that can start after this one; 0 where there is none
    sets: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, Any] = field(default_factory=dict)  # of the sets that it asks
    experiment: str = ""  # by which the runs of a dashboard are told apart


def _matches(name: str, pattern: str) -> bool:
    return fnmatch(name, pattern)


class StoreIO:
    """One rank of one attempt. `mapper` and `streamer` run the parallel parts of a stage that is no training stage.

    notices(): rank 0 of a training stage, from a thread: what the cluster says of its end, see courier.py.
    """

    def __init__(
        self,
        task: Task,
        rank: int = 0,
        world: int = 1,
        mapper: Callable | None = None,
        notices: Callable[[], Notice | None] = lambda: None,
        streamer: Callable | None = None,
    ):
        self.task, self.rank, self.world = task, rank, world
        self.stage, self.fingerprint = task.stage, task.fingerprint
        self.params, self.model = task.params, task.model
        self.sources, self.sets, self.digests = task.sources, task.sets, task.digests
        self.store = open_store(task.storage)
        self.scratch = make_scratch(task.stage)
        kind = KINDS[task.kind]
        self._trains = kind.trains
        # the driver, which may be on another machine than the workers, fetches what it plans with
        before = kind.before_reads if mapper and kind.trains else "*"
        self._held: list[Held] = []
        self.inputs: dict[str, Input] = {}
        for parent in task.parents:
            pattern = kind.reads.get(parent.kind, before)
            self._held.append(held_result(self.store, parent.folder, partial(_matches, pattern=pattern)))
            self.inputs[parent.name] = Input(
                parent.name, parent.kind, parent.fingerprint, self._held[-1].folder, parent.params,
                StoredResult(task.storage, parent.folder),
            )  # fmt: skip
        # a training stage's plan is made by the driver, under a log of its own
        log_name = token_name(task.token) + ("-0plan" if mapper and self._trains else "")
        self._recorder = Recorder(self.store, task.prefix, task.token, log_name)
        self._mapper, self._streamer = mapper, streamer
        self._courier = Courier(self.store, task.prefix, task.token, self._recorder, notices)
        self._ledger = Ledger(self.store, task.prefix)
        # with a ledger of its own, for the one thread that saves: it reads on from where it was
        self._checkpoints = Checkpoints(self.store, task.prefix, self._ledger.beside(), task.token, task.keep)
        self._pacer: Pacer | None = None
        self._why = ""  # a stage that does not train has to stop
        self._saving = 0.0
        self._saved: list[tuple[float, float]] = []  # (stall, seconds) of saves since the last tick
        self._placing: threading.Thread | None = None

    def close(self) -> None:
        self._courier.stop()
        if self._placing is not None:
            self._placing.join(PLACES_END_S)
        self._recorder.flush()
        drop_scratch(self.scratch)
        for held in self._held:
            held.release()

    def ran_on(self, nodes: Sequence[dict[str, str]]) -> None:
        """Rank 0, once: the labels of all ranks' nodes, for who asks what it cost. The start waits for no storage."""
        resources = self.params.resources
        places = Places(resources.cpus, resources.gpus, tuple(nodes))

        def write() -> None:
            try:
                store = with_patience(self.store, PLACES_PATIENCE_S)
                write_places(store, self.task.prefix, self.task.token, places)
            except (StorageTransient, OSError) as error:
                log.warning("where this attempt runs was not stored, so its cost stays unknown: %s", error)

        self._placing = threading.Thread(target=write, name="places", daemon=True)
        self._placing.start()

    def log(self, message: str) -> None:
        self._recorder.log(message)

    def tick(self, step: int, total: int, row: dict[str, Any]) -> Signal:
        self._recorder.row(step, total, row)
        if not self._recorder.behind:
            self._recorder.behind = True
            self._courier.start(step - 1 if self._trains else None, self._ledger.beside())
            self._pacer = self._make_pacer() if self._trains else None
        news = self._courier.news()
        for in_s, reason in news:
            self.log(f"asked to stop within {max(0.0, in_s):.0f} s: {reason}")
        if self._pacer is None:
            self._why = news[0][1] if news else self._why
            return Signal(stop=bool(news))
        for in_s, reason in news:
            self._pacer.notice(in_s, reason)
        while self._saved:
            self._pacer.saved(*self._saved.pop(0))
        return self._pacer.decide(step, row["time/step"])

    def _make_pacer(self) -> Pacer:
        entries = self._ledger.seen  # read by checkpoints(): a step waits for no store
        losses = [f for f in state(entries).failures if f.error_class is not ErrorClass.preempted]
        seconds = entries[-1].time - entries[0].time if entries else 0.0
        return Pacer(self.params.checkpoint.every, failure_interval(len(losses), seconds))

    def stopped(self, step: int) -> None:
        self._recorder.flush()
        if self.rank > 0:
            raise Preempted(f"saved and stopped after step {step}")  # only rank 0 knows why
        why, done = (self._pacer.reason, "saved and stopped") if self._pacer else (self._why, "stopped")
        raise Preempted(f"{why + ': ' if why else ''}{done} after step {step}")

    def hung(self, text: str) -> None:
        try:
            store = with_patience(self.store, HUNG_PATIENCE_S)  # the network may be what it hangs in
            store.put(stacks_key(self.task.prefix, self.task.token, self.rank), redact(text).encode())
            time.sleep(OTHERS_S)
        finally:
            drop_scratch(self.scratch)
            os._exit(HUNG_EXIT_CODE)

    # -- checkpoints ---------------------------------------------------------------------------------

    def put_shard(self, step: int, name: str, data: Any) -> dict[str, Any]:
        return self._checkpoints.put_shard(step, name, data)

    def saving(self, step: int) -> None:
        self._saving = time.monotonic()
        if self._pacer is not None:
            self._pacer.saving()

    def commit(
        self, step: int, files: list[dict[str, Any]], meta: dict[str, Any], train_s: float, stall_s: float = 0.0
    ) -> None:
        self._recorder.flush()
        self._checkpoints.commit(step, files, meta, train_s)
        self.log(f"checkpoint of step {step} committed")
        self._saved.append((stall_s, time.monotonic() - self._saving))

    def checkpoints(self) -> list[str]:
        return [checkpoint.manifest for checkpoint in self._ledger.state().checkpoints]

    def load(self, checkpoint: str) -> ResumePoint:
        return verified(self.store, checkpoint, self.scratch, (self.rank, self.world))

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

    def complete(
        self, folder: Path, summary: dict[str, Any], train_s: float = 0.0, stored: Sequence[dict[str, Any]] = ()
    ) -> None:
        prefix = self.result_folder().prefix
        files = list(stored)
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = path.relative_to(folder).as_posix()
            self.store.put_file(f"{prefix}/{name}", path)
            files.append({"name": name, "size": path.stat().st_size, "sha256": sha256_of(path)})
        self._recorder.flush()
        rows = read_metrics(self.store, self.task.prefix)
        if rows:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            self.store.put(f"{self.task.prefix}/metrics.jsonl", text.encode())
        manifest = {"folder": prefix, "files": sorted(files, key=lambda file: file["name"])}
        self._ledger.append("completed", self.task.token, manifest=manifest, summary=summary, train_s=train_s)

    def result_folder(self) -> StoreFolder:
        return StoreFolder(self.task.storage, f"{self.task.prefix}/result/{token_name(self.task.token)}")

    def work_folder(self, name: str) -> StoreFolder:
        return StoreFolder(self.task.storage, f"{self.task.prefix}/{name}")

    def shared_folder(self, name: str) -> StoreFolder:
        return StoreFolder(self.task.storage, f"shared/{name}")

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        assert self._mapper is not None, "a training stage maps nothing"
        return self._mapper(function, items, self.params.resources)

    def stream(self, function: Callable[..., Any], items: Sequence[Any]) -> Iterator[Any]:
        assert self._streamer is not None, "a training stage streams nothing"
        return self._streamer(function, items, self.params.resources)
