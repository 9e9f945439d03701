"""The field's antialiased cubic: what MATLAB's `imresize(x, s, "bicubic")` computes, whole or by rows.

Cubic convolution (Keys 1981, a = -0.5), widened by 1/scale when it shrinks, borders mirrored with the edge pixel
repeated. PSNR tables and x4 test pairs of the literature are made with it; Pillow's and torch's cubics differ.

Axes: B batch, C channels, P Q pixel rows and columns.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import torch

ReadRows = Callable[[int, int], np.ndarray]
"""`read(top, bottom)` gives rows [top, bottom) of a picture, (rows, width, channels)."""

_SUPPORT = 4.0  # source pixels under the cubic kernel when it does not shrink


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.5 at distances `x` (source pixels); zero from |x| = 2 on."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def cubic_contributions(n_in: int, n_out: int, scale: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Which source pixels make each of `n_out` pixels of a line, and how much of each.

    `scale` is out/in; None means n_out / n_in. Pass it where the size was rounded from a factor, as MATLAB does.
    Returns (indices, weights), both (n_out, taps): int64 in [0, n_in), and float64 whose rows sum to 1.
    An index may occur twice in a row where the border mirrors. ValueError for sizes or scales below or at zero.
    """
    if n_in < 1 or n_out < 1:
        raise ValueError(f"sizes must be at least 1, got {n_in} -> {n_out}")
    scale = n_out / n_in if scale is None else float(scale)
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be above zero, got {scale}")
    stretch = min(scale, 1.0)
    width = _SUPPORT / stretch
    centre = (np.arange(n_out, dtype=np.float64) + 0.5) / scale - 0.5
    left = np.floor(centre - width / 2).astype(np.int64)
    taps = left[:, None] + np.arange(math.ceil(width) + 2, dtype=np.int64)
    weights = stretch * _cubic(stretch * (centre[:, None] - taps))
    weights /= weights.sum(axis=1, keepdims=True)
    used = weights.any(axis=0)
    folded = taps[:, used] % (2 * n_in)
    return np.where(folded < n_in, folded, 2 * n_in - 1 - folded), np.ascontiguousarray(weights[:, used])


def _resize_axis(x: torch.Tensor, dim: int, indices: np.ndarray, weights: np.ndarray) -> torch.Tensor:
    """Weighted sum of the slices `indices` (n_out, taps) of `x` along `dim`; other axes stay.

    Taps are added one by one in a fixed order, so a pixel does not depend on which other rows are computed with it.
    """
    shape = [1] * x.ndim
    shape[dim] = len(indices)
    total: torch.Tensor | None = None
    for tap in range(indices.shape[1]):
        index = torch.tensor(indices[:, tap], device=x.device)
        weight = torch.tensor(weights[:, tap], dtype=x.dtype, device=x.device).reshape(shape)
        part = x.index_select(dim, index) * weight
        total = part if total is None else total + part
    assert total is not None
    return total


def resize(image_BCPQ: torch.Tensor, out_rows: int, out_cols: int, scale: float | None = None) -> torch.Tensor:
    """Resize the last two axes to (out_rows, out_cols).

    Floating point of any range, any number of leading axes, any device; the dtype is kept (half precisions are computed
    in float32). Values are not clamped: the cubic overshoots at edges. `scale` as in `cubic_contributions`, both axes.
    """
    if not image_BCPQ.is_floating_point():
        raise ValueError(f"expected a floating point image, got {image_BCPQ.dtype}")
    dtype = image_BCPQ.dtype
    x = image_BCPQ.float() if dtype in (torch.float16, torch.bfloat16) else image_BCPQ
    rows, cols = x.shape[-2:]
    x = _resize_axis(x, x.ndim - 1, *cubic_contributions(cols, out_cols, scale))
    x = _resize_axis(x, x.ndim - 2, *cubic_contributions(rows, out_rows, scale))
    return x.to(dtype)


def resize_rows(
    read_rows: Callable[[int, int], np.ndarray],
    in_rows: int,
    in_cols: int,
    out_rows: int,
    out_cols: int,
    top: int,
    bottom: int,
    scale: float | None = None,
) -> np.ndarray:
    """Rows [top, bottom) of the image resized from (in_rows, in_cols) to (out_rows, out_cols), as if whole.

    `read_rows(first, last)` returns source rows [first, last) as (rows, in_cols, C); it is called once, for the rows
    that are needed only. Returns float32 (bottom - top, out_cols, C), not clamped, the same bits whatever the strip.
    """
    if not 0 <= top < bottom <= out_rows:
        raise ValueError(f"rows [{top}, {bottom}) lie outside an image of {out_rows} rows")
    indices, weights = cubic_contributions(in_rows, out_rows, scale)
    indices, weights = indices[top:bottom], weights[top:bottom]
    first, last = int(indices.min()), int(indices.max()) + 1
    source_PQC = np.asarray(read_rows(first, last), dtype=np.float32)
    if source_PQC.shape[:2] != (last - first, in_cols):
        raise ValueError(f"read_rows({first}, {last}) returned shape {source_PQC.shape}, expected {in_cols} columns")
    # a copy: torch warns about arrays that are read-only, as slices of a mapped photo may be
    x = torch.tensor(source_PQC)
    x = _resize_axis(x, 1, *cubic_contributions(in_cols, out_cols, scale))
    return _resize_axis(x, 0, indices - first, weights).numpy()


class KeptStrips:
    """Rows made in strips that always lie the same, the last of which are kept: they come out the same whatever is
    asked for with them, and neighbouring requests share a strip."""

    def __init__(self, rows: int, kept: int = 4) -> None:
        self._rows, self._kept = rows, kept
        self._strips: OrderedDict[int, np.ndarray] = OrderedDict()

    def read_rows(self, make: Callable[[int], np.ndarray], top: int, bottom: int) -> np.ndarray:
        """Rows [top, bottom), (bottom - top, width, C), of strips that `make(number)` gives, the same at every call:
        rows [number * rows, (number + 1) * rows), fewer at the bottom. It isn't held, for its owner holds this."""
        found = []
        for number in range(top // self._rows, -(-bottom // self._rows)):
            first = number * self._rows
            found.append(self._strip(make, number)[max(0, top - first) : bottom - first])
        return np.concatenate(found)

    def _strip(self, make: Callable[[int], np.ndarray], number: int) -> np.ndarray:
        if number not in self._strips:
            self._strips[number] = make(number)
        self._strips.move_to_end(number)
        if len(self._strips) > self._kept:
            self._strips.popitem(last=False)
        return self._strips[number]
