"""Which networks stay open from photo to photo, by the memory plan; and whether the next photo fits beside this one.

A decision about time only: it changes no byte of any result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dreamsr_cli.bundle_sizes import BundleSizes
from dreamsr_cli.config import CONTROL_BYTES, parse_memory
from dreamsr_cli.images import PhotoInfo
from dreamsr_cli.machine import Machine
from dreamsr_cli.memory_plan import RESERVED, Phase, phases, typical_work
from dreamsr_cli.models.quantization import MemoryMode
from dreamsr_cli.planning import Plan
from dreamsr_cli.workload import LIBRARIES, Limits, is_spilled, photo_bytes

MARGIN, CARD_MARGIN = 0.2, 0.1
"""Shares of the free RAM and of a card's free memory that are left alone."""
WHOLE_PHOTO_TILE = 2048
"""Tile that `--tile 0` is taken for before any photo is known."""
_PART_OF = {"text": "text_encoder", "restore": "restorer", "decode": "autoencoder"}
_FOLDER = (("text", "restore", "decode"), ("restore", "decode"), ("decode",))
_ONE_PHOTO = (("decode",),)
"""What one photo needs twice: encoding and decoding."""
_HOLDING_FORMATS = ("webp", "avif")
"""Their encoders hold the whole result."""
LARGEST_HELD = 32 * 2**20
"""Pixels of a result that such an encoder may hold while the next photo is computed."""


@dataclass(frozen=True)
class Residency:
    """What stays open."""

    keep: frozenset[str]
    """Names of parts (`open_parts`)."""
    sentence: str | None
    """Why a folder's networks can't all stay open; None where they do, and for one photo."""


def decide_residency(
    sizes: BundleSizes,
    mode: MemoryMode,
    machine: Machine,
    tile: int,
    tile_batch: int,
    limits: Limits,
    photos: int,
    memory: str | None = None,
) -> Residency:
    """The most networks that fit the machine's free memory (or `memory`, as `--memory` says it: the card's, on a CPU
    RAM) side by side, with a margin, beside the largest phase's work."""
    work = typical_work(sizes, tile or WHOLE_PHOTO_TILE, limits.strip_rows, limits.control_bytes or CONTROL_BYTES)(
        tile_batch
    )
    found = phases(sizes, mode, machine.itemsize, work)
    given = None if memory is None else parse_memory(memory)
    on_cpu = machine.device == "cpu"
    host = _least(machine.memory, given if on_cpu else None)
    card = _least(machine.device_memory, None if on_cpu else given)
    for kept in _ONE_PHOTO if photos == 1 else _FOLDER:
        if fits(found, kept, mode, None if on_cpu else card, host, on_cpu):
            sentence = None if len(kept) == len(_PART_OF) or photos == 1 else _told(kept)
            return Residency(frozenset(_PART_OF[phase] for phase in kept), sentence)
    return Residency(frozenset(), None if photos == 1 else _told(()))


def fits(
    found: Mapping[str, Phase],
    kept: tuple[str, ...],
    mode: MemoryMode,
    card: int | None,
    host: int | None,
    on_cpu: bool,
) -> bool:
    """Whether the networks of the phases `kept` may stay open through all phases. `card` and `host`: free bytes, None
    where the system doesn't say (a card's memory may be the host's, as on MPS)."""
    if host is None:
        return False

    # A text encoder that isn't kept finds everything else closed.
    side_by_side = [name for name in found if name != "text" or name in kept]

    def peak(weights: Mapping[str, int]) -> int:
        always = sum(weights[name] for name in kept)
        return max(always + found[name].working + (0 if name in kept else weights[name]) for name in side_by_side)

    everywhere = {name: phase.weights for name, phase in found.items()}
    if on_cpu or card is None:
        return LIBRARIES + peak(everywhere) <= (1 - MARGIN) * host
    waiting = sum(everywhere[name] for name in kept) if mode.offload != "none" else 0
    resident = {name: phase.resident for name, phase in found.items()}
    return RESERVED + peak(resident) <= (1 - CARD_MARGIN) * card and LIBRARIES + waiting <= (1 - MARGIN) * host


def _least(free: int | None, given: int | None) -> int | None:
    return given if free is None else free if given is None else min(free, given)


def _told(kept: tuple[str, ...]) -> str:
    first = "the networks don't all fit the memory side by side: the texts of many photos are embedded first"
    then = {
        ("restore", "decode"): "then the other networks stay open",
        ("decode",): "then the restoring networks are loaded for each photo",
        (): "then the other networks are loaded for each photo in turn",
    }
    return f"{first}, {then[kept]}"


def fits_beside(present: Plan, coming: Plan, coming_info: PhotoInfo, free_before: int | None) -> bool:
    """Whether the next photo may be decoded while the present one is computed: memory and disk have room for both.

    `free_before`: bytes of RAM that were free before the first photo. Huge photos (which wait on disk once they are
    decoded) are never read ahead.
    """
    if is_spilled(coming_info) or is_spilled(present.info) or free_before is None:
        return False
    # While it is decoded and turned upright a photo may be there twice.
    memory = present.memory["host"] + 2 * photo_bytes(coming_info)
    disk = present.disk["total"] + coming.disk["total"]
    return memory <= (1 - MARGIN) * free_before and disk <= coming.free_disk


def may_write_behind(plan: Plan) -> bool:
    """Whether the result may be encoded beside the next photo: its encoder goes row by row, or holds little."""
    holds = plan.format in _HOLDING_FORMATS or plan.info.palette
    return not holds or plan.width * plan.height <= LARGEST_HELD
