"""How much fine detail a good picture has: what a photo of a quarter the size can't show."""

from __future__ import annotations

import numpy as np
import pytest

from dreamsr_cli.models.detail_words import AMOUNTS, BLOCK, LEVELS, detail_words


def grain(strength: float) -> np.ndarray:
    """Noise whose blocks all have mean 0.5 and this root mean square."""
    rows = np.indices((64, 48)).sum(0) % 2 * 2 - 1
    return np.repeat((0.5 + strength * rows)[..., None], 3, 2).astype(np.float32)


def test_words_follow_the_strength_of_detail() -> None:
    strengths = [LEVELS[0] / 2, *((a + b) / 2 for a, b in zip(LEVELS, LEVELS[1:], strict=False)), 2 * LEVELS[-1]]
    assert [detail_words(grain(s)).split()[0] for s in strengths] == list(AMOUNTS)
    assert detail_words(grain(0.2)) == "Much fine detail."


def test_coarse_structure_is_no_fine_detail() -> None:
    blocks = np.kron(np.random.default_rng(0).random((16, 12)), np.ones((BLOCK, BLOCK)))
    rgb_PQC = np.repeat(blocks[..., None], 3, 2).astype(np.float32)
    assert detail_words(rgb_PQC) == detail_words(rgb_PQC[:-1, :-1]) == "No fine detail."
    with pytest.raises(ValueError):
        detail_words(rgb_PQC[:3])
