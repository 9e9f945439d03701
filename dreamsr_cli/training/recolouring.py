"""Good crops in other colours and another light, so that few photos show more (*ours*; orders of channels are one of
the augmentations that Yoo et al. 2020, "Rethinking data augmentation for image super-resolution", compare).

Axes: C channels, P Q pixel rows and columns.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

GAMMA = 1.5
"""Brightness is raised to a power between one over this and this."""
PALER = 0.7
"""Least share of its contrast that a crop keeps; its mean stays where it is."""


def recoloured(rgb_CPQ: Tensor, rng: np.random.Generator) -> Tensor:
    """A crop (3, P, Q) on [0, 1] with another tone curve and less contrast, on the same scale, and half of the time
    with its channels in another order."""
    gamma = math.exp(rng.uniform(-1, 1) * math.log(GAMMA))
    contrast = rng.uniform(PALER, 1)
    if rng.random() < 0.5:
        rgb_CPQ = rgb_CPQ[torch.from_numpy(rng.permutation(3))]
    lit_CPQ = rgb_CPQ**gamma
    mean = lit_CPQ.mean()
    return mean + contrast * (lit_CPQ - mean)
