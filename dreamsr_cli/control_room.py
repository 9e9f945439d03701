"""Where control features that don't depend on the step may wait between steps: on the device, in RAM, or nowhere (they
are then computed again in every step). It changes how long a run takes, never its bytes."""

from __future__ import annotations

from dataclasses import replace

from dreamsr_cli.config import CONTROL_BYTES
from dreamsr_cli.memory_plan import RESERVED
from dreamsr_cli.workload import Workload

CPU_MOST = 1536 * 2**20
"""Most RAM that features take on a CPU: results of any size are to stay within a few GiB (docs/performance.md, C)."""
SHARE_OF_RAM = 8
"""On a CPU features take at most this part of the free RAM; beside a card twice as much."""
SHARE_OF_CARD = 0.8
"""Of what weights and activations leave free on a card."""


def with_control_room(work: Workload) -> Workload:
    """`work` with the room for control features that its machine's free memory allows, in whole batches and no more
    than all of them; unchanged where its limits name a room."""
    if work.limits.control_bytes is not None:
        return work
    each = work.feature_bytes
    near, far = _free(work)
    if not each:
        near = far = 0
    else:
        batches = min(work.feature_batches, near // each)
        near, far = batches * each, min(work.feature_batches - batches, far // each) * each
    return replace(work, limits=replace(work.limits, control_bytes=near, control_host=far))


def _free(work: Workload) -> tuple[int, int]:
    """(bytes on the device, bytes in RAM beside it) that features may take."""
    machine = work.machine
    if work.settings.memory is not None:  # which counted on so much
        return CONTROL_BYTES, 0
    if machine.device == "cpu":
        return (CONTROL_BYTES if machine.memory is None else min(CPU_MOST, machine.memory // SHARE_OF_RAM)), 0
    beside = 0 if machine.memory is None else machine.memory * 2 // SHARE_OF_RAM
    if machine.device_memory is None:
        return CONTROL_BYTES, 0
    taken = work.phases()["restore"].device + RESERVED
    return max(0, int((machine.device_memory - taken) * SHARE_OF_CARD)), beside
