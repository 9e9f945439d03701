"""An `UpscaleConfig` made whole: what nobody typed is taken from the bundle, and every value is checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dreamsr_cli.config import UpscaleConfig
from dreamsr_cli.errors import UsageError
from dreamsr_cli.models.bundle import Bundle
from dreamsr_cli.tiling import check_tiling

COLOR_FIXES = ("wavelet", "adain", "none")
CAPTIONERS = ("describe", "none")


@dataclass(frozen=True)
class Settings:
    """An `UpscaleConfig` with nothing left open: what the bundle decides is filled in."""

    scale: float | None
    long_side: int | None
    short_side: int | None
    tile: int
    overlap: int
    steps: int
    strength: float
    guidance: float | None
    seed: int
    prompt: str | None
    captioner: str
    color_fix: str
    removal: bool
    precision: str
    device: str
    tile_batch: int


def check_settings(config: UpscaleConfig, bundle: Bundle) -> Settings:
    """Fill in what the bundle decides and check every value. Raises `UsageError` naming the flag and what to type."""
    defaults, sampling = bundle.config.defaults, bundle.config.sampling

    def pick(value: Any, default: Any) -> Any:
        return default if value is None else value

    sized = config.long_side is not None or config.short_side is not None
    tile = pick(config.tile, defaults.tile)
    overlap = defaults.overlap if config.overlap is None else config.overlap
    if config.overlap is None and tile:
        overlap = min(overlap, tile // 2 // 16 * 16)
    settings = Settings(
        scale=config.scale if sized else pick(config.scale, float(bundle.config.scale)),
        long_side=config.long_side,
        short_side=config.short_side,
        tile=tile,
        overlap=overlap,
        steps=pick(config.steps, sampling.steps),
        strength=pick(config.strength, sampling.t_start),
        guidance=pick(config.guidance, sampling.guidance),
        seed=config.seed,
        prompt=config.prompt,
        captioner=pick(config.captioner, defaults.captioner),
        color_fix=pick(config.color_fix, defaults.color_fix),
        removal=config.removal,
        precision=config.precision,
        device=config.device,
        tile_batch=config.tile_batch,
    )
    check_tiling(settings.tile, settings.overlap)
    _check_range("--steps", settings.steps, 1, 100)
    _check_range("--strength", settings.strength, 0, 1)
    _check_range("--tile-batch", settings.tile_batch, 1, 64)
    _check_choice("--color-fix", settings.color_fix, COLOR_FIXES)
    _check_choice("--captioner", settings.captioner, CAPTIONERS)
    if config.guidance is not None and sampling.guidance is None:
        raise UsageError(f"--guidance: model {bundle.config.name} has no guidance input", "leave --guidance out")
    return settings


def _check_range(flag: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UsageError(f"{flag} {value} is not between {low} and {high}", f"use {flag} {min(max(value, low), high)}")


def _check_choice(flag: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{flag} {value} is not known", f"use {flag} {', '.join(known[:-1])} or {known[-1]}")
