"""Files written once and large, a checkpoint's: past the page cache, where the file system can.

Copying into the cache and out of it takes 1.6 s of a core for every GB, a direct write .04 s (RESULTS.md,
2026-11-26): on a machine whose cores all train, that is the training's own time.
"""

import ctypes
import errno
import fcntl
import os
from pathlib import Path

BLOCK = 4096  # what addresses, offsets and sizes must be multiples of (open(2), O_DIRECT)
PIECE = 32 << 20
LEAST = 8 << 20  # below it the cache is the faster way


def write_file(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Creates the file. Its last bytes, and all of them where the memory is not aligned, go through the cache."""
    view = memoryview(data).cast("B")
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        done = 0
        if len(view) >= LEAST and _aligned(view):
            done = _directly(handle, view[: len(view) // BLOCK * BLOCK])
        while done < len(view):
            done += os.write(handle, view[done:])
    finally:
        os.close(handle)


def _aligned(view: memoryview) -> bool:
    return not view.readonly and ctypes.addressof(ctypes.c_char.from_buffer(view)) % BLOCK == 0


def _directly(handle: int, view: memoryview) -> int:
    """How many bytes were written; 0 on a file system that has no direct writes."""
    direct, flags, done = getattr(os, "O_DIRECT", 0), fcntl.fcntl(handle, fcntl.F_GETFL), 0
    try:
        fcntl.fcntl(handle, fcntl.F_SETFL, flags | direct)
        while done < len(view):
            done += os.write(handle, view[done : done + PIECE])
            if done % BLOCK:  # cut short, by a full disk for one: the plain way says why
                break
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    fcntl.fcntl(handle, fcntl.F_SETFL, flags)
    return done
