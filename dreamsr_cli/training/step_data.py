"""What a training step is given and what it came to.

Axes: B batch, P Q pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dreamsr_cli.config import Looks

Critic = Callable[[Tensor], Tensor]
"""Pictures (B, 3, P, Q) -> the discriminator's logits, gradients to the pictures only."""


@dataclass(frozen=True)
class Crops:
    """What a step is given, on the device of the networks."""

    step: int
    hq: Tensor
    """Good crops (B, 3, P, Q) in [0, 1]."""
    lq_up: Tensor
    """Bad crops enlarged to the same size, in [0, 1]."""
    local_texts: list[str]
    global_texts: list[str]
    erased: Tensor | None = None
    """Good crops without their texture, in [0, 1]; None where the data have none."""
    first: int = 0
    """Index of the first crop in the global batch: what draws depend on, with the step."""
    lq: Tensor | None = None
    """Bad crops as they are, in [0, 1]; for "judge" and "enlarge" steps."""
    looks: tuple[Looks | None, ...] = ()
    """For each crop what its bad version looks like; None: nobody knows."""


class Outcome(NamedTuple):
    """What a step came to."""

    loss: Tensor
    terms: dict[str, Tensor]
    """Terms before weighting, detached; a step of one kind always has the same ones."""
    fake: Tensor | None = None
    """What the step made, on [-1, 1], detached: for the discriminator."""
    real: Tensor | None = None
