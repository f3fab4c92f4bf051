"""The chat template `internvl2_5` and its label mask: from a conversation to ids and labels.

Invariant: ids and labels equal those of the official `preprocess_internvl2_5` and of the dataset code around it
(OpenGVLab/InternVL, commit 2410d1dbf208). Each turn is tokenised on its own, so no token crosses a turn's border;
only answers and their `<|im_end|>` are supervised; truncation cuts the right end after concatenation. Image tokens
are inserted as ids: one `<IMG_CONTEXT>` per image is tokenised and then repeated, which is the same because special
tokens split the text.

Kept from the official code: special tokens typed in a text become control tokens; `<image>` in an answer or a system
turn stays text; a sample without any answer is accepted; a missing placeholder of a single image or a video is put
in front of the first turn only if that is a human one, otherwise the sample is refused.
Refused here, accepted there (each makes text and pictures disagree, or hides a mistake in the data): more
placeholders than images, also in a text-only sample; a video whose image tokens are truncated; `<IMG_CONTEXT>` typed
in a text. And a placeholder counts in any human turn, where the official code looks at the first turn alone and so
puts a second one there, even into a system turn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SPECIAL_TOKENS = (
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)
IMG_START, IMG_END, IMG_CONTEXT = SPECIAL_TOKENS[:3]
IMAGE = "<image>"
VIDEO = "<video>"
IGNORE = -100

DEFAULT_SYSTEM = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)

_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
_ASSISTANT = "<|im_start|>assistant\n"

Conversation = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Encoded:
    """One sample: input_ids and labels of equal length (-100 where not supervised, unshifted).

    answer_spans: the supervised [start, end) of each response, in order; a truncated one is shorter or absent.
    """

    input_ids: list[int]
    labels: list[int]
    answer_spans: list[list[int]]


def encode_conversation(
    conversation: Conversation,
    tokenizer: Any,
    tiles_per_image: Sequence[int],
    tokens_per_tile: int,
    max_length: int | None = None,
    *,
    system: str | None = None,
    video: bool | None = None,
) -> Encoded:
    """Encode one training sample of {"from": system|human|gpt, "value": text} turns.

    tiles_per_image: tiles of each image in order, thumbnail included; for a video 1 per frame; empty for text.
    tokens_per_tile: image tokens of one tile (256 at 448 pixels). max_length: in tokens; None does not truncate.
    system: the system prompt where the conversation has none; None is the official one.
    video: whether the images are the frames of a video; None: if a human turn has `<video>` and none has `<image>`.

    Raises ValueError where placeholders and images do not match, truncation would cut image tokens, or a turn is not
    one of the template's.
    """
    turns = _turns(conversation, len(tiles_per_image), system, video)
    segments, header = _tokenise(turns, tokenizer, tiles_per_image, tokens_per_tile)
    ids: list[int] = _bos(tokenizer)
    spans: list[list[int]] = []
    for (role, _), segment in zip(turns, segments, strict=True):
        if role == "gpt":  # neither the header nor the newline after <|im_end|> is supervised
            spans.append([len(ids) + len(header), len(ids) + len(segment) - 1])
        ids += segment
    if max_length is not None and len(ids) > max_length:
        ids = ids[:max_length]
        spans = [[start, min(end, max_length)] for start, end in spans if start < max_length]
    images, ends = len(tiles_per_image), ids.count(tokenizer.convert_tokens_to_ids(IMG_END))
    if images and ends < images:
        raise ValueError(f"image tokens are truncated: only {ends} of {images} images fit {max_length} tokens")
    if images and ends > images:
        raise ValueError(f"a text holds {IMG_END}, which ends an image: {ends} found for {images} images")
    labels = [IGNORE] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return Encoded(ids, labels, spans)


def frame_token_counts(
    conversation: Conversation, tokenizer: Any, tokens_per_tile: int, counts: Sequence[int], system: str | None = None
) -> list[int]:
    """The length of a video's sample with each of these numbers of frames, in tokens, from one tokenisation.

    Each frame ends with a control token, so that its `Frame-7: ` is tokenised alike whatever follows.
    Raises ValueError as `encode_conversation` does.
    """
    most = max(counts)
    ids = encode_conversation(
        conversation, tokenizer, [1] * most, tokens_per_tile, system=system, video=True
    ).input_ids  # fmt: skip
    end = tokenizer.convert_tokens_to_ids(IMG_END)
    ends = [place for place, token in enumerate(ids) if token == end]
    return [len(ids) - (ends[-1] - ends[count - 1]) for count in counts]


def encode_prompt(
    conversation: Conversation,
    tokenizer: Any,
    tiles_per_image: Sequence[int],
    tokens_per_tile: int,
    system: str | None = None,
    *,
    video: bool | None = None,
) -> list[int]:
    """The ids to generate from: as in training, then the assistant's header. The last turn must be human.

    Raises ValueError as `encode_conversation` does.
    """
    turns = _turns(conversation, len(tiles_per_image), system, video)
    if turns[-1][0] != "human":
        raise ValueError(f"a prompt ends with a human turn, found {turns[-1][0]!r}")
    segments, header = _tokenise(turns, tokenizer, tiles_per_image, tokens_per_tile)
    return [*_bos(tokenizer), *(token for segment in segments for token in segment), *header]


def _turns(conversation: Conversation, images: int, system: str | None, video: bool | None) -> list[tuple[str, str]]:
    """Checked (role, text) turns, system first, human ones with exactly `images` placeholders."""
    turns = []
    for index, turn in enumerate(conversation):
        role, text = turn.get("from"), turn.get("value")
        if role not in _ROLES:
            raise ValueError(f"turn {index}: unknown role {role!r}, expected system, human or gpt")
        if role == "system" and index > 0:
            raise ValueError(f"turn {index}: a system turn can only come first")
        if not isinstance(text, str):
            raise ValueError(f"turn {index}: the value must be text, found {type(text).__name__}")
        if IMG_CONTEXT in text:
            raise ValueError(f"turn {index}: {IMG_CONTEXT} stands for pictures and cannot be part of a text")
        turns.append((role, text))
    if not turns:
        raise ValueError("the conversation has no turns")
    turns = _place(turns, images, video)
    found = sum(text.count(IMAGE) for role, text in turns if role == "human")
    if found != images:
        more = "more" if found > images else "fewer"
        raise ValueError(f"{more} placeholders than images: {found} {IMAGE} in human turns, {images} images")
    if turns[0][0] != "system":
        turns.insert(0, ("system", DEFAULT_SYSTEM if system is None else system))
    return turns


def _place(turns: list[tuple[str, str]], images: int, video: bool | None) -> list[tuple[str, str]]:
    """Expand the video placeholder, and put one in front where a single image or a video has none."""
    if images == 0:
        return turns
    human = [text for role, text in turns if role == "human"]
    has_image = any(IMAGE in text for text in human)
    has_video = any(VIDEO in text for text in human)
    if video is None:
        video = has_video and not has_image
    missing = not has_video if video else images == 1 and not has_image
    role, text = turns[0]
    if missing and role == "human":
        turns = [(role, f"{VIDEO if video else IMAGE}\n{text}"), *turns[1:]]
    if not video:
        return turns
    frames = "".join(f"Frame-{frame + 1}: {IMAGE}\n" for frame in range(images))
    return [(role, text.replace(f"{VIDEO}\n", frames) if role == "human" else text) for role, text in turns]


def _tokenise(
    turns: list[tuple[str, str]], tokenizer: Any, tiles_per_image: Sequence[int], tokens_per_tile: int
) -> tuple[list[list[int]], list[int]]:
    """The ids of each turn, every image's context token repeated as often as it has tokens; and of the header."""
    texts = []
    for role, text in turns:
        if role == "human":
            text = text.replace(IMAGE, f"{IMG_START}{IMG_CONTEXT}{IMG_END}")
        texts.append(f"<|im_start|>{_ROLES[role]}\n{text}<|im_end|>\n")
    *segments, header = tokenizer([*texts, _ASSISTANT], add_special_tokens=False).input_ids
    if not tiles_per_image:
        return segments, header
    if tokens_per_tile < 1 or min(tiles_per_image) < 1:
        raise ValueError(f"tokens_per_tile {tokens_per_tile} and tiles {list(tiles_per_image)} must be at least 1")
    context = tokenizer.convert_tokens_to_ids(IMG_CONTEXT)
    if sum(segment.count(context) for segment in segments) != len(tiles_per_image):
        raise ValueError(f"the tokenizer does not know {IMG_CONTEXT}: add template.SPECIAL_TOKENS to it")
    tiles = iter(tiles_per_image)
    for index, segment in enumerate(segments):
        if context in segment:
            expanded = []
            for token in segment:
                expanded += [token] * (next(tiles) * tokens_per_tile) if token == context else [token]
            segments[index] = expanded
    return segments, header


def _bos(tokenizer: Any) -> list[int]:
    """One BOS for the tokenizers that want it (InternLM), none for the others (Qwen)."""
    if not getattr(tokenizer, "add_bos_token", False):
        return []
    if tokenizer.bos_token_id is None:
        raise ValueError("the tokenizer asks for a BOS token (add_bos_token) but has none")
    return [tokenizer.bos_token_id]
