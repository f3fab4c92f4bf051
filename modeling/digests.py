"""Digests of model folders in Hugging Face layout: what they hold, not where they lie.

Invariant: a copy of a local folder has the same digest. Files up to SMALL bytes are read whole; of larger ones, which
are weights, the size and 4 KiB of every MiB are read, so that planning a 78B model takes seconds, not minutes:
two trainings of one architecture differ in every large tensor, and a tensor of a MiB or more is always sampled.
"""

import hashlib
from pathlib import Path

from modeling.remote import recorded, state

SMALL = 256 << 20
STRIDE, SAMPLE = 1 << 20, 4 << 10

_TOKENIZER_PARTS = ("token", "vocab", "merges", "special_tokens", "chat_template")
_IGNORED = (".md", ".gitattributes", ".png", ".jpg")


def weights_digest(folder: Path) -> str | None:
    """Everything in the folder that makes a model; None where it is no model folder (config.json, weights).

    Of a copy of a folder on S3: that folder's names, sizes and ETags, whether its weights were fetched or not.
    """
    if (listing := recorded(folder)) is not None:
        whole = "config.json" in listing and any(name.endswith(".safetensors") for name in listing)
        return state(listing) if whole else None
    files = _files(folder)
    if not (folder / "config.json").is_file() or not any(f.suffix == ".safetensors" for f in files):
        return None
    return _digest(folder, files)


def tokenizer_digest(folder: Path) -> str | None:
    """The tokenizer's files alone; None where there are none."""
    files = [f for f in _files(folder) if f.name.startswith(_TOKENIZER_PARTS) or f.suffix == ".model"]
    return _digest(folder, files) if files else None


def language_digest(path: Path) -> str | None:
    """A folder with everything in it, or a .gguf file; None where neither is there."""
    if path.is_dir():
        return _digest(path, _files(path)) if (path / "config.json").is_file() else None
    return _digest(path.parent, [path], named=False) if path.is_file() and path.suffix == ".gguf" else None


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if f.is_file() and f.suffix not in _IGNORED and f.name[0] != ".")


def _digest(folder: Path, files: list[Path], named: bool = True) -> str:
    total = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        total.update(f"{path.relative_to(folder).as_posix() if named else ''}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= SMALL:
                total.update(hashlib.file_digest(file, "sha256").digest())
            else:
                for offset in range(0, size, STRIDE):
                    file.seek(offset)
                    total.update(file.read(SAMPLE))
    return total.hexdigest()
