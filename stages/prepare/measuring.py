"""Have every unit of a mixture measured, on the cluster, and whatever an earlier attempt has measured not again."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from modeling.errors import DataError
from modeling.meta import Dataset
from stages.io import Folder, StageIO
from stages.params import PrepareParams
from stages.prepare.chunks import BEGUN, Chunk, Part, Work, measure_chunk, read_part
from stages.prepare.formats import split

REVIEW = "review.json"
MOST_BEGUN = 12  # tasks of one unit, over all attempts: Ray tries each 4 times
KNOWN_AT_ONCE = 1000  # parts of earlier attempts


def chunks_of(
    datasets: Sequence[Dataset], model: Any, params: PrepareParams, system: str | None, scratch: Path,
    questions: bool = False,
) -> Iterator[Chunk]:  # fmt: skip
    """All units of a mixture, numbered in its order. questions: of an evaluation set, which is only compared with."""
    units = (
        (position, dataset, place, unit)
        for position, dataset in enumerate(datasets)
        for place, path in enumerate(dataset.annotations)
        for unit in split(dataset, path, scratch / "annotations")
    )
    for number, (position, dataset, place, unit) in enumerate(units):
        alone = replace(dataset, annotations=(unit.path,))
        told = dataset.told(unit.path)
        yield Chunk(number, alone, position, unit, told, place, model, params, system, questions)


def measured(
    io: StageIO, chunks: Sequence[Chunk], folder: Folder, reviewed: Mapping[str, str] | None = None
) -> Iterator[Part]:
    """The parts of all chunks, in their order, once all are there: those of earlier attempts, and what is missing."""
    parts = _known(chunks, folder)
    if parts:
        io.log(f"{len(parts)} of {len(chunks)} parts were made before")
    pending = [chunk for chunk in chunks if chunk.number not in parts]
    coming = sum(chunk.unit.records for chunk in pending)
    tally = Counter(done=sum(part.records for part in parts.values()))
    for part in parts.values():
        _add(tally, part)
    review = REVIEW if reviewed else ""
    if reviewed:
        folder.create(REVIEW, json.dumps(dict(reviewed)).encode())  # the same in every attempt: it is in the identity
    for part in io.stream(measure_chunk, [Work(chunk, folder, review) for chunk in pending]):
        parts[part.number] = part
        _add(tally, part)
        tally["done"] += part.records
        known = chunks[part.number].unit.records  # 0 for an archive, whose records are known once it is read
        coming -= known
        row = {name: tally[name] for name in ("samples", "rejected", "tokens")}
        if io.tick(tally["done"], tally["done"] + coming, row).stop:
            io.log(f"stopped with {len(parts)} of {len(chunks)} parts; a new run goes on from them")
            io.stopped(tally["done"])
    yield from (parts[chunk.number] for chunk in chunks)


def _add(tally: Counter, part: Part) -> None:
    tally.update(samples=part.kept, rejected=part.records - part.kept, tokens=part.tokens)


def _known(chunks: Sequence[Chunk], folder: Folder) -> dict[int, Part]:
    there = set(folder.names())
    begun = Counter(name.removeprefix(f"{BEGUN}/")[:6] for name in there if name.startswith(f"{BEGUN}/"))
    for chunk in chunks:
        if begun[f"{chunk.number:06d}"] >= MOST_BEGUN and chunk.name not in there:
            raise DataError(
                f"{MOST_BEGUN} tasks that read this have ended without a word, most likely killed for the memory they "
                "took or by a decoder that crashed", where=f"{chunk.dataset.name}, {chunk.where}",
                remedy="take what it cannot read out of the sources, or give its workers more memory",
            )  # fmt: skip
    names = [chunk.name for chunk in chunks if chunk.name in there]
    found = {}
    for start in range(0, len(names), KNOWN_AT_ONCE):
        for data in folder.get(names[start : start + KNOWN_AT_ONCE]):
            part = read_part(data)
            if part.mark != chunks[part.number].mark:
                folder.drop([chunks[part.number].name])  # of another version of Stageline
                continue
            found[part.number] = part
    return found
