"""How much of what stage 2 changes is kept, by rows (`--texture`).

Stage 2 begins from a picture of the cleaner or the enlarger, and what it makes of it is one of the photos that this
could be. Both pictures err, each in its own way: so their mean errs less than either, as the mean of several networks
does (Hansen and Salamon 1990), and a little of what stage 2 invents in smooth places is gone.

Axes: P Q pixel rows and columns, C channels.
"""

from __future__ import annotations

import numpy as np

from dreamsr_cli.canvas import EnlargedPhoto
from dreamsr_cli.resample import ReadRows


class BlendedRows:
    """Rows between the picture that stage 2 begins from and its result: `amount` 0 is the one, 1 the other."""

    def __init__(self, begun: EnlargedPhoto, read_result: ReadRows, amount: float) -> None:
        """`read_result(top, bottom)` gives float32 rows (rows, width, 3), about [0, 1], of the size of `begun`."""
        self._begun, self._read_result, self.amount = begun, read_result, amount

    def read_rows(self, top: int, bottom: int) -> np.ndarray:
        """Rows [top, bottom), float32 (rows, width, 3), about [0, 1], not clipped."""
        rows_PQC = self._read_result(top, bottom)
        if self.amount == 1:
            return rows_PQC
        begun_PQC = self._begun.read_rows(top, bottom)
        return begun_PQC + np.float32(self.amount) * (rows_PQC - begun_PQC)
