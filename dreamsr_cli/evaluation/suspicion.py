"""Which tiles stand out, and why: robust outliers among the tiles of one picture.

A tile is an outlier in a figure if it lies further from the median of all tiles than 3.5 robust standard deviations
(1.4826 times the median absolute deviation; Iglewicz and Hoaglin 1993) *and* than what a person would notice. Pictures
of fewer than `FEWEST` tiles have no such "others": there fixed limits count instead. A picture that is off as a whole
(a very noisy photo, of which the noise is gone) shows it in its own scores, not by naming every tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEWEST = 6
"""Tiles from which on a tile is held against the others."""
CUT = 3.5
"""Robust standard deviations."""


@dataclass(frozen=True)
class Measured:
    """Figures of one tile (see `fidelity.TileScore`)."""

    delta_e: float
    shift: float
    texture: float
    seam: float | None


@dataclass(frozen=True)
class Rule:
    """When one figure of a tile is called suspicious, and in which words."""

    figure: str
    """Field of `Measured`."""
    above: bool
    """Outliers above the others (True) or below them."""
    step: float
    """Least distance from the median that is worth a person's look."""
    limit: float | None
    """Above this a tile of a picture of few tiles is suspicious; None: no such limit."""
    words: str
    """With {value} and {median}."""


RULES = (
    Rule("delta_e", True, 1.5, 8.0, "differs from the photo: ΔE {value:.1f}, other tiles {median:.1f}"),
    Rule("shift", True, 1.5, 5.0, "its colours are shifted: by {value:.1f}, other tiles {median:.1f}"),
    Rule("texture", True, 1.0, None, "more fine detail was added than elsewhere: 2^{value:.1f}, others 2^{median:.1f}"),
    Rule("texture", False, 1.0, None, "less fine detail than elsewhere: 2^{value:.1f}, others 2^{median:.1f}"),
    Rule("seam", True, 0.3, 1.5, "its border shows: seam {value:.2f}, other tiles {median:.2f}"),
)


def find_reasons(tiles: Sequence[Measured]) -> list[tuple[str, ...]]:
    """For each tile the rules that it breaks, in words; () where it breaks none."""
    reasons: list[list[str]] = [[] for _ in tiles]
    for rule in RULES:
        values = [getattr(tile, rule.figure) for tile in tiles]
        known = np.array([value for value in values if value is not None])
        if not len(known):
            continue
        median = float(np.median(known))
        spread = 1.4826 * float(np.median(np.abs(known - median)))
        many = len(known) >= FEWEST
        least = max(rule.step, CUT * spread)
        for number, value in enumerate(values):
            if value is None:
                continue
            distance = value - median if rule.above else median - value
            if distance > least if many else rule.limit is not None and value > rule.limit:
                reasons[number].append(rule.words.format(value=value, median=median))
    return [tuple(words) for words in reasons]
