"""Small photos and pairs for training tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dreamsr_cli import draws


def save_photos(folder: Path, number: int = 5, rows: int = 56, cols: int = 64) -> Path:
    """Photos of waves and noise."""
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[0:rows, 0:cols]
    for i in range(number):
        rng = draws.generator(i, "test photo")
        waves = np.stack([np.sin(x * rng.uniform(0.05, 0.4) + y * rng.uniform(0.05, 0.4)) for _ in range(3)], 2)
        rgb = 128 + 90 * waves + rng.normal(0, 8, waves.shape)
        Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return folder
