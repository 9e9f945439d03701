"""Every random number: a function of (seed, purpose, index), never of global state.

A counter-based generator (Philox, Salmon et al. 2011, as numpy ships it) is keyed by the hash of the seed, the
purpose and the indices. So neither order, nor workers, nor ranks, nor a resume can change a draw, and no generator
state needs saving.
"""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, purpose: str, *index: int | str) -> np.random.Generator:
    """A fresh generator for one draw site.

    `purpose` names the site ("canvas-noise", "crop", "degradation"); `index` tells the draws of one site apart
    (latent row, step and sample, sha256 of a source and crop index). Equal arguments give equal streams on every
    machine.
    """
    text = "\x1f".join([str(int(seed)), purpose, *(str(i) for i in index)])
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))


def normal_rows(
    seed: int, purpose: str, first_row: int, rows: int, width: int, channels: int, *index: int | str
) -> np.ndarray:
    """Standard normal float32 of shape (rows, width, channels); row r depends on (seed, purpose, index, r) and width
    only.

    The canvas noise of eq. 3 is drawn so: any band of latent rows can be drawn again without the rows above it.
    """
    out = np.empty((rows, width, channels), np.float32)
    for row in range(rows):
        generator(seed, purpose, *index, first_row + row).standard_normal(dtype=np.float32, out=out[row])
    return out
