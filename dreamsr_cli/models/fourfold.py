"""Rows of a photo at four times its size, as a network makes them, and then at the size that is wanted.

Axes: P Q pixel rows and columns.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import nn

from dreamsr_cli.resample import KeptStrips, ReadRows, resize_rows

FACTOR = 4
"""Sides of what is made over those of the photo."""


Network = TypeVar("Network", bound=nn.Module)


class FourfoldRows(ABC, Generic[Network]):
    """Computed in strips that always lie the same, the last of which are kept: rows come out the same whatever is
    asked for with them. Several threads may ask."""

    STRIP = 64
    """Rows of the photo that are enlarged at a time."""

    def __init__(
        self,
        network: Network,
        read_photo: ReadRows,
        height: int,
        width: int,
        out_height: int,
        out_width: int,
        device: torch.device,
        on_strip: Callable[[], None] = lambda: None,
        kept: KeptStrips | None = None,
    ) -> None:
        """`network`: on `device`. `read_photo(top, bottom)`: rows of the photo (height, width), float32
        (rows, width, 3) in [0, 1]. `on_strip` is called after each strip. `kept`: strips of the same photo and network
        that were made before (`keeping`)."""
        self._network, self._device, self._on_strip = network, device, on_strip
        self._read_photo, self._height, self._width = read_photo, height, width
        self._out = (out_height, out_width)
        self._kept = self.keeping() if kept is None else kept
        self._one_at_a_time = threading.RLock()

    @classmethod
    def keeping(cls, strips: int = 4) -> KeptStrips:
        """Room for so many strips, which several of these may share one after the other."""
        return KeptStrips(FACTOR * cls.STRIP, strips)

    @property
    def strips(self) -> int:
        """How many strips the photo has."""
        return -(-self._height // self.STRIP)

    def read_rows(self, top: int, bottom: int) -> np.ndarray:
        """Rows [top, bottom) of the result, float32 (rows, out_width, 3), clipped to [0, 1]."""
        height, width = FACTOR * self._height, FACTOR * self._width
        with self._one_at_a_time:
            if self._out == (height, width):
                return self._fourfold(top, bottom)
            return np.clip(resize_rows(self._fourfold, height, width, *self._out, top, bottom), 0, 1)

    def _fourfold(self, top: int, bottom: int) -> np.ndarray:
        """Rows [top, bottom) at four times the photo's size."""
        return self._kept.read_rows(self._strip, top, bottom)

    def _cubic(self, begin: int, end: int) -> np.ndarray:
        """What the antialiased cubic makes of the photo's rows [begin, end), clipped to [0, 1]."""
        sizes = (self._height, self._width, FACTOR * self._height, FACTOR * self._width)
        return np.clip(resize_rows(self._read_photo, *sizes, FACTOR * begin, FACTOR * end), 0, 1)

    @abstractmethod
    def _strip(self, strip: int) -> np.ndarray:
        """Rows of one strip at four times the photo's size, clipped to [0, 1]."""
