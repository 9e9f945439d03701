"""Where a crop is cut from a picture.

Axes: P Q pixel rows and columns, C channels.
"""

from __future__ import annotations

import numpy as np

FLAT_ENERGY = 0.5
"""Gradient energy (levels) every candidate has at least: flat crops stay possible."""
PALETTE_COLOURS = 512


def busy_corner(
    rgb_PQC: np.ndarray, size: int, candidates: int, rng: np.random.Generator, grid: int = 1
) -> tuple[int, int]:
    """(top, left) of one of several random crops, kept with a chance proportional to its gradient energy.

    Corners are multiples of `grid`. The picture is at least `size` on both sides.
    """
    rows, cols = ((n - size) // grid + 1 for n in rgb_PQC.shape[:2])
    corners = [(int(rng.integers(rows)) * grid, int(rng.integers(cols)) * grid) for _ in range(candidates)]
    energy = np.array([_gradient_energy(cut(rgb_PQC, corner, size)) for corner in corners]) + FLAT_ENERGY
    return corners[int(rng.choice(len(corners), p=energy / energy.sum()))]


def cut(rgb_PQC: np.ndarray, corner: tuple[int, int], size: int) -> np.ndarray:
    """The square crop at (top, left), a view."""
    top, left = corner
    return rgb_PQC[top : top + size, left : left + size]


def palette(rgb_PQC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(PALETTE_COLOURS, 3) uint8 pixels of the picture."""
    height, width = rgb_PQC.shape[:2]
    rows, cols = rng.integers(height, size=PALETTE_COLOURS), rng.integers(width, size=PALETTE_COLOURS)
    return rgb_PQC[rows, cols]


def _gradient_energy(rgb_PQC: np.ndarray) -> float:
    """Mean absolute difference of neighbouring green values, in levels of 255."""
    green = rgb_PQC[..., 1].astype(np.int16)
    return float(np.abs(np.diff(green, axis=0)).mean() + np.abs(np.diff(green, axis=1)).mean())
