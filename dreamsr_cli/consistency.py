"""Consistency: the result, shrunk to the photo's size, agrees with the photo.

A small photo that nothing but its size is wrong with says exactly what the result must average to. One step of
iterative back-projection (Irani and Peleg 1991) takes it at its word: what the photo has and the shrunk result hasn't
is enlarged and added. For a damaged photo that would bring the damage back, so how much is added depends on what the
photo looks like (`models/cleanliness.py`, `looks.py`), or on what people say. A JPEG's own pixels would bring its
blocks back; there the result agrees with what the enlarger made of the photo.

Axes: P Q pixel rows and columns, C channels.
"""

from __future__ import annotations

import numpy as np

from dreamsr_cli.canvas import EnlargedPhoto
from dreamsr_cli.resample import ReadRows, resize_rows


class ConsistentRows:
    """Rows of a result that agree with its photo by `amount`, 0 (as the result is) to 1 (all that one step can do).

    Shrunk and enlarged by the antialiased cubic, which is local: rows come out the same whatever is asked for with
    them, and depend on about four of the photo's pixels more on either side.
    """

    def __init__(
        self, read_result: ReadRows, enlarged: EnlargedPhoto, amount: float, like: EnlargedPhoto | None = None
    ) -> None:
        """`read_result(top, bottom)` gives float32 rows (rows, width, 3), about [0, 1], of the size of `enlarged`.
        `like`, of that size too: what shrunk takes the photo's place; None: the photo itself."""
        self._read_result, self._enlarged, self.amount, self._like = read_result, enlarged, amount, like

    def read_rows(self, top: int, bottom: int) -> np.ndarray:
        """Rows [top, bottom), float32 (rows, width, 3), about [0, 1], not clipped."""
        rows_PQC = self._read_result(top, bottom)
        if not self.amount:
            return rows_PQC
        info, large = self._enlarged.photo.info, self._enlarged
        missing_PQC = resize_rows(self._missing, info.height, info.width, large.height, large.width, top, bottom)
        return rows_PQC + np.float32(self.amount) * missing_PQC

    def _missing(self, top: int, bottom: int) -> np.ndarray:
        """Rows [top, bottom) of the photo less the shrunk result."""
        photo, like = self._enlarged.photo, self._like
        wanted = photo.read_rows(top, bottom) if like is None else self._shrunk(like.read_rows, top, bottom)
        return wanted - self._shrunk(self._clipped, top, bottom)

    def _shrunk(self, read_rows: ReadRows, top: int, bottom: int) -> np.ndarray:
        """Rows [top, bottom) at the photo's size."""
        info, large = self._enlarged.photo.info, self._enlarged
        return resize_rows(read_rows, large.height, large.width, info.height, info.width, top, bottom)

    def _clipped(self, top: int, bottom: int) -> np.ndarray:
        """The result as a file will hold it."""
        return np.clip(self._read_result(top, bottom), 0, 1)
