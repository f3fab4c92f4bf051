"""Fewer passes over memory on a GPU: the layers of both towers compiled, the patch embedding as a matrix product.

One layer's code serves all layers of a tower and every row: the numbers of tiles and tokens are left open. The module
tree and the weights stay what they are. Attention is a kernel already (attention.py), the loss has its own (loss.py).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def fuse(model: Any) -> None:
    """In place, an InternVLForConditionalGeneration, before its first forward; compiling then takes some 10 s."""
    # a layer of either tower, with and without a gradient, with one tile or many: more than torch keeps by itself
    torch._dynamo.config.recompile_limit = max(16, torch._dynamo.config.recompile_limit)
    for layer in (*model.model.vision_tower.encoder.layer, *model.model.language_model.layers):
        layer.compile(dynamic=True)
    convolution = model.model.vision_tower.embeddings.patch_embeddings.projection
    convolution.forward = lambda pixels: patch_product(convolution, pixels)


def patch_product(convolution: nn.Conv2d, pixels: Tensor) -> Tensor:
    """A convolution whose stride is its kernel: pixels [n, 3, H, W] -> [n, hidden, H / patch, W / patch].

    cuDNN has no good kernel for it: 2.8 ms for 48 tiles of 448² on an H200, a hundredth of the step.
    """
    height, width = convolution.kernel_size
    patches = pixels.unflatten(3, (-1, width)).unflatten(2, (-1, height)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    return F.linear(patches, convolution.weight.flatten(1), convolution.bias).permute(0, 3, 1, 2)
