"""Checkpoints as fragments by parameter name: free of world size and ZeRO stage, and never a pickle.

Each rank writes one safetensors file with the fragments it owns: for every parameter piece [start, start+count) of the
flattened parameter the fp32 master weight and both Adam moments. Loading takes whatever fragments cover what a rank
owns now, so a stage saved by 8 ranks under ZeRO-2 resumes on 3 under ZeRO-1 (design.md, "Engine and checkpoints").
DeepSpeed's own checkpoints are pickled and rank-shaped, and its universal ones load wrong values under ZeRO-3.
"""

import json
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from modeling.errors import CheckpointError

PARTS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A piece of one parameter and its optimizer state: flat fp32 views, written to on load, copied on save."""

    name: str
    start: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def count(self) -> int:
        return self.master.numel()


class Snapshot:
    """One rank's fragments in host memory, laid out as the safetensors file that they become.

    The buffer is the file: header, then the tensors, which are views into it. So taking a snapshot is one copy, and
    what is written and digested behind the training is one piece of memory (a save through safetensors' own writer
    copies everything twice more). Keys are '<parameter>|<start>|<part>'.
    """

    def __init__(self, fragments: Sequence[Fragment]):
        """fragments: those that every snapshot will take, in this order and of these sizes; fp32."""
        header, end = {}, 0
        for fragment in fragments:
            for part in PARTS:
                assert getattr(fragment, part).dtype == torch.float32, fragment.name
                begin, end = end, end + 4 * fragment.count
                header[f"{fragment.name}|{fragment.start}|{part}"] = {
                    "dtype": "F32", "shape": [fragment.count], "data_offsets": [begin, end],
                }  # fmt: skip
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        # pages of its own: where a page begins, a store can write it without copying it first
        self._buffer = torch.frombuffer(mmap.mmap(-1, 8 + len(text) + end), dtype=torch.uint8)
        self._buffer.fill_(0)  # touched now, so that no snapshot waits for pages
        head = len(text).to_bytes(8, "little") + text
        self._buffer[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        self._values = self._buffer[len(head) :].view(torch.float32)

    def take(self, fragments: Iterable[Fragment]) -> memoryview:
        """Copies the fragments as they are now; the file's bytes, valid until the next take()."""
        at = 0
        with torch.no_grad():
            for fragment in fragments:
                for part in PARTS:
                    self._values[at : at + fragment.count].copy_(getattr(fragment, part))
                    at += fragment.count
        assert at == self._values.numel(), "the fragments of a rank change with its engine only"
        return self._buffer.numpy().data


class FragmentReader:
    """All files of one checkpoint, whoever wrote them."""

    def __init__(self, paths: Iterable[Path]):
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Path, str]]] = {}
        for path in sorted(paths):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    name, start, part = key.rsplit("|", 2)
                    count = file.get_slice(key).get_shape()[0]
                    self._pieces.setdefault((name, part), []).append((int(start), count, path, key))

    def names(self) -> set[str]:
        return {name for name, _ in self._pieces}

    def load(self, fragments: Iterable[Fragment]) -> None:
        """Fill the fragments in place. Raises CheckpointError where a piece is covered by no file."""
        files: dict[Path, safe_open] = {}
        with torch.no_grad():
            for fragment in fragments:
                for part in PARTS:
                    self._fill(getattr(fragment, part), fragment, part, files)

    def _fill(self, target: Tensor, fragment: Fragment, part: str, files: dict) -> None:
        filled = 0
        for start, count, path, key in sorted(self._pieces.get((fragment.name, part), [])):
            low, high = max(start, fragment.start + filled), min(start + count, fragment.start + fragment.count)
            if low >= high:
                continue
            if low > fragment.start + filled:
                break
            file = files.setdefault(path, safe_open(path, framework="pt"))
            target[low - fragment.start : high - fragment.start].copy_(file.get_slice(key)[low - start : high - start])
            filled = high - fragment.start
        if filled != fragment.count:
            raise CheckpointError(
                f"parameter {fragment.name} [{fragment.start}:{fragment.start + fragment.count}] ({part}) is not "
                f"in the checkpoint beyond {fragment.start + filled}",
                remedy="the checkpoint was written for other trained modules; delete its folder to fall back",
            )
