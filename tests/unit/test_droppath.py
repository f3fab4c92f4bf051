"""Drop path: the same branches for the same sample, wherever it lands."""

import pytest
import torch

from modeling.droppath import DropPath
from modeling.internvl import TrainingLoss

DEPTH, RATE = 2, 0.6


def tower(micro, rate=RATE):
    model = micro.build().model.vision_tower
    return model, DropPath(model, rate)


def tiles(n):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def run(model, drop, pixels, uniforms):
    drop.set(uniforms)
    with torch.no_grad():
        return model(pixel_values=pixels).last_hidden_state


def test_rate_zero_changes_nothing(micro):
    model, drop = tower(micro, 0.0)
    plain = micro.build().model.vision_tower
    with torch.no_grad():
        expected = plain(pixel_values=tiles(3)).last_hidden_state
    assert torch.equal(run(model, drop, tiles(3), torch.zeros(3, DEPTH, 2)), expected)


def test_a_tile_does_not_depend_on_its_neighbours(micro):
    model, drop = tower(micro)
    pixels, uniforms = tiles(4), torch.rand(4, DEPTH, 2, generator=torch.Generator().manual_seed(1))
    together = run(model, drop, pixels, uniforms)
    for i in range(4):
        alone = run(model, drop, pixels[i : i + 1], uniforms[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], atol=1e-6, rtol=1e-6)
    backwards = run(model, drop, pixels.flip(0), uniforms.flip(0)).flip(0)
    torch.testing.assert_close(backwards, together, atol=1e-6, rtol=1e-6)
    assert torch.equal(run(model, drop, pixels, uniforms), together)


def test_the_rate_grows_linearly_and_the_first_layer_is_never_dropped(micro):
    """linspace(0, rate, depth): a number just below a layer's rate drops its branches, the rate itself keeps them."""
    model, drop = tower(micro)
    pixels, kept = tiles(1), torch.full((1, DEPTH, 2), 0.99)
    expected = run(model, drop, pixels, kept)
    for branch in (0, 1):
        first, last, edge = kept.clone(), kept.clone(), kept.clone()
        first[0, 0, branch] = 0.0
        last[0, -1, branch] = RATE - 1e-3
        edge[0, -1, branch] = RATE
        assert torch.equal(run(model, drop, pixels, first), expected)
        assert not torch.equal(run(model, drop, pixels, last), expected)
        assert torch.equal(run(model, drop, pixels, edge), expected)


def test_a_dropped_layer_is_the_identity(micro):
    model, drop = tower(micro)
    seen = []
    model.encoder.layer[-1].register_forward_hook(lambda _m, inputs, out: seen.append((inputs[0], out)))
    uniforms = torch.full((1, DEPTH, 2), 0.99)
    uniforms[0, -1] = 0.0
    run(model, drop, tiles(1), uniforms)
    before, after = seen[0][0], seen[0][1][0] if isinstance(seen[0][1], tuple) else seen[0][1]
    assert torch.equal(before, after)


def test_the_expected_branch_is_the_undropped_one():
    """Over uniform numbers a branch keeps its mean, so that evaluation without drop path fits."""

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.mlp = torch.nn.Identity(), torch.nn.Identity()

    model = torch.nn.Module()
    model.encoder = torch.nn.Module()
    model.encoder.layer = torch.nn.ModuleList(Layer() for _ in range(3))
    drop = DropPath(model, 0.4)
    n = 10_000
    numbers = ((torch.arange(n) + 0.5) / n)[:, None, None].expand(n, 3, 2)
    drop.set(numbers)
    for layer in model.encoder.layer:
        for branch in (layer.attention, layer.mlp):
            assert branch(torch.ones(n, 1, 1)).mean().item() == pytest.approx(1.0, abs=1e-3)


def test_without_numbers_it_refuses(micro):
    loss = TrainingLoss(micro.build(), ("vit", "mlp"), drop_path=0.1)
    with pytest.raises(ValueError, match="uniform numbers"):
        loss.image_features(tiles(1), None)


def test_a_frozen_tower_drops_nothing(micro):
    loss = TrainingLoss(micro.build(), ("mlp",), drop_path=0.9)
    plain = TrainingLoss(micro.build(), ("mlp",))
    assert torch.equal(loss.image_features(tiles(2), None), plain.image_features(tiles(2), None))
