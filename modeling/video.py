"""Video bytes -> frames. The one place where a video is opened: containers by FFmpeg (PyAV), GIFs by Pillow.

Invariants: frame i is the same picture whichever others are asked for with it, and `probe` counts what `read_frames`
can give. Metadata is not believed (Matroska has no count, a cut file too high a one): frames are counted by their
packets, in the order of their times, without hidden and cut-off ones; `verify` decodes each of them (damage inside a
picture that the decoder conceals passes, as it does in players). Only the frames
between the key frame before a wanted one and that one are decoded. No container is asked to seek, which lands anywhere
(dmlc/decord #78, meta-pytorch/torchcodec #1077): the packets are all read first, which costs the file's size in memory.

A file can be hostile: it is read from memory, by the demuxers of FORMATS alone, so that no playlist opens another file
or address, within limits of size, number and their product: what is refused for them is refused within minutes and in
memory of the order of the file's size (containers.py has what comes before opening). GIFs: Pillow composes their
frames, as for the official `read_frames_gif`. Decoding uses one thread: those who decode are many processes.
"""

import io
import math
import re
import warnings
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, islice
from typing import Any

from PIL import Image

from modeling.containers import VideoError, checked_format
from modeling.errors import UserError
from modeling.images import ImageError, open_image, to_rgb
from modeling.tiles import split_image

FORMATS = "mov,matroska,avi,flv,mpegts,mpeg,asf"  # FFmpeg's names; mov is also mp4, matroska also webm
MAX_FRAMES = 1 << 20  # 9 hours at 30 a second
# Frames times width times height that one call decodes. A frame in which nothing moves is 500 bytes and 0.5 ns a pixel
# in H.264 (4096x2304): 5 minutes. It is 2 hours at 1080p and 30 frames a second.
MAX_DECODED = 1 << 39
MAX_COMPOSED = 10**10  # likewise of a GIF, where a frame of 22 bytes costs 1.4 ns a pixel of the canvas: 14 s
MAX_SHARE = 2  # bytes of packets for each of the file: its index may name the same bytes again and again
# What PyAV raises, besides its own errors, where a damaged file contradicts itself.
CONTRADICTIONS = (LookupError, ValueError, TypeError, AssertionError, ArithmeticError)
ROUNDED = Fraction(1, 1000)  # seconds: as much as containers round the time of a frame
GIF_DELAY = 100  # ms for which players show a frame that has no time
VP8_SHOWN = 0x10  # bit of a frame's first byte; without it the frame only helps to decode others

Clip = Sequence[float]  # [start, end] in seconds


@dataclass(frozen=True)
class VideoInfo:
    """frames: within the clip. first: the number in the file of the first of them. fps: on average over the file."""

    frames: int
    first: int
    fps: float
    width: int
    height: int


def probe(data: bytes, clip: Clip | None = None, verify: bool = False) -> VideoInfo:
    """What a video, or a part of it, has to show. verify: decode all of that; else only packets are read.

    clip: from the frame that is shown at `start` to the last one before `end`, which may lie beyond the video's.
    Raises VideoError: no video, damaged, too large, or the clip lies outside of it.
    """
    if _is_gif(data):
        _check_gif(data)
        delays, size = [], (0, 0)
        for delay, image in _gif(data):
            delays.append(delay)
            size = image.size
        first, frames, fps = _part([0, *accumulate(delays[:-1])], Fraction(1, 1000), clip)
        return VideoInfo(frames, first, fps, *size)
    with _opened(data) as track:
        first, frames, fps = _part(track.stamps, track.tick, clip)
        if verify:
            frames = track.last(first, frames) - first + 1
        return VideoInfo(frames, first, fps, track.codec.width, track.codec.height)


def read_frames(data: bytes, indices: Sequence[int], size: int | None = None) -> list[Image.Image]:
    """RGB pictures of these frames of the file (from 0), in the order asked for; an index may come twice.

    size: as one tile of so many pixels a side (tiles.split_image), made at once, so that only one frame is ever held
    in full. A frame that the stream leaves out is the one before it, as players show it.
    Raises VideoError where a frame, or one that it depends on, does not decode.
    """
    wanted = sorted(set(indices))
    if not wanted or wanted[0] < 0:
        raise ValueError(f"give numbers of frames, from 0, found {list(indices)}")

    def made(image: Image.Image) -> Image.Image:
        return image if size is None else split_image(image, 1, size)[0]

    if _is_gif(data):
        asked = set(wanted)
        frames = enumerate(image for _, image in islice(_gif(data), wanted[-1] + 1))
        found = {i: made(image.copy()) for i, image in frames if i in asked}
    else:
        with _opened(data) as track:
            found = {i: made(_rgb(frame)) for i, frame in track.shown(wanted)}
    if len(found) < len(wanted):
        raise VideoError(f"there is no frame {wanted[-1]}: the video ends before")
    return [found[i] for i in indices]


