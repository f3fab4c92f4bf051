"""One sample: from its source to the row and the bytes that are stored, or the reason why not.

Invariants: what the row says (tokens, supervised tokens, tiles) is what training will build, for the same
functions count it; no sample is truncated, a longer one is rejected; `verify: full` decodes every picture
once, so that damage is found here. Rules for tiles: recipe of arXiv 2412.05271 §3.1 and the official
`dynamic_preprocess` (one image: the dataset's limit; n images: max(1, limit // n) each; thumbnail on top).
"""

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from modeling.images import ImageError, decode_rgb, open_image
from modeling.shards import pack_sample
from modeling.sources import Dataset, Rejection, Sample
from modeling.template import encode_conversation
from modeling.tiles import count_tiles, tiles_per_image_limit
from stages.params import ModelParams, PrepareParams

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}


@dataclass(frozen=True)
class Measure:
    """What lengths depend on besides the sample: the model's tokenizer and tiles, the stage's limits."""

    tokenizer: Any
    tile_size: int
    tokens_per_tile: int
    system: str | None
    max_tokens: int
    max_tiles_per_sample: int
    max_tiles: int
    verify: Literal["full", "header"]
    tile_tie: Literal["strict", "inclusive"]


@lru_cache(maxsize=4)
def build_measure(model: ModelParams, params: PrepareParams, system: str | None) -> Measure:
    """Loads the tokenizer, once per process. Raises UserError where the model's name is unknown."""
    from modeling import presets

    # a few short texts per call: threads of the tokenizer only wait for each other (measured: 4.7 times slower)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    resolved = presets.resolve(model)
    return Measure(
        tokenizer=resolved.tokenizer(),
        tile_size=resolved.tile_size,
        tokens_per_tile=resolved.tokens_per_tile,
        system=system,
        max_tokens=params.max_tokens,
        max_tiles_per_sample=params.max_tiles_per_sample,
        max_tiles=params.max_tiles,
        verify=params.verify,
        tile_tie=params.tile_tie,
    )


def measure_sample(sample: Sample, dataset: Dataset, measure: Measure, key: str) -> tuple[bytes, dict[str, Any]]:
    """The sample's tar members and its index row, offsets relative to the first byte. Raises Rejection."""
    pictures = [_read(path) for path in sample.images]
    opened = [_header(data, path) for data, path in zip(pictures, sample.images)]
    max_tiles = dataset.max_tiles or measure.max_tiles
    limit = tiles_per_image_limit(max_tiles, max(1, len(opened)))
    tiles = [
        count_tiles(image.width, image.height, limit, tile_size=measure.tile_size, tie=measure.tile_tie)
        for image in opened
    ]
    if sum(tiles) > measure.max_tiles_per_sample:
        raise Rejection("too_many_tiles", f"{sum(tiles)} tiles, at most {measure.max_tiles_per_sample} are allowed")
    conversation = list(sample.conversation)
    try:
        encoded = encode_conversation(
            conversation, measure.tokenizer, tiles, measure.tokens_per_tile, system=measure.system
        )
    except ValueError as error:  # roles and values were checked by the reader: only placeholders are left
        raise Rejection("placeholder_mismatch", str(error)) from error
    tokens = len(encoded.input_ids)
    if tokens > measure.max_tokens:
        raise Rejection("too_long", f"{tokens} tokens, at most {measure.max_tokens} are allowed")
    answers = [end - start for start, end in encoded.answer_spans]
    if not sum(answers):
        raise Rejection("no_supervised_token", "nothing to learn from")
    if measure.verify == "full":
        for data, path in zip(pictures, sample.images):
            _decode(data, path)

    record = {
        "id": sample.id,
        "task": sample.task,
        "dataset": sample.dataset,
        "conversations": conversation,
        "images": [os.path.relpath(path, dataset.root) for path in sample.images],
    }
    names = [EXTENSIONS.get(image.format or "", (image.format or "").lower()) for image in opened]
    blob, place = pack_sample(key, record, list(zip(names, pictures)))
    row = {
        "id": sample.id,
        "task": sample.task,
        "dataset": sample.dataset,
        "key": key,
        "tokens": tokens,
        "answers": answers,
        "tiles": sum(tiles),
        "tiles_per_image": tiles,
        "widths": [image.width for image in opened],
        "heights": [image.height for image in opened],
        "max_tiles": max_tiles,
        "augment": dataset.data_augment,
        "repeat": dataset.repeat,
        "file": sample.file,
        "line": sample.line,
    }
    return blob, row | place


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise Rejection("missing_image", path) from None
    except OSError as error:  # name too long, no permission, a failing disk
        raise Rejection("unreadable_image", f"{path}: {error.strerror}") from error
    if not data:
        raise Rejection("zero_size", f"{path} is empty")
    return data


def _header(data: bytes, path: str) -> Any:
    try:
        image = open_image(data)
    except ImageError as error:
        raise _image_rejection(error, path) from error
    if not image.width or not image.height:
        raise Rejection("zero_size", f"{path} has {image.width}×{image.height} pixels")
    return image


def _decode(data: bytes, path: str) -> None:
    try:
        decode_rgb(data)
    except ImageError as error:
        raise _image_rejection(error, path) from error


def _image_rejection(error: ImageError, path: str) -> Rejection:
    return Rejection("too_many_pixels" if error.bomb else "unreadable_image", f"{path}: {error}")
