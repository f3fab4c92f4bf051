"""One record of a source: a Sample, or a Rejected with its reason.

Invariant: a record becomes exactly one of the two; nothing is dropped in silence, where the official code loses the
rest of a dataset after a few bad samples (OpenGVLab/InternVL `dataset_packed.py`). What is read: LLaVA and InternVL
`conversations` (`internvl_chat/internvl/train/internvl_chat_finetune.py`), OpenAI-style `messages`, and `texts`
pairs (messages.py). The same sample through any of them is the same Sample but for its names.
"""

import base64
import binascii
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from modeling import files
from modeling.messages import pairs_of, turns_of
from modeling.meta import Dataset

Reason = Literal[
    "bad_json",  # not JSON, or nested beyond reading
    "bad_member",  # an archive's member whose name is no plain one, or that is no file
    "broken_file",  # an archive or Parquet file that cannot be read beyond this place
    "bad_record",  # a row or an archive's sample without what makes it one
    "not_a_number",  # NaN or Infinity, which JSON does not have
    "invalid_utf8",  # bytes that are no UTF-8, or a lone surrogate
    "not_an_object",  # JSON, but not an object
    "bad_id",  # `id` neither text nor a whole number
    "missing_conversations",  # no `conversations` list
    "empty_conversation",  # a list without turns
    "bad_turn",  # a turn that is not {from, value} with text
    "unknown_role",  # `from` other than human, gpt, or system in first place
    "first_turn_not_human",
    "no_gpt_turn",
    "bad_image",  # `image` neither text nor a list of text
    "outside_root",  # a path that leaves the dataset's root
    "bad_video",  # `video` or `clip` is not what it should be
    "unsupported_video",  # several videos, or a video beside pictures
    "missing_video",
    "unreadable_video",  # damaged, or of a kind that is not opened
    "missing_image",
    "unreadable_image",  # not an image, truncated, or of a mode without RGB
    "zero_size",  # an empty file or a side of 0 pixels
    "too_many_bytes",
    "too_many_pixels",  # a decompression bomb
    "placeholder_mismatch",  # <image> placeholders and images differ in number
    "too_long",
    "too_many_tiles",
    "no_supervised_token",
    # curation (stages/curation.py): what a step found in a sample that is whole
    "abnormal_length",
    "repetition",  # n-grams that come again and again
    "zero_run",  # a long run of zeros, or of another character
    "duplicate_lines",
    "odd_characters",
    "control_tokens",  # text that breaks the chat template
    "odd_shape",  # a picture too small or too long to show anything
    "duplicate",
    "near_duplicate",
    "contaminated",  # in an evaluation set
    "low_quality",  # by a language model
    "repetitive",  # by a language model
    "not_scored",  # the scorer gave no answer that can be read
    "review",  # by a person
]

DETAIL_CHARACTERS = 300
LONGEST_S = 1e7  # seconds of a video
VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp")


class Rejection(Exception):
    """Raised inside reading and measuring one sample; turned into a Rejected where the sample's place is known."""

    def __init__(self, reason: Reason, detail: str = ""):
        super().__init__(reason, detail)
        self.reason: Reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Media:
    """A picture or a video. name: as its record gives it. It lies at `path` (which may not exist), or is `data`."""

    name: str
    path: str = ""
    data: bytes | None = None


@dataclass(frozen=True)
class Sample:
    """One record. `line` counts from 1: a line, the place in a list, a row, or a sample of an archive.

    video: a file, or a folder of frames where its path ends with '/'; then there are no images. clip: [start, end) in
    seconds.
    """

    id: str
    task: str
    dataset: str
    file: str
    line: int
    conversation: tuple[dict[str, str], ...]  # {from: human|gpt|system, value}
    images: tuple[Media, ...] = ()
    video: Media | None = None
    clip: tuple[float, float] | None = None

    @property
    def type(self) -> str:
        if self.video:
            return "video"
        return ("text", "image")[len(self.images)] if len(self.images) < 2 else "multi_image"


@dataclass(frozen=True)
class Rejected:
    """A sample that will not be trained on: where it stands, why, and what was found there."""

    dataset: str
    file: str
    line: int
    id: str
    reason: Reason
    detail: str

    @classmethod
    def of(cls, source: Sample, rejection: Rejection) -> "Rejected":
        detail = rejection.detail[:DETAIL_CHARACTERS]
        return cls(source.dataset, source.file, source.line, source.id, rejection.reason, detail)


def read_samples(dataset: Dataset) -> Iterator[Sample | Rejected]:
    """Every non-blank line of a dataset's .jsonl files, in order."""
    for path in dataset.annotations:
        with files.opened(path, dataset.endpoint) as file:
            for number, raw in enumerate(file, 1):
                if raw.strip():
                    yield parse_line(dataset, number, raw, dataset.told(path))


