"""What a job does when the device's memory is too small: a smaller batch, then control features computed again
instead of kept, then offload. Never another tile: that would be another picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dreamsr_cli.errors import DeviceError
from dreamsr_cli.models.restorer import Restorer
from dreamsr_cli.progress import Progress


@dataclass(frozen=True)
class WorkPlan:
    """How the work is laid out; kept in the journal, so that a resumed job goes on the same way."""

    tile_batch: int
    """Tiles per network call."""
    control_bytes: int
    """Control features kept on the device between steps, at most."""
    offload: str = "none"
    """What waits in RAM (`Restorer.place`)."""
    control_host: int = 0
    """Control features kept in RAM beside a device, at most, in bytes."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for the journal."""
        return dataclasses.asdict(self)


def next_plan(plan: WorkPlan, device: torch.device, movable: bool = True) -> tuple[WorkPlan, str] | None:
    """The next smaller plan and the one line that says so; None where nothing smaller is left.

    `movable`: the weights can be moved block by block (NF4's can't).
    """
    if plan.tile_batch > 1:
        half = plan.tile_batch // 2
        return dataclasses.replace(
            plan, tile_batch=half
        ), f"--tile-batch {plan.tile_batch} doesn't fit: going on with {half}"
    if plan.control_bytes:
        instead = "wait in RAM" if plan.control_host else "are computed again instead of kept"
        return dataclasses.replace(plan, control_bytes=0), f"control features {instead}"
    if plan.offload != "block" and movable and device.type != "cpu":
        return dataclasses.replace(plan, offload="block"), "weights wait in RAM and go to the device block by block"
    return None


def place_weights(restorer: Restorer, plan: WorkPlan, allowed: bool, progress: Progress) -> WorkPlan:
    """Bring the networks to their device as `plan` says; where they don't fit and it is `allowed`, block by block."""
    try:
        restorer.place(plan.offload)
        return plan
    except torch.OutOfMemoryError:
        if not allowed or plan.offload == "block":
            raise
    progress.note(f"the weights don't fit on {restorer.device}: they wait in RAM and go there block by block")
    restorer.place("block")
    return dataclasses.replace(plan, offload="block")


def settle(
    plan: WorkPlan,
    attempt: Callable[[WorkPlan], None],
    device: torch.device,
    tile: int,
    allowed: bool,
    progress: Progress,
    movable: bool = True,
) -> WorkPlan:
    """The first plan under which `attempt` (one full batch) fits the device's memory.

    Raises `DeviceError` with the `--tile` to type where none does, or at once where backing off isn't `allowed`.
    """
    while True:
        try:
            attempt(plan)
            return plan
        except (torch.OutOfMemoryError, MemoryError) as error:
            smaller = next_plan(plan, device, movable) if allowed else None
            if smaller is None:
                hint = "leave out --no-backoff" if not allowed else f"use --tile {smaller_tile(tile)}"
                raise DeviceError(f"out of memory on {device} with tiles of {tile} px", hint) from error
            plan, line = smaller
            progress.note(f"out of memory on {device}: {line}")
        if device.type == "cuda":
            torch.cuda.empty_cache()


def smaller_tile(tile: int) -> int:
    """The tile to propose: half, a multiple of 16, at least 128."""
    return max(128, tile // 2 // 16 * 16)
