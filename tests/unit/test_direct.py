"""Large files past the page cache: the same bytes, whatever the file system and the memory allow."""

import errno
import fcntl
import mmap
import os
import random

import pytest

from orchestrator import direct
from orchestrator.direct import BLOCK, LEAST, write_file


@pytest.fixture
def memory():
    """make(size) -> page-aligned memory of random bytes."""
    return lambda size: memoryview(mmap.mmap(-1, size)).cast("B")


def filled(view: memoryview) -> memoryview:
    view[:] = random.Random(len(view)).randbytes(len(view))
    return view


@pytest.mark.parametrize("size", [0, 1, BLOCK, LEAST - 1, LEAST, LEAST + 1, LEAST + BLOCK, 2 * LEAST + 12345])
@pytest.mark.parametrize("offset", [0, 1, 64, BLOCK])
def test_every_size_and_address(size, offset, memory, tmp_path, monkeypatch):
    monkeypatch.setattr(direct, "PIECE", LEAST // 2)
    view = filled(memory(offset + size + 1))[offset : offset + size]
    write_file(tmp_path / "file", view)
    assert (tmp_path / "file").read_bytes() == view


def test_what_cannot_be_written_to_is_written_too(tmp_path):
    write_file(tmp_path / "file", bytes(LEAST))
    assert (tmp_path / "file").read_bytes() == bytes(LEAST)


def failing(monkeypatch, code: int, after: int) -> None:
    """os.write as of a file system whose direct writes fail after some."""
    real, left = os.write, [after]

    def write(handle, data):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT:
            if not left[0]:
                raise OSError(code, os.strerror(code))
            left[0] -= 1
        return real(handle, data)

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(direct, "PIECE", BLOCK)


@pytest.mark.parametrize("after", [0, 3])
def test_a_file_system_without_direct_writes(after, memory, tmp_path, monkeypatch):
    failing(monkeypatch, errno.EINVAL, after)
    view = filled(memory(LEAST + 5))
    write_file(tmp_path / "file", view)
    assert (tmp_path / "file").read_bytes() == view


def test_a_full_disk_is_said(memory, tmp_path, monkeypatch):
    failing(monkeypatch, errno.ENOSPC, 3)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "file", filled(memory(LEAST)))
