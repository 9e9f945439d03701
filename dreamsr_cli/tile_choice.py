"""`--tile auto`: the tile side with the fewest operations that fits the memory.

The choice depends on the photo's size, the settings and what memory the device has in all (or `--memory`), not on what
is free at the moment: the same command chooses the same tile again. An unfinished run keeps its own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamsr_cli.bundle_sizes import BundleSizes
from dreamsr_cli.config import TOKEN_SIDE, OutputConfig, parse_memory
from dreamsr_cli.errors import UsageError
from dreamsr_cli.images import PhotoInfo
from dreamsr_cli.journal import fingerprint_of, journal_folder
from dreamsr_cli.machine import Machine
from dreamsr_cli.memory_plan import RESERVED
from dreamsr_cli.planning import target_size
from dreamsr_cli.settings import Settings
from dreamsr_cli.tiling import make_grid
from dreamsr_cli.workload import Limits, Workload

USABLE = 0.9
"""Share of the memory that a device has in all which a run may plan with."""


@dataclass(frozen=True)
class TileOption:
    """One side that was weighed."""

    tile: int
    """Output pixels."""
    tiles: int
    """Of the removal step; a shifted grid has fewer in texture steps."""
    calls: int
    """Calls of the transformer."""
    flops: int
    """Of the whole run."""
    memory: int
    """Bytes at the peak: of the card, on a CPU of RAM."""
    fits: bool


@dataclass(frozen=True)
class TileChoice:
    """What was chosen for one photo, and from what."""

    tile: int
    budget: int | None
    """Bytes that were planned with; None where the system doesn't say what it has."""
    options: tuple[TileOption, ...]
    """By operations, the fewest first; empty where an unfinished run had chosen before."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"chosen": self.tile, "budget": self.budget, "options": [dataclasses.asdict(o) for o in self.options]}


def settle_tile(
    settings: Settings,
    memory: str | None,
    photo_path: Path,
    info: PhotoInfo,
    out_path: Path,
    output: OutputConfig,
    sizes: BundleSizes,
    machine: Machine,
    limits: Limits,
) -> tuple[Settings, TileChoice | None]:
    """The settings with a definite tile; the choice is None where `--tile auto` wasn't asked for.

    `memory` is what `--memory` said. Raises `UsageError` where no tile goes with the overlap, `InputError` for a size
    that doesn't suit the photo.
    """
    if settings.tile_auto is None:
        return settings, None
    choice = None
    if output.resume and not output.restart:
        before = fingerprint_of(journal_folder(out_path)).get("tile")
        if isinstance(before, int) and before >= 2 * settings.overlap:
            choice = TileChoice(before, None, ())
    if choice is None:
        width, height = target_size(photo_path, info, settings)
        budget = parse_memory(memory) if memory else None
        if budget is None and machine.total_memory is not None:
            budget = int(machine.total_memory * USABLE)
        choice = choose_tile(settings, settings.tile_auto, width, height, info, sizes, machine, limits, budget)
    return dataclasses.replace(settings, tile=choice.tile), choice


def choose_tile(
    settings: Settings,
    sides: tuple[int, int],
    width: int,
    height: int,
    info: PhotoInfo,
    sizes: BundleSizes,
    machine: Machine,
    limits: Limits,
    budget: int | None,
) -> TileChoice:
    """Weigh every multiple of 16 from `sides[0]` to `sides[1]` for a result of that size. Of equals the larger wins;
    where none fits `budget` bytes, the one that needs least."""
    options = []
    for tile in range(sides[0], sides[1] + 1, TOKEN_SIDE):
        if tile < 2 * settings.overlap:
            continue
        work = Workload(make_grid(height, width, tile, settings.overlap), settings, sizes, machine, limits)
        memory, calls = work.memory(info, width), work.calls()
        need = memory["host"] if machine.device == "cpu" else memory["device"] + RESERVED
        tiles, flops = len(work.grid.tiles), sum(work.flops().values())
        fits = budget is None or need <= budget
        options.append(TileOption(tile, tiles, calls["remove"] + calls["texture"], flops, need, fits))
    if not options:
        what = f"--overlap {settings.overlap} is more than half of every tile that --tile auto may choose"
        raise UsageError(
            f"{what} ({sides[0]} to {sides[1]})", f"use --overlap {sides[1] // 2 // TOKEN_SIDE * TOKEN_SIDE} or less"
        )
    options.sort(key=lambda option: (option.flops, -option.tile))
    fitting = [option for option in options if option.fits]
    chosen = fitting[0] if fitting else min(options, key=lambda option: (option.memory, option.flops))
    return TileChoice(chosen.tile, budget, tuple(options))
