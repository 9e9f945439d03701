"""How much fine detail a good picture has, in words for its prompt: what its degraded copy no longer shows.

The describer says nothing of it, since at inference it only has the degraded photo. In training a share of the local
texts begins with these words (`data.detail_words`), so that people can ask for detail, or for calm, tile by tile. They
come first because the built-in text encoder reads bytes in groups: at the start the same words are always the same
tokens.

Axes: P Q pixel rows and columns, C = 3 channels.
"""

from __future__ import annotations

import numpy as np

BLOCK = 4
"""Side in pixels of the blocks whose inside is fine detail: what a photo of a quarter the size can't hold."""
LEVELS = (0.03, 0.05, 0.08)
"""Root mean square of fine detail in luma, on [0, 1]; about the 10th, 35th and 70th percentile of training crops."""
AMOUNTS = ("No", "Little", "Some", "Much")


def detail_words(rgb_PQC: np.ndarray) -> str:
    """One sentence, as "Much fine detail.", about a picture (P, Q, 3) in [0, 1]; rows and columns beyond whole blocks
    don't count. ValueError for a side below `BLOCK`."""
    rows, columns = (side // BLOCK for side in rgb_PQC.shape[:2])
    if not rows or not columns:
        raise ValueError(f"a picture of {rgb_PQC.shape[:2]} pixels has no block of {BLOCK}")
    luma = rgb_PQC[: rows * BLOCK, : columns * BLOCK] @ np.array([0.299, 0.587, 0.114], np.float32)
    blocks = luma.reshape(rows, BLOCK, columns, BLOCK)
    fine = float(np.sqrt(np.square(blocks - blocks.mean((1, 3), keepdims=True)).mean()))
    return f"{AMOUNTS[sum(fine >= level for level in LEVELS)]} fine detail."


def with_detail(sentence: str, rgb_PQC: np.ndarray) -> str:
    """A prompt that begins with the detail words of a picture (P, Q, 3) in [0, 1]; ValueError as `detail_words`."""
    return f"{detail_words(rgb_PQC)} {sentence}".rstrip()
