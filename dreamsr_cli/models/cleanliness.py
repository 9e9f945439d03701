"""Cleanliness: whether a small photo is as its good version would be when shrunk, was then saved as a fair JPEG, or was
damaged on the way.

Noise, blur and JPEG show in the fine detail alone, and most where there is least of it. So a few convolutions look at
the photo without its coarse part, and of what each finds only four figures go on: its energy on average and in quiet,
middling and busy places. What the photo shows plays hardly any part, and a few thousand weights do.

Axes: B batch, C channels, K looks, P Q pixel rows and columns of the small photo, N cells of 8x8 pixels, or windows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from dreamsr_cli.config import LOOKS

WINDOW = 64
"""Side of the windows that a photo is judged by, in its pixels: what crops of 256 pixels are at x4."""
WINDOWS = 5
"""Windows along each side of a photo, where there is room."""
SPACING = 16
"""Pixels from window to window at least: those of small photos overlap, so that there are several to choose from."""
BUSY = 0.25
"""Share of the windows that are asked, those with most fine detail: where there is little to see, a dark or plain one,
a clean photo looks as if its detail had been taken away (docs/mini.md, row 30)."""
LEAST_SIDE = 24
"""Smallest side that can be judged: a few cells of 8x8 are left of it."""
_GAIN = 20.0
"""Fine detail of a few levels of 255 comes to about 1."""
_FLOOR = 1e-4
"""Least energy: well below what rounding to 8 bits makes."""
# Luma and two colour differences, as JPEG keeps them (BT.601).
_YCC = ((0.299, 0.587, 0.114), (-0.169, -0.331, 0.5), (0.5, -0.419, -0.081))


class Cleanliness(ModelMixin, ConfigMixin):
    """A small network from photos to what they look like."""

    @register_to_config
    def __init__(self, width: int = 24, layers: int = 2, hidden: int = 48) -> None:
        """`layers` convolutions of `width` channels after the first, and `hidden` units behind their figures."""
        super().__init__()
        self.entry = nn.Conv2d(3, width, 5)
        self.inner = nn.ModuleList(nn.Conv2d(width, width, 3) for _ in range(layers))
        self.mixing = nn.Linear(4 * width, hidden)
        self.exit = nn.Linear(hidden, len(LOOKS))

    def forward(self, photo_BCPQ: Tensor) -> Tensor:
        """Small photos (B, 3, P, Q) in [0, 1], P and Q at least `LEAST_SIDE`, to a logit for each of
        `LOOKS`, (B, K), float32."""
        x = self.entry(fine_detail(photo_BCPQ))
        for layer in self.inner:
            x = x[:, :, 1:-1, 1:-1] + layer(F.silu(x))
        return self.exit(F.silu(self.mixing(_figures(x) / 3)))


def fine_detail(photo_BCPQ: Tensor) -> Tensor:
    """What a 3x3 mean takes away from luma and colour differences, (B, 3, P, Q), scaled to about 1."""
    ycc_BCPQ = torch.einsum("kc,bcpq->bkpq", photo_BCPQ.new_tensor(_YCC), photo_BCPQ)
    mean_BCPQ = F.avg_pool2d(F.pad(ycc_BCPQ, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return (ycc_BCPQ - mean_BCPQ) * _GAIN


def _figures(x_BCPQ: Tensor) -> Tensor:
    """(B, 4C): log energy of each channel on average, and in the quietest eighth, the middle and the busiest of 8x8
    cells."""
    cells_BCN = F.avg_pool2d(x_BCPQ.square(), 8, 4).flatten(2)
    count = cells_BCN.shape[2]
    quiet_BC = cells_BCN.kthvalue(max(1, count // 8), dim=2).values
    found = (cells_BCN.mean(2), quiet_BC, cells_BCN.median(2).values, cells_BCN.amax(2))
    return torch.cat([torch.log(energy_BC + _FLOOR) for energy_BC in found], 1)


@torch.no_grad()
def chances_of_looks(
    network: Cleanliness, read_rows: Callable[[int, int], np.ndarray], height: int, width: int
) -> dict[str, float]:
    """How likely a photo looks like each of `LOOKS`, 0 to 1, to two digits: by the mean logits of the busiest of the
    windows spread over it.

    `read_rows(top, bottom)`: its rows, float32 (rows, width, 3) in [0, 1]. A photo smaller than a window is repeated
    by reflection.
    """
    logits, energies = [], []
    for top in _starts(height):
        rows_PQC = np.asarray(read_rows(top, min(top + WINDOW, height)), np.float32)
        for left in _starts(width):
            window_PQC = rows_PQC[:, left : left + WINDOW]
            short = [max(0, WINDOW - side) for side in window_PQC.shape[:2]]
            window_PQC = np.pad(window_PQC, ((0, short[0]), (0, short[1]), (0, 0)), mode="symmetric")
            window_BCPQ = torch.from_numpy(np.ascontiguousarray(window_PQC.transpose(2, 0, 1)))[None]
            logits.append(network(window_BCPQ))
            energies.append(fine_detail(window_BCPQ)[:, 0].square().mean())
    energy_N = torch.stack(energies)
    busy_N = energy_N >= energy_N.quantile(1 - BUSY)
    chance_K = torch.cat(logits)[busy_N].mean(0).softmax(0)
    return {looks: round(float(chance), 2) for looks, chance in zip(LOOKS, chance_K, strict=True)}


def _starts(side: int) -> list[int]:
    """First pixels of the windows along one side, evenly from end to end."""
    count = min(WINDOWS, 1 + max(0, side - WINDOW) // SPACING)
    return [0] if count == 1 else [(side - WINDOW) * i // (count - 1) for i in range(count)]
