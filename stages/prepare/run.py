"""`prepare`: a mixture's sources -> shards with an index, every sample kept or rejected with its reason.

Invariants: samples = kept + rejected; the result does not depend on the number of workers; nothing is handed
over unless the whole mixture was read and the rejected share is at most `max_rejected` (design.md, "Data").
The folder: index.parquet, shards/*.tar, rejected.jsonl, summary.json.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from modeling.errors import DataError
from modeling.sources import Dataset, Rejected, read_meta
from stages.io import StageIO
from stages.params import PrepareParams
from stages.prepare.chunks import Chunk, Part, measure_chunk, split_lines

PLACES_SHOWN = 5


class Tally:
    """Counts per dataset, and in all, while the parts come in."""

    def __init__(self, datasets: list[Dataset]):
        self.datasets = {
            d.name: Counter(samples=0, kept=0, rejected=0, tokens=0, supervised=0, tiles=0) for d in datasets
        }
        self.reasons = {d.name: Counter() for d in datasets}
        self.first: list[Rejected] = []

    def add(self, dataset: str, part: Part) -> None:
        counts = self.datasets[dataset]
        counts["samples"] += part.samples
        counts["kept"] += len(part.rows)
        counts["rejected"] += len(part.rejected)
        for row in part.rows:
            counts["tokens"] += row["tokens"]
            counts["supervised"] += sum(row["answers"])
            counts["tiles"] += row["tiles"]
        self.reasons[dataset].update(rejected.reason for rejected in part.rejected)
        self.first += part.rejected[: PLACES_SHOWN - len(self.first)]

    def total(self, name: str) -> int:
        return sum(counts[name] for counts in self.datasets.values())

    def all_reasons(self) -> Counter:
        return sum(self.reasons.values(), Counter())

    def summary(self, repeat: str) -> dict[str, Any]:
        totals = {name: self.total(name) for name in ("samples", "kept", "rejected", "tokens", "supervised", "tiles")}
        datasets = {
            name: {**counts, "reasons": dict(sorted(self.reasons[name].items()))}
            for name, counts in self.datasets.items()
        }
        return {**totals, "reasons": dict(sorted(self.all_reasons().items())), "repeat": repeat, "datasets": datasets}


def prepare(io: StageIO) -> None:
    """Runs the stage. Raises DataError: no sources, no sample kept, or too many rejected."""
    from modeling.shards import ShardWriter

    params: PrepareParams = io.params
    source = io.sources[params.data]
    datasets = read_meta(source.meta)
    folder, parts = io.scratch / "result", io.scratch / "parts"
    parts.mkdir(parents=True)
    chunks = list(_chunks(datasets, parts, io.model, params, source.system))
    lines = sum(chunk.lines for chunk in chunks)
    tally, done = Tally(datasets), 0
    with (
        ShardWriter(folder, int(params.shard_megabytes * 1e6)) as writer,
        open(folder / "rejected.jsonl", "w", encoding="utf-8") as rejected,
    ):
        for chunk, part in zip(chunks, io.map(measure_chunk, chunks), strict=True):
            _store(part, writer)
            for one in part.rejected:
                rejected.write(json.dumps(asdict(one), ensure_ascii=False) + "\n")
            tally.add(chunk.dataset.name, part)
            done += part.lines
            row = {"samples": tally.total("kept"), "rejected": tally.total("rejected"), "tokens": tally.total("tokens")}
            if io.tick(done, lines, row).stop:
                io.log(f"stopped after {done} of {lines} lines; a new run starts from the first")
                io.stopped(done)
    samples, kept = tally.total("samples"), tally.total("kept")
    assert samples == kept + tally.total("rejected") and kept == writer.rows, (samples, kept, writer.rows)
    io.keep("rejected.jsonl", folder / "rejected.jsonl")
    _check(tally, io.stage, source.meta, params.max_rejected)

    for dataset in datasets:
        found = tally.datasets[dataset.name]["samples"]
        if dataset.length is not None and dataset.length != found:
            io.log(f"{dataset.name}: the meta file says length {dataset.length}, {dataset.file} has {found} samples")
    summary = tally.summary(params.repeat)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    io.log(
        f"{kept} samples, {summary['tokens']} tokens ({summary['supervised']} supervised), {summary['tiles']} tiles, "
        f"{writer.shards} shards; {_rejections(tally)}"
    )
    io.complete(folder, summary)


def _chunks(
    datasets: list[Dataset], parts: Path, model: Any, params: PrepareParams, system: str | None
) -> Iterator[Chunk]:
    number = 0
    for position, dataset in enumerate(datasets):
        for offset, size, first, lines in split_lines(dataset.annotation):
            part = parts / f"{number:08d}"
            yield Chunk(number, dataset, position, offset, size, first, lines, part, model, params, system)
            number += 1


def _store(part: Part, writer: Any) -> None:
    """Moves a part's samples to the shards, in order."""
    with open(part.path, "rb") as file:
        for row in part.rows:
            offset, size = row.pop("blob")
            file.seek(offset)
            writer.add(file.read(size), row)
    part.path.unlink()


def _rejections(tally: Tally) -> str:
    reasons = ", ".join(f"{reason} {count}" for reason, count in tally.all_reasons().most_common())
    return f"{tally.total('rejected')} rejected" + (f" ({reasons})" if reasons else "")


def _check(tally: Tally, stage: str, meta: str, max_rejected: float) -> None:
    samples, kept, rejected = (tally.total(name) for name in ("samples", "kept", "rejected"))
    where = f"stages.{stage}: {meta}"
    if not samples:
        raise DataError("the annotations hold no sample", where=where, remedy="write one JSON object per line")
    if kept and rejected / samples <= max_rejected:
        return
    places = "; ".join(f"{one.file}:{one.line} {one.reason} ({one.detail})" for one in tally.first)
    more = f"; and {rejected - len(tally.first)} more" if rejected > len(tally.first) else ""
    share = f"{rejected / samples:.1%} of {samples} samples, max_rejected is {max_rejected:.1%}"
    message = f"{_rejections(tally)}, {share}: {places}{more}"
    remedy = f"correct the samples (all are listed in rejected.jsonl beside the stage) or raise stages.{stage}."
    raise DataError(message, where=where, remedy=remedy + "max_rejected" if kept else "correct the samples")
