"""The only place that opens Parquet files.

Invariant: reading a file runs nothing of it, whoever wrote it. Ray Data, once imported, registers an Arrow extension
type whose values are pickles, and whatever makes Python objects of such a column runs what is in them. A column is
refused by the name of its type, so the same file is refused whether Ray is imported or not; the types that Arrow itself
defines are plain data.
"""

from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from modeling.errors import DataError

PLAIN = "arrow."  # how the names of Arrow's own extension types begin: JSON, UUID, 8-bit booleans, tensors
_NAME = b"ARROW:extension:name"  # of a type that this process does not know


def open_parquet(
    source: Any, where: str, columns: Collection[str] | None = None, read_dictionary: list[str] | None = None
) -> pq.ParquetFile:
    """An open file whose `columns` (None: all) may be read. source: a path, or a file that is open for reading.

    read_dictionary: columns to be held so where they are there and flat; for paths alone.
    where: what an error calls it. Raises DataError for a column of a foreign extension type, however deep it lies in
    lists and structs; and, as pyarrow does, ArrowException for what is no Parquet file and OSError for what cannot
    be read.
    """
    file = pq.ParquetFile(source)
    for field in file.schema_arrow:
        if columns is not None and field.name.partition(".")[0] not in columns:  # "a.b" is read where "a" is asked for
            continue
        foreign = next(_foreign(field.type, field.metadata), None)
        if foreign is not None:
            file.close(force=True)
            raise DataError(
                f"column {field.name[:80]!r} holds the extension type {foreign[:80]!r}, which is not read: it may be "
                "made of pickled Python objects, and those run code",
                where=where,
                remedy="write the file with plain columns",
            )
    if read_dictionary is not None:
        flat = {file.schema.column(i).path for i in range(len(file.schema))}
        file.close()
        return pq.ParquetFile(
            source, metadata=file.metadata, read_dictionary=[name for name in read_dictionary if name in flat]
        )
    return file


def read_table(path: Any) -> pa.Table:
    """A whole file. Raises as open_parquet() does."""
    with open_parquet(path, str(path)) as file:
        return file.read()


def _foreign(kind: pa.DataType, metadata: dict[bytes, bytes] | None) -> Iterator[str]:
    """The names of foreign extension types of a field and of all below it."""
    known = isinstance(kind, pa.BaseExtensionType)
    name = kind.extension_name if known else (metadata or {}).get(_NAME, b"").decode(errors="replace")
    if name and not name.startswith(PLAIN):
        yield name
    if known:
        yield from _foreign(kind.storage_type, None)
    elif isinstance(kind, pa.DictionaryType):
        yield from _foreign(kind.value_type, None)
    for i in range(kind.num_fields):
        inner = kind.field(i)
        yield from _foreign(inner.type, inner.metadata)
