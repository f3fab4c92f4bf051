"""Dynamic high resolution: one picture becomes a grid of square tiles and a thumbnail.

Invariant: grid, crops and resampling equal the official `dynamic_preprocess` (OpenGVLab/InternVL, commit
2410d1dbf208), pixel for pixel under the same Pillow: the grid nearest in aspect ratio wins, and among equally
near ones the largest whose area is less than twice the picture's. The paper (arXiv 2412.05271, §3.1) says "less
than or equal": `tie="inclusive"`. The two differ only at equality (1008x896 at 12 tiles).

The official code walks a Python set within one area. No result depends on that order for up to 64 tiles
(checked by brute force), so here candidates of one area are taken from narrow to wide.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

Tie = Literal["strict", "inclusive"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@lru_cache(maxsize=256)
def _candidates(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int, float], ...]:
    """All (columns, rows, ratio) with min_tiles <= columns * rows <= max_tiles, small areas first."""
    grids = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    grids.sort(key=lambda grid: grid[0] * grid[1])
    return tuple((columns, rows, columns / rows) for columns, rows in grids)


def choose_grid(
    width: int, height: int, max_tiles: int, min_tiles: int = 1, tile_size: int = 448, tie: Tie = "strict"
) -> tuple[int, int]:
    """The grid (columns, rows) for a picture of width x height pixels; tile_size is a tile's side in pixels.

    Raises ValueError for sizes below one pixel, a tile range without a grid, or an unknown `tie`.
    """
    if width < 1 or height < 1:
        raise ValueError(f"a picture needs at least one pixel a side, found {width}x{height}")
    if tile_size < 1:
        raise ValueError(f"tile_size must be at least 1, found {tile_size}")
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(f"1 <= min_tiles <= max_tiles does not hold: min_tiles {min_tiles}, max_tiles {max_tiles}")
    if tie not in get_args(Tie):
        raise ValueError(f"tie must be one of {', '.join(get_args(Tie))}, found {tie!r}")
    ratio = width / height
    # A later candidate at the same distance wins if the picture has more than half of its pixels.
    twice_image, tile_area = 2 * width * height, tile_size * tile_size
    best, best_distance = (1, 1), float("inf")
    for columns, rows, candidate in _candidates(min_tiles, max_tiles):
        distance = abs(ratio - candidate)
        if distance < best_distance:
            best, best_distance = (columns, rows), distance
        elif distance == best_distance:
            area = tile_area * columns * rows
            if area < twice_image or (tie == "inclusive" and area == twice_image):
                best = (columns, rows)
    return best


def count_tiles(
    width: int,
    height: int,
    max_tiles: int,
    min_tiles: int = 1,
    tile_size: int = 448,
    tie: Tie = "strict",
    thumbnail: bool = True,
) -> int:
    """How many tiles `split_image` makes, thumbnail included, from the picture's size alone."""
    columns, rows = choose_grid(width, height, max_tiles, min_tiles, tile_size, tie)
    tiles = columns * rows
    return tiles + 1 if thumbnail and tiles > 1 else tiles


