"""Where pictures of one photo differ most: places worth a closer look.

The absolute difference of luma is averaged over a window as large as the crop; the largest mean wins, then the largest
of those that don't overlap it, and so on. Axes: P Q pixel rows and columns, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dreamsr_cli.evaluation.page_pictures import Box, ReadRows

BLOCK = 8
"""Differences are summed over blocks of this side first; boxes begin at multiples of it."""
_STRIP = 256
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # BT.601


def find_places(pictures: Sequence[ReadRows], width: int, height: int, side: int, count: int) -> list[Box]:
    """Up to `count` boxes of `side` x `side` pixels that don't overlap, the largest difference first.

    `pictures`: two or more of the same size; of more than two the range (largest - smallest luma) counts. A picture
    smaller than `side` is one box. Equal differences: the upper, then the left one. Places where nothing differs are
    left out.
    """
    side = min(side, width, height) // BLOCK * BLOCK or min(side, width, height)
    if side < BLOCK:
        return [(0, 0, width, height)]
    blocks_PQ = _sum_blocks(pictures, width, height)
    window = side // BLOCK
    totals_PQ = np.zeros((blocks_PQ.shape[0] + 1, blocks_PQ.shape[1] + 1))
    totals_PQ[1:, 1:] = blocks_PQ.cumsum(0).cumsum(1)
    means_PQ = totals_PQ[window:, window:] - totals_PQ[:-window, window:]
    means_PQ = means_PQ - totals_PQ[window:, :-window] + totals_PQ[:-window, :-window]
    boxes: list[Box] = []
    while len(boxes) < count:
        row, column = np.unravel_index(int(np.argmax(means_PQ)), means_PQ.shape)
        if means_PQ[row, column] <= 1e-9:
            break
        boxes.append((int(column) * BLOCK, int(row) * BLOCK, int(column) * BLOCK + side, int(row) * BLOCK + side))
        means_PQ[max(0, row - window + 1) : row + window, max(0, column - window + 1) : column + window] = -1
    return boxes


def _sum_blocks(pictures: Sequence[ReadRows], width: int, height: int) -> np.ndarray:
    """Sum of differences of whole blocks, float64; what is left at the right and the bottom is not looked at."""
    columns = width // BLOCK
    found = []
    for top in range(0, height // BLOCK * BLOCK, _STRIP):
        bottom = min(top + _STRIP, height // BLOCK * BLOCK)
        lumas = np.stack([read(top, bottom)[:, : columns * BLOCK] @ _LUMA for read in pictures])
        apart_PQ = np.ptp(lumas, axis=0).astype(np.float64)
        found.append(apart_PQ.reshape(-1, BLOCK, columns, BLOCK).sum((1, 3)))
    return np.concatenate(found)
