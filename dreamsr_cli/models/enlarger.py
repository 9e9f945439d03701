"""The enlarger: a clean photo four times as large, as sharp as its own pixels allow.

Where nothing but its size is wrong with a photo there is no damage to remove, and a small network that knows only
shrinking guesses its edges better than a large one that has to be ready for everything (docs/mini.md, row 22). It
works on the photo's own pixels and answers on a grid four times as fine (sub-pixel convolution, Shi et al. 2016).

Axes: B batch, C channels, P Q pixel rows and columns.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from dreamsr_cli.resample import resize, resize_rows

FACTOR = 4
"""Sides of the answer over those of the photo."""

ReadRows = Callable[[int, int], np.ndarray]


class Enlarger(ModelMixin, ConfigMixin):
    """Residual convolutions over the small photo, and what the antialiased cubic lacks as 4x4 sub-pixels.

    No norm and no attention: an answer depends on `reach` of the photo's pixels around it and nothing else. The last
    convolution starts at zero, so an untrained enlarger is the cubic.
    """

    @register_to_config
    def __init__(self, width: int = 48, blocks: int = 6) -> None:
        """`blocks` of two convolutions of `width` channels each."""
        super().__init__()
        self.entry = nn.Conv2d(3, width, 3, padding=1)
        self.inner = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(blocks)
        )
        self.exit = nn.Conv2d(width, 3 * FACTOR**2, 3, padding=1)
        for parameter in self.exit.parameters():
            nn.init.zeros_(parameter)
        self.reach = 2 + 2 * blocks

    def forward(self, photo_BCPQ: Tensor, cubic_BCPQ: Tensor | None = None) -> Tensor:
        """Photos (B, 3, P, Q) in [0, 1] to (B, 3, 4P, 4Q), float32, about [0, 1], not clamped. `cubic_BCPQ`: the
        photos enlarged by the antialiased cubic, where that is known already."""
        if cubic_BCPQ is None:
            rows, columns = photo_BCPQ.shape[2:]
            cubic_BCPQ = resize(photo_BCPQ.float(), FACTOR * rows, FACTOR * columns)
        return cubic_BCPQ.float() + self.correction(photo_BCPQ)

    def correction(self, photo_BCPQ: Tensor) -> Tensor:
        """What is added to the cubic, (B, 3, 4P, 4Q), float32."""
        # Centred, so that the zeros beyond the border are a middle grey.
        x = self.entry(photo_BCPQ.to(self.entry.weight.dtype) - 0.5)
        for block in self.inner:
            x = x + block(x)
        return F.pixel_shuffle(self.exit(x), FACTOR).float()


class EnlargedRows:
    """Rows of a photo enlarged by `network` and brought to (out_height, out_width) by the antialiased cubic.

    Computed in strips that always lie the same, the last of which are kept: rows come out the same whatever is asked
    for with them.
    """

    STRIP = 64
    """Rows of the photo that are enlarged at a time."""
    KEPT = 4

    def __init__(
        self,
        network: Enlarger,
        read_photo: ReadRows,
        height: int,
        width: int,
        out_height: int,
        out_width: int,
        device: torch.device,
        on_strip: Callable[[], None] = lambda: None,
    ) -> None:
        """`read_photo(top, bottom)`: rows of the photo (height, width), float32 (rows, width, 3) in [0, 1].
        `on_strip` is called after each strip."""
        self._network, self._read_photo, self._device = network, read_photo, device
        self._height, self._width = height, width
        self._out, self._on_strip = (out_height, out_width), on_strip
        self._strips: OrderedDict[int, np.ndarray] = OrderedDict()

    @property
    def strips(self) -> int:
        """How many strips the photo has."""
        return -(-self._height // self.STRIP)

    def read_rows(self, top: int, bottom: int) -> np.ndarray:
        """Rows [top, bottom) of the result, float32 (rows, out_width, 3), clipped to [0, 1]."""
        height, width = FACTOR * self._height, FACTOR * self._width
        if self._out == (height, width):
            return self._fourfold(top, bottom)
        return np.clip(resize_rows(self._fourfold, height, width, *self._out, top, bottom), 0, 1)

    def _fourfold(self, top: int, bottom: int) -> np.ndarray:
        """Rows [top, bottom) at four times the photo's size."""
        rows = FACTOR * self.STRIP
        made = []
        for strip in range(top // rows, -(-bottom // rows)):
            first = strip * rows
            made.append(self._strip(strip)[max(0, top - first) : bottom - first])
        return np.concatenate(made)

    def _strip(self, strip: int) -> np.ndarray:
        """Rows of one strip at four times the photo's size, clipped to [0, 1]."""
        if strip in self._strips:
            self._strips.move_to_end(strip)
            return self._strips[strip]
        first, last = strip * self.STRIP, min((strip + 1) * self.STRIP, self._height)
        begin, end = max(0, first - self._network.reach), min(self._height, last + self._network.reach)
        made_PQC = self._correction(begin, end)[FACTOR * (first - begin) : FACTOR * (last - begin)]
        height, width = FACTOR * self._height, FACTOR * self._width
        made_PQC += resize_rows(
            self._read_photo, self._height, self._width, height, width, FACTOR * first, FACTOR * last
        )
        self._strips[strip] = np.clip(made_PQC, 0, 1)
        if len(self._strips) > self.KEPT:
            self._strips.popitem(last=False)
        self._on_strip()
        return self._strips[strip]

    @torch.inference_mode()
    def _correction(self, top: int, bottom: int) -> np.ndarray:
        """What rows [top, bottom) of the photo, on their own, get added to their cubic."""
        photo_PQC = np.ascontiguousarray(self._read_photo(top, bottom).transpose(2, 0, 1))
        made_CPQ = self._network.correction(torch.from_numpy(photo_PQC)[None].to(self._device))[0]
        return np.ascontiguousarray(made_CPQ.permute(1, 2, 0).cpu().numpy())
