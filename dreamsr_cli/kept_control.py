"""Control features that don't depend on the step, kept between steps: on the device, in RAM, or not at all."""

from __future__ import annotations

import torch

from dreamsr_cli.models.conditioned_dit import Injections

Place = tuple[int, int]
"""Number of the layout, index of the first tile."""


class KeptControl:
    """Features of batches of tiles, by the batch's place (layout, first tile): on the device until `device_bytes` are
    full, then in RAM until `host_bytes` are; what fits neither is computed again by the caller, with the same result.

    On a CPU both are RAM, and the second is not used.
    """

    def __init__(self, device: torch.device, device_bytes: int, host_bytes: int = 0) -> None:
        self.device = device
        self.device_bytes, self.host_bytes = device_bytes, 0 if device.type == "cpu" else host_bytes
        self._near: dict[Place, Injections] = {}
        self._far: dict[Place, Injections] = {}

    def find(self, place: Place) -> Injections | None:
        """The batch's features on the device; None where they aren't kept."""
        found = self._near.get(place)
        if found is None and place in self._far:
            # On the stream of the computation, so after the copy to RAM and before the networks.
            return self._far[place].to(self.device)
        return found

    def keep(self, place: Place, made: Injections) -> None:
        """Keep a batch's features where there is room; batches are of equal size."""
        if (len(self._near) + 1) * made.size <= self.device_bytes:
            self._near[place] = made
        elif (len(self._far) + 1) * made.size <= self.host_bytes:
            self._far[place] = made.in_ram()

    def forget(self) -> None:
        """Keep nothing of another photo."""
        self._near.clear()
        self._far.clear()

    @property
    def on_device(self) -> int:
        """Batches kept on the device."""
        return len(self._near)

    @property
    def in_ram(self) -> int:
        """Batches kept in RAM beside a device."""
        return len(self._far)

    def leave_device(self) -> bool:
        """Give the device's memory back, for good; False where nothing was kept there."""
        held = bool(self._near)
        self._near.clear()
        self.device_bytes = 0
        return held
