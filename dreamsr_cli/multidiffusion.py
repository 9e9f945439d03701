"""Weighted blending of tiles into one canvas, as in MultiDiffusion (Bar-Tal et al. 2023).

Each canvas pixel is the mean of the tiles that cover it, weighted by a window that falls towards the tile's sides. Sums
run in float64 and in tile order: one float32 tile comes back bit for bit, and neither the order in which slots were
written nor the bands that are asked for change a byte.

Axes: C channels, H W latent rows and columns.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from dreamsr_cli.tiling import TileGrid


class TileValues(Protocol):
    """What a blend reads: a dictionary, or the journal's slots."""

    def __getitem__(self, tile: int, /) -> np.ndarray:
        """(C, H, W) of the tile of that index."""
        ...


def window(height: int, width: int, overlap: int) -> np.ndarray:
    """Blending weights of one tile: float32 (height, width), all in latent pixels, in (0, 1].

    A raised cosine climbs over `overlap` pixels at each of the four sides and is sampled at pixel centres, so the
    window equals its mirror images exactly, and two windows that overlap by `overlap` add up to 1.
    """
    return np.outer(_profile(height, overlap), _profile(width, overlap)).astype(np.float32)


def _profile(length: int, overlap: int) -> np.ndarray:
    """One side's weights, float64 (length,)."""
    position = np.arange(length)
    from_side = np.minimum(position, position[::-1])
    if overlap == 0:
        return np.ones(length)
    return np.sin(np.pi / 2 * np.minimum((from_side + 0.5) / overlap, 1.0)) ** 2


def blend_rows(grid: TileGrid, slots: TileValues, top: int, bottom: int, stride: int = 8) -> np.ndarray:
    """Rows [top, bottom) of the blended canvas: float32 (C, bottom - top, W) in latent pixels.

    `slots[tile.index]` is (C, H, W) of that tile; only tiles that touch these rows are read, in index order. `KeyError`
    for a slot that is missing, `ValueError` for a shape that is not its tile's.
    """
    if not 0 <= top < bottom <= grid.canvas_height // stride:
        raise ValueError(f"rows {top} to {bottom} don't lie in a canvas of {grid.canvas_height // stride} latent rows")
    tile_window = window(grid.tile_height // stride, grid.tile_width // stride, grid.overlap // stride)
    weights_HW = tile_window.astype(np.float64)
    rows, columns = bottom - top, grid.canvas_width // stride
    total_CHW: np.ndarray | None = None
    weight_HW = np.zeros((rows, columns))
    for tile in grid.tiles:
        tile_top, left, height, width = tile.latent_box(stride)
        first, last = max(top, tile_top), min(bottom, tile_top + height)
        if first >= last:
            continue
        slot_CHW = slots[tile.index]
        if slot_CHW.ndim != 3 or slot_CHW.shape[1:] != (height, width):
            raise ValueError(f"slot {tile.index} has shape {slot_CHW.shape}, its tile is {height} x {width}")
        if total_CHW is None:
            total_CHW = np.zeros((len(slot_CHW), rows, columns))
        inside, here = slice(first - tile_top, last - tile_top), slice(first - top, last - top)
        total_CHW[:, here, left : left + width] += slot_CHW[:, inside] * weights_HW[inside]
        weight_HW[here, left : left + width] += weights_HW[inside]
    assert total_CHW is not None, "a grid covers its canvas"
    total_CHW /= weight_HW
    return total_CHW.astype(np.float32)


def blend(grid: TileGrid, slots: TileValues, stride: int = 8) -> np.ndarray:
    """The whole blended canvas, float32 (C, H, W) in latent pixels; made in bands, so float64 sums stay small."""
    rows, band = grid.canvas_height // stride, grid.tile_height // stride
    return np.concatenate([blend_rows(grid, slots, y, min(y + band, rows), stride) for y in range(0, rows, band)], 1)


def finished_rows(grid: TileGrid, done: int, stride: int = 8) -> int:
    """How many latent rows from the top need no tile with index `done` or above."""
    return grid.tiles[done].top // stride if done < len(grid.tiles) else grid.canvas_height // stride


def slots_needed(grid: TileGrid, batch: int, stride: int = 8) -> int:
    """How many consecutive tiles' velocities must be held at once when tiles come in batches of `batch` and rows are
    blended as soon as they can be; slot = index modulo this number is then never overwritten too early."""
    most, ready, first = 1, 0, 0
    for tiles in grid.batches(batch):
        done = tiles[-1].index + 1
        while (grid.tiles[first].top + grid.tiles[first].height) // stride <= ready:
            first += 1
        most = max(most, done - first)
        ready = finished_rows(grid, done, stride)
    return most
