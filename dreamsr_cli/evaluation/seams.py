"""Seams: is there more of an edge at tile borders than elsewhere, beyond what the photo itself has there?

Score = mean |second difference of luma| across tile borders / the same across parallel lines at least 32 px from all
of them - the same ratio, at the same places, in the photo enlarged by Lanczos + 1. About 1: no seam.

Lines that borders are compared with lie on the lattice of 16 px that borders lie on too (image tokens): a pattern of
that period, which networks of patches leave everywhere, is not a seam. It has its own score: lines of the lattice over
all other lines, all at least 32 px from borders, minus the same in the Lanczos picture, plus 1.

A line at b lies between pixels b-1 and b; its second difference is the mean of the two that reach over it, centred on
pixels b-1 and b. A tile border is every side of every tile that is not a side of the picture. Columns and rows have a
ratio each, weighted by their number of border pixels.

Axes: P Q pixel rows and columns, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dreamsr_cli.config import TOKEN_SIDE
from dreamsr_cli.tiling import Tile, TileGrid

DISTANCE = 32
"""Least distance in output pixels of a line that borders are compared with from every border."""
_LUMA = np.array([0.299, 0.587, 0.114], np.float32) * 255  # BT.601, full range, in levels
_TINY = 1e-3  # levels; makes 0/0 of plain pictures a 1
_FEWEST = 4  # lines inside a tile that its own score is compared with


def luma(rgb_PQC: np.ndarray) -> np.ndarray:
    """BT.601 luma in levels (0 to 255), float32 (rows, columns), of RGB in [0, 1]."""
    return rgb_PQC @ _LUMA


@dataclass(frozen=True)
class Lines:
    """Where second differences are compared along one axis."""

    borders: np.ndarray
    """Lines at tile borders, ascending; may be empty."""
    references: np.ndarray
    """Lines of the lattice at least `DISTANCE` away from every one of them."""
    others: np.ndarray
    """Lines beside the lattice, as far away."""


def find_lines(starts: set[int], tile: int, length: int) -> Lines:
    """Lines of one axis of `length` pixels for tiles of `tile` pixels that begin at `starts`."""
    inside = np.arange(2, max(2, length - 1))
    sides = starts | {start + tile for start in starts}
    borders = np.array(sorted(side for side in sides if 2 <= side <= length - 2), np.int64)
    distance = np.full(len(inside), length)
    for border in borders:
        np.minimum(distance, np.abs(inside - border), out=distance)
    far = inside[distance >= DISTANCE]
    return Lines(borders, far[far % TOKEN_SIDE == 0], far[far % TOKEN_SIDE != 0])


class SecondDifferences:
    """|Second differences| of a picture's luma, summed for each column within each row of tiles, and for each row
    within each column of tiles. Fed strip by strip from the top; the picture itself is not kept."""

    def __init__(self, grid: TileGrid, width: int, height: int) -> None:
        self.grid, self.width, self.height = grid, width, height
        self._row_spans = _spans({tile.row: tile for tile in grid.tiles}.values(), "top", "height", height)
        self._column_spans = _spans({tile.column: tile for tile in grid.tiles}.values(), "left", "width", width)
        self.columns = np.zeros(width)
        """Of each column, across it, over all rows."""
        self.rows = np.zeros(height)
        """Of each row, across it, over all columns."""
        self.columns_in_band = np.zeros((len(self._row_spans), width))
        """As `columns`, within each row of tiles."""
        self.rows_in_band = np.zeros((len(self._column_spans), height))
        """As `rows`, within each column of tiles."""

    def add(self, top: int, bottom: int, luma_PQ: np.ndarray) -> None:
        """Rows [top, bottom); `luma_PQ` holds one row more at each side where the picture has one."""
        above = min(top, 1)
        rows_PQ = luma_PQ[above : above + bottom - top]
        across_PQ = np.abs(rows_PQ[:, :-2] - 2 * rows_PQ[:, 1:-1] + rows_PQ[:, 2:])
        self.columns[1:-1] += across_PQ.sum(0, dtype=np.float64)
        for band, (first, last) in enumerate(self._row_spans):
            first, last = max(first, top), min(last, bottom)
            if first < last:
                self.columns_in_band[band, 1:-1] += across_PQ[first - top : last - top].sum(0, dtype=np.float64)
        down_PQ = np.abs(luma_PQ[:-2] - 2 * luma_PQ[1:-1] + luma_PQ[2:])
        at = slice(max(top, 1), max(top, 1) + len(down_PQ))
        self.rows[at] = down_PQ.sum(1, dtype=np.float64)
        for band, (first, last) in enumerate(self._column_spans):
            self.rows_in_band[band, at] = down_PQ[:, first:last].sum(1, dtype=np.float64)

    def texture(self, tile: Tile) -> float:
        """Mean |second difference| inside a tile, in levels: how much fine detail it has."""
        top, bottom = self._row_spans[tile.row]
        left, right = self._column_spans[tile.column]
        area = (bottom - top) * (right - left)
        across = self.columns_in_band[tile.row, left:right].sum() / area
        return float((across + self.rows_in_band[tile.column, top:bottom].sum() / area) / 2)

    def span(self, tile: Tile) -> tuple[tuple[int, int], tuple[int, int]]:
        """((left, right), (top, bottom)) of a tile inside the picture."""
        return self._column_spans[tile.column], self._row_spans[tile.row]


def _spans(tiles: Iterable[Tile], start: str, size: str, length: int) -> list[tuple[int, int]]:
    return [(getattr(t, start), min(getattr(t, start) + getattr(t, size), length)) for t in tiles]


@dataclass(frozen=True)
class Seam:
    """One tile border that reaches through the whole picture."""

    axis: str
    """"column" (a vertical line) or "row"."""
    position: int
    """Output pixels from the left or the top."""
    score: float
    """As the picture's score, of this border alone."""


