"""Prepared data on disk: WebDataset tars plus one Parquet index, and the reader that decodes late.

Invariants: a sample's members (`<key>.json`, `<key>.0.jpg`, …) lie together in one shard, so one ranged read
gets it; image and video bytes are the source's own, never re-encoded; the same samples give the same bytes (times,
owners and order are fixed). Planning needs the index alone. Read damage is a DataError that names shard and id: every
member has its CRC-32 in the index. Nothing here unpickles. Layout: design.md "Data: plan on lengths, decode late".
"""

import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from modeling.errors import DataError
from modeling.images import ImageError, decode_rgb
from modeling.index import INDEX, SCHEMA, Index
from modeling.tiles import frame_indices, split_image
from modeling.video import VideoError, read_frames

SHARDS = "shards"
ROW_GROUP = 16384
END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)

NO_VIDEO = {"frames": 0, "min_frames": 0, "frame_tokens": []}

Row = dict[str, Any]  # one row of the index, as Python values


def pack_sample(key: str, record: dict[str, Any], images: Sequence[tuple[str, bytes]]) -> tuple[bytes, dict[str, Any]]:
    """Tar members of one sample as bytes, and the offsets of their contents relative to the first byte.

    record: what the json member holds. images: (extension, bytes) of each; of a video its file, or its frames where
    it is a folder of them. record["video"]: {"kind": "file", "first": frames before the clip}, or {"kind": "frames"}.
    Returns (blob, {json_offset, json_size, json_crc32, image_offsets, image_sizes, image_crc32s}).
    """
    text = json.dumps(record, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()
    members = [("json", text)] + [(f"{i}.{extension}", data) for i, (extension, data) in enumerate(images)]
    parts, offsets, crcs, position = [], [], [], 0
    for suffix, data in members:
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = len(data)
        header = info.tobuf(tarfile.USTAR_FORMAT)
        padding = -len(data) % tarfile.BLOCKSIZE
        offsets.append(position + len(header))
        parts += [header, data, bytes(padding)]
        crcs.append(zlib.crc32(data))
        position += len(header) + len(data) + padding
    row = {
        "json_offset": offsets[0],
        "json_size": len(text),
        "image_offsets": offsets[1:],
        "image_sizes": [len(data) for _, data in images],
        "json_crc32": crcs[0],
        "image_crc32s": crcs[1:],
    }
    return b"".join(parts), row


class ShardWriter:
    """Appends packed samples to shards of about `shard_bytes` and rows to the index, in the order given.

    A shard is cut between samples where the next one would pass `shard_bytes`. Use as a context manager;
    the folder is complete only after a normal exit.
    """

    def __init__(self, folder: Path, shard_bytes: int):
        self.folder, self.shard_bytes = folder, shard_bytes
        (folder / SHARDS).mkdir(parents=True)
        self.shards = 0
        self.rows = 0
        self._tar = None
        self._size = 0
        self._pending: list[dict[str, Any]] = []
        self._index = pq.ParquetWriter(folder / INDEX, SCHEMA, compression="zstd")

    def add(self, blob: bytes, row: dict[str, Any]) -> None:
        """blob and its relative offsets as made by pack_sample; row: the other columns (NO_VIDEO's if need be)."""
        if self._tar is None or self._size + len(blob) > self.shard_bytes:
            self._close_tar()
            self._tar = open(self.folder / SHARDS / self._name(self.shards), "xb")  # noqa: SIM115
            self.shards += 1
            self._size = 0
        start = self._size
        self._tar.write(blob)
        self._size += len(blob)
        self._pending.append(
            NO_VIDEO
            | row
            | {
                "shard": self._name(self.shards - 1),
                "json_offset": start + row["json_offset"],
                "image_offsets": [start + offset for offset in row["image_offsets"]],
            }
        )
        self.rows += 1
        if len(self._pending) == ROW_GROUP:
            self._flush()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self._close_tar()
        if failure is None:
            self._flush()
        self._index.close()

    @staticmethod
    def _name(number: int) -> str:
        return f"{number:06d}.tar"

    def _flush(self) -> None:
        if self._pending:
            self._index.write_table(pa.Table.from_pylist(self._pending, schema=SCHEMA), row_group_size=ROW_GROUP)
            self._pending.clear()

    def _close_tar(self) -> None:
        if self._tar is not None:
            self._tar.write(END_OF_TAR)
            self._tar.close()
            self._tar = None


class SampleReader:
    """Samples of a prepared folder, by their row of the index (`ShardReader.row`): holds nothing but the folder.

    Reading opens no file for longer than the call: use it from any number of threads or processes.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)

    def sample(self, row: Row, frame_size: int | None = None) -> tuple[list[dict[str, str]], list[Image.Image]]:
        """The conversation ([{from, value}]) and the RGB images. DataError where the shard is damaged.

        Of a video the middle frames of equal intervals, as many as it may at most be trained with. frame_size: they as
        tiles of so many pixels a side, which is what a model sees of them; in full, 32 frames of 4K are 1.1 GB.
        """
        if row.get("frames"):
            return self.video(row, frame_indices(row["tiles"], row["frames"]), frame_size)
        record, pictures = self.read(row)
        try:
            return record["conversations"], [decode_rgb(data) for data in pictures]
        except ImageError as error:
            raise self._damaged(row, f"an image does not decode: {error}") from error

    def video(
        self, row: Row, indices: Sequence[int], size: int | None = None
    ) -> tuple[list[dict[str, str]], list[Image.Image]]:
        """The conversation and these of the row's `frames` frames, in RGB. DataError where the shard is damaged.

        size: the frames as tiles of so many pixels a side.
        """
        record = self._record(row)
        members = _media_members(row)
        try:
            if record["video"]["kind"] == "file":
                (data,) = self._members(row, members)
                return record["conversations"], read_frames(data, [record["video"]["first"] + i for i in indices], size)
            frames = {}
            for i in set(indices):
                image = decode_rgb(self._members(row, [members[i]])[0])
                frames[i] = image if size is None else split_image(image, 1, size)[0]
            return record["conversations"], [frames[i] for i in indices]
        except (ImageError, VideoError) as error:
            raise self._damaged(row, f"the video does not decode: {error}") from error

    def conversation(self, row: Row) -> list[dict[str, str]]:
        """The conversation alone; readable where an image beside it is damaged."""
        return self._record(row)["conversations"]

    def read(self, row: Row) -> tuple[dict[str, Any], list[bytes]]:
        """The json record and the undecoded image bytes."""
        text, *contents = self._members(row, [_json_member(row), *_media_members(row)])
        return json.loads(text), contents

    def _record(self, row: Row) -> dict[str, Any]:
        (text,) = self._members(row, [_json_member(row)])
        return json.loads(text)

    def _members(self, row: Row, members: list[tuple[int, int, int]]) -> list[bytes]:
        """The contents of neighbouring members (offset, size, CRC-32), by one ranged read."""
        start, end = members[0][0], members[-1][0] + members[-1][1]
        blob = self._pread(row, start, end - start)
        parts = [blob[offset - start : offset - start + size] for offset, size, _ in members]
        for part, (offset, size, crc) in zip(parts, members):
            if len(part) != size or zlib.crc32(part) != crc:
                raise self._damaged(row, f"bytes {offset} to {offset + size} are not those that were written")
        return parts

    def _pread(self, row: Row, offset: int, size: int) -> bytes:
        try:
            file = os.open(self.folder / SHARDS / row["shard"], os.O_RDONLY)
        except OSError as error:
            raise self._damaged(row, str(error)) from error
        try:
            parts = []
            while size > 0 and (part := os.pread(file, size, offset)):
                parts.append(part)
                offset, size = offset + len(part), size - len(part)
            return b"".join(parts)
        finally:
            os.close(file)

    def _damaged(self, row: Row, what: str) -> DataError:
        where = f"{self.folder / SHARDS / row['shard']}: sample {row['id']}"
        return DataError(what, where=where, remedy="fetch the shard again or run the prepare stage again")


def _json_member(row: Row) -> tuple[int, int, int]:
    return row["json_offset"], row["json_size"], row["json_crc32"]


def _media_members(row: Row) -> list[tuple[int, int, int]]:
    return list(zip(row["image_offsets"], row["image_sizes"], row["image_crc32s"]))


class ShardReader:
    """A prepared folder. `index[column]`: numpy array, Strings, or Ragged; `sample(i)` reads and decodes."""

    def __init__(self, folder: Path | str):
        self.folder, self.samples = Path(folder), SampleReader(folder)
        self.index = Index(self.folder / INDEX)

    def __len__(self) -> int:
        return self.index.rows

    def row(self, i: int, columns: Iterable[str] = SCHEMA.names) -> Row:
        """The index columns of row i, as Python values (lists for list columns)."""
        values = {name: self.index[name][i] for name in columns}
        return {name: value if isinstance(value, str) else value.tolist() for name, value in values.items()}

    def sample(self, i: int, frame_size: int | None = None) -> tuple[list[dict[str, str]], list[Image.Image]]:
        """The conversation ([{from, value}]) and the RGB images of row i, as `SampleReader.sample` gives them."""
        return self.samples.sample(self.row(i), frame_size)

    def conversation(self, i: int) -> list[dict[str, str]]:
        """The conversation of row i alone; readable where an image beside it is damaged."""
        return self.samples.conversation(self.row(i))

    def read(self, i: int) -> tuple[dict[str, Any], list[bytes]]:
        """The json record and the undecoded image bytes of row i."""
        return self.samples.read(self.row(i))
