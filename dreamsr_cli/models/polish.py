"""Polish: the last look at a result, which sharpens what both stages leave soft.

Stage 1 and 2 work on latents whose tokens are 16 pixels wide, and their refiner sees 48 pixels around it. Here a U-Net
(Ronneberger et al. 2015) without norm and attention looks at the result and at the enlarged photo at once, at three
sizes, and says what to add: edges, weaves, what is left of blocks. It learns from LPIPS, as stage 2 does, and costs a
fifth of stage 2 for each training crop, so that it sees far more of them. `--polish 0` leaves it out.

Axes: B batch, P Q pixel rows and columns. Pictures are RGB on [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

FOLD = 4
"""Pixels are folded FOLD x FOLD into channels: a photo that was enlarged fourfold says no more than that."""
RESIDUAL_START = 0.1
"""Scale of a fresh block's second kernel: blocks begin close to doing nothing."""


class Polish(ModelMixin, ConfigMixin):
    """What to add to results, from the results and their enlarged photos."""

    @register_to_config
    def __init__(self, widths: Sequence[int] = (64, 128, 192), blocks: Sequence[int] = (3, 3, 4)) -> None:
        """Channels and residual blocks of each size, the largest first; all but the smallest have as many blocks on
        the way down as on the way up."""
        super().__init__()
        if len(widths) != len(blocks) or not widths:
            raise ValueError(f"{len(widths)} widths and {len(blocks)} counts of blocks")
        folded, pairs = 3 * FOLD**2, list(zip(widths, widths[1:], strict=False))
        self.entry = nn.Conv2d(2 * folded, widths[0], 3, padding=1)
        self.down = nn.ModuleList(_blocks(width, count) for width, count in zip(widths[:-1], blocks, strict=False))
        self.shrink = nn.ModuleList(nn.Conv2d(large, small, 2, stride=2) for large, small in pairs)
        self.middle = _blocks(widths[-1], blocks[-1])
        self.grow = nn.ModuleList(nn.ConvTranspose2d(small, large, 2, stride=2) for large, small in pairs)
        self.up = nn.ModuleList(_blocks(width, count) for width, count in zip(widths[:-1], blocks, strict=False))
        self.exit = nn.Conv2d(widths[0], folded, 3, padding=1)
        # A fresh one adds nothing.
        for parameter in self.exit.parameters():
            nn.init.zeros_(parameter)
        self.side_step = FOLD * 2 ** len(pairs)
        """Sides of pictures are multiples of it, and places at such multiples are all treated alike."""
        convolutions = [2 * count * (1 if level == len(pairs) else 2) for level, count in enumerate(blocks)]
        convolutions[0] += 2
        reach = sum(FOLD * 2**level * count for level, count in enumerate(convolutions))
        self.reach = -(-reach // self.side_step) * self.side_step
        """Pixels around a pixel that it sees, brought to a multiple of `side_step`."""

    def forward(self, result_B3PQ: Tensor, cubic_B3PQ: Tensor) -> Tensor:
        """What is to be added, (B, 3, P, Q), float32. `cubic_B3PQ`: the photos enlarged by the antialiased cubic. P and
        Q are multiples of `side_step`."""
        folded = [F.pixel_unshuffle(x.to(self.entry.weight.dtype), FOLD) for x in (result_B3PQ, cubic_B3PQ)]
        # A third faster on a CPU than channels first.
        x = self.entry(torch.cat(folded, 1).contiguous(memory_format=torch.channels_last))
        kept = []
        for blocks, shrink in zip(self.down, self.shrink, strict=True):
            x = blocks(x)
            kept.append(x)
            x = shrink(F.silu(x))
        x = self.middle(x)
        for blocks, grow, beside in reversed(list(zip(self.up, self.grow, kept, strict=True))):
            x = blocks(grow(F.silu(x)) + beside)
        return F.pixel_shuffle(self.exit(F.silu(x)), FOLD).float()


class Block(nn.Module):
    """Two convolutions beside the way past them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        with torch.no_grad():
            self.second.weight.mul_(RESIDUAL_START)
            cast(Tensor, self.second.bias).zero_()

    def forward(self, x_BCPQ: Tensor) -> Tensor:
        return x_BCPQ + self.second(F.silu(self.first(F.silu(x_BCPQ))))


def _blocks(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(Block(width) for _ in range(count)))
