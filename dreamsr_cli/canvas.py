"""Between a photo's pixels and the canvas' latent, strip by strip: float pixels of the whole canvas never exist.

Axes: P Q pixel rows and columns, C channels, H W latent rows and columns.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from dreamsr_cli.images import Photo
from dreamsr_cli.journal import Piece
from dreamsr_cli.journal_files import RowFile
from dreamsr_cli.models.autoencoder import NONE_SPARE, STRIDE, Autoencoder
from dreamsr_cli.models.fourfold import FourfoldRows
from dreamsr_cli.overlap import prefetched
from dreamsr_cli.progress import Progress
from dreamsr_cli.resample import resize_rows
from dreamsr_cli.tiling import TileGrid
from dreamsr_cli.work_sharing import Job, SharedWork

STRIP = 256
"""Pixel rows encoded or decoded at a time."""


class EnlargedPhoto:
    """The photo at the target size by the antialiased cubic, row by row: what is encoded, and the colour fix's
    reference."""

    def __init__(self, photo: Photo, width: int, height: int) -> None:
        self.photo, self.width, self.height = photo, width, height

    def read_rows(self, top: int, bottom: int) -> np.ndarray:
        """Rows [top, bottom), float32 (rows, width, 3), clipped to [0, 1]."""
        info = self.photo.info
        rows = resize_rows(self.photo.read_rows, info.height, info.width, self.height, self.width, top, bottom)
        return np.clip(rows, 0, 1)

    def read_padded(self, top: int, bottom: int, padded_width: int) -> np.ndarray:
        """Rows [top, bottom) of the canvas padded right and bottom by reflection."""
        if bottom <= self.height and padded_width == self.width:
            return self.read_rows(top, bottom)
        rows = reflected(np.arange(top, bottom), self.height)
        first = int(rows.min())
        strip = self.read_rows(first, int(rows.max()) + 1)[rows - first]
        return strip[:, reflected(np.arange(padded_width), self.width)]

    def read_alpha(self, top: int, bottom: int) -> np.ndarray | None:
        """Rows [top, bottom) of the enlarged alpha, (rows, width) in [0, 1]; None for a photo without."""
        if not self.photo.info.alpha:
            return None

        def read(first: int, last: int) -> np.ndarray:
            alpha_PQ = self.photo.read_alpha(first, last)
            assert alpha_PQ is not None
            return alpha_PQ[..., None]

        info = self.photo.info
        return np.clip(resize_rows(read, info.height, info.width, self.height, self.width, top, bottom), 0, 1)[..., 0]


class FourfoldPhoto(EnlargedPhoto):
    """A photo at the target size by the bundle's enlarger or cleaner: what is encoded instead of stage 1's result."""

    def __init__(self, photo: Photo, width: int, height: int, rows: FourfoldRows[Any]) -> None:
        """`rows`: of that size."""
        super().__init__(photo, width, height)
        self._rows = rows

    def read_rows(self, top: int, bottom: int) -> np.ndarray:
        return self._rows.read_rows(top, bottom)


def reflected(index: np.ndarray, length: int) -> np.ndarray:
    """Indices beyond [0, length) folded back by reflection that does not repeat the border (numpy's "reflect")."""
    if length == 1:
        return np.zeros_like(index)
    period = 2 * (length - 1)
    folded = np.abs(index) % period
    return np.where(folded < length, folded, period - folded)


@torch.inference_mode()
def encode(
    enlarged: EnlargedPhoto,
    grid: TileGrid,
    autoencoder: Autoencoder,
    piece: Piece,
    device: torch.device,
    progress: Progress,
) -> RowFile:
    """z_lq of the padded canvas, into `piece`, encoded in strips with the autoencoder's halo around each."""
    height, width = grid.canvas_height, grid.canvas_width
    halo = 0 if autoencoder.exact else autoencoder.halo
    progress.phase("encode", -(-height // STRIP))
    progress.advance(piece.rows_done * STRIDE // STRIP)
    tops = range(piece.rows_done * STRIDE, height, STRIP)

    def read(top: int) -> np.ndarray:
        rgb_PQC = enlarged.read_padded(max(0, top - halo), min(height, top + STRIP + halo), width)
        return np.ascontiguousarray(rgb_PQC.transpose(2, 0, 1))

    for top, rgb_CPQ in zip(tops, prefetched(read, tops), strict=True):
        bottom, first = min(top + STRIP, height), max(0, top - halo)
        rgb_BCPQ = torch.from_numpy(rgb_CPQ)[None].to(device) * 2 - 1
        z_CHW = autoencoder.encode(rgb_BCPQ)[0].cpu().numpy()
        piece.append(z_CHW[:, (top - first) // STRIDE : (bottom - first) // STRIDE])
        progress.advance()
    return piece.finish()


class DecodedCanvas:
    """Rows of the decoded canvas on demand; the strips decoded last are kept.

    Strips are decoded with the autoencoder's halo. Where that is exact the halo is cut off; else (FLUX's VAE)
    neighbouring strips are cross-faded over it.
    """

    KEPT = 4

    def __init__(
        self,
        z: RowFile,
        width: int,
        autoencoder: Autoencoder,
        device: torch.device,
        progress: Progress,
        shared: SharedWork | None = None,
        restored: bool = False,
    ) -> None:
        """`restored`: z is stage 1's result. With `shared`, other processes decode strips as well, ahead of the rows
        asked for."""
        self._restored = restored
        self._shared, self._round, self._next = shared, 0, -1
        self._z, self._width, self._device = z, width, device
        self._autoencoder, self._progress = autoencoder, progress
        self._rows = z.shape[1] * STRIDE
        self._strips: OrderedDict[int, np.ndarray] = OrderedDict()
        progress.phase("decode", self.strips)

    @property
    def strips(self) -> int:
        """How many strips the canvas has."""
        return -(-self._rows // STRIP)

    def read_rows(self, top: int, bottom: int) -> np.ndarray:
        """Rows [top, bottom), float32 (rows, width, 3), about [0, 1] (not clipped: the colour fix comes first)."""
        fade = 0 if self._autoencoder.exact else self._autoencoder.halo // 2
        out = np.zeros((bottom - top, self._width, 3), np.float32)
        weights = np.zeros(bottom - top, np.float32)
        for strip in range(max(0, (top - fade) // STRIP), min(self.strips, -(-(bottom + fade) // STRIP))):
            begin, end = strip * STRIP, min((strip + 1) * STRIP, self._rows)
            first, last = max(top, begin - fade, 0), min(bottom, end + fade, self._rows)
            if first >= last:
                continue
            extended, origin = self._decoded(strip)
            rows = np.arange(first, last)
            weight = np.ones(len(rows), np.float32)
            if fade:
                inside = np.minimum(rows + 0.5 - (begin - fade), (end + fade) - rows - 0.5) / (2 * fade)
                at_edge = (rows < fade) & (begin == 0) | (rows >= self._rows - fade) & (end == self._rows)
                weight = np.where(at_edge, 1.0, np.clip(inside, 0, 1)).astype(np.float32)
            out[first - top : last - top] += extended[first - origin : last - origin] * weight[:, None, None]
            weights[first - top : last - top] += weight
        return out / weights[:, None, None]

    def _decoded(self, strip: int) -> tuple[np.ndarray, int]:
        first = max(0, strip * STRIP - self._autoencoder.halo)
        if strip in self._strips:
            self._strips.move_to_end(strip)
            return self._strips[strip], first
        rgb_PQC = self._decode(strip) if self._shared is None else self._from_anybody(self._shared, strip)
        self._strips[strip] = rgb_PQC
        if len(self._strips) > self.KEPT:
            self._strips.popitem(last=False)
        self._progress.advance()
        return rgb_PQC, first

    def _latent(self, strip: int) -> StripLatent:
        halo, top, bottom = self._autoencoder.halo, strip * STRIP, min(self._rows, (strip + 1) * STRIP)
        first, last = max(0, top - halo), min(self._rows, bottom + halo)
        spare = (top - first, last - bottom) if self._autoencoder.exact else NONE_SPARE
        return StripLatent(np.ascontiguousarray(self._z.rows(first // STRIDE, last // STRIDE)), spare)

    def _decode(self, strip: int) -> np.ndarray:
        return decode_strip(self._autoencoder, self._latent(strip), self._width, self._device, self._restored)

    def _from_anybody(self, shared: SharedWork, strip: int) -> np.ndarray:
        if strip != self._next:  # the first one, or AdaIN's second time through
            self._round += 1
            shared.forget()
            shared.announce(
                Job((self._round, number), partial(self._latent, number), partial(self._decode, number))
                for number in range(strip, self.strips)
            )
        self._next = strip + 1
        return shared.take((self._round, strip))


class StripLatent(NamedTuple):
    """A strip of the canvas with its halo, for whoever decodes it."""

    z_CHW: np.ndarray
    spare: tuple[int, int]
    """Pixel rows at the top and at the bottom that only serve as surroundings (`Autoencoder.decode`)."""


@torch.inference_mode()
def decode_strip(
    autoencoder: Autoencoder, strip: StripLatent, width: int, device: torch.device, restored: bool = False
) -> np.ndarray:
    """Pixels of a strip's latent, float32 (rows, width, 3), about [0, 1]; `width` cuts the padding off, `restored` says
    that the latent is stage 1's result."""
    z_BCHW = torch.from_numpy(strip.z_CHW)[None].to(device)
    rgb_CPQ = autoencoder.decode(z_BCHW, restored, strip.spare)[0].cpu().numpy()
    return np.ascontiguousarray(rgb_CPQ.transpose(1, 2, 0)[:, :width]) * 0.5 + 0.5
