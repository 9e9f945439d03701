"""Where overlapping tiles lie, in output pixels and in latent pixels.

Everything lies on a lattice of `TOKEN_SIDE` = 16 output pixels, the side of one image token; the canvas is padded right
and bottom to that lattice and cropped at the end, so the size that a user gets is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from dreamsr_cli.config import TOKEN_SIDE
from dreamsr_cli.errors import UsageError

SMALLEST_FACTOR, LARGEST_FACTOR = 1, 8


def canvas_size(
    width: int, height: int, scale: float | None = None, long_side: int | None = None, short_side: int | None = None
) -> tuple[int, int]:
    """(out_width, out_height) in pixels for a photo of `width` x `height`; exactly one of the three is given.

    Each side is side * factor rounded half up, computed exactly (a scale means its decimal digits: 1.1 is 11/10).
    `UsageError`, with the photo's size and the values that the flag can take, where the factor is outside of 1 to 8.
    """
    given = {"--scale": scale, "--long-side": long_side, "--short-side": short_side}
    named = [(flag, value) for flag, value in given.items() if value is not None]
    if len(named) != 1:
        flags = ", ".join(flag for flag, _ in named) or "none"
        raise UsageError(f"the output size takes exactly one of {', '.join(given)}; given: {flags}", "keep one of them")
    flag, value = named[0]
    side = {"--scale": 1, "--long-side": max(width, height), "--short-side": min(width, height)}[flag]
    try:
        factor = Fraction(str(value)) / side
    except ValueError as error:
        raise UsageError(f"{flag} {value} is not a finite number", f"give {flag} a number") from error
    if not SMALLEST_FACTOR <= factor <= LARGEST_FACTOR:
        low, high = SMALLEST_FACTOR * side, LARGEST_FACTOR * side
        nearest = low if factor < SMALLEST_FACTOR else high
        raise UsageError(
            f"{flag} {value} is out of range for a photo of {width} x {height} pixels",
            f"use {flag} {nearest}; anything from {low} to {high} is possible",
        )
    return _scaled(width, factor), _scaled(height, factor)


def _scaled(side: int, factor: Fraction) -> int:
    return max(1, int(side * factor + Fraction(1, 2)))


def padded(n: int) -> int:
    """The next multiple of 16 at or above `n`."""
    return -(-n // TOKEN_SIDE) * TOKEN_SIDE


def check_tiling(tile: int, overlap: int) -> None:
    """`UsageError`, with the nearest legal value, unless both are multiples of 16 and overlap <= tile // 2.

    `tile` 0 (the whole photo) goes with any legal overlap.
    """
    if tile < 0 or tile % TOKEN_SIDE:
        nearest = max(TOKEN_SIDE, _nearest(tile))
        raise UsageError(f"--tile {tile} is not a multiple of {TOKEN_SIDE}", f"use --tile {nearest}, or 0 for one tile")
    limit = tile // 2 // TOKEN_SIDE * TOKEN_SIDE
    if tile and overlap > tile // 2:
        raise UsageError(f"--overlap {overlap} is more than half of --tile {tile}", f"use --overlap {limit} or less")
    if overlap < 0 or overlap % TOKEN_SIDE:
        nearest = max(0, _nearest(overlap))
        nearest = min(nearest, limit) if tile else nearest
        raise UsageError(f"--overlap {overlap} is not a multiple of {TOKEN_SIDE}", f"use --overlap {nearest}")


def _nearest(n: int) -> int:
    return (n + TOKEN_SIDE // 2) // TOKEN_SIDE * TOKEN_SIDE


@dataclass(frozen=True)
class Tile:
    """One rectangle of the padded canvas, in output pixels; all numbers but the indices are multiples of 16."""

    index: int
    """Position in row-major order, also the number of its slot."""
    row: int
    column: int
    top: int
    left: int
    height: int
    width: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) in output pixels."""
        return self.left, self.top, self.left + self.width, self.top + self.height

    def latent_box(self, stride: int = 8) -> tuple[int, int, int, int]:
        """(top, left, height, width) in latent pixels of `stride` output pixels."""
        return self.top // stride, self.left // stride, self.height // stride, self.width // stride


@dataclass(frozen=True)
class TileGrid:
    """Tiles of one size that cover the padded canvas: the first begins at 0, the last ends with the canvas."""

    canvas_height: int
    """Padded, in output pixels."""
    canvas_width: int
    """Padded, in output pixels."""
    tile_height: int
    tile_width: int
    overlap: int
    """Least overlap of neighbours in output pixels."""
    rows: int
    columns: int
    tiles: tuple[Tile, ...]
    """Row-major."""

    def batches(self, size: int) -> list[tuple[Tile, ...]]:
        """Tiles [b * size, (b + 1) * size) for each b; the last batch may be shorter, padding it is the caller's."""
        if size < 1:
            raise ValueError(f"a batch holds at least one tile, got {size}")
        return [self.tiles[i : i + size] for i in range(0, len(self.tiles), size)]


def make_grid(canvas_height: int, canvas_width: int, tile: int, overlap: int) -> TileGrid:
    """The grid with the fewest tiles of at most `tile` x `tile` output pixels that overlap by at least `overlap`.

    The canvas is padded to the lattice first. `tile` 0 makes one tile. Tiles are no longer than that number of them
    needs, and spread evenly, to the lattice: what they overlap beyond `overlap` would be computed twice for nothing.
    They stay at least twice as long as `overlap`. Raises `UsageError` as `check_tiling` does.
    """
    check_tiling(tile, overlap)
    height, width = padded(canvas_height), padded(canvas_width)
    if min(canvas_height, canvas_width) < 1:
        raise ValueError(f"a canvas has at least one pixel, got {canvas_height} x {canvas_width}")
    tile_height, tops = _divided(height, tile or height, overlap)
    tile_width, lefts = _divided(width, tile or width, overlap)
    tiles = tuple(
        Tile(row * len(lefts) + column, row, column, top, left, tile_height, tile_width)
        for row, top in enumerate(tops)
        for column, left in enumerate(lefts)
    )
    return TileGrid(height, width, tile_height, tile_width, overlap, len(tops), len(lefts), tiles)


def _divided(length: int, longest: int, overlap: int) -> tuple[int, list[int]]:
    """The tiles' extent along one side of the canvas, and their first pixels; neighbouring steps differ by one lattice
    unit at most."""
    if longest >= length:
        return length, [0]
    steps = -(-(length - longest) // (longest - overlap))
    tile = max(padded(-(-(length + steps * overlap) // (steps + 1))), 2 * overlap)
    spare = (length - tile) // TOKEN_SIDE
    return tile, [(2 * i * spare + steps) // (2 * steps) * TOKEN_SIDE for i in range(steps + 1)]
