"""Pictures for a page: bounded previews and crops of photos of any size, as data URIs of sRGB WebP, and heat maps.

Axes: P Q pixel rows and columns, C channels.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from dreamsr_cli.evaluation.colour_difference import to_srgb

ReadRows = Callable[[int, int], np.ndarray]
"""Rows [top, bottom) as float32 (rows, width, 3) in [0, 1]."""

Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels."""

HEAT = ((0, 0, 4), (40, 11, 84), (101, 21, 110), (159, 42, 99), (212, 72, 66), (245, 125, 21), (250, 193, 39))
"""Colours of a heat map at equal steps, dark to bright."""
_STRIP_PIXELS = 2**21


def preview(read_rows: ReadRows, icc: bytes | None, width: int, height: int, side: int) -> np.ndarray:
    """The whole picture as uint8 sRGB (rows, columns, 3), its longer side at most `side`; read in strips."""
    factor = min(1.0, side / max(width, height))
    wide, high = max(1, round(width * factor)), max(1, round(height * factor))
    step = max(1, _STRIP_PIXELS // width)
    block = max(1, int(1 / factor) // 2)  # averaged first, in strips; the last factor of 2 or more by Lanczos
    step = max(block, step // block * block)
    strips = [_average(read_rows(top, min(top + step, height)), block) for top in range(0, height, step)]
    small = Image.fromarray(to_srgb(np.concatenate(strips), icc))
    if small.size == (wide, high):
        return np.asarray(small)
    box = (0.0, 0.0, width / block, height / block)
    box = (0.0, 0.0, min(box[2], small.width), min(box[3], small.height))
    return np.asarray(small.resize((wide, high), Image.Resampling.LANCZOS, box))


def _average(rows_PQC: np.ndarray, block: int) -> np.ndarray:
    """Means of blocks; the last ones hold what is left."""
    if block == 1:
        return rows_PQC
    down, across = np.arange(0, rows_PQC.shape[0], block), np.arange(0, rows_PQC.shape[1], block)
    sums_PQC = np.add.reduceat(np.add.reduceat(rows_PQC, down, axis=0), across, axis=1)
    tall = np.diff(np.append(down, rows_PQC.shape[0]))[:, None, None]
    broad = np.diff(np.append(across, rows_PQC.shape[1]))[None, :, None]
    return sums_PQC / (tall * broad).astype(np.float32)


def crop(read_rows: ReadRows, icc: bytes | None, box: Box, side: int) -> np.ndarray:
    """`box` of the picture as uint8 sRGB, shrunk where it is longer than `side`."""
    left, top, right, bottom = box
    rgb_PQC = read_rows(top, bottom)[:, left:right]
    return preview(lambda first, last: rgb_PQC[first:last], icc, right - left, bottom - top, side)


def data_uri(srgb_PQC: np.ndarray, quality: int) -> str:
    """uint8 sRGB as a data: URI, WebP of this quality (100: lossless)."""
    buffer = io.BytesIO()
    Image.fromarray(srgb_PQC).save(buffer, "WEBP", quality=quality, lossless=quality == 100, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def heat_map(values_PQ: np.ndarray, top: float) -> np.ndarray:
    """uint8 (rows, columns, 3): 0 dark, `top` and more bright."""
    places = np.linspace(0, 1, len(HEAT))
    shares = np.clip(values_PQ / top, 0, 1)
    channels = [np.interp(shares, places, [colour[c] for colour in HEAT]) for c in range(3)]
    return np.rint(np.stack(channels, axis=2)).astype(np.uint8)
