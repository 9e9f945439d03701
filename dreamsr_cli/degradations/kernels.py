"""Blur kernels of the pixel degradation: Gaussian, generalised Gaussian, plateau (each round or oblong) and sinc.

A kernel is drawn as plain data (`KernelParams`) and made into numbers by `kernel_PQ`: square, odd, float64, sum 1,
symmetric about its centre. Shapes follow Real-ESRGAN (Wang et al. 2021, section 3.1 and its supplement).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

KINDS = ("iso", "aniso", "generalized-iso", "generalized-aniso", "plateau-iso", "plateau-aniso")
KIND_SHARES = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
SIZES = tuple(range(7, 22, 2))
SINC_SHARE = 0.1
GENERALIZED_BETA = (0.5, 4.0)
PLATEAU_BETA = (1.0, 2.0)


@dataclass(frozen=True)
class KernelParams:
    """One kernel. Round kinds have sigma_x == sigma_y; `beta` and `cutoff` matter to the kinds that use them."""

    kind: str
    """One of `KINDS`, or "sinc"."""
    size: int
    """Side in pixels, odd."""
    sigma_x: float = 1.0
    """Sigma along the first axis of the (turned) ellipse, pixels."""
    sigma_y: float = 1.0
    """Sigma along the second axis, pixels."""
    rotation: float = 0.0
    """Angle of the ellipse, radians."""
    beta: float = 1.0
    """Shape exponent of generalised and plateau kernels."""
    cutoff: float = math.pi
    """Cut-off frequency of a sinc filter, radians per pixel."""


def draw_blur(rng: np.random.Generator, sigma: tuple[float, float]) -> KernelParams:
    """A kernel of one pass: a sinc filter with chance 0.1, else one of the six Gaussian-like kinds."""
    if rng.random() < SINC_SHARE:
        return draw_sinc(rng, lowest=None)
    size = int(rng.choice(SIZES))
    kind = str(rng.choice(KINDS, p=KIND_SHARES))
    sigma_x = sigma_y = float(rng.uniform(*sigma))
    rotation = 0.0
    if kind.endswith("aniso"):
        sigma_y = float(rng.uniform(*sigma))
        rotation = float(rng.uniform(-math.pi, math.pi))
    beta = 1.0
    if not kind.startswith(("iso", "aniso")):
        low, high = GENERALIZED_BETA if kind.startswith("generalized") else PLATEAU_BETA
        # half of the draws below 1 and half above, so that flat and peaked shapes are equally common
        beta = float(rng.uniform(low, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, high))
    return KernelParams(kind, size, sigma_x, sigma_y, rotation, beta)


def draw_sinc(rng: np.random.Generator, lowest: float | None) -> KernelParams:
    """A circular low-pass filter (ringing, overshoot).

    `lowest` is the least cut-off in radians per pixel; None: by size, small kernels no lower than pi/3.
    """
    size = int(rng.choice(SIZES))
    if lowest is None:
        lowest = math.pi / 3 if size < 13 else math.pi / 5
    return KernelParams("sinc", size, cutoff=float(rng.uniform(lowest, math.pi)))


def kernel_PQ(params: KernelParams) -> np.ndarray:
    """The kernel's numbers, (size, size) float64 with sum 1."""
    if params.kind == "sinc":
        return sinc(params.size, params.cutoff)
    reach = np.arange(params.size) - params.size // 2
    y, x = np.meshgrid(reach, reach, indexing="ij")
    cos, sin = math.cos(params.rotation), math.sin(params.rotation)
    along, across = (cos * x + sin * y) / params.sigma_x, (cos * y - sin * x) / params.sigma_y
    distance = along**2 + across**2
    if params.kind.startswith("plateau"):
        kernel = 1 / (distance**params.beta + 1)
    elif params.kind.startswith("generalized"):
        kernel = np.exp(-0.5 * distance**params.beta)
    else:
        kernel = np.exp(-0.5 * distance)
    return kernel / kernel.sum()


def gaussian(size: int, sigma: float) -> np.ndarray:
    """A round Gaussian, (size, size) float64 with sum 1."""
    return kernel_PQ(KernelParams("iso", size, sigma, sigma))


def sinc(size: int, cutoff: float) -> np.ndarray:
    """A circular ideal low-pass filter, (size, size) float64 with sum 1: cutoff * J1(cutoff r) / (2 pi r)."""
    reach = np.arange(size) - size // 2
    radius = np.hypot(*np.meshgrid(reach, reach, indexing="ij"))
    radius[size // 2, size // 2] = 1.0
    bessel = torch.special.bessel_j1(torch.from_numpy(cutoff * radius)).numpy()
    kernel = cutoff * bessel / (2 * math.pi * radius)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * math.pi)
    return kernel / kernel.sum()
