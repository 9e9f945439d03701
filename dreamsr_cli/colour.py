"""Colour fix: the result keeps its detail and takes the colours of the photo it came from.

Generation shifts colours a little, tile by tile. Two remedies of the field, both strip by strip so that a huge photo
is never whole in memory:
- wavelet (StableSR's): high frequencies of the result + low ones of the reference, five à-trous levels;
- AdaIN (Huang and Belongie 2017, eq. 8): per channel, the result's mean and standard deviation become the reference's.

Axes: P Q pixel rows and columns, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

DILATIONS = (1, 2, 4, 8, 16)
HALO = sum(DILATIONS)
"""Rows above and below a strip that its wavelet fix depends on."""

_EPSILON = 1e-5  # added to variances, as AdaIN does: a plain area must not be blown up into noise

ReadRows = Callable[[int, int], np.ndarray]


def _smooth(x: np.ndarray, axis: int, dilation: int) -> np.ndarray:
    """[1 2 1] / 4 along `axis`, taps `dilation` apart, borders repeated."""
    out = np.multiply(x, np.float32(0.5))
    source, target = np.moveaxis(x, axis, 0), np.moveaxis(out, axis, 0)
    quarter = source * np.float32(0.25)
    target[dilation:] += quarter[:-dilation]
    target[:dilation] += quarter[:1]
    target[:-dilation] += quarter[dilation:]
    target[-dilation:] += quarter[-1:]
    return out


def low_frequencies(x_PQC: np.ndarray) -> np.ndarray:
    """What five à-trous levels leave over: float32 (P, Q, C), same shape, borders repeated at each level."""
    low_PQC = np.asarray(x_PQC, np.float32)
    for dilation in DILATIONS:
        low_PQC = _smooth(_smooth(low_PQC, 0, dilation), 1, dilation)
    return low_PQC


def wavelet_fix(result: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """High frequencies of `result` + low ones of `reference`; float32 (P, Q, C) both, not clamped.

    The filter is linear, so one pass over the difference does for both: result + low(reference - result).
    """
    _check_shapes(result, reference)
    return result + low_frequencies(np.subtract(reference, result, dtype=np.float32))


def adain_fix(result: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """`result` with the per-channel mean and standard deviation of `reference`; float32 (P, Q, C), not clamped."""
    _check_shapes(result, reference)
    (strip,) = _adain_strips(result.shape[0], lambda a, b: result[a:b], lambda a, b: reference[a:b], result.shape[0])
    return strip


def fix_strips(
    method: str,
    height: int,
    width: int,
    read_result: ReadRows,
    read_reference: ReadRows,
    strip_rows: int,
    start: int = 0,
) -> Iterator[np.ndarray]:
    """Yield the fixed photo from row `start` down, float32 (rows, width, C), `strip_rows` at a time (or what is left).

    `method` is "wavelet", "adain" or "none". `read_result(top, bottom)` and `read_reference(top, bottom)` return
    float32 rows [top, bottom) in [0, 1]. "wavelet" reads `HALO` rows more at each side and gives the same bits for any
    `strip_rows`; "adain" reads everything twice, its float64 sums are added in strip order. Not clamped.
    ValueError for an unknown method, an empty strip, or readers whose rows have another shape.
    """
    if method not in ("wavelet", "adain", "none"):
        raise ValueError(f"unknown colour fix {method!r}")
    if strip_rows < 1:
        raise ValueError(f"strip_rows must be at least 1, got {strip_rows}")

    def checked(read: ReadRows) -> ReadRows:
        def read_checked(top: int, bottom: int) -> np.ndarray:
            rows_PQC = np.asarray(read(top, bottom), np.float32)
            if rows_PQC.shape[:2] != (bottom - top, width):
                raise ValueError(f"rows [{top}, {bottom}) came as {rows_PQC.shape}, expected width {width}")
            return rows_PQC

        return read_checked

    result, reference = checked(read_result), checked(read_reference)
    if method == "adain":
        return _adain_strips(height, result, reference, strip_rows, start)
    if method == "wavelet":
        return _wavelet_strips(height, result, reference, strip_rows, start)
    return (result(top, bottom) for top, bottom in _strips(height, strip_rows, start))


def reads(method: str, height: int, strip_rows: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """Rows [top, bottom) of the result that `fix_strips` asks for, in its order."""
    if method == "adain":
        yield from _strips(height, strip_rows)
    halo = HALO if method == "wavelet" else 0
    for top, bottom in _strips(height, strip_rows, start):
        yield max(0, top - halo), min(height, bottom + halo)


def _strips(height: int, strip_rows: int, start: int = 0) -> Iterator[tuple[int, int]]:
    for top in range(start, height, strip_rows):
        yield top, min(top + strip_rows, height)


def _wavelet_strips(
    height: int, result: ReadRows, reference: ReadRows, strip_rows: int, start: int
) -> Iterator[np.ndarray]:
    for top, bottom in _strips(height, strip_rows, start):
        first, last = max(0, top - HALO), min(height, bottom + HALO)
        fixed_PQC = wavelet_fix(result(first, last), reference(first, last))
        yield fixed_PQC[top - first : bottom - first]


def _adain_strips(
    height: int, result: ReadRows, reference: ReadRows, strip_rows: int, start: int = 0
) -> Iterator[np.ndarray]:
    mean, deviation = _statistics(height, result, strip_rows)
    wanted_mean, wanted_deviation = _statistics(height, reference, strip_rows)
    gain = wanted_deviation / deviation
    offset = wanted_mean - mean * gain
    for top, bottom in _strips(height, strip_rows, start):
        yield (result(top, bottom) * gain + offset).astype(np.float32)


def _statistics(height: int, read: ReadRows, strip_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Per-channel mean and standard deviation, float64 (C,), of all rows."""
    total: np.ndarray | float = 0.0
    squares: np.ndarray | float = 0.0
    pixels = 0
    for top, bottom in _strips(height, strip_rows):
        rows_PQC = read(top, bottom).astype(np.float64)
        total = total + rows_PQC.sum(axis=(0, 1))
        squares = squares + np.square(rows_PQC).sum(axis=(0, 1))
        pixels += rows_PQC.shape[0] * rows_PQC.shape[1]
    mean = np.asarray(total) / pixels
    variance = np.maximum(np.asarray(squares) / pixels - np.square(mean), 0.0)
    return mean, np.sqrt(variance + _EPSILON)


def _check_shapes(result: np.ndarray, reference: np.ndarray) -> None:
    if result.shape != reference.shape:
        raise ValueError(f"result {result.shape} and reference {reference.shape} differ in shape")
