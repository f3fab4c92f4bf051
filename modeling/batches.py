"""From a pack of sample occurrences to tensors: decoded late, every random choice keyed by (seed, step, occurrence).

Invariant: a pack's tensors are a pure function of (shards, plan, seed, step, pack), whatever the rank, the worker or
the attempt. JPEG augmentation (quality uniform over 75..100 for every tile, official `simulate_jpeg_degradation`)
and drop path draw from the occurrence's own generator. A sample that cannot be decoded keeps its tokens and its place
in the denominator, gets weight zero, and is counted (design.md, "Data").
"""

import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modeling.attention import Segments
from modeling.epochs import StepPlan
from modeling.errors import DataError
from modeling.loss import Reduction, Unit, token_weights
from modeling.shards import ShardReader
from modeling.template import encode_conversation
from modeling.tiles import Tie, split_image, tiles_per_image_limit, to_pixels

COLUMNS = ("id", "dataset", "tokens", "tiles_per_image", "max_tiles", "augment")  # of the index, that a row needs


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
    """One packed row. input_ids, position_ids [1, L]; positions, targets, weights [n]; pixels [tiles, 3, S, S].

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
        return Batch(**{**vars(self), **moved, "segments": self.segments.to(device)})


def sample_checksum(sample_id: str) -> int:
    return zlib.crc32(sample_id.encode())


def jpeg(tile: Image.Image, quality: int) -> Image.Image:
    """The tile after one JPEG round trip, Pillow's defaults (4:2:0)."""
    buffer = io.BytesIO()
    tile.save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def empty_batch(token: int, depth: int) -> Batch:
    """A row of weight zero, for a rank that has no pack left in a step's last micro-step."""
    return Batch(
        input_ids=torch.tensor([[token, token]]), position_ids=torch.tensor([[0, 1]]), segments=Segments.of([2]),
        positions=torch.tensor([0]), targets=torch.tensor([token]), weights=torch.zeros(1), pixels=None,
        uniforms=None if depth == 0 else torch.ones(0, depth, 2), counts=Counts(),
    )  # fmt: skip


class Batcher:
    """Builds the rows of a plan. depth: vision layers when drop path is on, else 0."""

    def __init__(
        self, reader: ShardReader, plan: StepPlan, tokenizer, *, tile_size: int, tokens_per_tile: int,
        system: str | None, reduction: Reduction, unit: Unit, seed: int, depth: int = 0, tile_tie: Tie = "strict",
    ):  # fmt: skip
        self.reader, self.plan, self.tokenizer = reader, plan, tokenizer
        self.tile_size, self.tokens_per_tile, self.system = tile_size, tokens_per_tile, system
        self.reduction: Reduction = reduction
        self.unit: Unit = unit
        self.tile_tie: Tie = tile_tie
        self.seed, self.depth = seed, depth

    def _tiles(self, images: list[Image.Image], row, rng: np.random.Generator) -> tuple[list[Image.Image], list[int]]:
        limit = tiles_per_image_limit(int(row["max_tiles"]), max(1, len(images)))
        tiles, counts = [], []
        for image in images:
            parts = split_image(image, limit, tile_size=self.tile_size, tie=self.tile_tie)
            if row["augment"]:
                parts = [jpeg(part, int(rng.integers(75, 101))) for part in parts]
            tiles += parts
            counts.append(len(parts))
        return tiles, counts

    def batch(self, step: int, pack: Sequence[int]) -> Batch:
        """The row of one pack: `pack` holds occurrence numbers of the plan."""
        ids, positions_ids, lengths, positions, targets, weights = [], [], [], [], [], []
        tiles: list[Image.Image] = []
        uniforms: list[np.ndarray] = []
        counts, names, offset = Counts(), [], 0
        for occurrence in pack:
            index = int(self.plan.sample[occurrence])
            row = self.reader.row(index, COLUMNS)
            rng = np.random.default_rng((self.seed, step, int(occurrence)))
            try:
                conversation, images = self.reader.sample(index)
                parts, per_image = self._tiles(images, row, rng)
                lost = False
            except DataError:
                conversation, per_image = self.reader.conversation(index), [int(n) for n in row["tiles_per_image"]]
                parts = [Image.new("RGB", (self.tile_size, self.tile_size))] * sum(per_image)
                lost = True
            encoded = encode_conversation(
                conversation, self.tokenizer, per_image, self.tokens_per_tile, system=self.system
            )
            length = len(encoded.input_ids)
            if length != int(row["tokens"]):
                raise DataError(
                    f"{length} tokens, planned were {row['tokens']}",
                    where=f"sample {row['id']}", remedy="delete the prepare stage's folder and run again",
                )  # fmt: skip
            labels = np.asarray(encoded.labels)
            places = np.flatnonzero(labels != -100)
            weight = token_weights(encoded.answer_spans, length, self.reduction, self.unit)[places]
            ids += encoded.input_ids
            positions_ids += range(length)
            lengths.append(length)
            positions.append(places - 1 + offset)
            targets.append(labels[places])
            weights.append(np.zeros_like(weight) if lost else weight)
            tiles += parts
            if self.depth:
                uniforms.append(rng.random((len(parts), self.depth, 2), dtype=np.float32))
            offset += length
            names.append(row["id"])
            counts.samples += 1
            counts.tokens += length
            counts.supervised += len(places)
            counts.tiles += len(parts)
            counts.lost += lost
            counts.checksum += sample_checksum(row["id"])
            counts.per_dataset[row["dataset"]] = counts.per_dataset.get(row["dataset"], 0) + 1
        return Batch(
            input_ids=torch.tensor([ids]),
            position_ids=torch.tensor([positions_ids]),
            segments=Segments.of(lengths),
            positions=torch.from_numpy(np.concatenate(positions)),
            targets=torch.from_numpy(np.concatenate(targets)),
            weights=torch.from_numpy(np.concatenate(weights).astype(np.float32)),
            pixels=to_pixels(tiles) if tiles else None,
            uniforms=torch.from_numpy(np.concatenate(uniforms)) if uniforms else None,
            counts=counts,
            ids=tuple(names),
        )
