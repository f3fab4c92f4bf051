"""The tensors of a model folder, one file or many shards, read one at a time and never through pickle.

Invariant: what a folder holds is known from its headers before a tensor is read, and every name, shape and shard that
does not fit is told at once. Layout of shards: `model.safetensors.index.json`, as transformers and the official code
write it.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from modeling.errors import CheckpointError

_AGAIN = "fetch the folder again, or write it again from its source"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(path), remedy=_AGAIN) from error
    if not isinstance(value, dict):
        raise CheckpointError("is not a JSON object", where=str(path), remedy=_AGAIN)
    return value


class TensorFolder:
    """shapes: of every tensor by name; dtypes: those that occur, as safetensors spells them ('F32', 'BF16')."""

    def __init__(self, folder: Path, rename: Callable[[str], str] = str):
        """Reads headers alone. rename: from the names in the files. Raises CheckpointError where there are no
        safetensors, or damaged or missing ones, or a tensor is there twice."""
        self.folder, self._rename = folder, rename
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: set[str] = set()
        self._files = self._shards()
        for path in self._files:
            try:
                with safe_open(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118 (not a dict)
                        head, name = file.get_slice(name), rename(name)
                        if name in self.shapes:
                            raise CheckpointError(f"the tensor {name} is there twice", where=str(path), remedy=_AGAIN)
                        self.shapes[name] = tuple(head.get_shape())
                        self.dtypes.add(head.get_dtype())
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"the weights cannot be read: {error}", where=str(path), remedy=_AGAIN) from error

    def _shards(self) -> list[Path]:
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if index.is_file():
            placed = read_json(index).get("weight_map")
            if not isinstance(placed, dict):
                raise CheckpointError("has no weight_map", where=str(index), remedy=_AGAIN)
            files = [self.folder / name for name in sorted(set(placed.values()))]
            if absent := [path.name for path in files if not path.is_file()]:
                raise CheckpointError(f"shards are missing: {absent}", where=str(self.folder), remedy=_AGAIN)
            return files
        if single.is_file():
            return [single]
        if pickled := sorted(p.name for p in self.folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt")):
            raise CheckpointError(
                f"the weights are in {', '.join(pickled)}: files that can run code when they are read",
                where=str(self.folder), remedy="convert them to safetensors where you trust them, then import that",
            )  # fmt: skip
        raise CheckpointError("the folder has no model.safetensors", where=str(self.folder), remedy=_AGAIN)

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raises CheckpointError with the list of all names that are missing, unexpected or of another shape."""
        missing = sorted(expected.keys() - self.shapes.keys())
        unexpected = sorted(self.shapes.keys() - expected.keys())
        shapes = [
            f"{name} {list(self.shapes[name])} for {list(shape)}"
            for name, shape in sorted(expected.items())
            if self.shapes.get(name, shape) != shape
        ]
        found = (("missing keys", missing), ("unexpected keys", unexpected), ("keys of another shape", shapes))
        told = "; ".join(f"{len(names)} {title}: {', '.join(names)}" for title, names in found if names)
        if told:
            raise CheckpointError(
                f"weights do not fit the configuration: {told}",
                where=str(self.folder), remedy=_AGAIN,
            )  # fmt: skip

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) on the CPU in the file's dtype, shard by shard."""
        for path in self._files:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    yield self._rename(name), file.get_tensor(name)