def frame_order(names: Sequence[str]) -> list[str]:
    """The images of a folder in the order of the numbers in their names: f9.jpg before f10.jpg."""

    def key(name: str) -> tuple[list[Any], str]:  # text and numbers take turns
        return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))], name

    return sorted(names, key=key)


def _part(stamps: list[int], tick: Fraction, clip: Clip | None) -> tuple[int, int, float]:
    """(first frame, frames, average fps). stamps: when each frame begins, ascending, in ticks of so many seconds."""
    seconds = (stamps[-1] - stamps[0]) * tick
    fps = (len(stamps) - 1) / seconds if seconds else Fraction(1)
    if clip is None:
        return 0, len(stamps), float(fps)
    start, end = clip
    if not (math.isfinite(start) and math.isfinite(end) and 0 <= start < end):
        raise VideoError(f"a clip is [start, end] in seconds with 0 <= start < end, found {list(clip)}")
    if start >= seconds + 1 / fps:
        raise VideoError(f"the clip begins at {start:g} s, the video ends at {float(seconds + 1 / fps):.3f} s")
    first = bisect_right(stamps, stamps[0] + (Fraction(start) + ROUNDED) / tick) - 1
    beyond = bisect_left(stamps, stamps[0] + (Fraction(end) - ROUNDED) / tick)
    return first, max(1, beyond - first), float(fps)


# -- GIF -------------------------------------------------------------------------------------------------


def _is_gif(data: bytes) -> bool:
    return data[:6] in (b"GIF87a", b"GIF89a")


def _check_gif(data: bytes) -> None:
    """VideoError where its frames are too many, or too many for their size: counted before any is composed."""
    image = _open_gif(data)
    try:
        frames = getattr(image, "n_frames", 1)
    except Exception:  # damaged: those before that are composed, within the same limits
        frames = image.tell() + 1
    if frames > MAX_FRAMES:
        raise VideoError(f"more than {MAX_FRAMES:,} frames", bomb=True)
    if frames * image.width * image.height > MAX_COMPOSED:
        raise VideoError(f"{frames:,} frames of {image.width}×{image.height} take too long to compose", bomb=True)


