"""What a few bytes can cost: files that would take gigabytes or hours are refused in time, honest ones are not."""

import io
import re
import struct
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from videos import CONTAINERS, apart, box, digit_frames, encode, encode_gif, hollow_gif, rebuilt

from modeling import containers, video
from modeling.containers import VideoError, checked_format
from modeling.video import probe, read_frames

FRAMES = 40
MANY = 60_000_000
EACH = struct.pack(">I", 0)  # version and flags


def pictures(frames: int = 2, format: str = "mp4", **options: str) -> bytes:
    """Every frame a key frame."""
    out = io.BytesIO()
    with av.open(out, "w", format=format, options=options) as file:
        stream = file.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        for i, image in enumerate(digit_frames(frames)):
            frame = av.VideoFrame.from_image(image)
            frame.pts = i
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return out.getvalue()


def many_sizes(kind: bytes, content: bytes) -> bytes:
    """All samples are of one byte and lie in one chunk."""
    tables = {b"stsz": (1, MANY), b"stts": (1, MANY, 1024), b"stsc": (1, 1, MANY, 1)}
    if kind == b"edts":
        return b""
    return box(kind, EACH + struct.pack(f">{len(tables[kind])}I", *tables[kind]) if kind in tables else content)


def many_edits(kind: bytes, content: bytes) -> bytes:
    """Each shows the whole video again."""
    if kind == b"edts":
        edit = struct.pack(">IIHH", 1 << 20, 0, 1, 0)
        content = box(b"elst", EACH + struct.pack(">I", MANY // 1000) + edit * (MANY // 1000))
    return box(kind, content)


def long_run(kind: bytes, content: bytes) -> bytes:
    return box(kind, struct.pack(">III", 1, MANY, 0x100) if kind == b"trun" else content)


def same_bytes(kind: bytes, content: bytes) -> bytes:
    """5,000 samples, each of them the first one's bytes."""
    count = 5000
    if kind == b"stsz":
        content = EACH + struct.pack(">II", struct.unpack(">I", content[12:16])[0], count)
    elif kind == b"stts":
        content = EACH + struct.pack(">III", 1, count, 1024)
    elif kind == b"stsc":
        content = EACH + struct.pack(">IIII", 1, 1, 1, 1)
    elif kind == b"stco":
        content = EACH + struct.pack(">I", count) + content[8:12] * count
    return b"" if kind == b"edts" else box(kind, content)


def keyframe_index() -> bytes:
    """An FLV whose metadata claim 2 ** 28 places of key frames."""

    def text(value: bytes) -> bytes:
        return struct.pack(">H", len(value)) + value

    numbers = b"\n" + struct.pack(">I", (1 << 28) - 1) + (b"\0" + struct.pack(">d", 1.0)) * 2
    keyframes = b"\3" + text(b"times") + numbers + text(b"filepositions") + numbers + b"\0\0\t"
    body = b"\2" + text(b"onMetaData") + b"\x08" + struct.pack(">I", 1) + text(b"keyframes") + keyframes + b"\0\0\t"
    tag = b"\x12" + struct.pack(">I", len(body))[1:] + bytes(7) + body
    data = encode(digit_frames(6), "flv")
    return data[:13] + tag + struct.pack(">I", len(tag)) + data[13:]


def _peak() -> int:
    """The most memory in KiB since this was last called; the kernel's own word."""
    (found,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    Path("/proc/self/clear_refs").write_text("5")
    return int(found)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: rebuilt(pictures(), many_sizes), "claims 60,000,000 samples"),
        (lambda: rebuilt(pictures(1000), many_edits), "claims 60,000,000 samples"),
        (
            lambda: rebuilt(pictures(movflags="frag_keyframe+empty_moov+default_base_moof"), long_run),
            "claims 1?[26]0,000,000 samples",
        ),
        (lambda: rebuilt(pictures(), same_bytes), "2 times the file's bytes"),
        (keyframe_index, ""),
    ],
    ids=["stsz", "elst", "trun", "same bytes", "flv"],
)
def test_memory_is_bounded_whatever_a_file_claims(make, reason):
    data = make()
    _peak()
    before = _peak()
    if reason:
        with pytest.raises(VideoError, match=reason) as caught:
            probe(data)
        assert caught.value.bomb
    else:
        assert probe(data).frames == 6, "what it claims is not asked for"
    assert _peak() - before < 200_000


