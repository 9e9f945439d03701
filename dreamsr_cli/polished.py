"""Polish on a result, row by row (`models/polish.py`).

Axes: P Q pixel rows and columns, C channels.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from dreamsr_cli.canvas import EnlargedPhoto
from dreamsr_cli.models.polish import Polish
from dreamsr_cli.network_rows import padded_rgb
from dreamsr_cli.resample import KeptStrips, ReadRows


class PolishedRows:
    """Rows of a result with `amount`, 0 (none) to 1 (all), of what a network adds.

    Computed in strips that always lie the same, with all rows around them that the network sees, the last of which are
    kept: rows come out the same whatever is asked for with them.
    """

    STRIP = 512
    """Rows at a time, a multiple of `Polish.side_step`: what surrounds a strip is computed again with the next one."""

    def __init__(
        self,
        read_result: ReadRows,
        enlarged: EnlargedPhoto,
        network: Polish | None,
        amount: float,
        device: torch.device,
    ) -> None:
        """`read_result(top, bottom)` gives float32 rows (rows, width, 3), about [0, 1], of the size of `enlarged`.
        `network` None: nothing is added."""
        self._read_result, self._enlarged, self._network = read_result, enlarged, network
        self.amount, self._device = amount, device
        self._kept = KeptStrips(self.STRIP)
        # What surrounds a strip has just been read for the strip before.
        self._known = KeptStrips(self.STRIP // 2)

    def read_rows(self, top: int, bottom: int) -> np.ndarray:
        """Rows [top, bottom), float32 (rows, width, 3), about [0, 1], not clipped."""
        if self._network is None or not self.amount:
            return self._read_result(top, bottom)
        return self._kept.read_rows(partial(self._strip, self._network), top, bottom)

    def _strip(self, network: Polish, strip: int) -> np.ndarray:
        height = self._enlarged.height
        first, last = strip * self.STRIP, min((strip + 1) * self.STRIP, height)
        begin, end = max(0, first - network.reach), min(height, last + network.reach)
        result_PQC, cubic_PQC = self._known.read_rows(self._result, begin, end), self._enlarged.read_rows(begin, end)
        added_PQC = self._added(network, result_PQC, cubic_PQC)[first - begin : last - begin]
        return result_PQC[first - begin : last - begin] + added_PQC * np.float32(self.amount / 2)

    def _result(self, number: int) -> np.ndarray:
        rows = self.STRIP // 2
        return self._read_result(number * rows, min((number + 1) * rows, self._enlarged.height))

    @torch.inference_mode()
    def _added(self, network: Polish, result_PQC: np.ndarray, cubic_PQC: np.ndarray) -> np.ndarray:
        """What the network adds to these rows, (rows, width, 3), on the scale of [-1, 1]."""
        pictures = (np.clip(result_PQC, 0, 1), cubic_PQC)
        ready = (padded_rgb(picture_PQC, network.side_step, self._device) for picture_PQC in pictures)
        added_CPQ = network(*ready)[0, :, : result_PQC.shape[0], : result_PQC.shape[1]]
        return added_CPQ.permute(1, 2, 0).cpu().numpy()
