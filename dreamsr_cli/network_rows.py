"""Rows of a picture as a network takes them.

Axes: B batch, P Q pixel rows and columns, C channels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def padded_rgb(rgb_PQC: np.ndarray, side_step: int, device: torch.device) -> Tensor:
    """float32 RGB (P, Q, 3) in [0, 1] to (1, 3, P', Q') on [-1, 1], its sides brought to multiples of `side_step` by
    repeating the last pixels."""
    rgb_B3PQ = torch.from_numpy(np.ascontiguousarray(rgb_PQC.transpose(2, 0, 1)))[None].to(device) * 2 - 1
    missing = [-side % side_step for side in rgb_B3PQ.shape[2:]]
    return F.pad(rgb_B3PQ, (0, missing[1], 0, missing[0]), mode="replicate") if any(missing) else rgb_B3PQ
