"""The index of prepared data: columns one at a time, damage named whenever it is met."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeling.errors import DataError
from modeling.index import INDEX, SCHEMA, Index, Strings

DATASETS = ["b", "a", "b", "ä", "c", "a", "b"]


def write(folder, rows: int, *, row_group_size: int = 2, without: str = ""):
    columns = []
    for field in SCHEMA:
        if field.name == "dataset":
            values = DATASETS[:rows]
        elif pa.types.is_list(field.type):
            values = [[i] * i for i in range(rows)]
        elif pa.types.is_string(field.type):
            values = [f"{field.name}{i}" for i in range(rows)]
        else:
            values = [bool(i % 2) for i in range(rows)] if pa.types.is_boolean(field.type) else list(range(rows))
        columns.append(pa.array(values, field.type))
    table = pa.Table.from_arrays(columns, schema=SCHEMA)
    pq.write_table(table.drop_columns([without] if without else []), folder / INDEX, row_group_size=row_group_size)
    return folder / INDEX


@pytest.mark.parametrize("row_group_size", [1, 3, 100])  # each row group has a dictionary of its own
def test_columns_are_what_was_written(tmp_path, row_group_size):
    index = Index(write(tmp_path, 7, row_group_size=row_group_size))
    assert index.rows == 7 and list(index) == SCHEMA.names and len(index) == len(SCHEMA)
    assert index["tokens"].tolist() == list(range(7)) and index["tokens"].dtype == np.int32
    assert [item.tolist() for item in index["answers"]] == [[i] * i for i in range(7)]
    for name in ("id", "dataset", "shard"):
        column = index[name]
        expected = DATASETS if name == "dataset" else [f"{name}{i}" for i in range(7)]
        assert isinstance(column, Strings) and list(column) == expected == [column[i] for i in range(-7, 0)]
        numbers, words = column.codes()
        assert words == sorted(set(expected)) and [words[number] for number in numbers] == expected
        with pytest.raises(IndexError):
            column[7]
    with pytest.raises(KeyError):
        index["nothing"]


def test_an_empty_index(tmp_path):
    index = Index(write(tmp_path, 0))
    assert index.rows == 0 and list(index["id"]) == [] and list(index["answers"]) == []
    numbers, words = index["dataset"].codes()
    assert len(numbers) == 0 and words == []


def test_a_column_is_read_once_and_only_when_asked_for(tmp_path):
    path = write(tmp_path, 7)
    index = Index(path)
    tokens = index["tokens"]
    path.unlink()
    assert index["tokens"] is tokens
    with pytest.raises(DataError, match="no index"):
        index["tiles"]


def test_damage_inside_one_column_leaves_the_others(tmp_path):
    path = write(tmp_path, 7, row_group_size=100)
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(SCHEMA.names.index("id"))
    data = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    path.write_bytes(data)
    index = Index(path)
    assert index["tokens"].tolist() == list(range(7))
    with pytest.raises(DataError, match=r"(?s)the index is damaged: .* run the prepare stage again"):
        index["id"]


@pytest.mark.parametrize("name", ["answers", "dataset"])
def test_an_index_of_another_version(tmp_path, name):
    with pytest.raises(DataError, match=f"the index has no column {name}"):
        Index(write(tmp_path, 7, without=name))
