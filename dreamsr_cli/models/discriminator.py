"""The discriminator of eq. 7's GAN term, never shipped (*ours*: the paper names the term and nothing else).

A small U-Net with spectral normalisation, as Real-ESRGAN's (Wang et al. 2021, section 3.3), on pixels folded 4x4 into
channels. Why this one: it judges every spot of the picture, so its gradient says where a texture is wrong, which one
number per picture doesn't; spectral normalisation bounds its Lipschitz constant, so that hinge loss stays stable
without R1 (whose second backward pass doubles the price); and it needs no pretrained features, whose licences
(DINO, CLIP) and sizes would bind a bundle that is trained from photos alone. Folding keeps every pixel and makes it
cheap enough for a CPU.

Axes: B batch, C channels, P Q pixel rows and columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

FOLD = 4
"""Pixels per side that become channels of one position."""
SMALLEST = 4 * FOLD
"""Sides of a picture are multiples of this."""


class Discriminator(nn.Module):
    """(B, 3, P, Q) pictures on about [-1, 1] -> (B, 1, P/4, Q/4) logits, larger where a spot looks like a good photo.

    Three scales joined by skip connections; a logit sees about 90 pixels around it.
    """

    def __init__(self, width: int = 24) -> None:
        super().__init__()

        def conv(inside: int, outside: int, kernel: int = 3, stride: int = 1) -> nn.Module:
            return spectral_norm(nn.Conv2d(inside, outside, kernel, stride, kernel // 2))

        self.entry = conv(3 * FOLD**2, width)
        self.down1 = conv(width, 2 * width, 4, 2)
        self.down2 = conv(2 * width, 4 * width, 4, 2)
        self.up1 = conv(4 * width, 2 * width)
        self.up2 = conv(2 * width, width)
        self.exit = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, rgb_BCPQ: Tensor) -> Tensor:
        """ValueError unless both sides are multiples of `SMALLEST`."""
        if rgb_BCPQ.shape[2] % SMALLEST or rgb_BCPQ.shape[3] % SMALLEST:
            raise ValueError(f"discriminator of {tuple(rgb_BCPQ.shape)}: sides must be multiples of {SMALLEST}")

        def act(x: Tensor) -> Tensor:
            return F.leaky_relu(x, 0.2)

        fine = act(self.entry(F.pixel_unshuffle(rgb_BCPQ, FOLD)))
        # A kernel of 4 with a padding of 2 makes one position too many, which would shift the skips.
        middle = act(self.down1(fine))[..., :-1, :-1]
        coarse = act(self.down2(middle))[..., :-1, :-1]
        middle = middle + act(self.up1(_twice(coarse)))
        fine = fine + act(self.up2(_twice(middle)))
        return self.exit(fine)


def _twice(x_BCPQ: Tensor) -> Tensor:
    return F.interpolate(x_BCPQ, scale_factor=2, mode="bilinear", align_corners=False)


def fresh(seed: int) -> Discriminator:
    """A discriminator whose weights depend on `seed` alone; torch's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Discriminator()
