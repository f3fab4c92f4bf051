"""Tokenizers built from nothing: for the tiny models, the tests and the quickstart, with no download; and those of
model folders.

Invariant: every text survives (decode(encode(x)) == x: byte-level BPE knows every byte), special tokens are matched
anywhere and never stripped, each digit is one token, and the result depends on this file alone: the merges are
learned here, with ties broken by the pair itself, not by a library whose order may change.
"bytes" has no merges: the tokenizer of the golden template cases. The nine image tokens keep the official order.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling.errors import CheckpointError
from modeling.template import SPECIAL_TOKENS

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

NAMES = ("bytes", "tiny-bpe")
PAD, UNK, EOS = "<pad>", "<unk>", "<|im_end|>"
CONTROL_TOKENS = (PAD, UNK, "<|im_start|>", EOS)
MERGES = 144  # with 256 bytes and 13 special tokens: 413 ids

# The words of the template first, then those of the quickstart's tasks, then the commonest English.
CORPUS = (
    8 * "system\nuser\nassistant\nWhich\n"
    + """
Image-1: Image-2: Image-3: Image-4: Frame-1: Frame-2:
Which digit is larger? Which digit is smaller? Which image shows the larger digit? Which image has the larger digit?
Read the digit. Read the digits. Read the digit in the image. Read the digits in the image from left to right.
Read the row of digits. Read this number. What digit is this? What digit is shown? What is the digit in the image?
The digit is larger than the digit. The digit in the first image is larger. The digit in the second image is larger.
The image shows the digit. This is the digit. The number in the image is shown. The digits in the row are shown.
Compare the two images. Compare the digits. Are the digits equal? The first is larger. The second is larger. Both.
Answer with one digit. Answer with one word. Answer the question. The answer is. yes no Yes No first second both equal
zero one two three four five six seven eight nine ten zero one two three four five six seven eight nine ten
counting from up down to: comes after before between plus minus and equals the next number is the sum of
You are a helpful assistant. Describe the image in detail. A picture of a handwritten digit. handwritten number
the of and to in is that it for was on are as with his they at be this from have or by one had not but what all were
when we there can an your which their said if do will each about how up out them then she many some so these would
"""
)


def build_tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """The tokenizer called `name`: "bytes" (269 ids) or "tiny-bpe" (413 ids). ValueError for another name.

    Saved with save_pretrained it is read back the same by AutoTokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if name not in NAMES:
        raise ValueError(f"unknown tokenizer {name!r}: choose one of {', '.join(NAMES)}")
    if name == "bytes":
        splitter, merges = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), []
    else:
        splitter = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        merges = _learn_merges(splitter)
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = splitter  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    special = [AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS + SPECIAL_TOKENS]
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )


FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def read_tokenizer(folder: Path, config: Mapping[str, Any] | None = None) -> Any:
    """The tokenizer of a model folder, None where it has none. It ends an answer with `<|im_end|>`, where it knows it.

    config: the language model's, which names the pad token where the folder has a tokenizer.json alone. Raises
    CheckpointError for a tokenizer that cannot be read, or only by running code that comes with it.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not any((folder / name).is_file() for name in FILES):
        return None
    try:
        if (folder / "tokenizer_config.json").is_file() or not (folder / "tokenizer.json").is_file():
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        else:
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
            pad = (config or {}).get("pad_token_id")
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad) if pad is not None else None
    except Exception as error:  # whatever the library meets in files that others wrote
        raise CheckpointError(
            f"the tokenizer cannot be read: {error}", where=str(folder),
            remedy="take another folder's, with a tokenizer.json that needs no code of its own",
        ) from error  # fmt: skip
    if EOS in tokenizer.get_vocab():
        tokenizer.eos_token = EOS
    return tokenizer


def _learn_merges(splitter: "PreTokenizer") -> list[tuple[str, str]]:
    """The MERGES commonest pairs of CORPUS, one after the other, as byte-pair encoding does."""
    words = Counter(piece for line in CORPUS.splitlines() for piece, _ in splitter.pre_tokenize_str(line))
    spelled = {word: list(word) for word in words}
    merges = []
    for _ in range(MERGES):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in zip(spelled[word], spelled[word][1:]):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, pieces in spelled.items():
            spelled[word] = _merge(pieces, best)
    return merges


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    index = 0
    while index < len(pieces):
        if tuple(pieces[index : index + 2]) == pair:
            merged.append(pieces[index] + pieces[index + 1])
            index += 2
        else:
            merged.append(pieces[index])
            index += 1
    return merged
