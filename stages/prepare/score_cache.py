"""Scores that were paid for once: no sample is scored twice, whoever asks.

A segment is a file of JSON lines {"key", "value"}; the key is the SHA-256 of all that an answer depends on (scoring).
Invariants. Every score is a whole line, written to one segment by one process and handed to the system at once, so a
killed process loses no score that it had; a torn line, or one with a value that no answer can have, is left out and its
question asked again. Segments only grow, and no process writes to another's, so any number of them may work on any file
system, shared ones too. That is why it is not SQLite: its write-ahead log needs shared memory, which a network file
system does not have, and an object store has neither.

On an object store: when a chunk is done its segment is put under the SHA-256 of its bytes, create-only. The scores that
a run may use are all segments in that place, of whatever mixture; a worker fetches those that its disk lacks. Segments
are never merged or removed: whoever reads them then needs no agreement with anybody, they are fetched side by side,
once a process, and a run that asks nothing new leaves none.

Memory: a process holds what it has read. A million scores: 106 MB, 3.5 s to read, a file of 90 MB (Python 3.11, one of
2 x86-64 cores); so the repetition scores of 16.3 million samples, as in the paper's fine-tuning mixture, are 1.7 GB.
Scoring waits for accelerators or an endpoint: one process per GPU, or one per node, is enough.
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from stages.prepare.scoring import DOMAINS, Value

log = logging.getLogger(__name__)

SUFFIX = ".jsonl"


class SegmentCache:
    """A ScoreCache over segments: `read` those that are there, `write_to` a new one. For one thread."""

    def __init__(self) -> None:
        self._known: dict[bytes, Value] = {}
        self._read: set[Path] = set()
        self._out: BinaryIO | None = None

    def read(self, segments: Iterable[Path]) -> None:
        """Each once: a segment that was read is taken to be complete."""
        for segment in segments:
            if segment not in self._read:
                self._load(segment)
                self._read.add(segment)

    def write_to(self, segment: Path) -> None:
        """From now on new scores go to `segment`. One of an attempt that was killed is read, and grows."""
        self.close()
        torn = False
        if segment.exists():
            self._load(segment)
            with open(segment, "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                torn = file.read(1) not in (b"\n", b"")
        self._read.add(segment)
        self._out = open(segment, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)
        if torn:
            self._out.write(b"\n")

    def close(self) -> None:
        if self._out is not None:
            self._out.close()
        self._out = None

    def get_many(self, keys: Sequence[str]) -> dict[str, Value]:
        found = ((key, self._known.get(_short(key))) for key in keys)
        return {key: value for key, value in found if value is not None}

    def put_many(self, values: Mapping[str, Value]) -> None:
        assert self._out is not None, "write_to comes first"
        if not values:
            return
        lines = (json.dumps({"key": key, "value": value}, ensure_ascii=False) + "\n" for key, value in values.items())
        self._out.write("".join(lines).encode())
        self._known.update((_short(key), value) for key, value in values.items())

    def _load(self, segment: Path) -> None:
        shared: dict[Value, Value] = {}  # there are few different values: one object each
        unreadable = 0
        with open(segment, "rb") as file:
            for line in file:
                if line.strip():
                    try:
                        key, value = _entry(line)
                    except (ValueError, RecursionError):
                        unreadable += 1
                    else:
                        self._known[key] = shared.setdefault(value, value)
        if unreadable:
            log.warning("%s: %d lines cannot be read; what they held is asked again", segment, unreadable)


@lru_cache(maxsize=1)
def process_cache() -> SegmentCache:
    """The one of this process, which keeps what it has read from task to task."""
    return SegmentCache()


def _short(key: str) -> bytes:
    """128 of the key's 256 bits: enough to tell any number of questions apart, in half the memory."""
    return bytes.fromhex(key[:32])


def _entry(line: bytes) -> tuple[bytes, Value]:
    """Raises ValueError for anything that `put_many` does not write."""
    entry: Any = json.loads(line)
    if not isinstance(entry, dict) or entry.keys() != {"key", "value"}:
        raise ValueError("not an entry")
    key, value = entry["key"], entry["value"]
    if not isinstance(key, str) or len(key) != 64:
        raise ValueError("not a key")
    if (isinstance(value, float) and 0 <= value <= 10) or value in DOMAINS:
        return _short(key), value
    raise ValueError("not a value")
