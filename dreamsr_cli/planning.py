"""What an upscale will take, before anything is loaded: size, tiles, network calls, operations, memory, disk, time.

Counts come from the bundle's config files (`bundle_sizes`), so no weight is opened and no torch is imported here.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dreamsr_cli.bundle_sizes import BundleSizes
from dreamsr_cli.config import MAX_INPUT_PIXELS, MAX_OUTPUT_PIXELS, OutputConfig
from dreamsr_cli.control_room import with_control_room
from dreamsr_cli.counting_pixels import STRIDE
from dreamsr_cli.errors import InputError, UsageError
from dreamsr_cli.images import PhotoInfo
from dreamsr_cli.machine import Estimate, Machine, estimate, remember_efficiency
from dreamsr_cli.memory_plan import Phase
from dreamsr_cli.multidiffusion import slots_needed
from dreamsr_cli.photo_writer import SIDE_LIMITS, resolve_bit_depth, resolve_format
from dreamsr_cli.planned_settings import Settings
from dreamsr_cli.roofline import Floor, floor, peak
from dreamsr_cli.tiling import TileGrid, canvas_size, make_grid
from dreamsr_cli.workload import Limits, Workload, bands, is_spilled, photo_bytes

RESULT_SHARE = {"png": 0.9, "tiff": 0.9, "jpg": 0.3, "webp": 0.2, "avif": 0.2}
"""A result's size over that of its raw pixels, generously."""


@dataclass(frozen=True)
class Plan:
    """One photo's upscale, planned. Bytes, pixels and operations are whole numbers; a part of memory counts where it
    is needed, so parts don't add up to the peak."""

    photo_path: Path
    info: PhotoInfo
    """The photo's, by its header."""
    out_path: Path
    format: str
    """Of the result: "png", "jpg", "webp", "tiff" or "avif"."""
    bit_depth: int
    """Of the result."""
    width: int
    """Of the result."""
    height: int
    """Of the result."""
    grid: TileGrid
    tile_batch: int
    batches: int
    steps: int
    """Texture steps that are run: 0 with --strength 0."""
    calls: dict[str, int]
    """Network calls by phase: batches of tiles, prompts ("text", at most) or strips ("encode", "decode")."""
    flops: dict[str, int]
    """Operations by phase."""
    moved: dict[str, int]
    """Bytes by phase that networks read and write."""
    tile_step: dict[str, int]
    """Operations ("flops") and "bytes" of one tile in one texture step, its ControlNet included."""
    texture_tiles: int
    """Tiles of a texture step."""
    floor: Floor | None
    """The least time that the device needs; None where its speed isn't known."""
    memory: dict[str, int]
    """Estimated bytes: "host" (peak of RAM), "device" (peak on the card, 0 on a CPU), and what they consist of."""
    phases: dict[str, Phase]
    """What "text", "restore" and "decode" need on the device, one after the other."""
    tiling: str
    control: dict[str, int]
    """Control features: bytes that may be kept on the "device" and in RAM beside it ("host"), "batches" of tiles
    that have features of their own, and how many of them are "kept"."""
    quantize: str
    offload: str
    disk: dict[str, int]
    """Bytes at the output while it is in work, and "total"."""
    free_disk: int
    """Bytes free at the output."""
    machine: Machine
    model: str
    time: Estimate | None
    """None where the speed was not measured."""
    stops_because: tuple[str, ...]
    """Why a run with these settings would refuse; empty if nothing speaks against it."""

    @property
    def total_flops(self) -> int:
        """All operations of the run."""
        return sum(self.flops.values())

    @property
    def fits_memory(self) -> bool | None:
        """Whether both peaks are below what is free now; None where that isn't known."""
        if self.machine.memory is None:
            return None
        card = self.machine.device_memory
        return self.memory["host"] <= self.machine.memory and (card is None or self.memory["device"] <= card)

    @property
    def fits_disk(self) -> bool:
        """Whether journal and result find room."""
        return self.disk["total"] <= self.free_disk

    def to_json(self) -> dict[str, Any]:
        """One plain JSON object: pixels, bytes, operations and seconds."""
        grid = self.grid
        return {
            "plan": 1,
            "input": str(self.photo_path),
            "output": str(self.out_path),
            "source_width": self.info.width,
            "source_height": self.info.height,
            "width": self.width,
            "height": self.height,
            "format": self.format,
            "bit_depth": self.bit_depth,
            "canvas": [grid.canvas_width, grid.canvas_height],
            "tile": [grid.tile_width, grid.tile_height],
            "overlap": grid.overlap,
            "rows": grid.rows,
            "columns": grid.columns,
            "tiles": len(grid.tiles),
            "tile_batch": self.tile_batch,
            "batches": self.batches,
            "steps": self.steps,
            "calls": self.calls,
            "flops": {**self.flops, "total": self.total_flops},
            "bytes": {**self.moved, "total": sum(self.moved.values())},
            "tile_step": self.tile_step,
            "tiling": self.tiling,
            "texture_tiles": self.texture_tiles,
            "floor": None if self.floor is None else self.floor.to_json(),
            "memory": self.memory,
            "phases": {name: phase.to_json() for name, phase in self.phases.items()},
            "control": self.control,
            "quantize": self.quantize,
            "offload": self.offload,
            "fits_memory": self.fits_memory,
            "disk": self.disk,
            "free_disk": self.free_disk,
            "fits_disk": self.fits_disk,
            "machine": asdict(self.machine),
            "model": self.model,
            "seconds": None if self.time is None else [round(self.time.low, 1), round(self.time.high, 1)],
            "efficiency": None if self.time is None else round(self.time.efficiency, 4),
            "earlier_runs": 0 if self.time is None else self.time.runs,
            "stops_because": list(self.stops_because),
        }


