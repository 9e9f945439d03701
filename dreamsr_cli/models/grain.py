"""Grain: the finest texture of a result, which no damaged photo tells anything about but how strong it was.

Networks that answer the same photo with the same picture can only paint such texture as a pattern, or leave surfaces as
smooth as plastic. So noise is an input here, as in StyleGAN (Karras et al. 2019): a small network looks at the result
and at the enlarged photo and says how strong it is to be at each pixel, finer and coarser noise apart. It has the same
say in red, green and blue. What is added is plain to see and to leave out (`--grain 0`); the result under it stays as
it is.

Axes: B batch, K bands, P Q pixel rows and columns. Pictures are RGB on [-1, 1].
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

HEADROOM = 16 / 127.5
"""Closer to black or white than this grain fades: at neither is there any, as in a photo."""
FIRST_STRENGTH = -5.7
"""Of a fresh network, before softplus: less than half a level of 255 in each band."""
BANDS = 0.45, 0.65, 0.9, 1.4
"""Standard deviations in pixels of the Gaussians that noise is seen through, one for each band. They are not learnt:
learnt ones drew towards single pixels, which looks like a sensor's noise and less like a surface (docs/mini.md)."""
MARGIN = 4
"""Pixels that the widest of them reaches."""


class Grain(ModelMixin, ConfigMixin):
    """How strong grain is at each pixel, and what it looks like.

    Residual convolutions over pixels folded 4x4 into channels, without norm or attention: what is said of a pixel
    depends on `reach` pixels around it and on nothing else.
    """

    FOLD = 4

    @register_to_config
    def __init__(self, width: int = 24, blocks: int = 2) -> None:
        super().__init__()
        self.reach = self.FOLD * (2 + 2 * blocks)
        self.entry = nn.Conv2d(2 * 3 * self.FOLD**2, width, 3, padding=1)
        self.pairs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(blocks)
        )
        self.exit = nn.Conv2d(width, len(BANDS) * self.FOLD**2, 3, padding=1)
        nn.init.zeros_(self.exit.weight)
        nn.init.constant_(cast(Tensor, self.exit.bias), FIRST_STRENGTH)

    def forward(self, result_B3PQ: Tensor, cubic_B3PQ: Tensor, noise_B1PQ: Tensor) -> Tensor:
        """What is to be added to results, (B, 3, P, Q), float32. `cubic_B3PQ`: their photos enlarged by the antialiased
        cubic; P and Q are multiples of 4. `noise_B1PQ`: standard normal, `MARGIN` pixels larger on each side."""
        return self.painted(self.strengths(result_B3PQ, cubic_B3PQ), noise_B1PQ)

    def strengths(self, result_B3PQ: Tensor, cubic_B3PQ: Tensor) -> Tensor:
        """Standard deviation of each band at each pixel, (B, K, P, Q), float32, on the scale of the pictures; 0 where
        the result is black or white."""
        folded = [F.pixel_unshuffle(x.to(self.entry.weight.dtype), self.FOLD) for x in (result_B3PQ, cubic_B3PQ)]
        x = self.entry(torch.cat(folded, 1).contiguous(memory_format=torch.channels_last))
        for pair in self.pairs:
            first, second = cast(nn.Sequential, pair)
            x = x + second(F.silu(first(F.silu(x))))
        said_BKPQ = F.pixel_shuffle(self.exit(F.silu(x)), self.FOLD).float()
        room_B1PQ = (1 - result_B3PQ.float().abs().amax(1, keepdim=True)) / HEADROOM
        return F.softplus(said_BKPQ) * room_B1PQ.clamp(0, 1)

    def painted(self, strength_BKPQ: Tensor, noise_B1PQ: Tensor) -> Tensor:
        """Noise seen through the bands' Gaussians, each as strong as said: (B, 3, P, Q), float32."""
        bands_BKPQ = F.conv2d(noise_B1PQ.float(), _gaussians(noise_B1PQ.device))
        return (bands_BKPQ * strength_BKPQ).sum(1, keepdim=True).expand(-1, 3, -1, -1)


def _gaussians(device: torch.device) -> Tensor:
    """(K, 1, p, q), each of energy 1: noise stays as strong as it is."""
    squares = torch.arange(-MARGIN, MARGIN + 1, dtype=torch.float32, device=device).square()
    widths = torch.tensor(BANDS, device=device)[:, None, None]
    made_Kpq = torch.exp(-(squares[:, None] + squares) / (2 * widths.square()))
    return (made_Kpq / made_Kpq.square().sum((1, 2), keepdim=True).sqrt())[:, None]
