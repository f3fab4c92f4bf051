"""Causal attention inside a packed row, isolated per sample, without an L×L mask.

transformers keeps the documents of a packed row apart only under conditions that are easy to miss
(position_ids restarting, no cache, no mask); otherwise they leak in silence. Here the sample borders are
passed explicitly as `segments=` and nothing is inferred. On a GPU in half precision one variable-length kernel
takes the whole row: flash-attn's where it is installed, torch's own otherwise. Elsewhere segments of like length are
stacked right-padded into one causal SDPA call: a real query never sees the padding behind it, so no mask is needed.
Either way memory is linear in the row length. Invariant (tested): changing one sample moves no other sample's outputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

NAME = "stageline_segments"
WASTE = 1.25  # a group's longest segment is at most this many times its shortest


@dataclass  # not frozen: torch.compile would guard every field of it, and compile again for other groups
class Segments:
    """Where the samples of a row lie. groups: index tensors [n, longest] into the row; back: [L] into their outputs.

    borders: int32 [samples + 1], from 0 to L; longest: tokens of the longest sample.
    """

    groups: tuple[Tensor, ...]
    back: Tensor
    borders: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> "Segments":
        """lengths: tokens per sample, in row order."""
        starts, position = [], 0
        for length in lengths:
            starts.append(position)
            position += length
        order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
        groups: list[Tensor] = []
        back = torch.empty(position, dtype=torch.long)
        offset = first = 0
        while first < len(order):
            last = first
            while last < len(order) and lengths[order[last]] <= max(WASTE * lengths[order[first]], 8):
                last += 1
            members, longest = order[first:last], lengths[order[last - 1]]
            index = torch.zeros(len(members), longest, dtype=torch.long)
            for row, member in enumerate(members):
                n, start = lengths[member], starts[member]
                index[row, :n] = torch.arange(start, start + n)
                index[row, n:] = start
                back[start : start + n] = offset + row * longest + torch.arange(n)
            groups.append(index.to(device))
            offset += index.numel()
            first = last
        borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        return cls(tuple(groups), back.to(device), borders, max(lengths))

    def to(self, device: torch.device) -> "Segments":
        groups = tuple(group.to(device) for group in self.groups)
        return Segments(groups, self.back.to(device), self.borders.to(device), self.longest)


Kernel = Callable[[Tensor, Tensor, Tensor, Segments, float | None], Tensor]


def _varlen_kernel() -> Kernel:
    """(query [L, heads, d], key, value [L, kv_heads, d], segments, scale) -> [L, heads, d] on a GPU."""
    try:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn

        asked = "enable_gqa" in signature(varlen_attn).parameters  # before 2.12 torch takes fewer key heads unasked

        def torchs(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None) -> Tensor:
            ends, longest = segments.borders, segments.longest
            gqa: Any = {"enable_gqa": k.shape[1] != q.shape[1]} if asked else {}
            out = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale, window_size=(-1, 0), **gqa)
            assert isinstance(out, Tensor)
            return out

        return torchs

    def flash(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None) -> Tensor:
        ends, longest = segments.borders, segments.longest
        return flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, softmax_scale=scale, causal=True)

    return flash


# Chosen at import, for torch.compile sees no cache; whether or not a GPU is seen, for a process may be forked before.
KERNEL = _varlen_kernel()


def segment_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, segments: Segments | None = None, **_,
) -> tuple[Tensor, None]:  # fmt: skip
    """query [1, heads, L, d], key and value [1, kv_heads, L, d] -> ([1, L, heads, d], None).

    Raises ValueError without `segments`, with a mask or a batch: rather no result than a leaking one.
    """
    if segments is None or attention_mask is not None or query.shape[0] != 1:
        raise ValueError(f"attention '{NAME}' takes one packed row with segments= and no attention mask")
    repeat = query.shape[1] // key.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [L, heads, d]
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        assert not dropout, "the recipe has no attention dropout"
        return KERNEL(q, k, v, segments, scaling).unsqueeze(0), None
    outputs = []
    for index in segments.groups:
        shape = (*index.shape, -1, q.shape[-1])
        flat = index.flatten()
        qs, ks, vs = (x.index_select(0, flat).view(shape).transpose(1, 2) for x in (q, k, v))
        if repeat > 1:
            ks, vs = (x.repeat_interleave(repeat, dim=1) for x in (ks, vs))
        out = F.scaled_dot_product_attention(qs, ks, vs, dropout_p=dropout, is_causal=True, scale=scaling)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # [n * longest, heads, d]
    return torch.cat(outputs).index_select(0, segments.back).unsqueeze(0), None


AttentionInterface.register(NAME, segment_attention)