def split_image(
    image: "Image",
    max_tiles: int,
    tile_size: int = 448,
    thumbnail: bool = True,
    min_tiles: int = 1,
    tie: Tie = "strict",
) -> list["Image"]:
    """RGB tiles of tile_size x tile_size, row by row from the top left; the thumbnail, if any, comes last.

    A picture of another mode is converted to RGB first, as the official loader does.
    """
    grid, small = _resized(image, max_tiles, tile_size, thumbnail, min_tiles, tie)
    columns, rows = (side // tile_size for side in grid.size)
    tiles = [
        grid.crop((column * tile_size, row * tile_size, (column + 1) * tile_size, (row + 1) * tile_size))
        for row in range(rows)
        for column in range(columns)
    ]
    return tiles if small is None else [*tiles, small]


def fill_tiles(image: "Image", out: np.ndarray, max_tiles: int, tie: Tie = "strict") -> None:
    """The bytes of `split_image`'s tiles into `out`, uint8 [tiles, S, S, 3], without an image for every tile.

    Raises ValueError where `out` is not of as many tiles as the picture has.
    """
    size = out.shape[1]
    grid, small = _resized(image, max_tiles, size, True, 1, tie)
    columns, rows = (side // size for side in grid.size)
    if len(out) != columns * rows + (small is not None):
        raise ValueError(f"room for {len(out)} tiles, the picture has {columns * rows + (small is not None)}")
    cells = np.asarray(grid).reshape(rows, size, columns, size, 3)
    out[: columns * rows].reshape(rows, columns, size, size, 3)[:] = cells.swapaxes(1, 2)
    if small is not None:
        out[-1] = np.asarray(small)


def _resized(
    image: "Image", max_tiles: int, tile_size: int, thumbnail: bool, min_tiles: int, tie: Tie
) -> tuple["Image", "Image | None"]:
    """The picture in RGB at the size of its grid, and its thumbnail where it has one."""
    from PIL.Image import Resampling

    columns, rows = choose_grid(*image.size, max_tiles, min_tiles, tile_size, tie)
    if image.mode != "RGB":
        image = image.convert("RGB")
    grid = image.resize((columns * tile_size, rows * tile_size), Resampling.BICUBIC)
    if not thumbnail or columns * rows == 1:
        return grid, None
    return grid, image.resize((tile_size, tile_size), Resampling.BICUBIC)


def tiles_per_image_limit(max_tiles: int, images: int) -> int:
    """The tile limit of each of a sample's `images` pictures; thumbnails come on top, as in the official code."""
    if max_tiles < 1 or images < 1:
        raise ValueError(f"max_tiles and images must be at least 1, found {max_tiles} and {images}")
    return max(1, max_tiles // images)


def frame_indices(num_frames: int, video_length: int, rng: np.random.Generator | None = None) -> list[int]:
    """One frame of each of num_frames equal intervals of a video of video_length frames: the middle one, or any.

    A video shorter than num_frames gives every interval it has; its last index is repeated up to num_frames.
    rng: draws the frame ("rand", for training). The official code never draws an interval's last frame, and where an
    interval has but one it draws from the whole video instead; here every frame of an interval is as likely.
    """
    if num_frames < 1 or video_length < 1:
        raise ValueError(f"num_frames and video_length must be at least 1, found {num_frames} and {video_length}")
    edges = np.linspace(0, video_length, min(num_frames, video_length) + 1).astype(int)
    middles = (edges[:-1] + edges[1:] - 1) // 2
    indices = (middles if rng is None else rng.integers(edges[:-1], edges[1:])).tolist()
    return indices + indices[-1:] * (num_frames - len(indices))


def to_pixels(tiles: Sequence["Image"]) -> "torch.Tensor":
    """float32 [n, 3, S, S], scaled to 0..1, then normalised by ImageNet's mean and standard deviation.

    Raises ValueError if there is no tile or they differ in size.
    """
    import torch

    sizes = {tile.size for tile in tiles}
    if len(sizes) != 1:
        raise ValueError(f"tiles must be of one size, found {sorted(sizes) or 'none'}")
    stacked = np.stack([np.asarray(tile if tile.mode == "RGB" else tile.convert("RGB")) for tile in tiles])
    return normalised(torch.from_numpy(stacked))


def normalised(tiles: "torch.Tensor") -> "torch.Tensor":
    """uint8 [n, S, S, 3] to float32 [n, 3, S, S] as `to_pixels`, on the tensor's own device, to the bit alike on all.

    Every constant is a tensor there: CUDA turns the division by a Python number into a product.
    """
    import torch

    scale, mean, std = (
        torch.tensor(values, device=tiles.device).view(1, -1, 1, 1)
        for values in ((255.0,), IMAGENET_MEAN, IMAGENET_STD)
    )
    pixels = tiles.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.div_(scale).sub_(mean).div_(std)
