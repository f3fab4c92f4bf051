"""Checkpoints behind the training: snapshot, upload and commit go on beside the steps.

The state of a step stays as it is until the next step's update, so the snapshot is copied during that step's forward
and backward; only what is left of it when they are done is a stall.
Invariants: no weight changes before settle() has returned; one save at a time; no collective runs in a thread, so that
one rank's store never holds another's steps: that a rank's file is stored travels in the step's all-reduce, and when
all are, all ranks gather the digests at the same step and rank 0 commits. What a thread meets is raised in the
training, at the next step (design.md, "Engine and checkpoints").
"""

import os
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist

from modeling.checkpoint import Fragment, Snapshot
from modeling.engine import Engine
from stages.io import StageIO


def _give_way() -> None:
    """In the thread that saves: one core, and only what the training leaves of it.

    Who waits for the save leaves it the core. The memory for snapshots is there before the first: to get 5 GB of it
    page by page took 10 s at this priority, with the training waiting.
    """
    torch.set_num_threads(1)
    if sys.platform == "linux":  # where threads have priorities of their own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


class Saver:
    """One rank's part in every save of an attempt."""

    def __init__(self, io: StageIO, engine: Engine):
        self.io, self.engine = io, engine
        self.stall_s = 0.0  # of the newest save, so far
        self._pool = ThreadPoolExecutor(1, "checkpoint", initializer=_give_way)
        self._allocated = self._pool.submit(Snapshot, engine.to_write())
        self._copy: Future | None = None  # until it is known to be made
        self._upload: Future | None = None  # until its digest was gathered
        self._commit: Future | None = None  # rank 0
        self._what: tuple[int, dict[str, Any], float] | None = None  # step, meta, train_s

    def start(self, step: int, meta: dict[str, Any], train_s: float) -> float:
        """All ranks, after the same step: begin to copy the state and then to upload it; the stall in seconds."""
        before = time.perf_counter()
        self.finish()
        if self.io.rank == 0:
            self.io.saving(step)
        name = f"shard-{self.io.rank:05d}-of-{self.io.world:05d}.safetensors"
        on_gpu = self.engine.device.type == "cuda"
        ready = torch.cuda.Event() if on_gpu else None
        if ready:
            ready.record()
        self._copy = self._pool.submit(self._take, self.engine.to_write(), ready)
        self._upload = self._pool.submit(lambda copy: self.io.put_shard(step, name, copy.result()), self._copy)
        self._what = step, meta, train_s
        self.stall_s = time.perf_counter() - before
        return self.stall_s

    def _take(self, fragments: list[Fragment], ready: torch.cuda.Event | None) -> memoryview:
        """The file's bytes. ready: the update of the weights, on a GPU; the copy runs beside the next kernels."""
        with torch.cuda.stream(torch.cuda.Stream(self.engine.device) if ready else None):
            if ready:
                ready.wait()
            return self._allocated.result().take(fragments)

    def settle(self) -> float:
        """Before a weight changes: wait until the snapshot is taken; for how long that was, in seconds."""
        if self._copy is None:
            return 0.0
        before = time.perf_counter()
        self._copy.result()
        self._copy, stall = None, time.perf_counter() - before
        self.stall_s += stall
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
            self._commit = self._pool.submit(self.io.commit, self._what[0], files, *self._what[1:], self.stall_s)

    def finish(self) -> None:
        """All ranks: wait until the save in flight, if any, is committed; none goes on before rank 0 has done that, for
        the end of one rank is the end of all."""
        self.settle()
        if self._upload is not None:
            self.gather()
        if self._what is None:
            return
        if self._commit is not None:
            self._commit.result()
            self._commit = None
        self._what = None
        dist.barrier()
