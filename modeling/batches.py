"""From a pack of sample occurrences to tensors: decoded late, every random choice keyed by (seed, step, occurrence).

Invariant: a pack's tensors are a pure function of (shards, plan, seed, step, pack), whatever the rank, the process or
the attempt: a Request names all that goes into a row, and a Builder, which knows neither index nor plan, makes it.
JPEG augmentation (quality uniform over 75..100 for every tile, official `simulate_jpeg_degradation`), the frames of a
video (one of each of as many intervals as the plan says; never augmented) and drop path draw from the occurrence's own
generator. A sample that cannot be decoded keeps its tokens and its place in the denominator,
gets weight zero, and is counted (design.md, "Data").
"""

import io
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modeling.attention import Segments
from modeling.epochs import StepPlan
from modeling.errors import DataError
from modeling.frames import FrameChoices
from modeling.loss import Reduction, Unit, token_weights
from modeling.shards import Row, SampleReader, ShardReader
from modeling.template import IGNORE, encode_conversation
from modeling.tiles import Tie, count_tiles, fill_tiles, frame_indices, normalised, split_image, tiles_per_image_limit

COLUMNS = (  # of the index, that a row needs
    "id", "dataset", "tokens", "tiles", "tiles_per_image", "max_tiles", "augment", "widths", "heights", "shard",
    "json_offset", "json_size", "json_crc32", "image_offsets", "image_sizes", "image_crc32s",
)  # fmt: skip


@dataclass
class Counts:
    """What a micro-batch consumed. checksum: sum of CRC-32 of its sample ids, exact in float64 over a step."""

    samples: int = 0
    tokens: int = 0
    supervised: int = 0
    tiles: int = 0
    lost: int = 0
    checksum: int = 0
    per_dataset: dict[str, int] = field(default_factory=dict)


@dataclass
class Batch:
    """One packed row. input_ids, position_ids [1, L]; positions, targets, weights [n].

    pixels: uint8 [tiles, S, S, 3] as they were decoded, a quarter of the memory; `to` makes the model's input of them,
    float32 [tiles, 3, S, S], normalised.
    positions: where in the row the prediction of `targets` is made (already shifted by one).
    uniforms: [tiles, depth, 2] for drop path. ids: the sample ids, for error messages.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Segments
    positions: Tensor
    targets: Tensor
    weights: Tensor
    pixels: Tensor | None
    uniforms: Tensor | None
    counts: Counts
    ids: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        if self.pixels is not None and self.pixels.dtype == torch.uint8:
            moved["pixels"] = normalised(moved["pixels"])
        return Batch(**{**vars(self), **moved, "segments": self.segments.to(device)})


def sample_checksum(sample_id: str) -> int:
    return zlib.crc32(sample_id.encode())


def jpeg(tile: Image.Image, quality: int) -> Image.Image:
    """The tile after one JPEG round trip, Pillow's defaults (4:2:0)."""
    buffer = io.BytesIO()
    tile.save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def _room(size: int) -> memoryview:
    return np.empty(size, np.uint8).data


def empty_batch(token: int, depth: int) -> Batch:
    """A row of weight zero, for a rank that has no pack left in a step's last micro-step."""
    return Batch(
        input_ids=torch.tensor([[token, token]]), position_ids=torch.tensor([[0, 1]]), segments=Segments.of([2]),
        positions=torch.tensor([0]), targets=torch.tensor([token]), weights=torch.zeros(1), pixels=None,
        uniforms=None if depth == 0 else torch.ones(0, depth, 2), counts=Counts(),
    )  # fmt: skip


@dataclass(frozen=True)
class Request:
    """All that one row is made of: its step, and occurrence number and index row of each sample.

    The row of a video (`frames`: those that it has) is the occurrence's: tokens and tiles are of the frames it shows.
    """

    step: int
    samples: tuple[tuple[int, Row], ...]


