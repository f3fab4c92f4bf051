"""Tiles, thumbnails and frames against outputs of the official code (tests/data/golden)."""

import hashlib
import json
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modeling import tiles

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def test_grids_equal_the_official_ones():
    golden = json.loads((GOLDEN / "tiling.json").read_text())
    limits = golden["meta"]["n_max"]
    assert golden["cases"]
    for width, height, _, *results in golden["cases"]:
        for limit, (columns, rows, count) in zip(limits, results, strict=True):
            assert tiles.choose_grid(width, height, limit) == (columns, rows), (width, height, limit)
            assert tiles.count_tiles(width, height, limit) == count, (width, height, limit)


def test_values_of_the_fact_sheet():
    expected = {
        (448, 448): (1, 1),
        (633, 633): (1, 1),
        (634, 634): (2, 2),
        (950, 950): (2, 2),
        (951, 951): (3, 3),
        (800, 1300): (2, 3),
        (1000, 500): (2, 1),
        (3000, 1000): (6, 2),
        (300, 1000): (1, 3),
    }
    assert {size: tiles.choose_grid(*size, 12) for size in expected} == expected


def test_tie_rules_differ_at_exactly_twice_the_area():
    assert tiles.choose_grid(1008, 896, 12, tie="strict") == (2, 2)
    assert tiles.choose_grid(1008, 896, 12, tie="inclusive") == (3, 3)
    assert tiles.choose_grid(1007, 896, 12, tie="inclusive") == tiles.choose_grid(1007, 896, 12)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 40), st.integers(1, 40))
def test_grid_is_within_the_limits(width, height, one, other):
    low, high = sorted((one, other))
    columns, rows = tiles.choose_grid(width, height, high, low)
    assert low <= columns * rows <= high
    count = tiles.count_tiles(width, height, high, low)
    assert count == (1 if columns * rows == 1 else columns * rows + 1)
    assert tiles.count_tiles(width, height, high, low, thumbnail=False) == columns * rows


@pytest.mark.parametrize(
    "arguments",
    [(0, 5, 1), (5, -1, 1), (5, 5, 0), (5, 5, 2, 3), (5, 5, 2, 0), (5, 5, 2, 1, 0), (5, 5, 2, 1, 448, "loose")],
)
def test_nonsense_is_refused(arguments):
    with pytest.raises(ValueError):
        tiles.choose_grid(*arguments)


