"""A discriminator that looks at pictures through the frozen network of the perceptual distance (*ours*; the idea is
Projected GANs', Sauer et al. 2021): it learns within a few hundred steps what one from nothing doesn't in thousands.

Only small heads learn, one for each size of features; the network under them is the one that LPIPS uses in the same
run, so no more pretrained weights take part than that loss brings already. Never shipped.

Axes: B batch, C channels, P Q pixels, H W the features' rows and columns.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from dreamsr_cli.models.perceptual import SMALLEST_SIDE, Lpips

SHIFT = 16
"""Pixels by which the window that is judged is smaller than the picture: at another place in every step, so that no
pattern can fit the strides of the features' network."""
WIDTH = 48
"""Channels inside a head."""
SIZES = 4
"""Sizes of features that are judged, from the finest on."""


class FeatureDiscriminator(nn.Module):
    """(B, 3, P, Q) pictures on about [-1, 1] -> (B, S, H, W) logits, larger where a spot looks like a good photo.

    S sizes of features, H W those of the finest: the coarser ones' logits are repeated, so that each size counts alike.
    """

    def __init__(self, perceptual: Lpips, width: int = WIDTH) -> None:
        super().__init__()
        # In a tuple, so that its frozen weights are neither counted nor saved with the heads.
        self._perceptual = (perceptual,)
        self._taps, channels = _first_of_each_size(perceptual)
        self.heads = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv2d(c, width, 1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(width, width, 3, padding=1)),
                nn.LeakyReLU(0.2),
                nn.Conv2d(width, 1, 1),
            )
            for c in channels
        )

    def forward(self, rgb_BCPQ: Tensor) -> Tensor:
        """Gradients flow to the pictures too. ValueError for sides below the perceptual distance's smallest."""
        if min(rgb_BCPQ.shape[2:]) < SMALLEST_SIDE:
            raise ValueError(f"features of {tuple(rgb_BCPQ.shape)}: sides must be at least {SMALLEST_SIDE}")
        features = self._perceptual[0].features(rgb_BCPQ)
        finest = features[self._taps[0]].shape[2:]
        logits = []
        for tap, head in zip(self._taps, self.heads, strict=True):
            # LPIPS' features have length one: times the root of C, a channel has about unit size.
            seen = features[tap] * features[tap].shape[1] ** 0.5
            logits.append(F.interpolate(cast(nn.Sequential, head)(seen), size=finest))
        return torch.cat(logits, 1)


@torch.no_grad()
def _first_of_each_size(perceptual: Lpips) -> tuple[list[int], list[int]]:
    """(numbers of the taps, their channels) of the first tap of each of the finest `SIZES` sizes."""
    device = perceptual.mean.device
    found: dict[int, tuple[int, int]] = {}
    for tap, x in enumerate(perceptual.features(torch.zeros(1, 3, 128, 128, device=device))):
        found.setdefault(x.shape[2], (tap, x.shape[1]))
    kept = list(found.values())[:SIZES]
    return [tap for tap, _ in kept], [channels for _, channels in kept]


def fresh_heads(seed: int, perceptual: Lpips) -> FeatureDiscriminator:
    """One whose heads depend on `seed` alone; torch's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FeatureDiscriminator(perceptual)