class _Axis(NamedTuple):
    """What is compared along one axis of a picture, or of a tile."""

    lines: Lines
    result: np.ndarray
    """Second differences of the result by line, summed."""
    plain: np.ndarray
    """The same of the Lanczos picture."""
    length: int
    """A line's pixels."""


class SeamScores:
    """Seam scores of a result against the photo enlarged by Lanczos, both summed up by `SecondDifferences`."""

    def __init__(self, result: SecondDifferences, plain: SecondDifferences) -> None:
        grid = result.grid
        self._result, self._plain = result, plain
        x = find_lines({tile.left for tile in grid.tiles}, grid.tile_width, result.width)
        y = find_lines({tile.top for tile in grid.tiles}, grid.tile_height, result.height)
        self._columns = _Axis(x, result.columns, plain.columns, result.height)
        self._rows = _Axis(y, result.rows, plain.rows, result.width)

    def whole(self) -> float | None:
        """The picture's score; None without borders inside, or without lines far enough from them."""
        return _mean(_scored(self._columns, self._rows))

    def elsewhere(self) -> tuple[float, float] | None:
        """Mean and standard deviation of the picture's score where no border is: what chance makes of it. Its lines are
        the borders moved by a multiple of `TOKEN_SIDE`, those still `DISTANCE` away from every border. None for a
        picture with fewer than `_FEWEST` such moves."""
        grid, scores = self._result.grid, list[float]()
        for move in range(TOKEN_SIDE, max(grid.tile_width, grid.tile_height), TOKEN_SIDE):
            axes = (axis._replace(lines=_moved(axis.lines, move)) for axis in (self._columns, self._rows))
            if (score := _mean(_scored(*axes))) is not None:
                scores.append(score)
        return (float(np.mean(scores)), float(np.std(scores))) if len(scores) >= _FEWEST else None

    def lattice(self) -> float | None:
        """How much lines of the lattice stand out, away from borders: about 1 is not at all. None where the tiles leave
        no such lines."""
        scores = []
        for lines, result, plain, length in (self._columns, self._rows):
            if len(lines.references) and len(lines.others):
                swapped = Lines(lines.references, lines.others, lines.others)
                score = _ratio(result / length, swapped) - _ratio(plain / length, swapped) + 1
                scores.append((score, length * len(lines.references)))
        return _mean(scores)

    def borders(self) -> list[Seam]:
        """Every border's own score, the worst first."""
        found = []
        for axis, (lines, result, plain, length) in (("column", self._columns), ("row", self._rows)):
            for border in lines.borders if len(lines.references) else ():
                one = Lines(np.array([border]), lines.references, lines.others)
                score = _ratio(result / length, one) - _ratio(plain / length, one) + 1
                found.append(Seam(axis, int(border), score))
        return sorted(found, key=lambda seam: (-seam.score, seam.axis, seam.position))

    def tile(self, tile: Tile) -> float | None:
        """Score of the tile's own sides against lines inside of it; None where there are none."""
        result, plain = self._result, self._plain
        (left, right), (top, bottom) = result.span(tile)
        columns = _Axis(
            _within(self._columns.lines, tile.left, tile.left + tile.width),
            result.columns_in_band[tile.row],
            plain.columns_in_band[tile.row],
            bottom - top,
        )
        rows = _Axis(
            _within(self._rows.lines, tile.top, tile.top + tile.height),
            result.rows_in_band[tile.column],
            plain.rows_in_band[tile.column],
            right - left,
        )
        return _mean(_scored(columns, rows))


def _scored(*axes: _Axis) -> list[tuple[float, int]]:
    """Score and number of border pixels of each axis that has one."""
    return [
        (_ratio(of_result / length, lines) - _ratio(of_plain / length, lines) + 1, length * len(lines.borders))
        for lines, of_result, of_plain, length in axes
        if len(lines.borders) and len(lines.references)
    ]


def _moved(lines: Lines, move: int) -> Lines:
    """As if borders lay `move` pixels further, where that is away from all of them; none where most aren't."""
    places = np.intersect1d(lines.borders + move, lines.references)
    if 2 * len(places) < len(lines.borders):
        places = places[:0]
    far = np.abs(lines.references[:, None] - places).min(1, initial=DISTANCE) >= DISTANCE
    return Lines(places, lines.references[far], lines.others)


def _within(lines: Lines, first: int, last: int) -> Lines:
    """A tile's two sides, and the lines inside of it; none of these where they are too few."""
    references = lines.references[(lines.references > first) & (lines.references < last)]
    if len(references) < _FEWEST:
        references = references[:0]
    return Lines(lines.borders[np.isin(lines.borders, (first, last))], references, lines.others)


def _ratio(sums: np.ndarray, lines: Lines) -> float:
    """Mean over borders / mean over references, of sums by pixel."""
    by_line = (sums[1:] + sums[:-1]) / 2  # by_line[b - 1] belongs to line b
    border, reference = by_line[lines.borders - 1].mean(), by_line[lines.references - 1].mean()
    return float((border + _TINY) / (reference + _TINY))


def _mean(scores: list[tuple[float, int]]) -> float | None:
    total = sum(pixels for _, pixels in scores)
    return sum(score * pixels for score, pixels in scores) / total if total else None
