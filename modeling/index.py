"""The Parquet index of prepared data: one row per sample, read one column at a time.

Invariant: a column is read when it is first asked for, and held flat (numpy or Arrow, no Python object per sample):
a plan needs 5 of the 25 columns, 20 bytes a sample, a training rank 16, 180. Damage is a DataError that names the
file, when it is read.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from modeling.errors import DataError
from modeling.parquet import open_parquet
from modeling.ragged import Ragged

INDEX = "index.parquet"

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),  # the line's `task`, else its dataset
        ("dataset", pa.string()),
        ("key", pa.string()),  # name of the members in the tar; unique
        ("shard", pa.string()),
        ("json_offset", pa.int64()),  # bytes of the member's content in the shard
        ("json_size", pa.int64()),
        ("image_offsets", pa.list_(pa.int64())),
        ("image_sizes", pa.list_(pa.int64())),
        ("json_crc32", pa.uint32()),
        ("image_crc32s", pa.list_(pa.uint32())),
        ("tokens", pa.int32()),  # length of input_ids, image tokens included; of a video with as many frames as may be
        ("answers", pa.list_(pa.int32())),  # supervised tokens of each response
        ("tiles", pa.int16()),  # of the whole sample, thumbnails included; 0 for text; of a video one a frame
        ("tiles_per_image", pa.list_(pa.int16())),
        ("widths", pa.list_(pa.int32())),  # pixels of each image
        ("heights", pa.list_(pa.int32())),
        ("frames", pa.int32()),  # that a video has to show, within its clip; 0: no video
        ("min_frames", pa.int16()),  # the fewest that are shown; 0: no video
        ("frame_tokens", pa.list_(pa.int32())),  # `tokens` with min_frames, min_frames + 1, ... of them; [] : no video
        ("max_tiles", pa.int16()),  # the dataset's limit; for each of n images it is max(1, max_tiles // n)
        ("augment", pa.bool_()),
        ("repeat", pa.float64()),
        ("file", pa.string()),
        ("line", pa.int64()),
    ]
)
FEW = ["task", "dataset", "shard", "file"]  # columns of few different strings: held as numbers of a dictionary


class Strings(Sequence[str]):
    """A string column as Arrow holds it."""

    def __init__(self, column: pa.ChunkedArray):
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, i: Any) -> Any:
        return self._column[range(len(self))[i]].as_py()

    def __iter__(self) -> Iterator[str]:
        for chunk in self._column.iterchunks():
            yield from chunk.to_pylist()

    def codes(self) -> tuple[np.ndarray, list[str]]:
        """(numbers [n], the different strings, sorted): the column is strings[numbers]."""
        encoded = self._column.dictionary_encode().unify_dictionaries()
        if not len(encoded):
            return np.zeros(0, np.int64), []
        words = encoded.chunk(0).dictionary.to_pylist()
        rank = np.empty(len(words), np.int64)
        rank[sorted(range(len(words)), key=words.__getitem__)] = np.arange(len(words))
        return np.concatenate([rank[chunk.indices.to_numpy()] for chunk in encoded.iterchunks()]), sorted(words)


class Index(Mapping[str, Any]):
    """`index[column]`: numpy array, Strings or Ragged. DataError if the file is absent, damaged or of another layout.

    No file stays open: use it from any number of threads or processes.
    """

    def __init__(self, path: Path):
        self.path = path
        self._columns: dict[str, Any] = {}
        with self._opened() as file:
            missing = [name for name in SCHEMA.names if name not in file.schema_arrow.names]
            self.rows: int = file.metadata.num_rows
        if missing:
            remedy = "it was written by another version: run the prepare stage again"
            raise DataError(f"the index has no column {', '.join(missing)}", where=str(path), remedy=remedy)

    def __getitem__(self, name: str) -> Any:
        if name not in self._columns:
            kind = SCHEMA.field(name).type
            with self._opened() as file:
                self._columns[name] = _column(file.read(columns=[name])[name], kind)
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(SCHEMA.names)

    def __len__(self) -> int:
        return len(SCHEMA)

    @contextmanager
    def _opened(self) -> Iterator[pq.ParquetFile]:
        remedy = "run the prepare stage again"
        try:
            with open_parquet(self.path, str(self.path), read_dictionary=FEW) as file:
                yield file
        except FileNotFoundError:
            raise DataError("no index", where=str(self.path), remedy=remedy) from None
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"the index is damaged: {error}", where=str(self.path), remedy=remedy) from None


def _column(column: pa.ChunkedArray, kind: pa.DataType) -> Any:
    if pa.types.is_string(kind):
        return Strings(column)
    array = column.cast(kind).combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # a column without rows or with several chunks
        array = pa.concat_arrays(array.chunks) if array.chunks else pa.array([], kind)
    if pa.types.is_list(kind):
        return Ragged(array.values.to_numpy(zero_copy_only=False), array.offsets.to_numpy())
    return array.to_numpy(zero_copy_only=False)
