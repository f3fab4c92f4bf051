"""Greedy answers to questions about images, by transformers' own generate: what `ask`, `evaluate` and users share.

A prompt is built exactly as in training (template.py, tiles.py). Batches are padded on the left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from modeling.template import encode_prompt
from modeling.tiles import Tie, split_image, tiles_per_image_limit, to_pixels


@dataclass(frozen=True)
class Question:
    """conversation: {from, value} turns ending with a human one; images: RGB, in the order of the placeholders.

    video: the images are the frames of one.
    """

    conversation: Sequence[dict[str, str]]
    images: Sequence[Image.Image]
    max_tiles: int = 12
    tile_tie: Tie = "strict"
    video: bool = False


def device() -> torch.device:
    """Where to answer: the accelerator this process sees (Ray shows a worker those it asked for), else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def encode_question(question: Question, tokenizer, config, system: str | None) -> tuple[list[int], torch.Tensor | None]:
    """(input ids, pixels [tiles, 3, S, S] or None). config: the model's InternVLConfig."""
    size = config.vision_config.image_size[0]
    limit = 1 if question.video else tiles_per_image_limit(question.max_tiles, max(1, len(question.images)))
    split = [
        split_image(image.convert("RGB"), limit, tile_size=size, tie=question.tile_tie) for image in question.images
    ]
    ids = encode_prompt(
        question.conversation, tokenizer, [len(tiles) for tiles in split], config.image_seq_length, system=system,
        video=question.video or None,
    )  # fmt: skip
    return ids, to_pixels([tile for tiles in split for tile in tiles]) if split else None


KEPT = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")  # special tokens that are part of an answer


def texts_of(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """Generated tokens as text: marks of regions stay, other special tokens go, blanks around it are stripped."""
    kept = {tokenizer.convert_tokens_to_ids(mark) for mark in KEPT}
    gone = set(tokenizer.all_special_ids) - kept
    rows = [[token for token in row if token not in gone] for row in rows]
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=False)]


@torch.inference_mode()
def answer(
    model: Any, tokenizer: Any, questions: Sequence[Question], *, system: str | None, max_new_tokens: int = 64
) -> list[str]:
    """Greedy answers as text (texts_of)."""
    encoded = [encode_question(question, tokenizer, model.config, system) for question in questions]
    longest = max(len(ids) for ids, _ in encoded)
    pad = tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids, _ in encoded])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in encoded])
    pixels = [tiles for _, tiles in encoded if tiles is not None]
    where = next(model.parameters()).device
    # the library takes a pixel_values of None for a picture
    images = {"pixel_values": torch.cat(pixels).to(where, model.dtype)} if pixels else {}
    output = model.generate(
        input_ids=input_ids.to(where), attention_mask=mask.to(where), **images,
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=pad,
    )  # fmt: skip
    return texts_of(tokenizer, output[:, longest:].tolist())
