"""What an evaluation asks: the rows of prepared data and the items of sets, each with every prompt, as small as a task
needs them.

Invariant: `content` says what is asked (whatever a picture or a text of it changes, it changes), so answers kept under
it may be given to any other stage that asks the same. Pictures stay where they are until a worker opens them.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from modeling.errors import DataError
from modeling.generate import Question
from modeling.shards import ShardReader
from modeling.tiles import Tie, frame_indices, split_image
from stages.evaluate.extract import extract
from stages.evaluate.items import Item, Media
from stages.evaluate.prompts import asked
from stages.evaluate.readers import read_set, set_digest
from stages.evaluate.records import METRIC_OF
from stages.evaluation import Answers, EvalSet, Prompt
from stages.io import Input, StageIO
from stages.plan_packs import parent

DIRECT = "direct"
LONG = 1024  # tokens of an answer that is thought out
OPTION = re.compile(r"^\(?([A-Z])[.):] *(\S.*)$", re.MULTILINE)
SHORT = {"box": 100, "text": 100}  # of a direct one, by kind, as in the official code (DocVQA, RefCOCO); others: 16


@dataclass(frozen=True)
class Asked:
    """One question in one form. key: names it for its draws. variant: the prompt, and the frames of a video. size: what
    it is sorted by, so that neighbours are of like length; tiles: at most. row: of prepared data."""

    key: str
    content: str
    item: Item
    variant: str
    text: str
    system: str | None
    size: int
    tiles: int
    row: int | None = None
    frames: int | None = None
    tile_tie: Tie = "strict"
    endpoint: str | None = None  # of its s3:// pictures


def all_asked(io: StageIO) -> Iterator[tuple[Asked, str]]:
    """Every question in every form, and the name of its prompt. Raises as readers do."""
    items = [*_prepared(io), *_of_sets(io)]
    _check_tasks(io, items)
    for name, prompt in io.params.prompts.items():
        for one in items:
            given = prompt
            if one.row is not None and prompt.suffix is None and name == DIRECT:
                given = Prompt(suffix="")  # prepared questions say themselves what they want
            text = asked(one.item, name, given)
            for frames in _frames(io, one):
                variant = name if frames is None else f"{name}, {frames} frames"
                yield replace(one, variant=variant, text=text, frames=frames, tiles=frames or one.tiles), name


def _check_tasks(io: StageIO, items: Sequence[Asked]) -> None:
    """Rows of two origins would be one row of a table; answers to a task that nobody asks are a slip of the pen."""
    origins: dict[str, set[str]] = {}
    for one in items:
        origin = "prepared data" if one.row is not None else one.key.split("/", 1)[0]
        origins.setdefault(one.item.task, set()).add(origin)
    for task, found in origins.items():
        if len(found) > 1:
            raise DataError(f"the task '{task}' comes from {' and from '.join(sorted(found))}",
                            where=f"stages.{io.stage}", remedy="give the set, or the task, another name")  # fmt: skip
    prepared = {one.item.task for one in items if one.row is not None}
    for task in io.params.answers:
        if task not in prepared:
            raise DataError(f"no prepared question is of the task '{task}'", where=f"stages.{io.stage}.answers",
                            remedy=f"the tasks are {', '.join(sorted(prepared)) or 'none'}")  # fmt: skip


def options_of(question: str) -> dict[str, str]:
    """Of a choice as prepared data write it: lines "A. text" or "(A) text", from A on without a gap; else none."""
    found = dict(OPTION.findall(question))
    letters = [chr(ord("A") + i) for i in range(len(found))]
    return found if len(found) > 1 and list(found) == letters else {}


def longest(params: Any, name: str, asked: Sequence[Asked]) -> int:
    """Tokens that an answer to a prompt may have."""
    given = params.prompts[name].max_new_tokens
    if given is None and name != DIRECT:
        return LONG
    of_kinds = max((SHORT.get(one.item.kind, 0) for one in asked if one.row is None), default=0)
    return given or max(params.max_new_tokens, of_kinds)


def _prepared(io: StageIO) -> Iterator[Asked]:
    data = parent(io, "prepare")
    if data is None:
        return
    reader, counts = ShardReader(data.folder), {}
    system = io.sources[data.params["data"]].system
    for row in range(len(reader)):
        task = reader.index["task"][row]
        counts[task] = counts.get(task, 0) + 1
        if io.params.limit is not None and counts[task] > io.params.limit:
            continue
        *turns, question, last = reader.conversation(row)
        answers = io.params.answers.get(task, Answers())
        options = options_of(question["value"]) if answers.kind == "choice" else {}
        reference = last["value"]
        if options:
            reference = extract(reference, "choice", options) or reference
        item = Item(
            reader.index["id"][row], task, question["value"], answers.kind, answers.metric or METRIC_OF[answers.kind],
            (reference,), options, max_tiles=int(reader.index["max_tiles"][row]), history=tuple(turns),
        )  # fmt: skip
        yield Asked(
            f"{item.id}/{row}", f"{data.fingerprint}/{row}", item, "", "", system, int(reader.index["tokens"][row]),
            int(reader.index["tiles"][row]), row, tile_tie=data.params["tile_tie"],
        )  # fmt: skip


def _of_sets(io: StageIO) -> Iterator[Asked]:
    for name in io.params.sets:
        params: EvalSet = io.sets[name]
        found, planned = set_digest(params), io.digests.get(name)
        if planned is not None and found != planned:
            raise DataError("was edited after the run was planned", where=f"eval.{name}: {params.path}",
                            remedy="run again: it is then another set, and asked anew")  # fmt: skip
        digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
        counts: dict[str, int] = {}
        for item in read_set(name, params):
            counts[item.task] = counts.get(item.task, 0) + 1
            if io.params.limit is None or counts[item.task] <= io.params.limit:
                tiles = item.max_tiles if item.images else 0
                size = len(item.question) + 1024 * len(item.images)
                yield Asked(
                    f"{name}/{item.id}", f"{digest}/{item.id}", item, "", "", params.system, size, tiles,
                    endpoint=params.endpoint_url,
                )  # fmt: skip


def _frames(io: StageIO, one: Asked) -> Sequence[int | None]:
    if one.item.video is None:
        return [None]
    name = one.key.split("/", 1)[0]
    return io.sets[name].frames


def opened(one: Asked, data: Callable[[], Path] | None, side: int) -> Question:
    """With its pictures decoded. side: pixels of a tile. Raises DataError that names the item."""
    turns = [*one.item.history, {"from": "human", "value": one.text}]
    if one.row is not None:
        assert data is not None, "a row of prepared data comes with its folder"
        reader = _reader(str(data()))
        _, images = reader.sample(one.row, side)
        return Question(turns, images, one.item.max_tiles, one.tile_tie, bool(reader.index["frames"][one.row]))
    from modeling.images import ImageError, decode_rgb
    from modeling.video import VideoError

    try:
        if one.item.video is not None:
            return Question(turns, _frames_of(one, side), one.item.max_tiles, one.tile_tie, True)
        images = [decode_rgb(_bytes(picture, one.endpoint)) for picture in one.item.images]
    except ConnectionError:  # the store's fault, which passes
        raise
    except (OSError, ImageError, VideoError) as error:
        remedy = "mend the file, or take the item out of the set; it has to be there on every node"
        raise DataError(f"cannot be read: {error}", where=f"{one.item.task}: {one.key}", remedy=remedy) from error
    return Question(turns, images, one.item.max_tiles, one.tile_tie)


def _frames_of(one: Asked, side: int) -> list[Any]:
    """The middle frames of a video, or of a folder of its frames, as tiles."""
    from modeling import files
    from modeling.images import decode_rgb
    from modeling.video import VideoError, frame_order, probe, read_frames

    video, count = one.item.video, one.frames
    assert video is not None and count is not None, "a video is asked with a number of frames"
    if isinstance(video, str) and video.endswith("/"):
        names = frame_order(files.inside(video.rstrip("/"), one.endpoint))
        if not names:
            raise VideoError("the folder has no frames")
        chosen = [names[i] for i in frame_indices(count, len(names))]
        return [split_image(decode_rgb(files.read(name, one.endpoint)), 1, tile_size=side)[0] for name in chosen]
    data = _bytes(video, one.endpoint)
    return read_frames(data, frame_indices(count, probe(data).frames), side)


def _bytes(media: Media, endpoint: str | None) -> bytes:
    from modeling import files

    return media if isinstance(media, bytes) else files.read(media, endpoint)


@lru_cache(maxsize=2)
def _reader(folder: str) -> ShardReader:
    return ShardReader(folder)


def checkpoints(io: StageIO) -> list[Input]:
    """The trained stages that are asked, in the order of `needs`."""
    return [item for item in io.inputs.values() if item.kind == "train" and item.name not in io.params.lent]
