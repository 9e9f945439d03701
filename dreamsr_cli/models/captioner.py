"""The weight-free describer: a photo or a tile in one sentence, made of words that survive a x4 degradation.

The picture is first averaged over at most 32 x 32 cells, so a clean tile and its small, noisy copy look nearly alike;
then five questions with few answers are put to the cells: brightness, colours, contrast, direction, surface. Thresholds
lie where natural tiles are rare or where degraded copies move least. Nothing is said of blur, noise or quality: the
sentence describes the scene, and the networks decide about the rest.

Axes: P Q cell or pixel rows and columns, C = 3 channels (sRGB in [0, 1]).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

CELLS = 32
"""Cells along the longer side of the grid a picture is reduced to."""


@dataclass(frozen=True)
class Description:
    """The describer's five answers."""

    brightness: str
    """"dark", "dim", "medium" or "bright"."""
    colours: tuple[str, ...]
    """One or two names, in the order of the colour table."""
    contrast: str
    """"low", "medium" or "high"."""
    direction: str
    """Along which most contours run: "horizontal", "vertical", "diagonal" or "no"."""
    surface: str
    """"smooth", "patterned" (something repeats) or "irregular"."""

    def sentence(self) -> str:
        """The prompt: one sentence of 60 to 110 ASCII characters."""
        return (
            f"{self.brightness.capitalize()} tones, mainly {' and '.join(self.colours)}, {self.contrast} contrast, "
            f"{self.direction} direction, {self.surface} surface."
        )


class Describer:
    """Captioner without weights: `--captioner describe`."""

    name = "describe"
    revision = "1"

    def describe(self, rgb_PQC: np.ndarray) -> str:
        """One sentence about a picture (rows, columns, 3) in [0, 1], at any resolution."""
        return self.look(rgb_PQC).sentence()

    def look(self, rgb_PQC: np.ndarray) -> Description:
        """The five answers behind `describe`."""
        cells = CellMeans(*rgb_PQC.shape[:2])
        cells.add(rgb_PQC)
        return self.look_at_cells(cells.mean_PQC)

    def look_at_cells(self, cells_PQC: np.ndarray) -> Description:
        """The five answers from finished cell means, as `CellMeans` makes them from strips of a large photo."""
        luma = cells_PQC @ np.array([0.299, 0.587, 0.114], np.float32)
        calm = _blurred(luma, 2)
        detail = calm - _blurred(calm, 6)
        return Description(
            brightness=_word(float(luma.mean()), (0.18, 0.35, 0.60), ("dark", "dim", "medium", "bright")),
            colours=_colours(cells_PQC),
            contrast=_word(float(calm.std()), (0.062, 0.15), ("low", "medium", "high")),
            direction=_direction(_blurred(calm, 1)),
            surface=_surface(luma, detail),
        )


class CellMeans:
    """Area means of a picture over a grid of cells, fed with strips of rows from top to bottom.

    The grid has `CELLS` cells along the longer side and about square cells, never more cells than pixels. Cell edges
    may cut a pixel; its weight is then shared, so that every resolution of a scene gives the same cells. Plain sums, no
    matrix product: the number of threads can't change a word.
    """

    def __init__(self, height: int, width: int) -> None:
        if height < 1 or width < 1:
            raise ValueError(f"a picture has at least one pixel, got {height} x {width}")
        longer = max(height, width)
        self._size = height, width
        self._down = np.linspace(0, height, min(height, max(1, round(CELLS * height / longer))) + 1)
        self._across = np.linspace(0, width, min(width, max(1, round(CELLS * width / longer))) + 1)
        self._sums_PXC = np.zeros((len(self._down) - 1, width, 3), np.float32)
        self._next = 0

    def add(self, rgb_YXC: np.ndarray) -> None:
        """Take the next rows (any number, whole width)."""
        height, width = self._size
        top, bottom = self._next, self._next + len(rgb_YXC)
        if rgb_YXC.shape[1:] != (width, 3) or bottom > height:
            raise ValueError(f"rows of shape {rgb_YXC.shape} don't continue this picture")
        for cell, (low, high) in enumerate(pairwise(self._down)):
            low, high = max(low, top), min(high, bottom)
            if low < high:
                self._sums_PXC[cell] += _span_sum(rgb_YXC, low - top, high - top)
        self._next = bottom

    @property
    def mean_PQC(self) -> np.ndarray:
        """float32 (P, Q, 3); meaningful once all rows were added."""
        sums_XPC = self._sums_PXC.swapaxes(0, 1)
        columns = [_span_sum(sums_XPC, low, high) for low, high in pairwise(self._across)]
        return np.stack(columns, 1) / np.float32(self._down[1] * self._across[1])


