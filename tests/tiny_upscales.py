"""Upscaling a small photo with a tiny bundle: what the tests of clean, damaged and blended photos share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from skimage import data

from dreamsr_cli.config import OutputConfig, UpscaleConfig
from dreamsr_cli.engine import UpscaleResult, upscale
from dreamsr_cli.models.bundle import Bundle
from dreamsr_cli.progress import SilentProgress


def save_photo_of_strips(path: Path) -> Path:
    """A photo of 140 rows, so of more than one strip, and 32 columns."""
    Image.fromarray(data.coffee()[100:240, 200:232]).save(path)
    return path


def run_tiny(
    bundle: Bundle, source: Path, target: Path, progress: SilentProgress | None = None, **more: Any
) -> UpscaleResult:
    """`upscale` in small tiles and one step, float32, with the settings `more`."""
    base = UpscaleConfig(tile=64, overlap=16, steps=1, precision="fp32")
    return upscale(source, target, bundle, replace(base, **more), OutputConfig(), progress or SilentProgress())


def levels(path: Path) -> np.ndarray:
    """A result's levels, float32 (rows, columns, 3)."""
    return np.asarray(Image.open(path).convert("RGB"), np.float32)


class Stopping(SilentProgress):
    """Ctrl-C after `left` pieces of work in `phase`."""

    def __init__(self, phase: str, left: int) -> None:
        self._phase, self._left, self._now = phase, left, ""

    def phase(self, name: str, total: int) -> None:
        self._now = name

    def advance(self, count: int = 1) -> None:
        self._left -= count * (self._now == self._phase)
        if self._left < 0:
            raise KeyboardInterrupt
