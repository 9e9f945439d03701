"""PSNR and SSIM, with every choice that changes the number said out loud.

On one and the same pair the usual choices differ by 2.5 dB. Here: levels 0-255 of 8-bit results (16-bit ones scaled
to that range), float64, no rounding in between. Axes: P Q pixel rows and columns, C channels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from dreamsr_cli.errors import InputError

BT601 = (65.481, 128.553, 24.966)
"""Y = 16 + (65.481 R + 128.553 G + 24.966 B) / 255 for R, G, B on 0-255: ITU-R BT.601, studio range 16-235, as MATLAB's
rgb2ycbcr, not rounded."""
WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03


def luma(rgb_PQC: np.ndarray) -> np.ndarray:
    """Y of BT.601 in [16, 235], unrounded float64 (P, Q), of RGB on [0, 255]."""
    return 16.0 + rgb_PQC.astype(np.float64) @ (np.asarray(BT601) / 255.0)


def planes(rgb_PQC: np.ndarray, channel: str, crop: int) -> np.ndarray:
    """float64 (P, Q, 1) luma for "y" or (P, Q, 3) for "rgb", `crop` pixels cut from each side.

    `InputError` if nothing is left.
    """
    rows, cols = rgb_PQC.shape[:2]
    if min(rows, cols) <= 2 * crop:
        raise InputError(f"nothing is left of {cols}x{rows} pixels without a border of {crop}", "lower --crop-border")
    inner_PQC = rgb_PQC[crop : rows - crop, crop : cols - crop].astype(np.float64)
    return luma(inner_PQC)[..., None] if channel == "y" else inner_PQC


def psnr(a_PQC: np.ndarray, b_PQC: np.ndarray) -> float:
    """10 log10(255^2 / mean squared error) in dB over all values; infinite for equal pictures."""
    error = float(np.mean((a_PQC - b_PQC) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255.0**2 / error)


def ssim(a_PQC: np.ndarray, b_PQC: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004), mean over channels of the mean over all whole windows.

    Gaussian window 11x11 of sigma 1.5, population variances, K = (0.01, 0.03), range 255, no border padded.
    `InputError` below 11 pixels per side.
    """
    if min(a_PQC.shape[:2]) < WINDOW:
        raise InputError(f"SSIM needs {WINDOW} pixels per side, got {a_PQC.shape[1]}x{a_PQC.shape[0]}", "leave it out")
    x, y = (torch.tensor(p_PQC, dtype=torch.float64).permute(2, 0, 1)[:, None] for p_PQC in (a_PQC, b_PQC))
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    both = _blur(x * y) - mean_x * mean_y
    c1, c2 = (K1 * 255) ** 2, (K2 * 255) ** 2
    similar = ((2 * mean_x * mean_y + c1) * (2 * both + c2)) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(similar.mean())


def _blur(x_BCPQ: torch.Tensor) -> torch.Tensor:
    offset = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weight = torch.exp(-(offset**2) / (2 * SIGMA**2))
    weight = weight / weight.sum()
    return F.conv2d(F.conv2d(x_BCPQ, weight.reshape(1, 1, -1, 1)), weight.reshape(1, 1, 1, -1))
