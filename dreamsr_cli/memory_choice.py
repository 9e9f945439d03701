"""`--quantize`, `--offload` and `--memory` made definite for one bundle and one machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dreamsr_cli.bundle_sizes import BundleSizes, read_sizes
from dreamsr_cli.canvas import STRIP
from dreamsr_cli.config import CONTROL_BYTES, TILE_BATCH, UpscaleConfig, parse_memory
from dreamsr_cli.device import choose_device, choose_dtype
from dreamsr_cli.errors import DeviceError, UsageError
from dreamsr_cli.machine import free_memory
from dreamsr_cli.memory_plan import Choice, Given, choose, need, runnable, typical_work
from dreamsr_cli.models.bundle import Bundle
from dreamsr_cli.models.quantization import PLAIN, MemoryMode, check_mode, installed


@dataclass(frozen=True)
class Decision:
    """The memory mode of a run."""

    mode: MemoryMode
    tile_batch: int
    """Tiles per network call, at most."""
    sentence: str | None
    """What `--memory` chose, for people; None where it wasn't given."""


def decide_memory(config: UpscaleConfig, bundle: Bundle, tile: int) -> Decision:
    """The memory mode that `config` asks for, what was typed winning over `config.memory`, checked.

    Raises `UsageError` for a mode that can't run on the device, `DeviceError` where its backend is missing or nothing
    fits.
    """
    mode = MemoryMode(config.quantize or "none", config.offload or "none")
    decision = Decision(mode, config.tile_batch or TILE_BATCH, None)
    if config.memory is not None:
        decision = _within(config.memory, config, bundle, tile)
    if decision.mode != PLAIN:
        check_mode(decision.mode, choose_device(config.device))
    return decision


def _within(amount: str, config: UpscaleConfig, bundle: Bundle, tile: int) -> Decision:
    budget = parse_memory(amount)
    if budget is None:
        raise UsageError(f"--memory {amount!r} is not an amount of memory", "use a number with GB, such as 24GB")
    if not tile:
        raise UsageError("--memory needs a tile: with --tile 0 it grows with the photo", "leave out one of the two")
    device = choose_device(config.device)
    sizes = read_sizes(bundle.config, bundle.part_folder)
    itemsize = choose_dtype(config.precision, device).itemsize
    work = typical_work(sizes, tile, STRIP, CONTROL_BYTES)
    given = Given(config.quantize, config.offload, config.tile_batch)
    host = None if device.type == "cpu" else free_memory()
    found = choose(budget, sizes, itemsize, work, device.type, given, _ready, host)
    if found is None:
        raise _too_small(amount, sizes, itemsize, tile, device.type, given)
    sentence = f"--memory {amount}: {found.flags()}, about {found.device / 1e9:.1f} GB at the peak"
    return Decision(found.mode, found.tile_batch, sentence)


def _ready(mode: MemoryMode) -> bool:
    return installed(mode.quantize)


def _too_small(amount: str, sizes: BundleSizes, itemsize: int, tile: int, kind: str, given: Given) -> DeviceError:
    work = typical_work(sizes, tile, STRIP, CONTROL_BYTES)(given.tile_batch or 1)
    needs = [need(sizes, mode, itemsize, work)[0] for mode in runnable(given, kind, _ready)]
    hint = f"give at least --memory {math.ceil(min(needs) / 1e9)}GB" if needs else "leave out --quantize or --offload"
    missing = [backend for backend in ("int8", "nf4") if not installed(backend)]
    if missing:
        hint += ", or pip install 'dreamsr[quantize]' for smaller weights"
    return DeviceError(f"--memory {amount}: model {sizes.name} doesn't fit on {kind}", hint)


def fitting(sizes: BundleSizes, itemsize: int, tile: int, gigabytes: int) -> Choice | None:
    """What would fit on a CUDA card of that many GB, with every backend installed."""
    work = typical_work(sizes, tile, STRIP, CONTROL_BYTES)
    return choose(gigabytes * 10**9, sizes, itemsize, work, "cuda")
