"""What a GPU runs instead of the library's own is the same function (compiling it is left to tests/gpu)."""

import torch

from modeling.kernels import patch_product


def test_the_patch_embedding_as_a_product_is_the_convolution():
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 10, kernel_size=(4, 8), stride=(4, 8))
    pixels = torch.randn(2, 3, 12, 16)
    results = [convolution(pixels), patch_product(convolution, pixels)]
    torch.testing.assert_close(results[1], results[0])
    one, two = (torch.autograd.grad(result.square().sum(), list(convolution.parameters())) for result in results)
    for plain, product in zip(one, two, strict=True):
        torch.testing.assert_close(product, plain)
