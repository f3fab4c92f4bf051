"""The same samples written in every format that Stageline reads: real pictures, and videos made of them.

scikit-learn's digits (BSD licence): 8 × 8 handwritten digits, enlarged.
"""

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FORMATS = ("internvl", "llava", "messages", "parquet", "webdataset")


def digit_pictures() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, 8, 8] and the digits they show."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images * 15.9).astype(np.uint8), digits.target


@dataclass(frozen=True)
class Written:
    """One sample. media: (file name, bytes) in order; video: whether it is one. turns: (question, answer) pairs."""

    id: str
    media: tuple[tuple[str, bytes], ...]
    turns: tuple[tuple[str, str], ...]
    video: bool = False

    @property
    def conversations(self) -> list[dict[str, str]]:
        pairs = [[("human", question), ("gpt", answer)] for question, answer in self.turns]
        return [{"from": role, "value": value} for pair in pairs for role, value in pair]


def encoded(image: np.ndarray, side: int = 48, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).resize((side, side)).convert("RGB").save(out, kind)
    return out.getvalue()


def gif(images: np.ndarray, side: int = 48) -> bytes:
    frames = [Image.fromarray(image).resize((side, side)) for image in images]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=100)
    return out.getvalue()


def mp4(images: np.ndarray, side: int = 64) -> bytes:
    import av

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for image in images:
            picture = np.asarray(Image.fromarray(image).resize((side, side)).convert("RGB"))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return out.getvalue()


def make_samples(pictures: np.ndarray, names: list[str]) -> list[Written]:
    """Six of each kind. pictures: uint8 [n, h, w], n at least 60; names: what each shows."""
    samples = []
    for i in range(6):
        one, two = encoded(pictures[i]), encoded(pictures[i + 1], 80, "JPEG")
        samples += [
            Written(f"one-{i}", ((f"{i}.png", one),), (("<image>\nWhat is it?", f"{names[i]}."), ("Sure?", "Yes."))),
            Written(
                f"two-{i}", ((f"a{i}.png", one), (f"b{i}.jpg", two)),
                (("Image-1: <image>\nImage-2: <image>\nWhich are they?", f"{names[i]} and {names[i + 1]}."),),
            ),
            Written(f"text-{i}", (), ((f"这是什么?{i}", "是一个数字。"),)),
            Written(f"gif-{i}", ((f"{i}.gif", gif(pictures[i : i + 12])),), (("<video>\nFirst?", names[i]),), True),
            Written(f"mp4-{i}", ((f"{i}.mp4", mp4(pictures[i : i + 20])),), (("<video>\nLast?", names[i + 19]),), True),
        ]  # fmt: skip
    return samples


def write(samples: list[Written], form: str, folder: Path, name: str = "things", **keys: Any) -> Path:
    """The samples in one format; returns the meta file."""
    (folder / "media").mkdir(parents=True)
    annotation = {"internvl": "a.jsonl", "llava": "a.json", "messages": "a.jsonl", "parquet": "a.parquet"}.get(
        form, "*.tar"
    )
    if form in ("internvl", "llava", "messages"):
        for sample in samples:
            for file, data in sample.media:
                (folder / "media" / file).write_bytes(data)
    if form == "internvl":
        (folder / annotation).write_text("".join(json.dumps(_internvl(one)) + "\n" for one in samples))
    elif form == "llava":
        (folder / annotation).write_text(json.dumps([_internvl(one) for one in samples], indent=1, ensure_ascii=False))
    elif form == "messages":
        (folder / annotation).write_text("".join(json.dumps(_messages(one)) + "\n" for one in samples))
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist([_row(one) for one in samples]), folder / annotation, row_group_size=7)
    else:
        half = len(samples) // 2
        for number, part in enumerate((samples[:half], samples[half:])):
            with tarfile.open(folder / f"{number}.tar", "w") as archive:
                for sample in part:
                    _members(archive, sample)
    entry = {"root": "media", "annotation": annotation, "data_augment": False, "repeat_time": 1, **keys}
    (folder / "meta.json").write_text(json.dumps({name: entry}))
    return folder / "meta.json"


def _internvl(sample: Written) -> dict[str, Any]:
    names = [file for file, _ in sample.media]
    if sample.video:
        media: dict[str, Any] = {"video": names[0]}
    else:
        media = {"image": names[0] if len(names) == 1 else names} if names else {}
    return {"id": sample.id, "conversations": sample.conversations, **media}


def _messages(sample: Written) -> dict[str, Any]:
    """Pictures in the content of the first message, as OpenAI has them; a video beside the messages."""
    roles = {"human": "user", "gpt": "assistant"}
    messages: list[dict[str, Any]] = [
        {"role": roles[turn["from"]], "content": turn["value"]} for turn in sample.conversations
    ]
    names = [file for file, _ in sample.media]
    if sample.video:
        return {"id": sample.id, "messages": messages, "videos": names}
    if names:
        text = messages[0]["content"].rpartition("<image>\n")[2]
        parts = [{"type": "image_url", "image_url": {"url": name}} for name in names]
        messages[0]["content"] = [*parts, {"type": "text", "text": text}]
    return {"id": sample.id, "messages": messages}


def _row(sample: Written) -> dict[str, Any]:
    media = [{"bytes": data, "path": file} for file, data in sample.media]
    row: dict[str, Any] = {"id": sample.id, "conversations": sample.conversations, "images": None, "video": None}
    return row | ({"video": media[0]} if sample.video else {"images": media or None})


def _members(archive: tarfile.TarFile, sample: Written) -> None:
    record: dict[str, Any] = {"id": sample.id, "conversations": sample.conversations}
    if sample.video:
        record["video"] = True
    members = [("json", json.dumps(record).encode())]
    for number, (file, data) in enumerate(sample.media):
        members.append((f"{number}.{file.rpartition('.')[2]}", data))
    for suffix, data in members:
        info = tarfile.TarInfo(f"shard/{sample.id}.{suffix}")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
