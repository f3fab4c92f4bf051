"""Rows ahead of the training, in the order they are asked for: by worker processes, or by a thread.

Invariants. A row is a function of its request (batches.py), so any number of workers gives the same rows, and the first
row of a resumed training is the first that is decoded. What fails in a worker is raised where the row is awaited, as
itself: a row that cannot be sent is an error, never a hang. Workers come from a fork server of their own: they know no
process group, no accelerator and no Ray, use one thread, and end with the process that trains, however that ends.

A row's pixels are written into anonymous memory that both processes map (memfd_create(2)), everything else crosses a
pipe. The memory is used again once nobody holds its row any more: fresh pages for every row would cost a sixth of the
time that decoding takes. Nothing lies in /dev/shm, of which containers often have 64 MB: what rows take counts as the
processes' own memory. torch's DataLoader wraps errors, needs /dev/shm, and waits for ever for a row that did not fit.
"""

import contextlib
import math
import mmap
import os
import signal
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from multiprocessing import forkserver, get_context, parent_process
from multiprocessing.reduction import ForkingPickler
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from modeling.batches import Batch, Builder, Request
from modeling.errors import UserError

AHEAD = 2  # rows for each worker: one that it makes, one that waits
KEPT = 31 << 20  # bytes; glibc takes no more than 32 MB
# What takes long to import, once for all workers of a rank; the project's own modules each worker finds by its own path
PRELOADED = ["torch", "transformers.modeling_utils", "pyarrow.parquet", "PIL.Image", "av"]


class Rows:
    """Rows of a builder. workers: processes; 0: one thread of this process."""

    def __init__(self, builder: Builder, workers: int = 0):
        self.builder, self.workers = builder, workers
        self._free: list[Slot] = []

    def ahead(self, requests: Iterable[Request | Batch]) -> Generator[tuple[Batch, float], None, None]:
        """(row, seconds waited for it) of each request; a row among them is passed on. Close it to end the workers."""
        pending: deque[Callable[[], Batch]] = deque()
        pool = self._pool()
        try:
            for request in requests:
                pending.append(self._begun(pool, request))
                if len(pending) > AHEAD * max(1, self.workers):
                    yield self._wait(pending.popleft())
            while pending:
                yield self._wait(pending.popleft())
        except BrokenProcessPool as error:
            raise BrokenProcessPool(
                f"a data worker of this rank was killed or has crashed, most often for want of memory: "
                f"lower data_workers ({self.workers}), whose rows in flight are {AHEAD} each"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)

    def _pool(self) -> ThreadPoolExecutor | ProcessPoolExecutor:
        if not self.workers:
            return ThreadPoolExecutor(1, thread_name_prefix="rows")
        warm_up()
        return ProcessPoolExecutor(self.workers, get_context("forkserver"), _start, (self.builder,))

    def _begun(self, pool: ThreadPoolExecutor | ProcessPoolExecutor, request: Request | Batch) -> Callable[[], Batch]:
        """Have it made; what waits for it."""
        if isinstance(request, Batch):
            return lambda: request
        if not self.workers:
            return pool.submit(self.builder.build, request).result
        size = self.builder.size(request)
        slot = (self._free.pop() if self._free else Slot()) if size else None
        if slot:
            slot.grow(size)
        with _without_main():  # the executor starts a worker when it has none that is idle
            future = pool.submit(_build, request, slot.path if slot else "")
        side = self.builder.tile_size
        return lambda: slot.filled(future.result(), side, self._free) if slot else future.result()

    @staticmethod
    def _wait(made: Callable[[], Batch]) -> tuple[Batch, float]:
        before = time.perf_counter()
        return made(), time.perf_counter() - before


class Slot:
    """Memory for the pixels of one row at a time, which a worker writes and this process reads."""

    def __init__(self):
        self._file = os.memfd_create("stageline-row")
        self._size, self._map = 0, mmap.mmap(-1, 1)
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"  # for the worker; it stays as long as this object

    def grow(self, size: int) -> None:
        if size > self._size:
            os.ftruncate(self._file, size)
            self._size, self._map = size, mmap.mmap(self._file, size)

    def filled(self, row: Batch, side: int, free: "list[Slot]") -> Batch:
        """The row with its pixels; when the last tensor of them is gone, this slot is among the free ones."""
        shape = (row.counts.tiles, side, side, 3)
        view = memoryview(self._map)[: math.prod(shape)]
        weakref.finalize(view, free.append, self)
        return replace(row, pixels=torch.frombuffer(view, dtype=torch.uint8).view(shape))

    def __del__(self) -> None:
        os.close(self._file)


def warm_up() -> None:
    """Begin to import what workers need, in a process beside this one; done once."""
    with _without_main():
        forkserver.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """multiprocessing would have every worker import the main program: here Ray's, and with it all of Ray."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


# -- in a worker -----------------------------------------------------------------------------------------

_builder: Builder  # of this worker
_maps: dict[str, mmap.mmap] = {}  # slots by path


def _start(builder: Builder) -> None:
    global _builder
    _builder = builder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the process that trains
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    bytearray(KEPT)  # from now on glibc keeps what is freed up to this size: fresh pages take a tenth of the time
    ForkingPickler.register(Tensor, lambda tensor: (_tensor, (tensor.numpy(),)))


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "no worker"
    parent.join()
    os._exit(1)


def _build(request: Request, path: str) -> Batch:
    """The row, its pixels in the slot behind the path."""
    return replace(_builder.build(request, partial(_room, path)), pixels=None)


def _room(path: str, size: int) -> memoryview:
    if path not in _maps or len(_maps[path]) < size:
        try:
            file = os.open(path, os.O_RDWR)
        except OSError as error:  # a sandbox without /proc
            message = f"a data worker cannot open the memory of its rank: {error}"
            raise UserError(message, where="data_workers", remedy="set data_workers: 0") from error
        try:
            _maps[path] = mmap.mmap(file, os.fstat(file).st_size)
        finally:
            os.close(file)
    return memoryview(_maps[path])[:size]


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array)