@dataclass
class Builder:
    """Makes rows of requests; cheap to send to another process. depth: vision layers when drop path is on, else 0."""

    samples: SampleReader
    tokenizer: Any
    tile_size: int
    tokens_per_tile: int
    system: str | None
    reduction: Reduction
    unit: Unit
    seed: int
    depth: int
    tile_tie: Tie

    def size(self, request: Request) -> int:
        """Bytes of the row's pixels."""
        return sum(row["tiles"] for _, row in request.samples) * self.tile_size**2 * 3

    def build(self, request: Request, room: Callable[[int], memoryview] = _room) -> Batch:
        """room(n): n bytes to hold the pixels. Raises DataError where a sample is not what was planned."""
        step = request.step
        ids, lengths, positions, targets, weights = [], [], [], [], []
        size, side = self.size(request), self.tile_size
        pixels = np.frombuffer(room(size), np.uint8).reshape(-1, side, side, 3) if size else None
        uniforms: list[np.ndarray] = []
        counts, names, offset, tile = Counts(), [], 0, 0
        for occurrence, row in request.samples:
            rng = np.random.default_rng((self.seed, step, occurrence))
            per_image, last, frames = row["tiles_per_image"], tile + row["tiles"], row.get("frames", 0)
            chosen = frame_indices(row["tiles"], frames, rng) if frames else []
            try:
                if frames:
                    conversation, images = self.samples.video(row, chosen, side)
                else:
                    conversation, images = self.samples.sample(row)
                lost = False
            except DataError:
                conversation, images, lost = self.samples.conversation(row), [], True
            if lost and pixels is not None:
                pixels[tile:last] = 0
            elif frames and pixels is not None:
                for image, space in zip(images, pixels[tile:last], strict=True):
                    space[:] = np.asarray(image)
            elif pixels is not None:
                self._fill(images, row, rng, pixels[tile:last])
            encoded = encode_conversation(
                conversation, self.tokenizer, per_image, self.tokens_per_tile, system=self.system,
                video=True if frames else None,
            )  # fmt: skip
            length = len(encoded.input_ids)
            if length != row["tokens"]:
                raise _other(f"{length} tokens, planned were {row['tokens']}", row)
            labels = np.asarray(encoded.labels)
            places = np.flatnonzero(labels != IGNORE)
            weight = token_weights(encoded.answer_spans, length, self.reduction, self.unit)[places]
            ids.append(np.asarray(encoded.input_ids))
            lengths.append(length)
            positions.append(places - 1 + offset)
            targets.append(labels[places])
            weights.append(np.zeros_like(weight) if lost else weight)
            if self.depth:
                uniforms.append(rng.random((row["tiles"], self.depth, 2), dtype=np.float32))
            offset, tile = offset + length, last
            names.append(row["id"])
            counts.samples += 1
            counts.tokens += length
            counts.supervised += len(places)
            counts.tiles += row["tiles"]
            counts.lost += lost
            counts.checksum += sample_checksum(row["id"])
            counts.per_dataset[row["dataset"]] = counts.per_dataset.get(row["dataset"], 0) + 1
        return Batch(
            input_ids=torch.from_numpy(np.concatenate(ids)[None]),
            position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])[None]),
            segments=Segments.of(lengths),
            positions=torch.from_numpy(np.concatenate(positions)),
            targets=torch.from_numpy(np.concatenate(targets)),
            weights=torch.from_numpy(np.concatenate(weights).astype(np.float32)),
            pixels=None if pixels is None else torch.from_numpy(pixels),
            uniforms=torch.from_numpy(np.concatenate(uniforms)) if uniforms else None,
            counts=counts,
            ids=tuple(names),
        )

    def _fill(self, images: list[Image.Image], row: Row, rng: np.random.Generator, out: np.ndarray) -> None:
        """The tiles of a sample into `out`, [tiles, S, S, 3]."""
        limit = tiles_per_image_limit(row["max_tiles"], max(1, len(images)))
        first = 0
        for image, planned in zip(images, row["tiles_per_image"], strict=True):
            place, first = out[first : first + planned], first + planned
            if count_tiles(*image.size, limit, tile_size=self.tile_size, tie=self.tile_tie) != planned:
                raise _other(f"a picture of {image.width}×{image.height} pixels is not of {planned} tiles", row)
            if row["augment"]:
                parts = split_image(image, limit, tile_size=self.tile_size, tie=self.tile_tie)
                for part, space in zip(parts, place, strict=True):
                    space[:] = np.asarray(jpeg(part, int(rng.integers(75, 101))))
            else:
                fill_tiles(image, place, limit, tie=self.tile_tie)


def _other(what: str, row: Row) -> DataError:
    remedy = "delete the prepare stage's folder and run again"
    return DataError(what, where=f"sample {row['id']}", remedy=remedy)


class Batcher:
    """The rows of a plan: their requests, and a builder of them."""

    def __init__(
        self, reader: ShardReader, plan: StepPlan, tokenizer, *, tile_size: int, tokens_per_tile: int,
        system: str | None, reduction: Reduction, unit: Unit, seed: int, depth: int = 0, tile_tie: Tie = "strict",
    ):  # fmt: skip
        self.reader, self.plan = reader, plan
        self.choices = None if plan.frames is None else FrameChoices.of(reader.index)
        self.builder = Builder(
            reader.samples, tokenizer, tile_size, tokens_per_tile, system, reduction, unit, seed, depth, tile_tie
        )

    def request(self, step: int, pack: Sequence[int]) -> Request:
        """`pack` holds occurrence numbers of the plan."""
        return Request(step, tuple((int(o), self._row(int(o))) for o in pack))

    def _row(self, occurrence: int) -> Row:
        sample = int(self.plan.sample[occurrence])
        frames = 0 if self.plan.frames is None else int(self.plan.frames[occurrence])
        if not frames:
            return self.reader.row(sample, COLUMNS)
        assert self.choices is not None, "a plan of videos over an index without any"
        length = int(self.choices.lengths(sample, frames))
        row = self.reader.row(sample, (*COLUMNS, "frames"))
        return row | {"tokens": length, "tiles": frames, "tiles_per_image": [1] * frames}

    def batch(self, step: int, pack: Sequence[int]) -> Batch:
        """The row of one pack."""
        return self.builder.build(self.request(step, pack))
