"""The whole method as one function: figure 2 of the paper, from a photo on disk to a larger photo on disk."""

from __future__ import annotations

import dataclasses
import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dreamsr_cli import __version__
from dreamsr_cli.canvas import STRIP, DecodedCanvas, EnlargedPhoto, encode
from dreamsr_cli.colour import fix_strips
from dreamsr_cli.config import OutputConfig, UpscaleConfig, to_dict
from dreamsr_cli.device import choose_device, choose_dtype, dtype_name
from dreamsr_cli.errors import InputError, UsageError
from dreamsr_cli.images import Photo, open_photo
from dreamsr_cli.models.bundle import Bundle
from dreamsr_cli.photo_writer import PhotoWriter, resolve_format
from dreamsr_cli.progress import Progress
from dreamsr_cli.prompts import PromptPlan, make_plan
from dreamsr_cli.sampler import Sampler, Texts
from dreamsr_cli.tiling import canvas_size, check_tiling, make_grid

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


@dataclass(frozen=True)
class UpscaleResult:
    """What was made, and everything needed to make it again."""

    input: Path
    output: Path
    source_width: int
    source_height: int
    width: int
    height: int
    tiles: int
    settings: Settings
    model: str
    bundle_sha256: str
    global_prompt: str
    notes: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """One flat JSON object; sizes in pixels, `scale` the factor reached."""
        plain = to_dict(self)
        settings = plain.pop("settings")
        for name in ("long_side", "short_side", "prompt"):
            settings.pop(name)
        settings["scale"] = round(self.width / self.source_width, 4)
        plain["seconds"] = round(self.seconds, 3)
        return {**plain, **settings, "version": __version__}


def upscale(
    photo_path: Path,
    out_path: Path,
    bundle: Bundle,
    config: UpscaleConfig,
    output: OutputConfig,
    progress: Progress,
) -> UpscaleResult:
    """Restore `photo_path` at a larger size and write `out_path`, whole or not at all.

    The calls in order are the method. Raises `UsageError` for settings that make no sense with this bundle,
    `InputError`, `OutputError`, `WeightsError`, `DeviceError`.
    """
    began = time.monotonic()
    settings = check_settings(config, bundle)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.precision, device)

    photo = open_photo(photo_path)
    info = photo.info
    width, height = _target(photo, settings)
    grid = make_grid(height, width, settings.tile, settings.overlap)
    writer = PhotoWriter(out_path, info, width, height, resolve_format(output.format, out_path, info), output.quality)
    enlarged = EnlargedPhoto(photo, width, height)

    progress.phase("describe", 1)
    plan = make_plan(photo, grid, width, height, settings.captioner, settings.prompt)
    texts, mask_pads = _embed(plan, bundle, device, dtype, progress)

    autoencoder = bundle.open_autoencoder(device, dtype)
    z_lq = encode(enlarged, grid, autoencoder, device, progress)
    del autoencoder
    _release(device)

    sampling = bundle.config.sampling
    restorer = bundle.open_restorer(device, dtype, mask_pads)
    sampler = Sampler(restorer, grid, texts, sampling, bundle.config.control, settings.tile_batch, progress)
    z_dr = sampler.remove(z_lq) if settings.removal else z_lq
    z_0 = z_dr
    if settings.strength > 0:
        z_0 = sampler.texture(z_dr, settings.strength, settings.steps, settings.seed, settings.guidance)
    del restorer, sampler
    _release(device)

    autoencoder = bundle.open_autoencoder(device, dtype)
    decoded = DecodedCanvas(z_0, width, autoencoder, device, progress)
    with writer:
        top = 0
        for strip in fix_strips(settings.color_fix, height, width, decoded.read_rows, enlarged.read_rows, STRIP):
            writer.write_strip(strip, enlarged.read_alpha(top, top + len(strip)))
            top += len(strip)
    notes = (*photo.notes, *writer.notes)
    for note in notes:
        progress.note(f"{photo_path.name}: {note}")
    return UpscaleResult(
        input=photo_path,
        output=out_path,
        source_width=info.width,
        source_height=info.height,
        width=width,
        height=height,
        tiles=len(grid.tiles),
        settings=dataclasses.replace(settings, device=str(device), precision=dtype_name(dtype)),
        model=bundle.config.name,
        bundle_sha256=bundle.sha256,
        global_prompt=plan.global_text,
        notes=notes,
        seconds=time.monotonic() - began,
    )


def _target(photo: Photo, settings: Settings) -> tuple[int, int]:
    """(width, height) of the result. A side that doesn't suit this photo is this photo's error, not the whole
    folder's."""
    info = photo.info
    try:
        return canvas_size(info.width, info.height, settings.scale, settings.long_side, settings.short_side)
    except UsageError as error:
        if settings.scale is not None:
            raise
        raise InputError(f"{photo.path}: {error.message}", error.hint) from error


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


def _embed(
    plan: PromptPlan, bundle: Bundle, device: torch.device, dtype: torch.dtype, progress: Progress
) -> tuple[Texts, bool]:
    """Embeddings of the global and of every local prompt, and whether padding is masked. The encoder is freed."""
    encoder = bundle.open_text_encoder(device, dtype)
    local = [tile.text for tile in plan.tiles]
    embeddings, cut = encoder.encode([plan.global_text, *local], bundle.config.defaults.max_text_tokens)
    for index in cut:
        which = "the global prompt" if index == 0 else f"the prompt of tile {index - 1}"
        progress.note(f"{which} is longer than {bundle.config.defaults.max_text_tokens} tokens and was cut")
    progress.advance()
    return Texts(embeddings[0], embeddings[1:]), not encoder.pads_are_seen


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
