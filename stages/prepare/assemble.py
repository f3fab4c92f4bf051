"""From parts to the result: the index of what is kept, its shards, and the verdict on every record.

Invariants: parts are put together in the order of the sources; a part's shards are given their names within the store,
no sample's bytes pass the driver; what the driver holds is one part's rows and the rows of a row group. The bytes of a
sample that a later step rejects (a duplicate, a low score) stay in its shard: the index alone says what is in the
mixture.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from modeling.index import INDEX, SCHEMA
from modeling.parquet import read_table
from modeling.shards import ROW_GROUP, SHARDS
from stages.io import Folder
from stages.prepare.chunks import Part
from stages.prepare.parts import VERDICTS

COPIES = 16  # at once


@dataclass(frozen=True)
class Late:
    """What a step that looks at all samples rejected of one part. rows: of its index."""

    rows: list[int]
    step: list[str]
    reason: list[str]
    detail: list[str]


class Rows:
    """A Parquet file written in row groups of one size."""

    def __init__(self, path: Path, schema: pa.Schema):
        self.schema, self._tables, self._pending = schema, [], 0
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")

    def add(self, table: pa.Table) -> None:
        self._tables.append(table.select(self.schema.names).cast(self.schema))
        self._pending += len(table)
        if self._pending >= ROW_GROUP:
            whole = pa.concat_tables(self._tables).combine_chunks()
            for start in range(0, self._pending - ROW_GROUP + 1, ROW_GROUP):
                self._writer.write_table(whole.slice(start, ROW_GROUP), row_group_size=ROW_GROUP)
            rest = self._pending % ROW_GROUP
            self._tables, self._pending = [whole.slice(self._pending - rest)], rest

    def close(self) -> None:
        if self._pending:
            self._writer.write_table(pa.concat_tables(self._tables), row_group_size=ROW_GROUP)
        self._writer.close()


def verdicts_of(part: Part, parts: Folder, scratch: Path, late: Late | None, scores: pa.Table | None) -> pa.Table:
    """The verdict on every record of a part, later steps included."""
    table = table_of(part, "verdicts.parquet", parts, scratch)
    kept = np.flatnonzero(table["verdict"].to_numpy() == "kept")
    if scores is not None:
        for name in ("domain", "quality", "repetition"):
            values = table[name].to_pylist()
            for row, value in zip(kept, scores[name].to_pylist(), strict=True):
                values[row] = value
            table = table.set_column(VERDICTS.get_field_index(name), name, pa.array(values, VERDICTS.field(name).type))
    if late is not None:
        places = kept[late.rows]
        found = {"verdict": ["rejected"] * len(places), "step": late.step, "reason": late.reason, "detail": late.detail}
        for name, new in found.items():
            values = table[name].to_pylist()
            for row, value in zip(places, new, strict=True):
                values[row] = value
            table = table.set_column(VERDICTS.get_field_index(name), name, pa.array(values, pa.string()))
    return table


def write_index(parts: Sequence[Part], folder: Folder, scratch: Path, out: Path, late: dict[int, Late]) -> set[str]:
    """index.parquet of what is kept; returns the shards that it names."""
    rows, named = Rows(out / INDEX, SCHEMA), set()
    for part in parts:
        table = table_of(part, INDEX, folder, scratch)
        if part.number in late:
            keep = np.ones(len(table), bool)
            keep[late[part.number].rows] = False
            table = table.filter(pa.array(keep))
        shards = [f"{part.number:06d}-{name}" for name in table["shard"].to_pylist()]
        named |= set(shards)
        rows.add(table.set_column(SCHEMA.get_field_index("shard"), "shard", pa.array(shards, pa.string())))
    rows.close()
    return named


def copy_shards(parts: Sequence[Part], folder: Folder, result: Folder, named: set[str]) -> Iterator[dict[str, Any]]:
    """{name, size, sha256} of every shard that the index names, once it lies in the result."""

    def copy(job: tuple[str, str, dict[str, Any]]) -> dict[str, Any]:
        source, name, file = job
        folder.copy_to(result, source, name)
        return {"name": name, "size": file["size"], "sha256": file["sha256"]}

    jobs = []
    for part in parts:
        for file in part.shards:
            name = f"{part.number:06d}-{file['name'].removeprefix(SHARDS + '/')}"
            if name in named:
                jobs.append((f"{part.folder}/{file['name']}", f"{SHARDS}/{name}", file))
    with ThreadPoolExecutor(COPIES) as pool:
        yield from pool.map(copy, jobs)


def write_rejected(path: Path, tables: Iterator[pa.Table]) -> None:
    """rejected.jsonl: a line for every record that is not kept."""
    names = ("dataset", "file", "line", "id", "step", "reason", "detail")
    with open(path, "w", encoding="utf-8") as file:
        for table in tables:
            for row in table.filter(pc.field("verdict") == "rejected").select(names).to_pylist():
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def table_of(part: Part, name: str, folder: Folder, scratch: Path) -> pa.Table:
    """A Parquet file of a part."""
    path = folder.fetch(f"{part.folder}/{name}", scratch)
    table = read_table(path)
    if path.is_relative_to(scratch):
        path.unlink()
    return table
