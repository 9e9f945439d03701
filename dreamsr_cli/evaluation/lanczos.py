"""A photo enlarged by Pillow's Lanczos, by rows: the plain picture that results are held against.

Axes: P Q pixel rows and columns, C channels.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from dreamsr_cli.images import Photo

_SUPPORT = 3  # Lanczos' a, source pixels at each side


class LanczosPhoto:
    """`photo` at another size, not smaller; 8 bits per channel, as Pillow computes it."""

    def __init__(self, photo: Photo, width: int, height: int) -> None:
        self.photo, self.width, self.height = photo, width, height

    def read_rows(self, top: int, bottom: int) -> np.ndarray:
        """Rows [top, bottom), float32 (rows, width, 3) in [0, 1], in steps of 1/255; as cut from the whole picture."""
        info = self.photo.info
        if (info.width, info.height) == (self.width, self.height):
            return np.rint(self.photo.read_rows(top, bottom) * 255) / np.float32(255)
        margin = 0
        while True:
            first, last = max(0, top - margin), min(self.height, bottom + margin)
            source_first, source_last = self._source_rows(first, last)
            # Pillow turns to rows first where they get fewer; strips must do as the whole picture does
            grows = last - first > source_last - source_first
            if grows or last - first == self.height or self.height <= info.height:
                break
            margin = 2 * margin or 16
        step = info.height / self.height
        levels_PQC = np.rint(self.photo.read_rows(source_first, source_last) * 255).astype(np.uint8)
        box = (0.0, first * step - source_first, float(info.width), last * step - source_first)
        enlarged = Image.fromarray(levels_PQC).resize((self.width, last - first), Image.Resampling.LANCZOS, box)
        return np.asarray(enlarged, np.float32)[top - first : bottom - first] / np.float32(255)

    def _source_rows(self, top: int, bottom: int) -> tuple[int, int]:
        """The photo's rows that make rows [top, bottom)."""
        height = self.photo.info.height
        step = height / self.height
        reach = math.ceil(_SUPPORT * max(1.0, step)) + 1
        return max(0, math.floor(top * step) - reach), min(height, math.ceil(bottom * step) + reach)