def _span_sum(rows: np.ndarray, low: float, high: float) -> np.ndarray:
    """Sum of `rows` over the span [low, high) of their axis 0, with parts of rows at its ends."""
    first, last = int(low), math.ceil(high)
    ends = np.float32(low - first) * rows[first] + np.float32(last - high) * rows[last - 1]
    return rows[first:last].sum(0, dtype=np.float32) - ends


def _word(value: float, thresholds: tuple[float, ...], words: tuple[str, ...]) -> str:
    return words[sum(value >= t for t in thresholds)]


def _blurred(plane_PQ: np.ndarray, passes: int) -> np.ndarray:
    """`passes` times the kernel [1 2 1]/4 in both directions, edges repeated."""
    for _ in range(passes):
        padded = np.pad(plane_PQ, 1, "edge")
        rows = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
        plane_PQ = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4
    return plane_PQ


# ---------------------------------------------------------------- colours

COLOURS: dict[str, tuple[tuple[float, float, float], ...]] = {
    "black": ((0.12, 0.0, 0), (0.22, 0.01, 60), (0.22, 0.01, 250)),
    "grey": ((0.40, 0.0, 0), (0.55, 0.0, 0), (0.70, 0.0, 0), (0.40, 0.012, 250), (0.60, 0.012, 250), (0.60, 0.012, 80)),
    "white": ((0.92, 0.0, 0), (0.97, 0.0, 0), (0.90, 0.015, 90), (0.90, 0.015, 250)),
    "brown": ((0.32, 0.045, 55), (0.45, 0.065, 58), (0.40, 0.05, 75), (0.52, 0.085, 55)),
    "beige": ((0.66, 0.055, 70), (0.78, 0.055, 70), (0.75, 0.07, 50), (0.88, 0.05, 80)),
    "red": ((0.40, 0.13, 25), (0.55, 0.19, 27), (0.35, 0.09, 22)),
    "orange": ((0.62, 0.14, 50), (0.72, 0.15, 62), (0.58, 0.12, 60)),
    "yellow": ((0.75, 0.14, 88), (0.88, 0.15, 98), (0.62, 0.11, 88)),
    "green": (
        (0.30, 0.05, 130),
        (0.42, 0.075, 130),
        (0.55, 0.10, 128),
        (0.68, 0.11, 125),
        (0.60, 0.05, 130),
        (0.55, 0.15, 142),
        (0.80, 0.09, 128),
    ),
    "teal": ((0.35, 0.05, 195), (0.55, 0.08, 195), (0.75, 0.08, 200)),
    "blue": (
        (0.25, 0.06, 260),
        (0.40, 0.09, 258),
        (0.55, 0.10, 252),
        (0.70, 0.09, 250),
        (0.82, 0.06, 240),
        (0.50, 0.18, 262),
        (0.60, 0.05, 250),
    ),
    "purple": ((0.30, 0.08, 310), (0.45, 0.13, 310), (0.62, 0.11, 308)),
    "pink": ((0.62, 0.14, 355), (0.75, 0.10, 5), (0.83, 0.06, 0)),
}
"""Points that a name stands for in Oklab: lightness, chroma, hue in degrees."""

_NAMES = tuple(COLOURS)
_OWNER = np.concatenate([np.full(len(points), i) for i, points in enumerate(COLOURS.values())])
_LCH = np.array([p for points in COLOURS.values() for p in points])
_HUE = np.radians(_LCH[:, 2])
_LIGHTNESS_WEIGHT = 0.4
_POINTS = np.stack([_LIGHTNESS_WEIGHT * _LCH[:, 0], _LCH[:, 1] * np.cos(_HUE), _LCH[:, 1] * np.sin(_HUE)], 1)
_SOFTNESS = 0.015
_SECOND_SHARE = 0.28
# Oklab: B. Ottosson, "A perceptual color space for image processing", 2020.
_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def _oklab(srgb: np.ndarray) -> np.ndarray:
    """sRGB (..., 3) in [0, 1] to Oklab."""
    srgb = np.clip(srgb, 0.0, 1.0).astype(np.float64)
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _TO_LMS.T) @ _TO_OKLAB.T


