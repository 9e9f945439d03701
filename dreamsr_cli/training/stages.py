"""Stages are data: which parts train, and which terms of the loss a step has.

Stages `autoencoder` and `backbone` exist for bundles without a pretrained prior (decisions.md). The paper's own
stages come with a later version.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage of training."""

    name: str
    """What `--stage` takes."""
    trains: tuple[str, ...]
    """Parts whose weights change (names of `networks.MODULES`, and "lora")."""
    fit_transform: bool = False
    """Fit the patch transform in closed form before the first step."""
    reconstruct: bool = False
    """Each step restores clean crops through encode and decode (trains the refiner alone)."""
    restore: bool = False
    """Each step has a removal part (eq. 7) and a texture part (eq. 5, 6) on the same crops."""


STAGES = {
    stage.name: stage
    for stage in (
        Stage("autoencoder", ("refiner",), fit_transform=True, reconstruct=True),
        Stage(
            "backbone",
            ("transformer", "controlnet", "context_attention", "text_encoder", "refiner", "lora"),
            restore=True,
        ),
    )
}
