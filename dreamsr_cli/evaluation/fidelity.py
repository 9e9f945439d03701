"""Is a result still the photo it was made from? Colours, seams and tiles that stand out; for any photo, no reference.

Downscale and compare: the result, shrunk to the photo's size by the antialiased cubic, against the photo, as CIEDE2000
for each pixel of the photo. Seams: `seams.py`. What a tile must do to be called suspicious: `suspicion.py`. Everything
is read in strips, so memory grows with a picture's sides and its number of tiles, not with its area.

Axes: P Q pixel rows and columns, C channels.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dreamsr_cli.config import MAX_OUTPUT_PIXELS
from dreamsr_cli.errors import InputError
from dreamsr_cli.evaluation.colour_difference import compare
from dreamsr_cli.evaluation.lanczos import LanczosPhoto
from dreamsr_cli.evaluation.seams import Seam, SeamScores, SecondDifferences, luma
from dreamsr_cli.evaluation.suspicion import Measured, find_reasons
from dreamsr_cli.images import Photo, open_photo
from dreamsr_cli.progress import Progress, SilentProgress
from dreamsr_cli.resample import resize_rows
from dreamsr_cli.tiling import Tile, TileGrid

MAP_SIDE = 1024
"""Longest side of the map of differences; larger photos are averaged down to it."""
_STRIP_PIXELS = 2**21
_BINS = 10_001  # of 0.01: the 95th percentile of any number of pixels in little memory


@dataclass(frozen=True)
class TileScore:
    """What one tile of the result looks like against the photo and against the other tiles."""

    index: int
    """As in the tile grid: row-major, from 0."""
    row: int
    column: int
    box: tuple[int, int, int, int]
    """(left, top, right, bottom) in output pixels, cut at the picture's sides."""
    delta_e: float
    """Mean CIEDE2000 of downscale-and-compare within the tile."""
    shift: float
    """Distance in CIELab between the tile's mean colour and that of the photo there."""
    texture: float
    """log2 of the tile's fine detail over that of the Lanczos picture there (0: as much, 1: twice as much)."""
    seam: float | None
    """Seam score of the tile's own sides; None where none lies inside the picture."""
    suspicious: tuple[str, ...]
    """Why the tile stands out, in words; empty: it doesn't."""