def synthetic(k: int, w: int, h: int) -> np.ndarray:
    """The picture of the golden set's formula."""
    y, x = np.mgrid[0:h, 0:w].astype(np.int64)
    if k % 3 == 0:
        channels = x * 255 // max(w - 1, 1), y * 255 // max(h - 1, 1), (x + y) * 255 // max(w + h - 2, 1)
    elif k % 3 == 1:
        red = ((x // 16 + y // 16) % 2) * 200 + 20
        channels = red, ((x * 5 + y * 3) // 7) % 256, ((x // 32) * 37 + (y // 32) * 91 + k * 13) % 256
    else:
        t = (x * 73856093) ^ (y * 19349663) ^ ((k + 1) * 83492791)
        noise = (t >> 13) & 127
        channels = noise + x * 128 // w, noise + y * 128 // h, (t >> 7) & 255
    return np.stack(np.broadcast_arrays(*channels), axis=-1).astype(np.uint8)


@pytest.mark.parametrize(
    "case", json.loads((GOLDEN / "tiles_pixels.json").read_text())["images"], ids=lambda c: c["index"]
)
def test_tile_pixels_equal_the_official_ones(case):
    source = synthetic(case["index"], case["width"], case["height"])
    assert hashlib.sha256(source.tobytes()).hexdigest() == case["source_sha256"]
    parts = [np.asarray(tile) for tile in tiles.split_image(Image.fromarray(source), 12)]
    assert len(parts) == case["tiles"] and all(part.shape == (448, 448, 3) for part in parts)
    expected = list(case["tile_sha256"])
    if PIL.__version__ != "12.3.0":  # the resampler changed in 13.0.0
        changed = case.get("tile_sha256_pillow_13_0_0_where_different") or {}
        expected = [changed.get(str(index), digest) for index, digest in enumerate(expected)]
    if PIL.__version__ in ("12.3.0", "13.0.0"):
        assert [hashlib.sha256(part.tobytes()).hexdigest() for part in parts] == expected
    for part, mean, blocks in zip(parts, case["mean_rgb"], case["block_mean_rgb_4x4"], strict=True):
        block_means = part.reshape(4, 112, 4, 112, 3).mean(axis=(1, 3)).reshape(16, 3)
        np.testing.assert_allclose(part.mean(axis=(0, 1)), mean, atol=0.02)
        np.testing.assert_allclose(block_means, blocks, atol=0.1)


def test_tiles_run_row_by_row_and_the_thumbnail_comes_last():
    picture = np.zeros((20, 30, 3), np.uint8)
    for number in range(6):
        row, column = divmod(number, 3)
        picture[row * 10 : row * 10 + 10, column * 10 : column * 10 + 10] = 40 * number
    parts = tiles.split_image(Image.fromarray(picture), 6, tile_size=10)
    assert [int(np.asarray(part)[5, 5, 0]) for part in parts[:6]] == [0, 40, 80, 120, 160, 200]
    assert len(parts) == 7 and parts[6].size == (10, 10) and np.ptp(np.asarray(parts[6])) > 100
    assert len(tiles.split_image(Image.fromarray(picture), 6, tile_size=10, thumbnail=False)) == 6
    assert len(tiles.split_image(Image.fromarray(picture), 1, tile_size=10)) == 1


def test_other_modes_become_rgb():
    grey = Image.linear_gradient("L")
    assert [part.mode for part in tiles.split_image(grey, 1, tile_size=56)] == ["RGB"]
    assert tiles.split_image(grey, 1, 56)[0].tobytes() == tiles.split_image(grey.convert("RGB"), 1, 56)[0].tobytes()


def test_pixels_are_normalised_per_channel():
    pixels = tiles.to_pixels([Image.new("RGB", (14, 14), (255, 0, 51)), Image.new("RGB", (14, 14))])
    assert pixels.shape == (2, 3, 14, 14) and str(pixels.dtype) == "torch.float32"
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    np.testing.assert_allclose(pixels[0, :, 3, 4].tolist(), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="none"):
        tiles.to_pixels([])
    with pytest.raises(ValueError, match="one size"):
        tiles.to_pixels([Image.new("RGB", (14, 14)), Image.new("RGB", (28, 28))])


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 12), st.sampled_from(["strict", "inclusive"]))
def test_tiles_are_filled_in_as_they_are_split(width, height, max_tiles, tie):
    image = Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))
    parts = [np.asarray(part) for part in tiles.split_image(image, max_tiles, tile_size=14, tie=tie)]
    out = np.full((len(parts), 14, 14, 3), 7, np.uint8)
    tiles.fill_tiles(image, out, max_tiles, tie)
    assert np.array_equal(out, parts)
    with pytest.raises(ValueError, match=f"room for {len(parts) + 1} tiles, the picture has {len(parts)}"):
        tiles.fill_tiles(image, np.empty((len(parts) + 1, 14, 14, 3), np.uint8), max_tiles, tie)


def test_every_byte_is_normalised_as_if_one_after_the_other():
    """To the bit what float32 arithmetic gives for (x / 255 - mean) / std."""
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    mean, std = (np.array(v, np.float32) for v in (tiles.IMAGENET_MEAN, tiles.IMAGENET_STD))
    expected = (values.astype(np.float32) / np.float32(255) - mean) / std
    assert np.array_equal(tiles.normalised(torch.from_numpy(values)).numpy(), expected.transpose(0, 3, 1, 2))


def test_the_limit_is_shared_between_the_pictures_of_a_sample():
    assert [tiles.tiles_per_image_limit(12, images) for images in (1, 2, 5, 12, 20)] == [12, 6, 2, 1, 1]


def test_frames_equal_the_official_ones():
    cases = json.loads((GOLDEN / "frames.json").read_text())["middle"]
    assert cases
    for num_frames, video_length, expected in cases:
        assert tiles.frame_indices(num_frames, video_length) == expected, (num_frames, video_length)


@pytest.mark.parametrize("arguments", [(0, 5), (5, 0), (-1, 5)])
def test_frames_of_nothing_are_refused(arguments):
    with pytest.raises(ValueError):
        tiles.frame_indices(*arguments)