def _colours(cells_PQC: np.ndarray) -> tuple[str, ...]:
    """The most common name and, with a share of 28 % or more, the second; in table order, so equal shares can't flip.

    Every cell spreads its vote over the names by its distance to their points: a cell between two names is split
    between them instead of jumping.
    """
    calm = np.stack([_blurred(cells_PQC[..., c], 2) for c in range(3)], -1)
    cells = _oklab(calm).reshape(-1, 3) * (_LIGHTNESS_WEIGHT, 1.0, 1.0)
    squared = (cells**2).sum(1)[:, None] + (_POINTS**2).sum(1) - 2 * cells @ _POINTS.T
    votes = np.exp(-(squared - squared.min(1, keepdims=True)) / (2 * _SOFTNESS**2))
    shares = np.bincount(_OWNER, (votes / votes.sum(1, keepdims=True)).mean(0), len(_NAMES))
    first, second = np.argsort(-shares, kind="stable")[:2]
    chosen = [first, second] if shares[second] >= _SECOND_SHARE else [first]
    return tuple(_NAMES[i] for i in sorted(chosen))


# ---------------------------------------------------------------- direction and surface


def _direction(calm_PQ: np.ndarray) -> str:
    """From the structure tensor of the whole picture; "no" where its orientation is weak or there is little to see."""
    if min(calm_PQ.shape) < 3:
        return "no"
    down = (calm_PQ[2:, 1:-1] - calm_PQ[:-2, 1:-1]) / 2
    across = (calm_PQ[1:-1, 2:] - calm_PQ[1:-1, :-2]) / 2
    xx, yy, xy = float((across**2).mean()), float((down**2).mean()), float((across * down).mean())
    faint = 4e-5
    if np.hypot(xx - yy, 2 * xy) < 0.40 * (xx + yy + faint):
        return "no"
    steepest = abs(np.degrees(0.5 * np.arctan2(2 * xy, xx - yy)))
    return _word(float(steepest), (30.0, 60.0), ("vertical", "diagonal", "horizontal"))


def _surface(luma_PQ: np.ndarray, detail_PQ: np.ndarray) -> str:
    """Smooth: little detail at the scale of a few cells. Patterned: what there is repeats at some distance."""
    if float(np.sqrt((detail_PQ**2).mean())) < 0.014:
        return "smooth"
    band = _blurred(luma_PQ, 1)
    return "patterned" if _repetition(band - _blurred(band, 7)) > 0.7 else "irregular"


def _repetition(band_PQ: np.ndarray) -> float:
    """How far autocorrelation climbs again after its lowest point, along the best of 24 directions.

    0: never comes back (one edge, one blob); about 2: perfect stripes. Lags reach 5/8 of the shorter side, and each is
    divided by the number of pairs it has.
    """
    rows, columns = band_PQ.shape
    reach = min(rows, columns) * 5 // 8
    if reach < 4:
        return 0.0
    shape = (2 * rows, 2 * columns)
    centred = band_PQ - band_PQ.mean()
    power = np.abs(np.fft.rfft2(centred, shape)) ** 2
    pairs = np.outer(_triangle(rows), _triangle(columns))
    correlation = np.fft.irfft2(power, shape) / np.maximum(pairs, 1)
    correlation /= correlation[0, 0] + 1e-6
    lag = np.arange(reach + 1)
    angle = np.arange(24)[:, None] * (np.pi / 24)
    rays = correlation[np.rint(lag * np.sin(angle)).astype(int), np.rint(lag * np.cos(angle)).astype(int)]
    return float((rays - np.minimum.accumulate(rays, axis=1)).max())


def _triangle(n: int) -> np.ndarray:
    """Pairs of samples at each circular lag of a zero-padded length 2n."""
    lag = np.arange(2 * n)
    return n - np.minimum(lag, 2 * n - lag)
