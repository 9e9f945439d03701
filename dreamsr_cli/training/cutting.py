"""Where a crop is cut from a picture.

Axes: P Q pixel rows and columns, C channels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

SLANTED_FROM = 1.5
"""A slanted crop is cut from a photo so many times as large as the others of its step: what turning by any angle
softens, shrinking sharpens again."""
SLANTED_ZOOM = 1.25, 1.75
"""How much it is shrunk, least and most: on both sides of `SLANTED_FROM`."""
_MARGIN = 6
"""Pixels beside a slanted crop, both sides together, for the cubic that turns it."""
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


class Slanted(NamedTuple):
    """A crop that doesn't lie upright in its picture."""

    crop_PQC: np.ndarray
    """(size, size, C) uint8."""
    corner: tuple[int, int]
    """(top, left) of the upright square that it lies in, in pixels of the picture."""
    around: int
    """That square's side, in pixels of the picture."""


def slanted(rgb_PQC: np.ndarray, size: int, candidates: int, rng: np.random.Generator) -> Slanted | None:
    """A random crop of `size` pixels of a picture (P, Q, C) uint8, turned by an angle up to 45 degrees and shrunk by a
    factor in `SLANTED_ZOOM`; its square is chosen as by `busy_corner`. None where the picture is too small for it;
    where it is too small for all angles, the smaller ones are drawn."""
    side = math.ceil(size * rng.uniform(*SLANTED_ZOOM))
    room = (min(rgb_PQC.shape[:2]) - _MARGIN) / side
    if room < 1:
        return None
    # A square turned by a fits into one that is cos a + sin a = sqrt(2) sin(a + 45 degrees) times as large.
    # Rounding would make a picture without any room turn by less than nothing.
    steepest = max(0.0, math.asin(min(1.0, room / math.sqrt(2))) - math.pi / 4)
    angle = rng.uniform(-steepest, steepest)
    around = min(math.ceil(side * (math.cos(angle) + math.sin(abs(angle)))) + _MARGIN, *rgb_PQC.shape[:2])
    corner = busy_corner(rgb_PQC, around, candidates, rng)
    piece = Image.fromarray(np.ascontiguousarray(cut(rgb_PQC, corner, around)))
    turned, inset = piece.rotate(math.degrees(angle), Image.Resampling.BICUBIC), (around - side) / 2
    box = (inset, inset, inset + side, inset + side)
    return Slanted(np.asarray(turned.resize((size, size), Image.Resampling.LANCZOS, box)), corner, around)


def palette(rgb_PQC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(PALETTE_COLOURS, 3) uint8 pixels of the picture."""
    height, width = rgb_PQC.shape[:2]
    rows, cols = rng.integers(height, size=PALETTE_COLOURS), rng.integers(width, size=PALETTE_COLOURS)
    return rgb_PQC[rows, cols]


def _gradient_energy(rgb_PQC: np.ndarray) -> float:
    """Mean absolute difference of neighbouring green values, in levels of 255."""
    green = rgb_PQC[..., 1].astype(np.int16)
    return float(np.abs(np.diff(green, axis=0)).mean() + np.abs(np.diff(green, axis=1)).mean())
