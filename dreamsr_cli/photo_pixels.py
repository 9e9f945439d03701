"""Where a photo's levels lie while it is read from again and again: in memory, or for huge ones in a nameless file.

The file is read with `pread`, not mapped: mapped pages count as resident memory. The system removes it when it is
closed, even if the process is killed.

Axes: P Q pixel rows and columns, C channels. `levels_PQC` is uint8 or uint16 (rows, width, bands).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dreamsr_cli.errors import OutputError

IN_MEMORY = 64 * 2**20
"""Photos of fewer pixels are kept in memory."""
GROUP = 128
"""Side of the squares over which hidden colours are averaged first; a power of two."""
_AT_ONCE = 32 * 2**20
"""Bytes handled at a time."""


class PixelStore:
    """Levels of a whole photo, (height, width, bands) of `dtype`; rows can be read in any order, also while writing."""

    def __init__(self, height: int, width: int, bands: int, dtype: np.dtype, spill: Path | None) -> None:
        self.shape, self.dtype = (height, width, bands), dtype
        self._row = width * bands * dtype.itemsize
        self._levels_PQC: np.ndarray | None = None
        self._file = None
        if spill is None or height * width < IN_MEMORY:
            self._levels_PQC = np.empty(self.shape, dtype)
            return
        try:
            spill.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=spill, buffering=0)  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise _disk_error(spill, error) from error
        self._spill = spill

    @property
    def spilled(self) -> bool:
        """Whether the levels lie on disk."""
        return self._file is not None

    @property
    def block(self) -> int:
        """Rows to handle at a time: a multiple of `GROUP`."""
        return max(1, _AT_ONCE // (self._row * GROUP)) * GROUP

    def read(self, top: int, bottom: int) -> np.ndarray:
        """Rows [top, bottom); not to be written to."""
        if self._levels_PQC is not None:
            return self._levels_PQC[top:bottom]
        rows_PQC = np.empty((bottom - top, *self.shape[1:]), self.dtype)
        view = rows_PQC.data.cast("B")
        done = 0
        while done < len(view):
            count = os.preadv(self._descriptor(), [view[done:]], top * self._row + done)
            if count == 0:
                raise OSError(f"rows [{top}, {bottom}) are not there yet")
            done += count
        return rows_PQC

    def write(self, top: int, left: int, levels_PQC: np.ndarray) -> None:
        """Put a rectangle of levels at row `top`, column `left`. `OutputError` if the disk is full."""
        rows, columns = levels_PQC.shape[:2]
        if self._levels_PQC is not None:
            self._levels_PQC[top : top + rows, left : left + columns] = levels_PQC
            return
        pixel = self.shape[2] * self.dtype.itemsize
        if columns == self.shape[1]:
            self._pwrite(np.ascontiguousarray(levels_PQC).data.cast("B"), top * self._row)
            return
        for row in range(rows):
            piece = np.ascontiguousarray(levels_PQC[row]).data.cast("B")
            self._pwrite(piece, (top + row) * self._row + left * pixel)

    def close(self) -> None:
        """Give up the levels and the file."""
        self._levels_PQC = None
        if self._file is not None:
            self._file.close()

    def _descriptor(self) -> int:
        assert self._file is not None
        return self._file.fileno()

    def _pwrite(self, data: memoryview, offset: int) -> None:
        try:
            while data:
                count = os.pwrite(self._descriptor(), data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            raise _disk_error(self._spill, error) from error


def _disk_error(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{folder}: no room for the decoded photo ({error.strerror or error})",
        "free some disk space, or choose another folder with -o",
    )


def place(store: PixelStore, top: int, stored_PQC: np.ndarray, orientation: int, stored_height: int) -> None:
    """Put stored rows from `top` on where they belong in the upright photo, for EXIF orientation 1 to 8.

    EXIF 2.3, tag 0x0112; other values change nothing. `stored_height`: rows of the whole photo as stored.
    """
    turned = stored_PQC.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else stored_PQC
    turned = turned[::-1] if orientation in (3, 4, 7, 8) else turned
    turned = turned[:, ::-1] if orientation in (2, 3, 6, 7) else turned
    last = stored_height - top - len(stored_PQC)
    if orientation in (5, 6, 7, 8):
        store.write(0, last if orientation in (6, 7) else top, turned)
    else:
        store.write(last if orientation in (3, 4) else top, 0, turned)


def fill_hidden(store: PixelStore) -> None:
    """Give fully transparent pixels the colour of the nearest visible ones; the last band, alpha, stays.

    What lies there is arbitrary (often black) and would bleed into visible edges when the photo is resized.
    """
    height, width, bands = store.shape
    coarse_PQC = np.zeros((-(-height // GROUP), -(-width // GROUP), bands), np.float32)
    hidden = False
    for top, levels_PQC in _blocks(store):
        hidden |= bool((levels_PQC[..., -1] == 0).any())
        values_PQC = _premultiplied(levels_PQC)
        for _ in range(GROUP.bit_length() - 1):
            values_PQC = _halve(values_PQC)
        coarse_PQC[top // GROUP : top // GROUP + len(values_PQC)] = values_PQC
    if not hidden or not coarse_PQC[..., -1].any():
        return
    far_PQC = _spread(coarse_PQC, None)
    for top, levels_PQC in _blocks(store):
        hidden_PQ = levels_PQC[..., -1] == 0
        if hidden_PQ.any():
            near_PQC = far_PQC[top // GROUP : -(-(top + len(levels_PQC)) // GROUP)]
            colour_PQC = _spread(_premultiplied(levels_PQC), near_PQC)
            filled_PQC = levels_PQC.copy()
            filled_PQC[hidden_PQ, :-1] = np.rint(colour_PQC[hidden_PQ])
            store.write(top, 0, filled_PQC)


def _blocks(store: PixelStore) -> Iterator[tuple[int, np.ndarray]]:
    """The photo in groups of rows that are small as floats, each with its top."""
    height = store.shape[0]
    step = max(GROUP, store.block // 4 // GROUP * GROUP)
    for top in range(0, height, step):
        yield top, store.read(top, min(top + step, height))


def _premultiplied(levels_PQC: np.ndarray) -> np.ndarray:
    """Colour times alpha, then alpha, float32."""
    values_PQC = levels_PQC.astype(np.float32)
    values_PQC[..., :-1] *= values_PQC[..., -1:]
    return values_PQC


def _halve(values_PQC: np.ndarray) -> np.ndarray:
    """Mean of 2 x 2; beyond the border lies nothing."""
    height, width = values_PQC.shape[:2]
    x = np.pad(values_PQC, ((0, height % 2), (0, width % 2), (0, 0)))
    return (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4


def _spread(premultiplied_PQC: np.ndarray, coarse_PQC: np.ndarray | None) -> np.ndarray:
    """Colours where there is weight, elsewhere those of a blur just wide enough to reach some.

    `premultiplied_PQC`: colour times weight, then weight. `coarse_PQC`: colours on a grid of `GROUP` pixels to end at;
    None: go on until one pixel is left.
    """
    weight_PQC = premultiplied_PQC[..., -1:]
    known_PQC = weight_PQC > 0
    colour_PQC = premultiplied_PQC[..., :-1] / np.where(known_PQC, weight_PQC, 1)
    if known_PQC.all():
        return colour_PQC
    height, width = colour_PQC.shape[:2]
    if coarse_PQC is not None and coarse_PQC.shape[:2] == (height, width):
        return np.where(known_PQC, colour_PQC, coarse_PQC)
    wider_PQC = _spread(_halve(premultiplied_PQC), coarse_PQC)
    grown_PQC = wider_PQC.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
    return np.where(known_PQC, colour_PQC, grown_PQC)