def plan(
    photo_path: Path,
    info: PhotoInfo,
    out_path: Path,
    settings: Settings,
    output: OutputConfig,
    sizes: BundleSizes,
    machine: Machine,
    limits: Limits,
) -> Plan:
    """Plan one photo, of which `images.read_info` has read the header.

    `InputError` if the asked-for size doesn't suit this photo, `UsageError` for settings that suit none. What would
    stop a run (`--max-pixels`, the format's largest side, the disk) is told in `stops_because`, not raised.
    """
    width, height = target_size(photo_path, info, settings)
    grid = make_grid(height, width, settings.tile, settings.overlap)
    format = resolve_format(output.format, out_path, info)
    bit_depth = resolve_bit_depth(output.bit_depth, format, info)
    work = with_control_room(Workload(grid, settings, sizes, machine, limits))
    flops, moved, most = work.flops(), work.moved(), peak(machine)
    disk = disk_needed(info, format, bit_depth, width, height, grid, work.batch, sizes.autoencoder.channels)
    free = shutil.disk_usage(_existing(out_path)).free
    stops = _limits_passed(info, format, width, height, output.max_pixels)
    if disk["total"] > free:
        stops.append(f"the disk has {free:,} bytes free, journal and result take {disk['total']:,}")
    return Plan(
        photo_path=photo_path,
        info=info,
        out_path=out_path,
        format=format,
        bit_depth=bit_depth,
        width=width,
        height=height,
        grid=grid,
        tile_batch=work.batch,
        batches=work.batches,
        steps=work.steps,
        calls=work.calls(),
        flops=flops,
        moved=moved,
        tile_step=work.tile_step(),
        texture_tiles=len(work.layouts[0].grid.tiles),
        floor=None if most is None else floor(flops, moved, most),
        memory=work.memory(info, width),
        phases=work.phases(),
        tiling=settings.tiling,
        control={
            "device": work.limits.control_bytes or 0,
            "host": work.limits.control_host,
            "kept": work.kept_features[0],
            "batches": work.feature_batches,
        },
        quantize=settings.quantize,
        offload=settings.offload,
        disk=disk,
        free_disk=free,
        machine=machine,
        model=sizes.name,
        time=estimate(sum(flops.values()), machine, sizes.name),
        stops_because=tuple(stops),
    )


def record_efficiency(done: Plan, seconds: float) -> None:
    """Remember how fast a whole run (not a resumed one) of this plan was; later plans on this device rest on it."""
    remember_efficiency(done.total_flops, seconds, done.machine, done.model)


def target_size(photo_path: Path, info: PhotoInfo, settings: Settings) -> tuple[int, int]:
    """(width, height) of the result. A side that doesn't suit this photo is this photo's `InputError`."""
    try:
        return canvas_size(info.width, info.height, settings.scale, settings.long_side, settings.short_side)
    except UsageError as error:
        if settings.scale is not None:
            raise
        raise InputError(f"{photo_path}: {error.message}", error.hint) from error


def disk_needed(
    info: PhotoInfo, format: str, bit_depth: int, width: int, height: int, grid: TileGrid, batch: int, channels: int
) -> dict[str, int]:
    """Bytes at the output while the result is in work, at most: three canvases of the journal (z_dr, the present and
    the next z_t), slots, raw pixels, the encoded result, a huge photo's decoded pixels; and their "total"."""
    canvas = 4 * channels * (grid.canvas_height // STRIDE) * (grid.canvas_width // STRIDE)
    tile = 4 * channels * (grid.tile_height // STRIDE) * (grid.tile_width // STRIDE)
    raw = width * height * bands(info) * (bit_depth // 8)
    parts = {
        "canvases": 3 * canvas,
        "slots": slots_needed(grid, batch) * tile,
        "pixels": raw,
        "result": int(raw * RESULT_SHARE[format]),
        "photo": photo_bytes(info) if is_spilled(info) else 0,
    }
    return {**parts, "total": sum(parts.values())}


def _limits_passed(info: PhotoInfo, format: str, width: int, height: int, max_pixels: int | None) -> list[str]:
    stops: list[str] = []
    checks = (("photo", info.width, info.height, MAX_INPUT_PIXELS), ("result", width, height, MAX_OUTPUT_PIXELS))
    for what, across, down, default in checks:
        most = default if max_pixels is None else max_pixels
        if across * down > most:
            stops.append(f"--max-pixels is {most:,}, the {what} has {across * down:,}")
    side = SIDE_LIMITS.get(format)
    if side is not None and max(width, height) > side:
        stops.append(f"{width} x {height} is more than {format.upper()} can hold ({side:,} per side)")
    return stops


def _existing(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    return next((folder for folder in path.absolute().parents if folder.is_dir()), Path("/"))
