"""Local folders of attempts, which do not stay when their process is killed.

Invariant: a folder is in use as long as a process holds its lock, and the kernel lets go of the lock when that process
ends, however it ends. Whoever makes a new one removes those that nobody holds: a worker downloads its parents and a
checkpoint, and a machine that is not replaced would fill up with what its killed workers left.
"""

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

PREFIX = "stageline-at-"
NEWBORN_S = 60.0  # of a folder that may not have its lock yet


_held: dict[Path, int] = {}  # open folders, which hold the locks of this process


def make_scratch(stage: str) -> Path:
    """A fresh folder below the folder for temporary files, this process's until drop_scratch() or its end."""
    sweep(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{stage}-"))
    _held[folder] = os.open(folder, os.O_RDONLY)
    fcntl.flock(_held[folder], fcntl.LOCK_EX)
    return folder


def drop_scratch(folder: Path) -> None:
    """Remove it with all that is in it. A second call does nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder in _held:
        os.close(_held.pop(folder))


def sweep(parent: Path) -> None:
    """Remove what ended processes left."""
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            if time.time() - folder.stat().st_mtime < NEWBORN_S:
                continue
            handle = os.open(folder, os.O_RDONLY)
        except OSError:  # gone by now, or another user's
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(handle)
