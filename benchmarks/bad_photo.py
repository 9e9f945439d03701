"""A good photo and its degraded copy, for benchmarks that compare with the good one.

Axes: C channels, P Q pixel rows and columns.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def degraded(path: Path, multiple: int, preset: str, seed: int, scale: int = 4) -> tuple[Tensor, Tensor]:
    """(good photo (3, P, Q), bad one (3, P/scale, Q/scale)), float32 in [0, 1]; P and Q are cropped to multiples of
    `multiple`, itself one of `scale`. `InputError` for a photo that can't be read or is smaller than that."""
    from dreamsr_cli.degradations import pixel
    from dreamsr_cli.errors import InputError
    from dreamsr_cli.images import open_photo

    with open_photo(path) as photo:
        rgb_PQC = photo.read_rows(0, photo.info.height)
    rows, columns = (n // multiple * multiple for n in rgb_PQC.shape[:2])
    if not rows or not columns:
        raise InputError(f"{path}: smaller than {multiple} pixels", "give a larger photo")
    good = torch.from_numpy(np.ascontiguousarray(rgb_PQC[:rows, :columns])).permute(2, 0, 1).float()
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return good, pixel.degrade(good, pixel.draw(preset, seed, sha256, 0, scale, False))
