"""Which tiles look alike: small descriptors of their pixels, so that flat and repeated tiles are captioned once.

Axes: P Q cell rows and columns, C = 3 channels (RGB in [0, 1]).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dreamsr_cli.images import Photo
from dreamsr_cli.models.captioner import CellMeans

CELLS = 8
"""Cells per side of a descriptor."""
STRIP_ROWS = 256
"""Photo rows that are read at a time."""
_ODD_CELL = 4.0
"""One cell may differ by this many times the threshold on the whole: a small object must not be overlooked."""

Area = tuple[int, int, int, int]
"""(left, top, right, bottom) in photo pixels."""


@dataclass(frozen=True, eq=False)
class Look:
    """What a tile looks like, in a few numbers."""

    colour_PQC: np.ndarray
    """float32, mean colour of each cell."""
    detail_PQ: np.ndarray
    """float32, standard deviation inside each cell, over pixels and channels about the channels' means."""

    @property
    def mean_C(self) -> np.ndarray:
        """Mean colour of the tile."""
        return self.colour_PQC.mean((0, 1))

    def is_flat(self, most: float) -> bool:
        """Whether levels spread by at most `most` (standard deviation), and nowhere much more."""
        off_PQC = self.colour_PQC - self.mean_C
        spread = float(np.sqrt((off_PQC**2).mean() + (self.detail_PQ**2).mean()))
        oddest = max(float(np.abs(off_PQC).max()), float(self.detail_PQ.max()))
        return spread <= most and oddest <= _ODD_CELL * most

    def is_like(self, other: Look, most: float) -> bool:
        """Whether cells differ by at most `most` (RMS) in colour and in detail, and no cell by much more."""
        if self.colour_PQC.shape != other.colour_PQC.shape:
            return False
        for mine, theirs in ((self.colour_PQC, other.colour_PQC), (self.detail_PQ, other.detail_PQ)):
            off = mine - theirs
            if np.sqrt((off**2).mean()) > most or np.abs(off).max() > _ODD_CELL * most:
                return False
        return True


class _Cells:
    """Sums for one `Look`, fed with strips from top to bottom."""

    def __init__(self, height: int, width: int) -> None:
        self._means, self._squares = CellMeans(height, width), CellMeans(height, width)

    def add(self, rgb_YXC: np.ndarray) -> None:
        self._means.add(rgb_YXC)
        self._squares.add(rgb_YXC * rgb_YXC)

    def look(self) -> Look:
        colour_PQC, square_PQC = _fewer(self._means.mean_PQC), _fewer(self._squares.mean_PQC)
        variance_PQ = (square_PQC - colour_PQC**2).mean(2)
        return Look(colour_PQC, np.sqrt(np.maximum(variance_PQ, 0)))


def _fewer(cells_PQC: np.ndarray) -> np.ndarray:
    """The describer's cells, averaged to at most `CELLS` per side."""
    rows = np.array_split(cells_PQC, min(CELLS, cells_PQC.shape[0]), axis=0)
    cells_PQC = np.stack([part.mean(0) for part in rows])
    columns = np.array_split(cells_PQC, min(CELLS, cells_PQC.shape[1]), axis=1)
    return np.stack([part.mean(1) for part in columns], axis=1)


def look_at(photo: Photo, areas: Sequence[Area]) -> list[Look]:
    """The look of each area, in one pass over the photo; memory: a strip, and the cells of the areas it touches."""
    looks: list[Look | None] = [None] * len(areas)
    open_areas: dict[int, _Cells] = {}
    height = photo.info.height
    for top in range(0, height, STRIP_ROWS):
        bottom = min(top + STRIP_ROWS, height)
        strip_PQC = photo.read_rows(top, bottom)
        for index, (left, area_top, right, area_bottom) in enumerate(areas):
            first, last = max(top, area_top), min(bottom, area_bottom)
            if first >= last:
                continue
            if first == area_top:
                open_areas[index] = _Cells(area_bottom - area_top, right - left)
            open_areas[index].add(strip_PQC[first - top : last - top, left:right])
            if last == area_bottom:
                looks[index] = open_areas.pop(index).look()
    return [look for look in looks if look is not None]


def share(looks: Sequence[Look], flat: float, flat_colour: float, alike: float) -> list[int | None]:
    """For each tile the earlier one whose caption it takes over, or None if it is captioned itself.

    Flat tiles (`flat`: spread of levels) go together if their mean colours differ by at most `flat_colour` in every
    channel, other tiles if `Look.is_like` says so. Tiles point at tiles that are captioned themselves.
    """
    owners: list[int] = []
    means_NC = np.stack([look.mean_C for look in looks])
    is_flat = [look.is_flat(flat) for look in looks]
    shared: list[int | None] = []
    for index, look in enumerate(looks):
        off_N = np.abs(means_NC[owners] - means_NC[index]).max(1) if owners else np.empty(0)
        found = None
        for owner, off in zip(owners, off_N, strict=True):
            both_flat = is_flat[index] and is_flat[owner] and off <= flat_colour
            # means can't differ by more than an odd cell: most pairs are settled by them
            if both_flat or (off <= _ODD_CELL * alike and look.is_like(looks[owner], alike)):
                found = owner
                break
        if found is None:
            owners.append(index)
        shared.append(found)
    return shared
