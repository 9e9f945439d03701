"""Notices when a run goes wrong: a loss that isn't finite, or far above what it was."""

from __future__ import annotations

import math

MEMORY = 0.98
"""Share that a running mean keeps at each step: about the last fifty."""
SETTLED = 30
"""Steps before a mean can tell."""


class LossWatch:
    """Running means of the loss, one for each kind of step; plain data, so that a resume goes on with the same."""

    def __init__(self, factor: float) -> None:
        """`factor`: how many times its mean a loss may be; 0: any finite one."""
        self.factor = factor
        self.means: dict[str, tuple[float, int]] = {}

    def complaint(self, kind: str, loss: float, norm: float) -> str | None:
        """What is wrong with a step of this kind, None if nothing; a good one is taken into the mean."""
        if not math.isfinite(loss):
            return "the loss is not finite"
        if not math.isfinite(norm):
            return "the gradient is not finite"
        mean, count = self.means.get(kind, (0.0, 0))
        if self.factor and count >= SETTLED and abs(loss) > self.factor * max(abs(mean), 1e-8):
            return f"the loss exploded: {loss:.4g}, {abs(loss) / max(abs(mean), 1e-8):.0f} times what it was"
        # A plain mean at first, so that the start doesn't weigh forever.
        keep = min(MEMORY, count / (count + 1))
        self.means[kind] = (keep * mean + (1 - keep) * loss, count + 1)
        return None

    def state(self) -> dict[str, list[float]]:
        """For a checkpoint's state.json; Python writes and reads floats exactly."""
        return {kind: [mean, count] for kind, (mean, count) in self.means.items()}

    def restore(self, state: dict[str, list[float]]) -> None:
        """The inverse of `state`."""
        self.means = {kind: (mean, int(count)) for kind, (mean, count) in state.items()}
