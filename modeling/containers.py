"""What a video file claims, looked at before FFmpeg believes it: its format, and the size of an MP4's index.

Invariant: opening a file costs memory in proportion to its bytes, or to MAX_SAMPLES. FFmpeg makes an entry in memory of
every sample that an MP4's header claims, and a few bytes can claim any number: `stsz` and `trun` give one size for n
samples, each edit of `elst` shows all samples again, a sound track cuts n samples of PCM into pieces. Files of 2 KB
took 2.1 GB (FFmpeg 8.0), by `stsz` and by `trun`. The other tables and containers have bytes for each entry, and AVI's
nested indexes end where FFmpeg has read more than there is.

Names of boxes are searched for everywhere outside the media itself (`mdat`), not parsed: FFmpeg reads a box wherever it
finds it, and what follows a `trak` belongs to that track, until the next. A file that begins as another container is
opened as that alone, so that none can be read as MP4 without having been looked at.
"""

import re
from collections.abc import Iterator

import numpy as np

MAX_SAMPLES = 1 << 22  # of all tracks together; about 40 bytes each once opened: 170 MB
PIECE = 512  # samples of plain sound in one entry: FFmpeg takes up to 1024, in whole frames
SOUND = (b"sowt", b"twos", b"lpcm", b"in24", b"in32", b"fl32", b"fl64", b"ulaw", b"alaw", b"ipcm", b"fpcm", b"ima4")
MAGIC = {
    b"\x1a\x45\xdf\xa3": "matroska", b"RIFF": "avi", b"FLV": "flv", b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": "asf",
    b"\0\0\1\xba": "mpeg",
}  # fmt: skip
TS_PACKETS = ((0, 188), (4, 192))  # (where the sync byte is, size), of broadcasts and of discs

_BOXES = re.compile(rb"stsz|stz2|stts|stsc|stco|co64|stsd|elst|trun|cmov")


class VideoError(ValueError):
    """Bytes that do not give a video. `bomb`: refused for its size alone."""

    def __init__(self, message: str, *, bomb: bool = False):
        super().__init__(message)
        self.bomb = bomb


def checked_format(data: bytes) -> str | None:
    """FFmpeg's name of the one format to open these bytes as; None: it may look for itself.

    Raises VideoError where an MP4 (all that is none of the others) claims more samples than MAX_SAMPLES.
    """
    for magic, name in MAGIC.items():
        if data.startswith(magic):
            return name
    if any(data[first : first + size + 1 : size] == b"GG" for first, size in TS_PACKETS):
        return "mpegts"
    samples = sum(_claimed(data, *span) for start, end in _outside_media(data) for span in _tracks(data, start, end))
    if samples > MAX_SAMPLES:
        raise VideoError(f"its index claims {samples:,} samples, more than {MAX_SAMPLES:,}", bomb=True)
    return None


def _outside_media(data: bytes) -> Iterator[tuple[int, int]]:
    """Where the top-level boxes other than `mdat` lie; of what is no sequence of boxes, all."""
    start = position = 0
    while position + 8 <= len(data):
        size, header = _number(data, position), 8
        if size == 1:
            size, header = int.from_bytes(data[position + 8 : position + 16], "big"), 16
        elif size == 0:
            size = len(data) - position
        if not header <= size < 1 << 63:
            break
        if data[position + 4 : position + 8] == b"mdat":
            yield start, position
            start = min(position + size, len(data))
        position += size
    yield start, len(data)


def _tracks(data: bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    while (following := data.find(b"trak", start + 4, end)) >= 0:
        yield start, following
        start = following
    yield start, end


def _claimed(data: bytes, start: int, end: int) -> int:
    """The entries that FFmpeg makes for what lies here: of at most one track."""
    boxes: dict[bytes, list[int]] = {}  # where the fields behind version and flags begin
    for found in _BOXES.finditer(data, start, end):
        boxes.setdefault(found[0], []).append(found.end() + 4)
    if b"cmov" in boxes:
        raise VideoError("its header is compressed: write the file again")

    def counts(*names: bytes, skip: int = 0) -> int:
        return sum(_number(data, place + skip) for name in names for place in boxes.get(name, ()))

    samples = counts(b"stsz", b"stz2", skip=4)
    if samples and _plain_sound(data, start, end, boxes):
        longest = max((_longest_chunk(data, place) for place in boxes.get(b"stsc", ())), default=0)
        samples = counts(b"stco", b"co64") * (1 + longest // PIECE)
    return samples * max(1, counts(b"elst")) + counts(b"trun")


def _plain_sound(data: bytes, start: int, end: int, boxes: dict[bytes, list[int]]) -> bool:
    """A sound track whose samples are single values: FFmpeg makes an entry of many."""
    times, formats = boxes.get(b"stts", []), boxes.get(b"stsd", [])
    if len(times) != 1 or len(formats) != 1 or data.find(b"vide", start, end) >= 0:
        return False
    one_each = _number(data, times[0]) == 1 and _number(data, times[0] + 8) == 1
    format = data[formats[0] + 8 : formats[0] + 12]
    return one_each and _number(data, formats[0]) == 1 and format in SOUND and data.find(b"soun", start, end) >= 0


def _longest_chunk(data: bytes, place: int) -> int:
    rows = min(_number(data, place), (len(data) - place - 4) // 12)
    return int(np.frombuffer(data, ">u4", 3 * rows, place + 4)[1::3].max(initial=0)) if rows > 0 else 0


def _number(data: bytes, place: int) -> int:
    return int.from_bytes(data[place : place + 4], "big")
