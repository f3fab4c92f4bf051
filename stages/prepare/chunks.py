"""The unit of parallel work in `prepare`: the records of one unit, read, measured and judged by one task.

Invariants: a part depends on its records and the measure alone, and parts are put together in their order, so the stage
gives the same bytes at any number of workers. A part exists once `<number>.json` does, which exactly one task creates,
naming the folder that it wrote to; so a task may be killed at any moment and done again, and a part that exists is
never done again.

A part: verdicts.parquet (a row for every record); index.parquet and shards/*.tar of those that no step has rejected
yet, a prepared folder of its own; review/index.parquet and review/shards/*.tar, likewise, of those that a step of
curation has rejected; signatures.npz where copies are looked for.
"""

import json
import os
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from modeling import files
from modeling.errors import UserError
from modeling.meta import Dataset
from modeling.shards import SHARDS
from modeling.sources import Rejected, Rejection, Sample, parse_record, rejected
from stages.io import Folder
from stages.params import ModelParams, PrepareParams
from stages.prepare.formats import Record, Unit, read

BEGUN = "begun"  # in the folder of parts: a mark for every task that began a unit and did not come to any end
LAYOUT = 2  # of a part: raise it when parts of before cannot be used any more
MOST_TILES = 2**15 - 1  # that the index can hold
# what may be mended without an edit of the sources: a mount that was gone, a download that had not ended
MAY_PASS = {"missing_image", "missing_video", "unreadable_image", "unreadable_video", "zero_size", "broken_file"}
FETCHES = 16  # at once, of media on S3


@dataclass(frozen=True)
class Chunk:
    """One unit of a dataset, and all that its part depends on. position: the dataset's place in the meta file."""

    number: int
    dataset: Dataset  # its annotations: the unit's file alone, for there may be thousands
    position: int
    unit: Unit
    told: str  # how messages name the unit's file
    place: int  # of the file among the annotations of its dataset
    model: ModelParams
    params: PrepareParams
    system: str | None
    questions: bool = False  # of an evaluation set: answers may be absent, and lengths are no matter

    @property
    def name(self) -> str:
        return f"{self.number:06d}.json"

    @property
    def mark(self) -> str:
        """What must agree for a part of an earlier attempt to be this chunk's."""
        unit = asdict(self.unit) | {"path": os.path.basename(self.unit.path)}  # folders may move
        return json.dumps([LAYOUT, self.dataset.name, self.place, unit, self.questions])

    @property
    def where(self) -> str:
        """For messages."""
        if not self.unit.records:
            return self.told
        return f"{self.told}: records {self.unit.first} to {self.unit.first + self.unit.records - 1}"


@dataclass(frozen=True)
class Work:
    """What a task gets."""

    chunk: Chunk
    folder: Folder
    review: str = ""  # name in the folder of a person's verdicts: {digest of a sample: keep | drop}

    @property
    def reviewed(self) -> dict[str, str]:
        return _read_json(self.folder, self.review) if self.review else {}


@dataclass(frozen=True)
class Part:
    """What a chunk gave. files: {name, size, sha256} by their names in the part's own folder. counts: of verdicts, by
    "step:reason", "" for kept. first: some rejected samples, in their order."""

    number: int
    dataset: str
    mark: str
    folder: str
    files: list[dict[str, Any]]
    records: int
    tokens: int
    counts: dict[str, int]
    first: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """Of its manifest, as Chunk.name."""
        return f"{self.number:06d}.json"

    @property
    def damage(self) -> dict[str, int]:
        """By reason: what is wrong with the sources themselves, not what a step of curation rejected."""
        named = ((name.partition(":"), count) for name, count in self.counts.items())
        return {reason: count for (step, _, reason), count in named if step == "structure"}

    @property
    def kept(self) -> int:
        return self.counts.get("", 0)

    @property
    def shards(self) -> list[dict[str, Any]]:
        """Files of the samples that are kept."""
        return [file for file in self.files if file["name"].startswith(f"{SHARDS}/")]


