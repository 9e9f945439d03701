"""How far two pictures are apart for the eye: CIELab by each picture's own profile, and CIEDE2000 between them.

Colours become CIELab by libvips. CIEDE2000 is written out here: libvips' differs from the published test values where
hues are far apart. Axes: P Q pixel rows and columns, C channels.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pyvips

_FULL = 2 * math.pi
_COS = {angle: math.cos(math.radians(angle)) for angle in (6, 30, 63)}
_SIN = {angle: math.sin(math.radians(angle)) for angle in (6, 30, 63)}


def has_rgb_profile(icc: bytes | None) -> bool:
    """Whether the profile describes RGB (ICC.1, header bytes 16 to 19); grey photos are read as RGB, theirs doesn't."""
    return icc is not None and icc[16:20] == b"RGB "


def lab_image(rgb_PQC: np.ndarray, icc: bytes | None) -> pyvips.Image:
    """CIELab (L* 0 to 100) of RGB in [0, 1], (rows, columns, 3), clipped first. Without an RGB profile: sRGB."""
    levels_PQC = np.rint(np.clip(rgb_PQC, 0, 1) * np.float32(65535)).astype(np.uint16)
    image = pyvips.Image.new_from_array(levels_PQC).copy(interpretation="rgb16")
    if not has_rgb_profile(icc):
        return image.colourspace("lab")
    image.set_type(pyvips.GValue.blob_type, "icc-profile-data", cast(Any, icc))
    return image.icc_import(embedded=True, intent="relative")


def compare(
    first_PQC: np.ndarray, first_icc: bytes | None, second_PQC: np.ndarray, second_icc: bytes | None
) -> tuple[np.ndarray, np.ndarray]:
    """CIEDE2000 of each pixel, float32 (rows, columns), and first - second in L*, a*, b*, (rows, columns, 3)."""
    first, second = lab_image(first_PQC, first_icc), lab_image(second_PQC, second_icc)
    first_lab, second_lab = first.numpy(), second.numpy()
    return ciede2000(first_lab, second_lab), first_lab - second_lab


def ciede2000(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Colour difference of CIELab values along the last axis, float32.

    Sharma, Wu, Dalal: The CIEDE2000 color-difference formula (Color Res. Appl. 30, 2005), eq. 2 to 22, all weights 1.
    """
    l1, a1, b1 = np.moveaxis(first.astype(np.float32), -1, 0)
    l2, a2, b2 = np.moveaxis(second.astype(np.float32), -1, 0)
    grey = (1 - _saturation((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2)) / 2
    a1, a2 = a1 * (1 + grey), a2 * (1 + grey)
    c1, c2 = np.hypot(a1, b1), np.hypot(a2, b2)
    h1, h2 = np.arctan2(b1, a1), np.arctan2(b2, a2)
    turn = h2 - h1
    turn = np.where(turn > np.pi, turn - _FULL, np.where(turn < -np.pi, turn + _FULL, turn))
    turn = np.where(c1 * c2 == 0, np.float32(0), turn)
    hue_step = 2 * np.sqrt(c1 * c2) * np.sin(turn / 2)
    l_mean, c_mean = (l1 + l2) / 2, (c1 + c2) / 2
    hue = np.where(c1 * c2 == 0, np.where(c1 == 0, h2, h1), h1 + turn / 2)
    cos1, sin1 = np.cos(hue), np.sin(hue)  # of multiples of the angle by addition theorems: half of the time
    cos2, sin2 = 2 * cos1 * cos1 - 1, 2 * sin1 * cos1
    cos3, sin3 = cos2 * cos1 - sin2 * sin1, sin2 * cos1 + cos2 * sin1
    cos4, sin4 = 2 * cos2 * cos2 - 1, 2 * sin2 * cos2
    weight = (
        1
        - 0.17 * (cos1 * _COS[30] + sin1 * _SIN[30])
        + 0.24 * cos2
        + 0.32 * (cos3 * _COS[6] - sin3 * _SIN[6])
        - 0.20 * (cos4 * _COS[63] + sin4 * _SIN[63])
    )
    off = (l_mean - 50) * (l_mean - 50)
    light = (l2 - l1) / (1 + 0.015 * off / np.sqrt(20 + off))
    chroma = (c2 - c1) / (1 + 0.045 * c_mean)
    tone = hue_step / (1 + 0.015 * c_mean * weight)
    from_blue = (np.where(hue < 0, hue + _FULL, hue) * (180 / math.pi) - 275) / 25
    blue = np.sin(math.pi / 3 * np.exp(-from_blue * from_blue)) * 2 * _saturation(c_mean)
    squares = light * light + chroma * chroma + tone * tone - blue * chroma * tone
    return np.sqrt(np.maximum(squares, 0)).astype(np.float32)


def _saturation(chroma: np.ndarray) -> np.ndarray:
    """sqrt(C^7 / (C^7 + 25^7))."""
    x = chroma / 25
    square = x * x
    seventh = square * square * square * x
    return np.sqrt(seventh / (seventh + 1))


def to_srgb(rgb_PQC: np.ndarray, icc: bytes | None) -> np.ndarray:
    """uint8 sRGB for the screen of RGB in [0, 1], by its profile; without an RGB profile only rounded."""
    clipped_PQC = np.clip(rgb_PQC, 0, 1)
    if not has_rgb_profile(icc):
        return np.rint(clipped_PQC * 255).astype(np.uint8)
    levels_PQC = np.rint(clipped_PQC * np.float32(65535)).astype(np.uint16)
    image = pyvips.Image.new_from_array(levels_PQC).copy(interpretation="rgb16")
    image.set_type(pyvips.GValue.blob_type, "icc-profile-data", cast(Any, icc))
    return image.icc_transform("srgb", embedded=True, depth=8, intent="relative").numpy()
