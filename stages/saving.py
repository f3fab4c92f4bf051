"""Checkpoints behind the training: every rank's snapshot is the only stall, upload and commit go on beside the steps.

Invariants: one save at a time; no collective runs in a thread, so that one rank's store never holds another's steps:
that a rank's file is stored travels in the step's all-reduce, and when all are, all ranks gather the digests at the
same step and rank 0 commits. What a thread meets is raised in the training, at the next step (design.md, "Engine and
checkpoints").
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from modeling.checkpoint import Snapshot
from modeling.engine import Engine
from stages.io import StageIO


class Saver:
    """One rank's part in every save of an attempt."""

    def __init__(self, io: StageIO, engine: Engine):
        self.io, self.engine = io, engine
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._snapshot: Snapshot | None = None
        self._upload: Future | None = None  # until its digest was gathered
        self._commit: Future | None = None  # rank 0
        self._what: tuple[int, dict[str, Any], float, float] | None = None  # step, meta, train_s, stall_s

    def start(self, step: int, meta: dict[str, Any], train_s: float) -> float:
        """All ranks, after the same step: copy the state, upload it in a thread; the stall in seconds."""
        before = time.perf_counter()
        self.finish()
        if self.io.rank == 0:
            self.io.saving(step)
        fragments = self.engine.to_write()
        if self._snapshot is None:
            self._snapshot = Snapshot(fragments)
        data = self._snapshot.take(fragments)
        name = f"shard-{self.io.rank:05d}-of-{self.io.world:05d}.safetensors"
        self._upload = self._pool.submit(self.io.put_shard, step, name, data)
        stall = time.perf_counter() - before
        self._what = step, meta, train_s, stall
        return stall

    def uploaded(self) -> bool:
        """Whether this rank's file is stored and its digest not yet gathered. Raises what a thread met."""
        if self._commit is not None and self._commit.done():
            self._commit.result()
            self._commit = None
        if self._upload is None or not self._upload.done():
            return False
        self._upload.result()
        return True

    def gather(self) -> None:
        """All ranks, when all have uploaded: the digests meet on rank 0, which commits in a thread."""
        assert self._upload is not None and self._what is not None, "nothing is being saved"
        files: list = [None] * self.io.world
        dist.all_gather_object(files, self._upload.result())
        self._upload = None
        if self.io.rank == 0:
            self._commit = self._pool.submit(self.io.commit, self._what[0], files, *self._what[1:])

    def finish(self) -> None:
        """All ranks: wait until the save in flight, if any, is committed."""
        if self._upload is not None:
            self.gather()
        if self._commit is not None:
            self._commit.result()
            self._commit = None