def measure_chunk(work: Work) -> Part:
    """Reads, measures and judges every record of a chunk, and leaves its part in the folder."""
    begun = f"{BEGUN}/{work.chunk.number:06d}-{uuid.uuid4().hex[:12]}"
    work.folder.create(begun, b"")
    try:
        return _measure(work)
    finally:  # stays where the process is killed, or crashes in a decoder
        work.folder.drop([begun])


def _measure(work: Work) -> Part:
    from stages.prepare.judge import Judge
    from stages.prepare.measure import build_measure
    from stages.prepare.parts import PartWriter

    chunk = work.chunk
    measure = build_measure(chunk.model, chunk.params, chunk.system)  # pyright: ignore[reportArgumentType]
    if chunk.questions:
        measure = replace(measure, max_tokens=sys.maxsize, max_tiles_per_sample=MOST_TILES, answers=False)
    judge = Judge(chunk.params.curate, chunk.dataset.name, work.reviewed)
    with tempfile.TemporaryDirectory(prefix="stageline-part-") as scratch:
        writer = PartWriter(Path(scratch), chunk.dataset, int(chunk.params.shard_megabytes * 1e6))
        for number, sample in _samples(chunk):
            try:
                writer.add(sample, f"{chunk.position:03d}-{chunk.number:06d}-{number:09d}", measure, judge)
            except (UserError, ConnectionError, MemoryError):
                raise
            except Exception as error:  # a bug of ours should at least say where
                raise RuntimeError(f"{chunk.dataset.name}: {chunk.told}:{number}: {error!r}") from error
        writer.close()
        folder = f"{chunk.number:06d}-{uuid.uuid4().hex[:12]}"
        paths = sorted(path for path in Path(scratch).rglob("*") if path.is_file())
        names = [path.relative_to(scratch).as_posix() for path in paths]
        stored = [{**work.folder.put_file(f"{folder}/{name}", path), "name": name} for name, path in zip(names, paths)]
        part = Part(
            chunk.number,
            chunk.dataset.name,
            chunk.mark,
            folder,
            stored,
            writer.records,
            writer.tokens,
            dict(writer.counts),
            writer.first,
        )
        if work.folder.create(chunk.name, json.dumps(asdict(part)).encode()):
            return part
    return read_part(work.folder.get([chunk.name])[0])  # another task was faster


@lru_cache(maxsize=2)
def _read_json(folder: Folder, name: str) -> dict[str, str]:
    """Once per process: a review of a whole mixture would be heavy in every task."""
    return json.loads(folder.get([name])[0])


def look_again(parts: Iterable[Part], folder: Folder) -> None:
    """Of a stage that fails for its sources: the next run makes the parts again whose damage may have passed."""
    folder.drop([part.name for part in parts if part.damage.keys() & MAY_PASS])


def read_part(data: bytes) -> Part:
    return Part(**json.loads(data))


def _samples(chunk: Chunk) -> Iterator[tuple[int, Sample | Rejected]]:
    records = read(chunk.unit, chunk.dataset)
    if not files.is_remote(chunk.dataset.root):
        for record in records:
            yield record[0], _sample(chunk, record)
        return
    with ThreadPoolExecutor(FETCHES) as pool:  # media on S3 take longer to come than to measure
        pending: list[Any] = []
        for record in records:
            sample = _sample(chunk, record)
            pending.append((record[0], pool.submit(_fetched, sample, chunk.dataset)))
            if len(pending) > 2 * FETCHES:
                number, future = pending.pop(0)
                yield number, future.result()
        for number, future in pending:
            yield number, future.result()


def _sample(chunk: Chunk, record: Record) -> Sample | Rejected:
    (number, data, media), dataset = record, chunk.dataset
    if isinstance(data, Rejection):
        return rejected(dataset, number, f"{dataset.name}-{number}", data, chunk.told)
    holds_media = chunk.unit.path.endswith((".parquet", ".tar"))
    return parse_record(dataset, number, data, chunk.told, media, answers=not chunk.questions, paths=not holds_media)


def _fetched(sample: Sample | Rejected, dataset: Dataset) -> Sample | Rejected:
    from stages.prepare.measure import with_contents

    return sample if isinstance(sample, Rejected) else with_contents(sample, dataset)
