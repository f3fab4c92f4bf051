"""Parquet files of anybody: reading one runs nothing of it, through whichever reader."""

import os
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeling.errors import DataError
from modeling.index import INDEX, SCHEMA, Index
from modeling.parquet import open_parquet, read_table
from stages.evaluate import mmmu
from stages.prepare import assemble, counts, formats, run, score_parts, show
from stages.prepare.parts import VERDICTS

PICKLED = {b"ARROW:extension:name": b"ray.data.arrow_pickled_object", b"ARROW:extension:metadata": b""}
PLACES = ("plain", "in a struct", "in a list", "in a list of structs", "in a map")


class Attack:
    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Ray's extension types, as any process has them that uses Ray Train."""
    import ray.data  # noqa: F401


def evil(name: str, place: str, marker: Path) -> tuple[pa.Field, pa.Array]:
    """A column of one row whose value is a pickle that makes the folder `marker`, as plain pyarrow writes it."""
    field = pa.field("it", pa.large_binary(), metadata=PICKLED)
    array: Any = pa.array([pickle.dumps(Attack(marker))], pa.large_binary())
    if place == "plain":
        return field.with_name(name), array
    if place == "in a struct":
        array = pa.StructArray.from_arrays([array], fields=[field])
        return pa.field(name, pa.struct([field])), array
    if place == "in a map":
        array = pa.MapArray.from_arrays([0, 1], pa.array(["key"]), array)
        kind = pa.map_(pa.string(), field.with_name("value"))
        return pa.field(name, kind), array.cast(kind)
    if place == "in a list of structs":
        array = pa.StructArray.from_arrays([array], fields=[field])
        field = pa.field("item", pa.struct([field]))
    array = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), array, type=pa.list_(field))
    return pa.field(name, pa.list_(field)), array


def write(path: Path, schema: pa.Schema, name: str, place: str = "plain") -> Path:
    """One row of nulls, but in the column `name`."""
    found = {one.name: (one, pa.nulls(1, one.type)) for one in schema}
    found[name] = evil(name, place, path.with_name("ran"))
    path.parent.mkdir(exist_ok=True)
    table = pa.Table.from_arrays([a for _, a in found.values()], schema=pa.schema([f for f, _ in found.values()]))
    pq.write_table(table, path)
    return path


def parts(path: Path) -> Any:
    """The file as that of a part, in a folder of storage."""
    part = SimpleNamespace(folder="part", number=0)
    return part, SimpleNamespace(fetch=lambda name, folder: path)


def table_of(path: Path) -> Any:
    part, folder = parts(path)
    return assemble.table_of(part, "x", folder, path.parent)


def scored(path: Path) -> Any:
    part, folder = parts(path)
    asked: Any = SimpleNamespace(part=part, folder=folder, rows=np.array([0]))
    return score_parts._texts(asked, path.parent / "scratch")


def shown(path: Path) -> Any:
    show._flagged(path)


def read_units(path: Path) -> Any:
    dataset: Any = SimpleNamespace(endpoint=None)
    return list(formats.read(formats.Unit(str(path), records=1, size=1), dataset))


def split_units(path: Path) -> Any:
    dataset: Any = SimpleNamespace(endpoint=None)
    return list(formats.split(dataset, str(path), path.parent))


RECORD = pa.schema([("id", pa.string()), ("conversations", pa.string()), ("image", pa.string())])
READERS = {
    "split": (RECORD, "conversations", split_units),
    "read": (RECORD, "conversations", read_units),
    "read, another name": (RECORD, "image.evil", read_units),  # which Arrow gives to whoever asks for "image"
    "mmmu": (RECORD, "image", lambda path: list(mmmu._rows(str(path), None))),
    "index": (SCHEMA, "key", lambda path: list(Index(path)["key"])),
    "index, few": (SCHEMA, "dataset", lambda path: Index(path)["dataset"].codes()),
    "table_of": (VERDICTS, "detail", table_of),
    "texts to score": (SCHEMA, "shard", scored),
    "counts": (VERDICTS, "dataset", counts.count_verdicts),
    "batches": (VERDICTS, "dataset", lambda path: [table.to_pylist() for table in run._batches(path)]),
    "flagged": (VERDICTS, "reason", shown),
    "damaged": (VERDICTS, "reason", lambda path: list(show._damaged(path))),
    "a table": (RECORD, "id", lambda path: read_table(path).to_pylist()),
}


def test_the_attack_is_one(tmp_path):
    for place in PLACES:
        path = write(tmp_path / place / "file.parquet", RECORD, "id", place)
        pq.read_table(path).to_pylist()
        assert path.with_name("ran").exists(), place


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("reader", READERS)
def test_nothing_runs_whoever_reads_it(reader, place, tmp_path):
    schema, name, read = READERS[reader]
    path = write(tmp_path / "folder" / INDEX, schema, name, place)
    told = f"{path}: column '{name}' holds the extension type 'ray.data.arrow_pickled_object', which is not read"
    with pytest.raises(DataError, match=f"^{re.escape(told)}.* → write the file with plain columns$"):
        read(path)
    assert not path.with_name("ran").exists()


def test_a_type_that_this_process_does_not_know_is_refused_alike(tmp_path):
    field = pa.field("id", pa.binary(), metadata={b"ARROW:extension:name": b"some.library.type"})
    pq.write_table(pa.Table.from_arrays([pa.array([b"x"])], schema=pa.schema([field])), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"'some\.library\.type'"):
        open_parquet(tmp_path / "a.parquet", "a")


def test_tensors_of_ray_are_refused(tmp_path):
    from ray.data.extensions import ArrowTensorArray

    pq.write_table(pa.table({"id": ArrowTensorArray.from_numpy(np.zeros((1, 2, 2)))}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"'ray\.data\.arrow_tensor"):
        open_parquet(tmp_path / "a.parquet", "a")


def test_a_column_that_nobody_asks_for_is_none_of_its_business(tmp_path):
    path = write(tmp_path / "a.parquet", RECORD, "elsewhere")
    file = open_parquet(path, "a", columns=["id", "image"])
    assert [batch.to_pylist() for batch in file.iter_batches(columns=["id", "image"])] == [
        [{"id": None, "image": None}]
    ]
    assert split_units(path) and read_units(path) == [(1, {}, [])] and not (tmp_path / "ran").exists()


def test_what_is_plain_is_read(tmp_path):
    """Arrow's own types, and the files of Hugging Face's datasets: structs, and a description of their features."""
    pictures = pa.array([{"bytes": b"png", "path": None}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    numbers = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16], pa.binary(16)))
    features = b'{"info": {"features": {"image": {"_type": "Image"}}}}'
    table = pa.table({"image": pictures, "uuid": numbers, "tag": pa.array(["a"]).dictionary_encode()})
    pq.write_table(table.replace_schema_metadata({b"huggingface": features}), tmp_path / "a.parquet")
    row = read_table(tmp_path / "a.parquet").to_pylist()[0]
    assert row["image"] == {"bytes": b"png", "path": None} and row["tag"] == "a" and row["uuid"].bytes == b"0" * 16


def test_all_files_are_opened_here():
    root = Path(__file__).parents[2]
    code = [path for name in ("modeling", "stages", "orchestrator", "cluster") for path in (root / name).rglob("*.py")]
    opening = re.compile(r"ParquetFile\(|pq\.read_|pyarrow\.(feather|ipc|dataset|orc)\b|pd\.read_parquet")
    assert [path.name for path in code if opening.search(path.read_text())] == ["parquet.py"]