def _gif(data: bytes) -> Iterator[tuple[int, Image.Image]]:
    """(ms that it is shown, RGB picture) of every frame that is whole; VideoError where there is none.

    A picture is good until the next one is asked for, which is painted over it.
    """
    image, left = _open_gif(data), MAX_COMPOSED
    for i in range(MAX_FRAMES + 1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image.seek(i)
                image.load()
                shown = to_rgb(image)
        except EOFError:
            return
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises many types for damaged pixels
            if i:  # a file that was cut off has the frames before that
                return
            raise VideoError(f"the first frame does not decode: {type(error).__name__}: {error}") from error
        left -= image.width * image.height  # a frame may enlarge the canvas
        if i == MAX_FRAMES or left < 0:
            raise VideoError("too many frames, or too many for their size", bomb=True)
        yield image.info.get("duration") or GIF_DELAY, shown


def _open_gif(data: bytes) -> Image.Image:
    try:
        return open_image(data)
    except ImageError as error:
        raise VideoError(str(error), bomb=error.bomb) from error


# -- containers ------------------------------------------------------------------------------------------


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError(f"videos need the package av: {error}", where="av", remedy="pip install av") from error
    return av


@contextmanager
def _opened(data: bytes) -> Iterator["_Track"]:
    """The video stream of a file, and a VideoError for whatever FFmpeg says of it."""
    av = _av()
    if not data:
        raise VideoError("an empty file")
    format = checked_format(data)
    most = str(Image.MAX_IMAGE_PIXELS or 0)
    limits = {"format_whitelist": FORMATS, "protocol_whitelist": ""}
    if format != "avi":  # which is read by its index; FLV's can claim 2 GB in a few bytes, and nobody seeks
        limits["fflags"] = "+ignidx"
    codecs = {"max_pixels": most, "threads": "1"}
    try:
        with av.open(
            io.BytesIO(data), format=format, options=codecs, container_options=limits, metadata_errors="replace"
        ) as file:
            cover = av.stream.Disposition.attached_pic
            streams = [stream for stream in file.streams.video if not stream.disposition & cover]
            if not streams:
                raise VideoError("there is no video in the file")
            if streams[0].codec_context is None:
                raise VideoError("the video is of a codec that is not known")
            streams[0].codec_context.options = {"max_pixels": most}
            streams[0].codec_context.thread_count = 1
            yield _Track(file, streams[0], MAX_SHARE * len(data))
    except VideoError:
        raise
    except av.FFmpegError as error:
        raise VideoError(f"not a video of a known format ({FORMATS}), or damaged: {error.strerror}") from error
    except CONTRADICTIONS as error:
        raise VideoError(f"damaged: {type(error).__name__}: {error}") from error


def _demuxed(file: Any, stream: Any) -> Iterator[Any]:
    """The stream's packets. MPEG-TS can begin another one anywhere, which PyAV says by an IndexError: passed over."""
    while True:
        try:
            yield from file.demux(stream)
            return
        except IndexError:
            continue  # with the packet after it, until the file ends


class _Track:
    """The packets of a video stream from its first key frame on, and the times of the frames that it shows.

    stamps: ascending, in ticks of `tick` seconds: frame i is shown from stamps[i] on.
    ordered: whether stamps are those of the frames. AVI has none: what it has are numbers of packets, and where frames
    come in another order the i-th one decoded is frame i.
    """

    def __init__(self, file: Any, stream: Any, most_bytes: int):
        self.left = MAX_DECODED
        self.codec: Any = stream.codec_context
        self.tick = Fraction(stream.time_base)
        width, height = self.codec.width, self.codec.height
        if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise VideoError(f"{width}×{height} pixels, more than {Image.MAX_IMAGE_PIXELS:,}", bomb=True)
        if not width * height:
            raise VideoError("the video has no width or no height")
        self.packets, stamps, keys = [], [], []
        for packet in _demuxed(file, stream):
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is None or not packet.size or packet.is_corrupt or not (keys or packet.is_keyframe):
                continue
            if packet.is_keyframe:
                keys.append((stamp, len(self.packets)))
            self.packets.append(packet)
            most_bytes -= packet.size
            if most_bytes < 0:
                raise VideoError(f"its index names more than {MAX_SHARE} times the file's bytes", bomb=True)
            if len(self.packets) > MAX_FRAMES:
                raise VideoError(f"more than {MAX_FRAMES:,} frames", bomb=True)
            hidden = self.codec.name == "vp8" and not bytes(packet)[0] & VP8_SHOWN
            if not (packet.is_discard or hidden) and stamp >= keys[0][0]:
                stamps.append(stamp)
        if not stamps:
            raise VideoError("the video has no frame")
        self.stamps = sorted(stamps)
        self.ordered = stamps != self.stamps or not self.codec.has_b_frames
        self.ordered &= len(set(stamps)) == len(stamps)
        self._keys = sorted(keys) if self.ordered else keys[:1]

    def shown(self, wanted: list[int]) -> Iterator[tuple[int, Any]]:
        """(i, frame) of each of these frame numbers, ascending; those beyond the last one are left out."""
        queue = deque(i for i in wanted if i < len(self.stamps))
        start, skips = (self._key(queue[0]) if queue else 0), True
        while queue:
            before = None
            for fed, position, frame in self._decoded(start):
                whole = frame.pict_type == _av().video.frame.PictureType.I and position <= queue[0]
                if start and before is None and not whole:
                    start, skips = 0, False  # no key frame, but a place from which pictures slowly become whole
                    break
                while queue and queue[0] <= position:
                    i = queue.popleft()
                    yield i, frame if i == position or before is None else before
                if not queue:
                    return
                before = frame
                if skips and self._key(queue[0]) > fed:
                    start = self._key(queue[0])
                    break
            else:  # the stream has ended
                if before is not None:
                    yield from ((i, before) for i in queue)
                    return
                if not start:
                    raise VideoError("no frame decodes")
                start, skips = 0, False

    def last(self, first: int, frames: int) -> int:
        """Decode so many frames; the number of the last of them that there is."""
        if frames * self.codec.width * self.codec.height > self.left:
            raise VideoError(f"{frames:,} frames of {self.codec.width}×{self.codec.height}: too many pixels", bomb=True)
        found = -1
        for _, position, _ in self._decoded(self._key(first)):
            found = position
            if position >= first + frames - 1:
                break
        if found < first:
            raise VideoError("no frame decodes")
        return min(found, first + frames - 1)

    def _key(self, i: int) -> int:
        """The packet to decode from where frame i is wanted."""
        return self._keys[bisect_right(self._keys, (self.stamps[i], math.inf)) - 1][1] if self.ordered else 0

    def _decoded(self, start: int) -> Iterator[tuple[int, int, Any]]:
        """(packet given to the decoder, frame number, frame) in the order in which they are shown, from a packet on."""
        self.codec.flush_buffers()
        shown = 0
        for number in range(start, len(self.packets) + 1):
            for frame in self.codec.decode(self.packets[number] if number < len(self.packets) else None):
                yield number, bisect_right(self.stamps, frame.pts) - 1 if self.ordered else shown, frame
                shown += 1
            self.left -= self.codec.width * self.codec.height  # a stream may change its size
            if self.left < 0:
                raise VideoError("too many frames to decode for their size", bomb=True)


def _rgb(frame: Any) -> Image.Image:
    """Upright, as players show it; the bytes do not depend on the processor."""
    modes = _av().video.reformatter.Interpolation
    image = frame.to_image(interpolation=modes.BILINEAR | modes.ACCURATE_RND | modes.BITEXACT, threads=1)
    turn = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
    quarter = frame.rotation % 360
    return image.transpose(turn[quarter]) if quarter in turn else image