def parse_line(dataset: Dataset, line: int, raw: bytes, file: str = "") -> Sample | Rejected:
    """One line of JSON (raw bytes) as a Sample, or as a Rejected with the reason. line: counts from 1."""
    file = file or dataset.file
    try:
        data = parse_json(raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw)
    except Rejection as rejection:
        return rejected(dataset, line, f"{dataset.name}-{line}", rejection, file)
    return parse_record(dataset, line, data, file)


def parse_record(
    dataset: Dataset,
    line: int,
    data: dict[str, Any],
    file: str = "",
    embedded: Sequence[Media] = (),
    answers: bool = True,
    paths: bool = True,
) -> Sample | Rejected:
    """A record as a Sample, or as a Rejected. embedded: media that came with it (an archive's members), which stand for
    those that it names. answers: there must be one. paths: media may be named by path; not in a file that holds them.
    """
    id, file = f"{dataset.name}-{line}", file or dataset.file
    try:
        given = data.get("id")
        if given is not None:
            if isinstance(given, bool) or not isinstance(given, str | int):
                raise Rejection("bad_id", f"`id` is {given!r}: give text or a whole number")
            id = str(given)
        turns, named = _turns(data)
        conversation = _conversation(turns, answers)
        videos = [one for one in embedded if _is_video(one.name, data)]
        pictures = tuple(one for one in embedded if one not in videos)
        root = dataset.root if paths else None
        images = pictures if embedded else _images(data, named, root)
        video, clip = _video(data, named, root, videos)
        if video and images:
            raise Rejection("unsupported_video", "a sample has pictures or a video, not both")
        human = "".join(turn["value"] for turn in conversation if turn["from"] == "human")
        if images and "<video>" in human and "<image>" not in human:
            raise Rejection("unsupported_video", "<video> stands where <image> is expected")
        task = data.get("task")
        task = task if isinstance(task, str) and task else dataset.name
        names = [one.name for one in (*images, *([video] if video else []))]
        for text in (id, task, *names, *(turn["value"] for turn in conversation)):
            _check_text(text)
        return Sample(id, task, dataset.name, file, line, conversation, images, video, clip)
    except Rejection as rejection:
        return rejected(dataset, line, id, rejection, file)


def rejected(dataset: Dataset, line: int, id: str, rejection: "Rejection", file: str = "") -> "Rejected":
    """Its texts made safe to write as UTF-8."""
    id = id.encode("utf-8", "backslashreplace").decode()
    detail = rejection.detail.encode("utf-8", "backslashreplace").decode()[:DETAIL_CHARACTERS]
    return Rejected(dataset.name, file or dataset.file, line, id, rejection.reason, detail)


def parse_json(raw: bytes) -> dict[str, Any]:
    """An object of JSON. Raises Rejection."""

    def constant(name: str) -> None:
        raise Rejection("not_a_number", f"{name} is not JSON")

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise Rejection("not_a_number", f"{text} is beyond a float")
        return value

    try:
        data = json.loads(raw.decode("utf-8"), parse_constant=constant, parse_float=number)
    except UnicodeDecodeError as error:
        raise Rejection("invalid_utf8", str(error)) from None
    except (ValueError, RecursionError) as error:
        raise Rejection("bad_json", str(error)) from None
    if not isinstance(data, dict):
        raise Rejection("not_an_object", f"found a {type(data).__name__}: write one JSON object per line")
    return data


def media_named(data: dict[str, Any]) -> list[str]:
    """The paths of pictures and videos that a record names, right or wrong."""
    named = turns_of(data["messages"]) if isinstance(data.get("messages"), list) else ([], [])
    given: list[Any] = [] if isinstance(named, str) else [one for _, one in named[1]]
    for key in ("image", "images", "video", "videos"):
        value = data.get(key)
        given += value if isinstance(value, list) else [value]
    given = [one.get("path", one.get("url")) if isinstance(one, dict) else one for one in given]
    return [
        one for one in given if isinstance(one, str) and one and not one.startswith(("data:", "http://", "https://"))
    ]


def _turns(data: dict[str, Any]) -> tuple[Any, list[tuple[str, Any]]]:
    """Turns as {from, value}, and the media that stand inside them: (image | video, what is given)."""
    if "messages" in data and not isinstance(data.get("conversations"), list):
        found = turns_of(data["messages"])
    elif "texts" in data and not isinstance(data.get("conversations"), list):
        found = pairs_of(data["texts"], data)
    else:
        return data.get("conversations"), []
    if isinstance(found, str):
        raise Rejection("bad_turn", found)
    return found


