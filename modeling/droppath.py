"""Drop path (stochastic depth) for the vision tower, keyed by the sample and not by the process.

The rate grows linearly over the layers, linspace(0, rate, depth) (official modeling_intern_vit.py). The uniform
numbers come with the batch, drawn from (seed, step, sample occurrence): so the same tiles drop the same branches
whatever rank or micro-step they land in, and a resumed run repeats them.
"""

from typing import Any

import torch
from torch import Tensor


class DropPath:
    """Hooks on the attention and MLP branches of every layer; `set` gives the numbers for the next forward."""

    def __init__(self, tower: Any, rate: float):
        self._scales: Tensor | None = None
        layers = tower.encoder.layer
        self._rates = torch.linspace(0, rate, len(layers))
        for depth, layer in enumerate(layers):
            layer.attention.register_forward_hook(self._hook(depth, 0))
            layer.mlp.register_forward_hook(self._hook(depth, 1))

    def set(self, uniforms: Tensor | None) -> None:
        """uniforms: [tiles, depth, 2] in [0, 1); a branch is kept where the number is at least its rate."""
        if uniforms is None:
            raise ValueError("drop path needs the batch's uniform numbers")
        rates = self._rates.to(uniforms.device)[None, :, None]
        self._scales = (uniforms >= rates).float() / (1 - rates)

    def _hook(self, depth: int, branch: int):
        def scale(_module, _inputs, output):
            assert self._scales is not None
            tensor = output[0] if isinstance(output, tuple) else output
            scaled = tensor * self._scales[:, depth, branch, None, None].to(tensor.dtype)
            return (scaled, *output[1:]) if isinstance(output, tuple) else scaled

        return scale