def test_a_header_that_is_compressed_is_refused():
    data = rebuilt(pictures(), lambda kind, content: box(b"cmov" if kind == b"udta" else kind, content))
    data = data if b"cmov" in data else data + box(b"cmov", bytes(8))
    with pytest.raises(VideoError, match="compressed"):
        probe(data)


def test_plain_sound_has_millions_of_samples_and_few_entries(monkeypatch):
    out = io.BytesIO()
    with av.open(out, "w", format="mov") as file:
        stream = file.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        sound = file.add_stream("pcm_s16le", rate=48000, layout="mono")
        frame = av.VideoFrame.from_image(digit_frames(1)[0])
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.int16), format="s16", layout="mono")
        samples.rate = 48000
        file.mux(sound.encode(samples))
        file.mux(sound.encode(None))
    monkeypatch.setattr(containers, "MAX_SAMPLES", 1000)
    assert probe(out.getvalue()).frames == 1
    # a picture's track that calls itself sound, or sound of another kind, is not believed
    for old, new in ((b"sowt", b"jpeg"), (b"soun", b"vide")):
        with pytest.raises(VideoError, match="claims 48,0"):
            probe(out.getvalue().replace(old, new))


def test_what_lies_in_the_media_is_not_taken_for_an_index():
    data = pictures() + box(b"mdat", b"stsz" + b"\xff" * 20)
    assert probe(data).frames == 2 and len(read_frames(data, [1])) == 1


@pytest.mark.parametrize("kind", CONTAINERS)
def test_formats_are_known_by_how_they_begin(kind):
    format = CONTAINERS[kind][0]
    found = checked_format(encode(digit_frames(3), kind))
    assert found == {"mp4": None, "webm": "matroska"}.get(format, format)


def test_time_is_bounded_by_pixels_however_small_the_file():
    """100 KB would take minutes, and hours where the limit on frames is all there is."""
    data = hollow_gif(9000, 2000)
    assert len(data) < 150_000
    began = time.process_time()
    with pytest.raises(VideoError, match="too long") as caught:
        probe(data)
    assert caught.value.bomb and time.process_time() - began < 5, "refused before any frame is composed"


def test_a_canvas_that_grows_is_counted_as_it_grows(monkeypatch):
    data = hollow_gif(64, 20, extent=(255, 255, 1, 1))
    assert probe(data).frames == 20
    monkeypatch.setattr(video, "MAX_COMPOSED", 10 * 256**2)
    with pytest.raises(VideoError) as caught:
        probe(data)
    assert caught.value.bomb


def test_only_what_is_decoded_counts_against_the_limit_of_pixels(monkeypatch):
    digits = digit_frames(FRAMES)
    data = encode(digits)
    monkeypatch.setattr(video, "MAX_DECODED", 20 * 64**2)
    assert probe(data).frames == FRAMES and probe(data, (0, 1), verify=True).frames == 10
    assert apart(read_frames(data, [38])[0], digits[38]) < 6
    for read in (lambda: probe(data, verify=True), lambda: read_frames(data, range(FRAMES))):
        with pytest.raises(VideoError, match=r"pixels|for their size") as caught:
            read()
        assert caught.value.bomb


def test_of_a_gif_only_the_frames_asked_for_are_copied(monkeypatch):
    digits = digit_frames(FRAMES)
    data, copied, original = encode_gif(digits), [], Image.Image.copy
    monkeypatch.setattr(Image.Image, "copy", lambda image: copied.append(image) or original(image))
    assert probe(data).frames == FRAMES and not copied
    one, three = read_frames(data, [3, 1])
    assert apart(one, digits[3]) == apart(three, digits[1]) == 0 and len(copied) == 2