@dataclass(frozen=True, eq=False)
class FidelityReport:
    """How faithful one result is; `to_json` is all of it but the map."""

    input: Path
    output: Path
    width: int
    """Output pixels."""
    height: int
    """Output pixels."""
    tile: tuple[int, int]
    """(width, height) of a tile in output pixels."""
    overlap: int
    delta_e_mean: float
    delta_e_p95: float
    """To 0.01."""
    delta_e_max: float
    seam: float | None
    """Seam score of the picture; None where no tile border lies inside, or no line is far enough from all of them."""
    seam_elsewhere: tuple[float, float] | None
    """Mean and standard deviation of that score where no border is; None where the tiles leave too little room."""
    lattice: float | None
    """How much lines of the 16 px lattice stand out away from tile borders (`seams.py`): about 1 is not at all."""
    borders: tuple[Seam, ...]
    """Every tile border's own score, the worst first."""
    tiles: tuple[TileScore, ...]
    """Row-major."""
    map_PQ: np.ndarray
    """Mean CIEDE2000 of blocks of the photo, float32, at most `MAP_SIDE` per side."""

    @property
    def suspicious(self) -> tuple[TileScore, ...]:
        """The tiles that stand out, those with most reasons first."""
        found = [tile for tile in self.tiles if tile.suspicious]
        return tuple(sorted(found, key=lambda tile: (-len(tile.suspicious), -tile.delta_e)))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON-able data."""
        return {
            "input": str(self.input),
            "output": str(self.output),
            "width": self.width,
            "height": self.height,
            "tile": list(self.tile),
            "overlap": self.overlap,
            "delta_e_mean": round(self.delta_e_mean, 4),
            "delta_e_p95": round(self.delta_e_p95, 2),
            "delta_e_max": round(self.delta_e_max, 4),
            "seam": None if self.seam is None else round(self.seam, 4),
            "seam_elsewhere": self.seam_elsewhere and [round(value, 4) for value in self.seam_elsewhere],
            "lattice": None if self.lattice is None else round(self.lattice, 4),
            "borders": [{**asdict(border), "score": round(border.score, 4)} for border in self.borders],
            "suspicious_tiles": [tile.index for tile in self.suspicious],
            "tiles": [_tile_json(tile) for tile in self.tiles],
        }


def _tile_json(tile: TileScore) -> dict[str, Any]:
    plain = {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(tile).items()}
    return {**plain, "box": list(tile.box), "suspicious": list(tile.suspicious)}


def photo_fidelity(lq: Path, sr: Path, grid: TileGrid | None) -> dict[str, float]:
    """`delta_e_mean`, `delta_e_p95` and, where `grid` has borders inside the picture, `seam`. `InputError` as in
    `open_photo`."""
    with open_spilled(lq) as photo, open_spilled(sr) as result:
        colours = _compare_colours(photo, result, None, SilentProgress())
        figures = {"delta_e_mean": colours.mean, "delta_e_p95": colours.percentile(0.95)}
        if grid is not None and len(grid.tiles) > 1:
            seam = SeamScores(*_sum_second_differences(photo, result, grid, SilentProgress())).whole()
            if seam is not None:
                figures["seam"] = seam
    return figures


def fidelity_report(
    input: Path,
    output: Path,
    grid: TileGrid,
    out_size: tuple[int, int],
    progress: Progress | None = None,
    max_pixels: int | None = None,
) -> FidelityReport:
    """Hold a result against its photo, tile by tile. `grid`: the one that the result was made with.

    `out_size`: (width, height) of the result. `max_pixels`: as in `open_spilled`. `InputError` as in `open_photo`, and
    if the result has another size.
    """
    progress = SilentProgress() if progress is None else progress
    with open_spilled(input, max_pixels) as photo, open_spilled(output, max_pixels) as result:
        width, height = result.info.width, result.info.height
        if (width, height) != tuple(out_size):
            raise InputError(
                f"{output}: {width}x{height} pixels, the tile grid is for {out_size[0]}x{out_size[1]}",
                "give the result that was made with this grid",
            )
        colours = _compare_colours(photo, result, grid, progress)
        detail, plain_detail = _sum_second_differences(photo, result, grid, progress)
    seams = SeamScores(detail, plain_detail)
    measured = [
        Measured(
            delta_e=colours.tile_mean(tile),
            shift=colours.tile_shift(tile),
            texture=float(np.log2((detail.texture(tile) + 0.5) / (plain_detail.texture(tile) + 0.5))),
            seam=seams.tile(tile),
        )
        for tile in grid.tiles
    ]
    reasons = find_reasons(measured)
    return FidelityReport(
        input=input,
        output=output,
        width=width,
        height=height,
        tile=(grid.tile_width, grid.tile_height),
        overlap=grid.overlap,
        delta_e_mean=colours.mean,
        delta_e_p95=colours.percentile(0.95),
        delta_e_max=colours.largest,
        seam=seams.whole(),
        seam_elsewhere=seams.elsewhere(),
        lattice=seams.lattice(),
        borders=tuple(seams.borders()),
        tiles=tuple(
            TileScore(
                index=tile.index,
                row=tile.row,
                column=tile.column,
                box=(tile.left, tile.top, min(tile.left + tile.width, width), min(tile.top + tile.height, height)),
                delta_e=score.delta_e,
                shift=score.shift,
                texture=score.texture,
                seam=score.seam,
                suspicious=why,
            )
            for tile, score, why in zip(grid.tiles, measured, reasons, strict=True)
        ),
        map_PQ=colours.map_PQ(),
    )


def open_spilled(path: Path, max_pixels: int | None = None) -> Photo:
    """`open_photo`, the pixels of huge photos in a nameless file beside it, or where temporary files lie.

    `max_pixels`: larger photos are refused; None: the largest that `dreamsr upscale` writes by default.
    """
    folder = path.absolute().parent
    spill = folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())
    return open_photo(path, spill, MAX_OUTPUT_PIXELS if max_pixels is None else max_pixels)


def _strips(height: int, rows: int) -> Iterator[tuple[int, int]]:
    for top in range(0, height, max(1, rows)):
        yield top, min(top + max(1, rows), height)


class _Colours:
    """CIEDE2000 of a photo's pixels, summed up strip by strip for the whole, for tiles and for the map."""

    def __init__(self, photo: Photo, result: Photo, grid: TileGrid | None) -> None:
        self._width, self._height = photo.info.width, photo.info.height
        self._across, self._down = result.info.width / self._width, result.info.height / self._height
        self._tiles = grid.tiles if grid else ()
        self._sums = np.zeros((len(self._tiles), 4))
        self._pixels = np.zeros(len(self._tiles), np.int64)
        self._histogram = np.zeros(_BINS, np.int64)
        self._total = self.largest = 0.0
        self._block = -(-max(self._width, self._height) // MAP_SIDE)
        shape = -(-self._height // self._block), -(-self._width // self._block)
        self._map, self._map_pixels = np.zeros(shape), np.zeros(shape)

    def add(self, top: int, delta_PQ: np.ndarray, lab_PQC: np.ndarray) -> None:
        bottom = top + len(delta_PQ)
        self._total += float(delta_PQ.sum(dtype=np.float64))
        self.largest = max(self.largest, float(delta_PQ.max()))
        bins = np.minimum((delta_PQ * 100).astype(np.int64), _BINS - 1)
        self._histogram += np.bincount(bins.ravel(), minlength=_BINS)
        for number, tile in enumerate(self._tiles):
            left, right, first, last = self._box(tile)
            first, last = max(first, top), min(last, bottom)
            if first < last:
                at = slice(first - top, last - top), slice(left, right)
                self._sums[number, 0] += delta_PQ[at].sum(dtype=np.float64)
                self._sums[number, 1:] += lab_PQC[at].sum((0, 1), dtype=np.float64)
                self._pixels[number] += (last - first) * (right - left)
        rows, columns = np.arange(top, bottom) // self._block, np.arange(0, self._width, self._block)
        sums = np.add.reduceat(delta_PQ, columns, axis=1, dtype=np.float64)
        np.add.at(self._map, rows, sums)
        np.add.at(self._map_pixels, rows, np.diff(np.append(columns, self._width))[None].repeat(len(rows), 0))

    def _box(self, tile: Tile) -> tuple[int, int, int, int]:
        """(left, right, top, bottom): the photo's pixels whose centres lie in the tile."""

        def pixel(edge: int, factor: float, length: int) -> int:
            return min(length, max(0, int(np.ceil(edge / factor - 0.5))))

        return (
            pixel(tile.left, self._across, self._width),
            pixel(tile.left + tile.width, self._across, self._width),
            pixel(tile.top, self._down, self._height),
            pixel(tile.top + tile.height, self._down, self._height),
        )

    @property
    def mean(self) -> float:
        return self._total / (self._width * self._height)

    def percentile(self, share: float) -> float:
        """The middle of the first bin at which `share` of all pixels is reached."""
        reached = np.searchsorted(np.cumsum(self._histogram), share * self._width * self._height)
        return (float(reached) + 0.5) / 100

    def tile_mean(self, tile: Tile) -> float:
        return float(self._sums[tile.index, 0] / max(1, self._pixels[tile.index]))

    def tile_shift(self, tile: Tile) -> float:
        return float(np.linalg.norm(self._sums[tile.index, 1:] / max(1, self._pixels[tile.index])))

    def map_PQ(self) -> np.ndarray:
        return (self._map / self._map_pixels).astype(np.float32)


def _compare_colours(photo: Photo, result: Photo, grid: TileGrid | None, progress: Progress) -> _Colours:
    width, height = photo.info.width, photo.info.height
    wide, high = result.info.width, result.info.height
    colours = _Colours(photo, result, grid)
    strips = list(_strips(height, _STRIP_PIXELS * height // (wide * high)))
    progress.phase("compare with the photo", len(strips))
    for top, bottom in strips:
        shrunk_PQC = resize_rows(result.read_rows, high, wide, height, width, top, bottom)
        own_PQC = photo.read_rows(top, bottom)
        colours.add(top, *compare(shrunk_PQC, result.info.icc, own_PQC, photo.info.icc))
        progress.advance()
    return colours


def _sum_second_differences(
    photo: Photo, result: Photo, grid: TileGrid, progress: Progress
) -> tuple[SecondDifferences, SecondDifferences]:
    """Of the result, and of the photo enlarged by Lanczos to its size."""
    width, height = result.info.width, result.info.height
    plain = LanczosPhoto(photo, width, height)
    sums = SecondDifferences(grid, width, height), SecondDifferences(grid, width, height)
    strips = list(_strips(height, _STRIP_PIXELS // width))
    progress.phase("look for seams", len(strips))
    for top, bottom in strips:
        first, last = max(0, top - 1), min(height, bottom + 1)
        for total, picture in zip(sums, (result, plain), strict=True):
            total.add(top, bottom, luma(picture.read_rows(first, last)))
        progress.advance()
    return sums
