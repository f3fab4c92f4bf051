"""The unit of parallel work in `prepare`: a run of annotation lines, measured by one task.

Invariant: a chunk's result depends on its lines and the measure alone, and chunks are put together in their
order, so the stage gives the same bytes at any number of workers. A task writes its samples to one part file
(temporary name, then rename), so running it again after a lost worker is harmless.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling.sources import Dataset, Rejected, Rejection, parse_line
from stages.params import ModelParams, PrepareParams

LINES = 256


@dataclass(frozen=True)
class Chunk:
    """`lines` lines (blank ones included) of a dataset's annotation: bytes [offset, offset + size)."""

    number: int
    dataset: Dataset
    position: int  # the dataset's place in the meta file
    offset: int
    size: int
    first_line: int
    lines: int
    part: Path
    model: ModelParams
    params: PrepareParams
    system: str | None


@dataclass
class Part:
    """What a chunk gave. rows: index rows, each with `blob` = (offset, size) of its members in the file `path`."""

    path: Path
    lines: int
    samples: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


def split_lines(path: Path, lines: int = LINES) -> Iterator[tuple[int, int, int, int]]:
    """(offset, size, first line, number of lines) of every run of at most `lines` lines. Lines count from 1."""
    offset = size = count = 0
    first = 1
    with open(path, "rb") as file:
        for raw in file:
            size += len(raw)
            count += 1
            if count == lines:
                yield offset, size, first, count
                offset, first, size, count = offset + size, first + count, 0, 0
    if count:
        yield offset, size, first, count


def measure_chunk(chunk: Chunk) -> Part:
    """Measures every sample of a chunk; the samples' bytes go to the chunk's part file."""
    from stages.prepare.measure import build_measure, measure_sample

    measure = build_measure(chunk.model, chunk.params, chunk.system)  # pyright: ignore[reportArgumentType]
    with open(chunk.dataset.annotation, "rb") as file:
        file.seek(chunk.offset)
        lines = file.read(chunk.size).split(b"\n")
    part = Part(chunk.part, chunk.lines)
    temporary = chunk.part.with_name(f".{chunk.part.name}.{os.getpid()}")
    with open(temporary, "wb") as out:
        for number, raw in enumerate(lines, chunk.first_line):
            if not raw.strip():
                continue
            part.samples += 1
            sample = parse_line(chunk.dataset, number, raw)
            if isinstance(sample, Rejected):
                part.rejected.append(sample)
                continue
            try:
                blob, row = measure_sample(sample, chunk.dataset, measure, f"{chunk.position:03d}-{number:09d}")
            except Rejection as rejection:
                part.rejected.append(Rejected.of(sample, rejection))
                continue
            part.rows.append(row | {"blob": (out.tell(), len(blob))})
            out.write(blob)
    os.replace(temporary, chunk.part)
    return part
