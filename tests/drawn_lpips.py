"""LPIPS with drawn weights, which need no download: what is told apart in tests any features show."""

from __future__ import annotations

import torch

from dreamsr_cli.models.perceptual import BACKBONES, Lpips

WIDTHS = {
    "lpips-squeeze": (64, 128, 256, 384, 384, 512, 512),
    "lpips-alex": (64, 192, 384, 256, 256),
    "lpips-vgg": (64, 128, 256, 512, 512),
}
"""Channels at each tap."""


def drawn_lpips(kind: str = "lpips-squeeze") -> Lpips:
    """The distance `kind`, the same at every call."""
    torch.manual_seed(4)
    return Lpips(BACKBONES[kind], BACKBONES[kind].build(), [torch.rand(1, c, 1, 1) for c in WIDTHS[kind]])
