"""Videos of scikit-learn's digits, in containers (PyAV), as GIF and as folders of frames, and a prepared mixture."""

import io
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modeling.shards import ShardWriter, pack_sample
from modeling.template import encode_conversation, frame_token_counts

CONTAINERS = {  # format and codec: what the wheel can write
    "mp4": ("mp4", "libx264", {"g": "12", "bf": "2"}),
    "open gop": ("mp4", "libx264", {"x264-params": "open-gop=1:bframes=3:keyint=12:min-keyint=12:scenecut=0"}),
    "intra refresh": ("mp4", "libx264", {"x264-params": "intra-refresh=1:keyint=12"}),
    "webm": ("webm", "libvpx-vp9", {"g": "12"}),
    "vp8": ("webm", "libvpx", {"g": "12"}),
    "mkv": ("matroska", "libx264", {"g": "12", "bf": "2"}),
    "avi": ("avi", "mpeg4", {"g": "12", "bf": "2"}),
    "avi of h264": ("avi", "libx264", {"g": "12", "bf": "2"}),
    "ts": ("mpegts", "libx264", {"g": "12", "bf": "2"}),
    "flv": ("flv", "libx264", {"g": "12"}),
    "asf": ("asf", "mpeg4", {"g": "12"}),
}


def digit_frames(n: int, side: int = 64) -> list[Image.Image]:
    """n different grey RGB pictures: digits, each on a background of its own."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    values = [np.clip(digits.images[i] * 12 + 3 * (i % 20), 0, 255).astype(np.uint8) for i in range(n)]
    return [Image.fromarray(v).resize((side, side), Image.Resampling.NEAREST).convert("RGB") for v in values]


def encode(
    frames: Sequence[Image.Image], kind: str = "mp4", rate: int = 10, times: Sequence[float] | None = None,
    rotation: int = 0,
) -> bytes:  # fmt: skip
    """times: seconds at which each frame begins; None: 1 / rate apart."""
    import av

    format, codec, options = CONTAINERS[kind]
    out = io.BytesIO()
    with av.open(out, "w", format=format) as file:
        stream: Any = file.add_stream(codec, rate=rate, options={**options, "threads": "1"})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        stream.codec_context.time_base = Fraction(1, 1000) if times else Fraction(1, rate)
        if rotation:
            stream.set_display_rotation(rotation)
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_image(image)
            frame.pts = round(1000 * times[i]) if times else i
            frame.time_base = stream.codec_context.time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return out.getvalue()


def encode_gif(frames: Sequence[Image.Image], ms: int = 100) -> bytes:
    out = io.BytesIO()
    first, *others = [frame.convert("L") for frame in frames]
    first.save(out, "GIF", save_all=True, append_images=others, duration=ms, loop=0, optimize=False)
    return out.getvalue()


def rebuilt(mp4: bytes, change: Callable[[bytes, bytes], bytes]) -> bytes:
    """The file with every box that change(type, content) gives for one of its, from the inside out."""
    out, place = b"", 0
    while place < len(mp4):
        size, kind = int.from_bytes(mp4[place : place + 4], "big"), mp4[place + 4 : place + 8]
        content = mp4[place + 8 : place + size]
        nested = kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")
        out += change(kind, rebuilt(content, change) if nested else content)
        place += size
    return out


def box(kind: bytes, content: bytes) -> bytes:
    return (8 + len(content)).to_bytes(4, "big") + kind + content


def hollow_gif(side: int, frames: int, local: bytes = b"", extent: tuple[int, int, int, int] = (0, 0, 1, 1)) -> bytes:
    """Frames of one pixel each on a canvas side×side; in the first one level 0 is transparent.

    Of the others, local: each one's palette; extent: x, y, width, height.
    """

    def frame(extent: tuple[int, int, int, int], local: bytes) -> bytes:
        numbers = b"".join(number.to_bytes(2, "little") for number in extent)
        return b"\x2c" + numbers + (b"\x80" + local if local else b"\0") + b"\x02\x02\x44\x01\0"

    header = b"GIF89a" + 2 * side.to_bytes(2, "little") + bytes(3) + b"\x21\xf9\4\1\x0a" + bytes(3)
    return header + frame((0, 0, 1, 1), b"") + frame(extent, local) * (frames - 1) + b";"


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def apart(one: Image.Image, two: Image.Image) -> float:
    """Mean distance in grey levels."""
    return float(np.abs(np.asarray(one, np.int16) - np.asarray(two, np.int16)).mean())


LEAST, MOST, FRAMES = 3, 9, 24  # frames shown, and frames of each video but v3's


def prepared_videos(folder: Path, micro: Any) -> Path:
    """A folder as `prepare` leaves it: v0 mp4, v1 GIF, v2 a folder of frames, v3 an mp4 of 2 frames, then t0, a text.

    All videos but v3 show the same; `augment` is set for all.
    """
    frames = digit_frames(FRAMES, 40)
    media = [
        ("file", FRAMES, [("mp4", encode(frames))]), ("file", FRAMES, [("gif", encode_gif(frames))]),
        ("frames", FRAMES, [("png", png(frame)) for frame in frames]), ("file", 2, [("mp4", encode(frames[:2]))]),
        ("", 0, []),
    ]  # fmt: skip
    per_tile = micro.resolved.tokens_per_tile
    with ShardWriter(folder, shard_bytes=1 << 20) as writer:
        for i, (kind, count, members) in enumerate(media):
            name = f"v{i}" if kind else "t0"
            question = "What is <video>\nabout?" if i == 1 else "Which digits?"
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"digit {i}"}]
            record = {"id": name, "conversations": turns, "video": {"kind": kind, "first": 0}}
            blob, place = pack_sample(f"{i:06d}", record, members)
            video = {}
            if kind:
                counts = range(LEAST, MOST + 1)
                tokens = frame_token_counts(turns, micro.tokenizer, per_tile, counts, system="")
                video = {"frames": count, "min_frames": LEAST, "frame_tokens": tokens}
            tiles = [1] * (MOST if kind else 0)
            encoded = encode_conversation(turns, micro.tokenizer, tiles, per_tile, system="", video=bool(kind))
            writer.add(blob, place | video | {
                "id": name, "task": "t", "dataset": "videos" if kind else "text", "key": f"{i:06d}",
                "tokens": len(encoded.input_ids), "answers": [end - start for start, end in encoded.answer_spans],
                "tiles": len(tiles), "tiles_per_image": tiles, "widths": [40] * bool(kind),
                "heights": [40] * bool(kind), "max_tiles": 6, "augment": True, "repeat": 2.0, "file": "a.jsonl",
                "line": i,
            })  # fmt: skip
    return folder
