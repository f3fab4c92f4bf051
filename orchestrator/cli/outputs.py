"""Folders that a command writes files into, as its user named them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modeling.errors import UserError


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Around everything that is done below `--output`. Raises UserError for what the system refuses there."""
    try:
        yield
    except OSError as error:
        place = f" {error.filename}" if error.filename not in (None, str(folder)) else ""
        raise UserError(
            f"cannot be written:{place} {error.strerror or error}", where=f"--output {folder}",
            remedy="give a folder of yours, or one that can be made",
        ) from error  # fmt: skip
