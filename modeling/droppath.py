"""Drop path (stochastic depth) for the vision tower, keyed by the sample and not by the process.

The rate grows linearly over the layers, linspace(0, rate, depth) (official modeling_intern_vit.py). The uniform
numbers come with the batch, drawn from (seed, step, sample occurrence): so the same tiles drop the same branches
whatever rank or micro-step they land in, and a resumed run repeats them.
"""

from typing import Any

import torch
from torch import Tensor


class _Scale:
    """A forward hook that multiplies its branch's output. One code for all layers, so that it is compiled once."""

    def __init__(self):
        self.values: Tensor | None = None  # [tiles, 1, 1]

    def __call__(self, _module: Any, _inputs: Any, output: Any) -> Any:
        assert self.values is not None
        tensor = output[0] if isinstance(output, tuple) else output
        scaled = tensor * self.values
        return (scaled, *output[1:]) if isinstance(output, tuple) else scaled


class DropPath:
    """Hooks on the attention and MLP branches of every layer; `set` gives the numbers for the next forward."""

    def __init__(self, tower: Any, rate: float):
        layers = tower.encoder.layer
        self._rates = torch.linspace(0, rate, len(layers))
        self._hooks = [(_Scale(), _Scale()) for _ in layers]
        for layer, (attention, mlp) in zip(layers, self._hooks, strict=True):
            layer.attention.register_forward_hook(attention)
            layer.mlp.register_forward_hook(mlp)

    def set(self, uniforms: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
        """uniforms: [tiles, depth, 2] in [0, 1); a branch is kept where the number is at least its rate."""
        if uniforms is None:
            raise ValueError("drop path needs the batch's uniform numbers")
        rates = self._rates.to(uniforms.device)[None, :, None]
        scales = ((uniforms >= rates).float() / (1 - rates)).to(dtype).permute(1, 2, 0).contiguous()
        for hooks, layer in zip(self._hooks, scales[..., None, None], strict=True):
            for hook, branch in zip(hooks, layer, strict=True):
                hook.values = branch.clone()  # torch.compile guards where in memory a view begins
