"""Grain on a result, row by row: the finest texture, drawn from the photo's seed (`models/grain.py`).

Axes: P Q pixel rows and columns, C channels.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dreamsr_cli.canvas import EnlargedPhoto
from dreamsr_cli.draws import normal_rows
from dreamsr_cli.models.grain import MARGIN, Grain
from dreamsr_cli.resample import KeptStrips, ReadRows


class GrainedRows:
    """Rows of a result with grain of `amount`, 0 (none) to 2 (twice what the network says).

    Computed in strips that always lie the same, the last of which are kept, from noise that belongs to the rows of the
    result: rows come out the same whatever is asked for with them.
    """

    STRIP = 128
    """Rows at a time, a multiple of `Grain.FOLD`."""

    def __init__(
        self,
        read_result: ReadRows,
        enlarged: EnlargedPhoto,
        network: Grain | None,
        amount: float,
        seed: int,
        device: torch.device,
    ) -> None:
        """`read_result(top, bottom)` gives float32 rows (rows, width, 3), about [0, 1], of the size of `enlarged`.
        `network` None: no grain."""
        self._read_result, self._enlarged, self._network = read_result, enlarged, network
        self.amount, self._seed, self._device = amount, seed, device
        self._kept = KeptStrips(self.STRIP)

    def read_rows(self, top: int, bottom: int) -> np.ndarray:
        """Rows [top, bottom), float32 (rows, width, 3), about [0, 1], not clipped."""
        if self._network is None or not self.amount:
            return self._read_result(top, bottom)
        return self._kept.read_rows(partial(self._strip, self._network), top, bottom)

    def _strip(self, network: Grain, strip: int) -> np.ndarray:
        height = self._enlarged.height
        first, last = strip * self.STRIP, min((strip + 1) * self.STRIP, height)
        begin, end = max(0, first - network.reach), min(height, last + network.reach)
        result_PQC, cubic_PQC = self._read_result(begin, end), self._enlarged.read_rows(begin, end)
        grain_PQ1 = self._grain(network, result_PQC, cubic_PQC, (first - begin, last - begin), first)
        return result_PQC[first - begin : last - begin] + grain_PQ1

    @torch.inference_mode()
    def _grain(
        self, network: Grain, result_PQC: np.ndarray, cubic_PQC: np.ndarray, inner: tuple[int, int], first: int
    ) -> np.ndarray:
        """Grain of the rows `inner` of those given, (rows, width, 1); `first` is their place in the result."""
        rows, width = slice(*inner), result_PQC.shape[1]
        result_B3PQ, cubic_B3PQ = self._ready(np.clip(result_PQC, 0, 1)), self._ready(cubic_PQC)
        strength_BKPQ = network.strengths(result_B3PQ, cubic_B3PQ)[:, :, rows, :width]
        count = inner[1] - inner[0]
        noise_PQC = normal_rows(self._seed, "grain", first - MARGIN, count + 2 * MARGIN, width + 2 * MARGIN, 1)
        noise_B1PQ = torch.from_numpy(noise_PQC.transpose(2, 0, 1))[None].to(self._device)
        # The same in all colours.
        grain_PQ = network.painted(strength_BKPQ, noise_B1PQ)[0, 0].cpu().numpy()
        return grain_PQ[..., None] * np.float32(self.amount / 2)

    def _ready(self, rgb_PQC: np.ndarray) -> Tensor:
        """On [-1, 1], its sides brought to multiples of 4 by repeating the last pixels."""
        rgb_B3PQ = torch.from_numpy(np.ascontiguousarray(rgb_PQC.transpose(2, 0, 1)))[None].to(self._device) * 2 - 1
        missing = [-side % Grain.FOLD for side in rgb_B3PQ.shape[2:]]
        return F.pad(rgb_B3PQ, (0, missing[1], 0, missing[0]), mode="replicate") if any(missing) else rgb_B3PQ