def _conversation(turns: Any, answers: bool) -> tuple[dict[str, str], ...]:
    if not isinstance(turns, list):
        raise Rejection("missing_conversations", "`conversations` (or `messages`) must be a list")
    if not turns:
        raise Rejection("empty_conversation", "`conversations` has no turn")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise Rejection("bad_turn", f"turn {number} must be {{from, value}} with text, found {turn!r}")
        role = turn.get("from")
        if role not in ("human", "gpt") and not (role == "system" and number == 1):
            raise Rejection("unknown_role", f"turn {number} is from {role!r}: human, gpt, or system in first place")
    dialogue = turns[1:] if turns[0]["from"] == "system" else turns
    if not dialogue or dialogue[0]["from"] != "human":
        raise Rejection("first_turn_not_human", "a conversation starts with a human turn (after a system turn)")
    if answers and all(turn["from"] != "gpt" for turn in dialogue):
        raise Rejection("no_gpt_turn", "nothing to learn from: no turn is from gpt")
    return tuple({"from": turn["from"], "value": turn["value"]} for turn in turns)


def _images(data: dict[str, Any], named: list[tuple[str, Any]], root: str | None) -> tuple[Media, ...]:
    """Official order of tests: a non-empty `image`, then `video`, else text only. `images` is another name of it."""
    inside = [given for kind, given in named if kind == "image"]
    key = next((key for key in ("image", "images") if data.get(key) not in (None, "", [])), None)
    if key and inside:
        raise Rejection("bad_image", f"pictures stand both in `messages` and in `{key}`: give them once")
    given = data[key] if key else inside
    items = given if isinstance(given, list) else [given]
    return tuple(_media(item, "bad_image", root, f"{key or 'picture'} {i}") for i, item in enumerate(items, 1))


def _video(
    data: dict[str, Any], named: list[tuple[str, Any]], root: str | None, embedded: list[Media]
) -> tuple[Media | None, tuple[float, float] | None]:
    inside = [given for kind, given in named if kind == "video"]
    if any(data.get(key) not in (None, "", []) for key in ("image", "images")) and not embedded and not inside:
        return None, None  # the official order: `video` is not looked at
    given = data.get("video") or data.get("videos") or []
    items = [*(given if isinstance(given, list) else [given]), *inside]
    found = embedded or [_media(item, "bad_video", root, "video") for item in items]
    if len(found) > 1:
        raise Rejection("unsupported_video", f"{len(found)} videos in one sample: give one")
    if not found:
        return None, None
    clip = data.get("clip")
    if clip is not None and found[0].path.endswith("/"):
        raise Rejection("bad_video", "`clip` is in seconds, of which a folder of frames knows nothing: leave it out")
    if clip is None:
        return found[0], None
    numbers = isinstance(clip, list) and len(clip) == 2 and all(type(one) in (int, float) for one in clip)
    if not numbers or not 0 <= clip[0] < clip[1] < LONGEST_S:
        raise Rejection("bad_video", f"`clip` must be [start, end] in seconds, found {clip!r}")
    return found[0], (float(clip[0]), float(clip[1]))


def _is_video(name: str, data: dict[str, Any]) -> bool:
    """A member of an archive; a GIF is a picture unless its record calls it a video."""
    suffix = os.path.splitext(name)[1].lower() or f".{name.lower()}"
    return suffix in VIDEOS or (suffix == ".gif" and bool(data.get("video")))


def _media(given: Any, reason: Reason, root: str | None, name: str) -> Media:
    """A path, a data: URL, {path}, {bytes, path} (Hugging Face), {url} (OpenAI). root: None where no path may stand."""
    if isinstance(given, dict):
        if isinstance(given.get("bytes"), bytes):
            path = given.get("path")
            return Media(path if isinstance(path, str) and path else name, data=given["bytes"])
        if "bytes" in given:
            raise Rejection(reason, f"{name} has no bytes (path {given.get('path')!r}): embed them in the file")
        given = given.get("path", given.get("url"))
    if isinstance(given, bytes):
        return Media(name, data=given)
    if not isinstance(given, str) or not given:
        raise Rejection(reason, f"{name} must be a path, found {str(given)[:80]!r}")
    if given.startswith("data:"):
        head, _, body = given.partition(",")
        try:
            if not head.endswith(";base64"):
                raise ValueError("not base64")
            return Media(name, data=base64.b64decode(body, validate=True))
        except (ValueError, binascii.Error) as error:
            raise Rejection(reason, f"{name} is no data: URL that can be read: {error}") from None
    if given.startswith(("http://", "https://")):
        raise Rejection(reason, f"{given} is on the web: download it and give its path")
    if root is None:
        raise Rejection(reason, f"{given[:100]!r} is a path: rows and archives hold their media themselves")
    return Media(given, path=media_path(root, given, reason))


def media_path(root: str, name: str, reason: Reason = "bad_image") -> str:
    """`name` below `root`, as an absolute path; Rejection where it is no path inside `root`."""
    if "\0" in name:
        raise Rejection(reason, f"{name!r} is not a path")
    path = files.join(root, name)
    if not path.startswith(root.rstrip("/") + "/"):
        raise Rejection("outside_root", f"{name!r} is outside the dataset's root: widen `root` in the meta file")
    return path + "/" if name.endswith("/") else path


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Rejection("invalid_utf8", f"a lone surrogate at character {error.start}") from None
