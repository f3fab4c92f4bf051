"""One sample: from its source to the row and the bytes that are stored, or the reason why not.

Invariants: what the row says (tokens, supervised tokens, tiles) is what training will build, for the same
functions count it; no sample is truncated, a longer one is rejected; `verify: full` decodes every picture
once, so that damage is found here. Rules for tiles: recipe of arXiv 2412.05271 §3.1 and the official
`dynamic_preprocess` (one image: the dataset's limit; n images: max(1, limit // n) each; thumbnail on top); a video has
one tile per frame, and every number of frames from `min_frames` to `max_frames` that fits is written down.
"""

import errno
import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from modeling import files
from modeling.errors import DataError
from modeling.images import ImageError, decode_rgb, open_image
from modeling.meta import Dataset
from modeling.shards import pack_sample
from modeling.sources import Media, Reason, Rejected, Rejection, Sample
from modeling.template import encode_conversation, frame_token_counts
from modeling.tiles import count_tiles, tiles_per_image_limit
from modeling.video import VideoError, VideoInfo, frame_order, probe
from stages.params import ModelParams, PrepareParams
from stages.prepare.formats import MOST_BYTES

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}
OF_THE_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
FRAME_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


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
    frame_counts: range  # of a video
    verify: Literal["full", "header"]
    tile_tie: Literal["strict", "inclusive"]
    answers: bool = True  # without a supervised token a sample is refused


@dataclass
class Measured:
    """blob: the tar members. row: of the index, offsets relative to the blob. contents: the media, undecoded.

    digest: 16 hexadecimal digits of what it says and shows, wherever it comes from.
    """

    blob: bytes
    row: dict[str, Any]
    contents: list[bytes]
    digest: str
    first: int = 0  # of the frames of a video, which may be a clip of it


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
        frame_counts=range(params.min_frames, params.max_frames + 1),
        verify=params.verify,
        tile_tie=params.tile_tie,
    )


def measure_sample(sample: Sample, dataset: Dataset, measure: Measure, key: str) -> Measured:
    """Raises Rejection, and files.Unavailable where the store of its media gives no answer."""
    if sample.video:
        return _measure_video(sample, sample.video, dataset, measure, key)
    contents = [_read(media, dataset) for media in sample.images]
    opened = [_header(data, media.name) for data, media in zip(contents, sample.images)]
    max_tiles = dataset.max_tiles or measure.max_tiles
    limit = tiles_per_image_limit(max_tiles, max(1, len(opened)))
    tiles = [
        count_tiles(image.width, image.height, limit, tile_size=measure.tile_size, tie=measure.tile_tie)
        for image in opened
    ]
    _check_tiles(sum(tiles), measure)
    tokens, answers = _count(sample, tiles, measure, video=False)
    if measure.verify == "full":
        for data, media in zip(contents, sample.images):
            _decode(data, media.name)
    row = {
        "tokens": tokens,
        "answers": answers,
        "tiles": sum(tiles),
        "tiles_per_image": tiles,
        "widths": [image.width for image in opened],
        "heights": [image.height for image in opened],
        "max_tiles": max_tiles,
        "augment": dataset.data_augment,
    }
    names = [EXTENSIONS.get(image.format or "", (image.format or "").lower()) for image in opened]
    return _packed(sample, dataset, key, row, list(zip(names, contents)), [media.name for media in sample.images])


def _measure_video(sample: Sample, video: Media, dataset: Dataset, measure: Measure, key: str) -> Measured:
    if video.path.endswith("/"):
        names, contents, info, kind = *_frames(video, dataset, measure), "frames"
    else:
        contents, kind = [_read(video, dataset, "missing_video", "unreadable_video")], "file"
        suffix = os.path.splitext(video.name)[1].lstrip(".").lower()
        names = [suffix if re.fullmatch("[a-z0-9]{1,8}", suffix) else "mp4"]
        try:
            info = probe(contents[0], sample.clip, verify=measure.verify == "full")
        except VideoError as error:
            reason = "too_many_pixels" if error.bomb else "unreadable_video"
            raise Rejection(reason, f"{video.name}: {error}") from error
    allowed = [count for count in measure.frame_counts if count <= measure.max_tiles_per_sample]
    if not allowed:
        _check_tiles(measure.frame_counts[0], measure)
    try:
        lengths = frame_token_counts(
            sample.conversation, measure.tokenizer, measure.tokens_per_tile, allowed, measure.system
        )
    except ValueError as error:
        raise Rejection("placeholder_mismatch", str(error)) from error
    fitting = [length for length in lengths if length <= measure.max_tokens]
    if not fitting:
        raise _too_long(lengths[0], measure)
    count = allowed[len(fitting) - 1]
    tokens, answers = _count(sample, [1] * count, measure, video=True)
    assert tokens == fitting[-1], (sample.id, tokens, fitting)
    row = {
        "tokens": tokens,
        "answers": answers,
        "tiles": count,
        "tiles_per_image": [1] * count,
        "widths": [info.width],
        "heights": [info.height],
        "max_tiles": 1,
        "augment": False,
        "frames": info.frames,
        "frame_tokens": fitting,
        "min_frames": allowed[0],
    }
    about = {"kind": kind, "clip": sample.clip, "first": info.first, "frames": info.frames, "fps": info.fps}
    measured = _packed(sample, dataset, key, row, list(zip(names, contents)), [video.name], about)
    return replace(measured, first=info.first)


