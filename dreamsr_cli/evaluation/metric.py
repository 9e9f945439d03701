"""One metric: what its column is, and the function that fills it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dreamsr_cli.errors import WeightsError
from dreamsr_cli.evaluation.results import MetricId
from dreamsr_cli.tiling import TileGrid
from dreamsr_cli.weights import weights_folder

FETCHED = "lpips"
"""Entry of weights.lock whose folder is looked into where none is named."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One result with what it is judged by. float64 RGB on [0, 255], (P, Q, 3)."""

    sr_PQC: np.ndarray
    hq_PQC: np.ndarray | None
    lq: Path
    sr: Path
    grid: TileGrid | None
    """The tiles it was made in; None where nobody knows."""


@dataclass(frozen=True, eq=False)
class Metric:
    """A column: what it is, and the function that fills it."""

    ident: MetricId
    needs_reference: bool
    score: Callable[[Sample], float]
    """Raises `DreamSRError` where the figure is not defined."""


def require_weights(folder: Path | None, name: str, files: str) -> Path:
    """`folder`, or where fetched weights of metrics lie; `WeightsError` that says what to give."""
    if folder is None:
        folder = weights_folder(FETCHED)
        if not folder.is_dir():
            raise WeightsError(f"{name} needs its weights ({files})", "give their folder: --perceptual-weights DIR")
    if not folder.is_dir():
        raise WeightsError(f"--perceptual-weights {folder} is not a folder", "check the path")
    return folder
