"""The step `scores`: every sample that is left, by a language model on the stage's workers.

Invariants: a score that was given is never asked for again, by this attempt, a later one or another mixture: each task
leaves what it asked as one immutable segment, named by its content, in a folder of the whole storage, and reads all
that were there when the step began. A killed task loses what it had not asked to the end.

There may be as many segments as tasks: each task gets the name of a file that lists them, which lies beside the parts,
so that what is sent grows with the tasks and not with their square.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from modeling.errors import DataError
from modeling.index import INDEX
from modeling.parquet import read_table
from modeling.shards import SHARDS, SampleReader
from stages.curation import Curation, Scores
from stages.io import Folder, StageIO
from stages.prepare.chunks import FETCHES, Part
from stages.prepare.parts import VERDICTS
from stages.prepare.score_cache import SUFFIX, process_cache

log = logging.getLogger(__name__)

SCORES = pa.schema([VERDICTS.field(name) for name in ("domain", "quality", "repetition")])


@dataclass(frozen=True)
class Asked:
    """Samples of a part to be scored. rows [samples]: of its index. segments: name in `folder` of the list of those in
    `cache` when the step began."""

    part: Part
    rows: np.ndarray
    folder: Folder
    cache: Folder
    segments: str
    params: Scores


@dataclass(frozen=True)
class Answered:
    """scores: domain, quality, repetition of each row; rejected: (row, reason, detail)."""

    number: int
    rows: np.ndarray
    scores: list[tuple[str, float | None, float | None]]
    rejected: list[tuple[int, str, str]]
    calls: int
    cached: int


class ScorePart:
    """One per process: the model is loaded once, and each segment read once."""

    def __init__(self) -> None:
        self.cache = process_cache()
        self._scratch = tempfile.TemporaryDirectory(prefix="stageline-scores-")
        self._fetched: set[str] = set()

    def __call__(self, asked: Asked) -> Answered:
        from stages.prepare.scorers import Scoring
        from stages.prepare.scoring import verdict

        scratch = Path(self._scratch.name)
        self._read(asked, scratch / "known")
        samples = _texts(asked, scratch)
        segment = scratch / f"{asked.part.number:06d}{SUFFIX}"
        self.cache.write_to(segment)
        try:
            scored = Scoring(asked.params, self.cache)(samples)
        finally:  # what was answered before it failed is answered
            self.cache.close()
            if segment.exists() and segment.stat().st_size:
                asked.cache.put_file(hashlib.sha256(segment.read_bytes()).hexdigest() + SUFFIX, segment)
                segment.unlink()
        rejected = []
        for row, sample, one in zip(asked.rows.tolist(), samples, scored, strict=True):
            if rejection := verdict(one, asked.params, sample.images):
                rejected.append((row, rejection.reason, rejection.detail))
        scores = [(one.domain or "", one.quality, one.repetition) for one in scored]
        calls, cached = sum(one.calls for one in scored), sum(one.cached for one in scored)
        return Answered(asked.part.number, asked.rows, scores, rejected, calls, cached)

    def _read(self, asked: Asked, scratch: Path) -> None:
        new = [name for name in _listed(asked.folder, asked.segments) if name not in self._fetched]
        with ThreadPoolExecutor(FETCHES) as pool:
            paths = list(pool.map(lambda name: _fetch(asked.cache, name, scratch), new))
        self.cache.read([path for path in paths if path is not None])
        self._fetched.update(new)


@lru_cache(maxsize=2)
def _listed(folder: Folder, name: str) -> tuple[str, ...]:
    return tuple(json.loads(folder.get([name])[0]))


def _fetch(cache: Folder, name: str, scratch: Path) -> Path | None:
    """None where somebody has removed the segment since it was listed."""
    try:
        return cache.fetch(name, scratch)
    except Exception:
        if name in cache.names():
            raise
        log.warning("the segment %s of the scores is gone; what it held is asked again", name)
        return None


def _texts(asked: Asked, scratch: Path) -> list[Any]:
    from stages.prepare.scoring import Text

    folder = scratch / "part"
    index = read_table(asked.folder.fetch(f"{asked.part.folder}/{INDEX}", folder))
    below = {name: f"{asked.part.folder}/{SHARDS}/{name}" for name in set(index["shard"].to_pylist())}
    shards = {name: asked.folder.fetch(path, folder) for name, path in below.items()}
    samples = []
    for row in index.take(asked.rows).to_pylist():
        conversation = SampleReader(shards[row["shard"]].parent.parent).conversation(row)
        samples.append(Text(row["dataset"], conversation, bool(row["tiles"])))
    for path in folder.rglob("*"):  # those that were fetched
        if path.is_file():
            path.unlink()
    return samples


def score_parts(io: StageIO, mixture: Any, curate: Curation, pardoned: np.ndarray) -> dict[int, pa.Table]:
    """Rejects samples of the mixture (later.Mixture); returns the scores of each part, a row for every row of its
    index. Raises DataError where too many answers cannot be read, and what the scorer raises."""
    assert curate.scores is not None, "asked only where the step runs"
    cache = io.shared_folder("scores")
    segments = _list(cache, mixture.folder)
    seen = mixture.seen(curate.exempt.scores, pardoned)
    bounds = np.searchsorted(seen, mixture.starts)
    jobs, starts = [], {}
    for i, part in enumerate(mixture.parts):
        rows = seen[bounds[i] : bounds[i + 1]] - mixture.starts[i]
        starts[part.number] = (i, part)
        if len(rows):
            jobs.append(Asked(part, rows, mixture.folder, cache, segments, curate.scores))
    tables, done, calls, cached, unread = {}, 0, 0, 0, 0
    io.tick(0, len(seen), {"scored": 0})
    for answered in io.stream(ScorePart, jobs):
        i, part = starts[answered.number]
        tables[part.number] = _table(part, answered)
        rejected = answered.rejected
        numbers = np.array([row for row, _, _ in rejected], np.int64) + mixture.starts[i]
        for reason in sorted({reason for _, reason, _ in rejected}):
            chosen = [k for k, (_, its, _) in enumerate(rejected) if its == reason]
            mixture.reject(numbers[chosen], "scores", reason, [rejected[k][2] for k in chosen])
        done, calls, cached = done + len(answered.rows), calls + answered.calls, cached + answered.cached
        unread += sum(reason == "not_scored" for _, reason, _ in rejected)
        if io.tick(done, len(seen), {"scored": done, "calls": calls, "cached": cached}).stop:
            io.stopped(done)
    io.log(f"scores: {done} samples, {calls} questions asked, {cached} answers known")
    limit = io.params.max_rejected
    if unread > limit * len(seen):
        message = f"{unread} of {len(seen)} samples have no score that can be read, max_rejected is {limit:.1%}"
        remedy = "give another scorer, more max_new_tokens or fewer max_characters; `not_scored: keep` keeps them"
        raise DataError(message, where=f"stages.{io.stage}.curate.scores", remedy=remedy)
    return tables


def _list(cache: Folder, folder: Folder) -> str:
    """Writes the names of the segments that are there into `folder`; returns the name of that list."""
    data = json.dumps([name for name in cache.names() if name.endswith(SUFFIX)]).encode()
    name = f"segments-{hashlib.sha256(data).hexdigest()}.json"
    folder.create(name, data)  # an earlier attempt may have left the same
    return name


def _table(part: Part, answered: Answered) -> pa.Table:
    rows: list[tuple[str, float | None, float | None]] = [("", None, None)] * part.kept
    for row, scores in zip(answered.rows.tolist(), answered.scores, strict=True):
        rows[row] = scores
    columns: Sequence[Sequence[Any]] = list(zip(*rows, strict=True))
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, SCORES)], schema=SCORES)