def _packed(
    sample: Sample, dataset: Dataset, key: str, row: dict[str, Any], media: list[tuple[str, bytes]], names: list[str],
    video: dict[str, Any] | None = None,
) -> Measured:  # fmt: skip
    record: dict[str, Any] = {
        "id": sample.id,
        "task": sample.task,
        "dataset": sample.dataset,
        "conversations": list(sample.conversation),
        "images": names,
    }
    if video:
        record["video"] = video
    blob, place = pack_sample(key, record, media)
    row = row | {
        "id": sample.id,
        "task": sample.task,
        "dataset": sample.dataset,
        "key": key,
        "repeat": dataset.repeat,
        "file": sample.file,
        "line": sample.line,
    }
    contents = [data for _, data in media]
    return Measured(blob, row | place, contents, content_digest(sample, contents))


def with_contents(sample: Sample, dataset: Dataset) -> Sample | Rejected:
    """The sample with its media's bytes, which take long to come from S3."""
    try:
        images = tuple(replace(media, data=_read(media, dataset)) for media in sample.images)
        video = sample.video
        if video and not video.path.endswith("/"):
            video = replace(video, data=_read(video, dataset, "missing_video", "unreadable_video"))
        return replace(sample, images=images, video=video)
    except Rejection as rejection:
        return Rejected.of(sample, rejection)


def content_digest(sample: Sample, contents: list[bytes]) -> str:
    said = json.dumps([list(sample.conversation), sample.clip], ensure_ascii=False, sort_keys=True).encode()
    digest = hashlib.sha256(said)
    for data in contents:
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()[:16]


def _count(sample: Sample, tiles: list[int], measure: Measure, video: bool) -> tuple[int, list[int]]:
    """(tokens, supervised tokens of each answer)."""
    try:
        encoded = encode_conversation(
            sample.conversation, measure.tokenizer, tiles, measure.tokens_per_tile, system=measure.system, video=video
        )
    except ValueError as error:  # roles and values were checked by the reader: only placeholders are left
        raise Rejection("placeholder_mismatch", str(error)) from error
    tokens = len(encoded.input_ids)
    if tokens > measure.max_tokens:
        raise _too_long(tokens, measure)
    answers = [end - start for start, end in encoded.answer_spans]
    if measure.answers and not sum(answers):
        raise Rejection("no_supervised_token", "nothing to learn from")
    return tokens, answers


def _check_tiles(tiles: int, measure: Measure) -> None:
    if tiles > measure.max_tiles_per_sample:
        raise Rejection("too_many_tiles", f"{tiles} tiles, at most {measure.max_tiles_per_sample} are allowed")


def _too_long(tokens: int, measure: Measure) -> Rejection:
    return Rejection("too_long", f"{tokens} tokens, at most {measure.max_tokens} are allowed")


def _frames(video: Media, dataset: Dataset, measure: Measure) -> tuple[list[str], list[bytes], VideoInfo]:
    """A folder of frames, in the order of their names."""
    found = files.inside(video.path.rstrip("/"), dataset.endpoint)
    paths = frame_order([path for path in found if os.path.splitext(path)[1].lower() in FRAME_FILES])
    if not paths:
        raise Rejection("missing_video", f"{video.name} is no folder with pictures")
    contents, total = [], 0
    for path in paths:
        contents.append(_read(Media(os.path.basename(path), path), dataset))
        total += len(contents[-1])
        if total > MOST_BYTES:
            raise Rejection("too_many_bytes", f"the frames of {video.name} are larger than {MOST_BYTES >> 30} GiB")
    opened = [_header(data, path) for data, path in zip(contents, paths)]
    if measure.verify == "full":
        for data, path in zip(contents, paths):
            _decode(data, path)
    names = [EXTENSIONS.get(image.format or "", (image.format or "").lower()) for image in opened]
    return names, contents, VideoInfo(len(paths), 0, 0.0, opened[0].width, opened[0].height)


def _read(
    media: Media, dataset: Dataset, missing: Reason = "missing_image", unreadable: Reason = "unreadable_image"
) -> bytes:
    data = media.data
    if data is None:
        try:
            data = files.read(media.path, dataset.endpoint, size=MOST_BYTES + 1)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise Rejection(missing, media.path) from None
        except PermissionError as error:
            if files.is_remote(media.path):  # of these workers, or it is missing and the keys may not list the bucket
                remedy = "give every worker keys that may read and list it"
                raise DataError(f"not readable: {error}", where=media.path, remedy=remedy) from error
            raise Rejection(unreadable, f"{media.path}: {error.strerror}") from error
        except OSError as error:
            if error.errno not in OF_THE_NAME:  # a mount that is gone, a failing disk: no sample's fault
                raise files.Unavailable(f"{media.path}: {error.strerror or error}") from error
            raise Rejection(unreadable, f"{media.path}: {error.strerror}") from error
    if not data:
        raise Rejection("zero_size", f"{media.path or media.name} is empty")
    if len(data) > MOST_BYTES:
        raise Rejection("too_many_bytes", f"{media.path or media.name} is larger than {MOST_BYTES >> 30} GiB")
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
