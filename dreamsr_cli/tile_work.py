"""What the sampler works on: a photo's embedded texts, canvases that tiles are cut from, passes over all tiles, and
batches of tiles on their way to another process. Axes: C channels, H W latent rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from dreamsr_cli.models.text_encoder import TextEmbedding
from dreamsr_cli.text_buckets import bucket_of


@dataclass(frozen=True)
class Texts:
    """Embedded prompts of one photo."""

    glob: TextEmbedding
    """Global prompt, batch 1."""
    local: Sequence[TextEmbedding]
    """Local prompt of each tile in the grid's order, batch 1 each."""
    local_to_both: bool = False
    """The transformer gets each tile's local prompt too, instead of the global one (ablation)."""
    most_tokens: int = 0
    """Tokens of the longest prompt that the bundle takes; 0 where the texts of a photo are never edited."""
    buckets: tuple[int, ...] = ()
    """Lengths that local prompts may be padded to; none: `most_tokens`."""

    @cached_property
    def length(self) -> int:
        """Tokens that every local prompt is padded to: with several tiles the bucket of the longest, so that another
        text in one tile doesn't round the numbers of the others differently unless it is in another bucket."""
        longest = max(e.tokens_BTD.shape[1] for e in self.local)
        return longest if len(self.local) == 1 else max(longest, bucket_of(longest, self.most_tokens, self.buckets))


class Crops(Protocol):
    """A canvas that tiles are cut from: a file, or what process 0 sent of it."""

    def crop(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """A rectangle in latent pixels, float32 (C, height, width)."""
        ...


@dataclass(frozen=True)
class Pass:
    """One pass of the networks over all tiles."""

    step: int
    """`sampler.REMOVE`, or the number of a texture step."""
    t: float
    """Time of the pass, 0 to 1; of the removal step t_r."""
    guidance: float | None
    """What the guidance input is told; None for a transformer without one."""


@dataclass(frozen=True)
class TileBatch:
    """A batch of tiles on its way to another process."""

    work: Pass
    tiles: tuple[int, ...]
    """Indices, padded to a full batch."""
    crops: tuple[dict[int, np.ndarray], ...]
    """(C, H, W) of each tile by index, of each canvas that the pass reads."""
