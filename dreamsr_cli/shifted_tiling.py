"""Tiles of the texture steps: one overlapping grid for all of them (`--tiling overlap`), or tiles that don't overlap in
a grid that moves from step to step (`--tiling shifted`).

A shifted grid divides the canvas among its tiles: each computes a rectangle of one size inside the canvas and owns a
part of it. What a tile at the sides computes beyond its own part is context, so the grid can move by the overlap
without made-up content beyond the sides. Its borders lie elsewhere in the next step, which sees them inside a tile and
mends them. The grid takes `POSITIONS` places in turn, not a new one each step, so that control features of each place
can be kept. Axes: C channels, H W latent rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dreamsr_cli import multidiffusion
from dreamsr_cli.config import TOKEN_SIDE
from dreamsr_cli.multidiffusion import TileValues
from dreamsr_cli.tiling import Tile, TileGrid

POSITIONS = 2
"""Places that a shifted grid takes in turn (docs/performance.md)."""


@dataclass(frozen=True)
class Layout:
    """The tiles of one step: what each computes, which part of it counts, whose text it takes."""

    number: int
    """Of this layout among those of a run."""
    grid: TileGrid
    """What each tile computes."""
    owned: tuple[tuple[int, int, int, int], ...] | None
    """For each tile the part that counts, as (left, top, right, bottom) in output pixels; together they are the canvas,
    each pixel once. None: tiles are blended where they overlap."""
    texts: tuple[int, ...]
    """For each tile the tile of the prompts' grid whose local prompt it takes."""

    def blend_rows(self, slots: TileValues, top: int, bottom: int, stride: int = 8) -> np.ndarray:
        """Rows [top, bottom) of the canvas, float32 (C, bottom - top, W) in latent pixels; see
        `multidiffusion.blend_rows`."""
        if self.owned is None:
            return multidiffusion.blend_rows(self.grid, slots, top, bottom, stride)
        rows_CHW: np.ndarray | None = None
        for tile, box in zip(self.grid.tiles, self.owned, strict=True):
            left, first, right, last = (side // stride for side in box)
            first, last = max(first, top), min(last, bottom)
            if first >= last:
                continue
            slot_CHW = slots[tile.index]
            if rows_CHW is None:
                rows_CHW = np.empty((len(slot_CHW), bottom - top, self.grid.canvas_width // stride), np.float32)
            tile_top, tile_left, _, _ = tile.latent_box(stride)
            inside_CHW = slot_CHW[:, first - tile_top : last - tile_top, left - tile_left : right - tile_left]
            rows_CHW[:, first - top : last - top, left:right] = inside_CHW
        assert rows_CHW is not None, "a grid covers its canvas"
        return rows_CHW


def overlapping(grid: TileGrid) -> Layout:
    """The layout of `grid` itself."""
    return Layout(0, grid, None, tuple(range(len(grid.tiles))))


def texture_layouts(grid: TileGrid, tiling: str) -> tuple[Layout, ...]:
    """Layouts that the texture steps take in turn. `grid` is the overlapping one, that of the removal step and of the
    prompts; `tiling` one of `config.TILINGS`. Shifted tiles are never larger than those of `grid`, and never more."""
    if tiling == "overlap" or len(grid.tiles) == 1:
        return (overlapping(grid),)
    return tuple(_shifted(grid, number) for number in range(POSITIONS))


def _shifted(grid: TileGrid, number: int) -> Layout:
    shift = grid.overlap * number // (POSITIONS - 1) // TOKEN_SIDE * TOKEN_SIDE
    height, rows = _divide(grid.canvas_height, grid.tile_height, grid.overlap, shift)
    width, columns = _divide(grid.canvas_width, grid.tile_width, grid.overlap, shift)
    caption_rows = {tile.row: (tile.top, tile.top + tile.height) for tile in grid.tiles}
    caption_columns = {tile.column: (tile.left, tile.left + tile.width) for tile in grid.tiles}
    tiles, owned, texts = [], [], []
    for row, (top, bottom) in enumerate(rows):
        for column, (left, right) in enumerate(columns):
            begin = min(top, grid.canvas_height - height), min(left, grid.canvas_width - width)
            tiles.append(Tile(len(tiles), row, column, *begin, height, width))
            owned.append((left, top, right, bottom))
            nearest = _covering((top, bottom), caption_rows), _covering((left, right), caption_columns)
            texts.append(nearest[0] * grid.columns + nearest[1])
    whole = TileGrid(grid.canvas_height, grid.canvas_width, height, width, 0, len(rows), len(columns), tuple(tiles))
    return Layout(number, whole, tuple(owned), tuple(texts))


def _divide(length: int, tile: int, room: int, shift: int) -> tuple[int, list[tuple[int, int]]]:
    """(tiles' side, parts of one side of the canvas): the fewest parts of at most `tile` pixels whose edges can move by
    `room`, moved by `shift`."""
    if tile >= length:
        return length, [(0, length)]
    count = -(-(length + room) // tile)
    units = (length + room) // TOKEN_SIDE
    edges = [(2 * k * units + count) // (2 * count) * TOKEN_SIDE for k in range(count + 1)]
    side = max(b - a for a, b in pairwise(edges))
    return side, list(pairwise(min(max(edge - shift, 0), length) for edge in edges))


def _covering(span: tuple[int, int], captions: dict[int, tuple[int, int]]) -> int:
    """The number of the prompts' row or column that covers most of `span`; the first of equals."""
    return max(captions, key=lambda n: (min(span[1], captions[n][1]) - max(span[0], captions[n][0]), -n))
