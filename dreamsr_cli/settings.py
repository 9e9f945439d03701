"""An `UpscaleConfig` made whole: what nobody typed is taken from the bundle, and every value is checked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from dreamsr_cli.config import AUTO, CAPTIONERS, LOOKS, PROMPT_MODES, TILINGS, TOKEN_SIDE, UpscaleConfig, is_captioner
from dreamsr_cli.device import choose_device
from dreamsr_cli.errors import UsageError
from dreamsr_cli.memory_choice import decide_memory
from dreamsr_cli.models.bundle import CLEANER, GRAIN, Bundle
from dreamsr_cli.models.compiling import check_compile
from dreamsr_cli.prompt_fitting import parse_tile_prompts
from dreamsr_cli.prompts import text_problem
from dreamsr_cli.tiling import check_tiling

COLOR_FIXES = ("wavelet", "adain", "none")


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
    tile_prompt: tuple[str, ...]
    prompt_mode: str
    captioner: str
    color_fix: str
    looks: str
    """"auto": what the photo itself says."""
    consistency: float | None
    """None: what the photo itself says."""
    texture: float
    """0: stage 2 is left out."""
    grain: float
    """0: none, and so where the bundle has no network for it."""
    enlarger: bool | None
    """Whether the bundle's enlarger takes the place of stage 1; None: where the photo doesn't look damaged."""
    cleaner: bool | None
    """Whether the bundle's cleaner takes the place of stage 1; None: where the photo looks damaged."""
    removal: bool
    precision: str
    device: str
    tile_batch: int
    fit_batch: bool
    """`tile_batch` is the most that a photo's grid may choose; False: it is what is used."""
    text_bucket: int | None
    """Tokens that prompts are padded to, and cut at; None: the bucket of the longest (`text_buckets`)."""
    compile: bool
    quantize: str
    offload: str
    memory: str | None
    """What `--memory` chose, as a sentence."""
    tiling: str
    tile_auto: tuple[int, int] | None
    """With `--tile auto` the sides to choose from; `tile` is the bundle's until one is chosen for a photo."""

    @property
    def largest_tile(self) -> int:
        """Side of the largest tile that a photo may get; 0: the whole photo."""
        return self.tile_auto[1] if self.tile_auto else self.tile


def for_unseen(settings: Settings) -> Settings:
    """Settings for a photo that nobody has looked at yet, for a plan: those of a damaged one."""
    cleaner = settings.looks == AUTO if settings.cleaner is None else settings.cleaner
    return replace(settings, cleaner=cleaner, removal=settings.removal and not cleaner)


def check_settings(config: UpscaleConfig, bundle: Bundle) -> Settings:
    """Fill in what the bundle decides and check every value. Raises `UsageError` naming the flag and what to type."""
    defaults, sampling = bundle.config.defaults, bundle.config.sampling

    def pick(value: Any, default: Any) -> Any:
        return default if value is None else value

    sized = config.long_side is not None or config.short_side is not None
    tile_auto = None
    if config.tile == AUTO:
        tile_auto = defaults.tile_auto or (defaults.tile // 2 // TOKEN_SIDE * TOKEN_SIDE, defaults.tile)
    elif isinstance(config.tile, str):
        raise UsageError(f"--tile {config.tile!r} is no number of pixels", "use --tile 512, or --tile auto")
    tile = config.tile if isinstance(config.tile, int) else defaults.tile
    overlap = defaults.overlap if config.overlap is None else config.overlap
    if config.overlap is None and tile:
        overlap = min(overlap, tile // 2 // 16 * 16)
    memory = decide_memory(config, bundle, tile)
    looks = config.looks
    if looks == AUTO and "cleanliness" not in bundle.config.parts:
        looks = "damaged"
    enlarger = None if looks == AUTO else looks != "damaged"
    cleaner = None if enlarger is None else not enlarger
    if "enlarger" not in bundle.config.parts or config.removal is not None:
        enlarger = False
    if CLEANER not in bundle.config.parts or config.removal is not None:
        cleaner = False
    has_grain = GRAIN in bundle.config.parts
    # From a picture alone, for stage 1 ends in a latent.
    has_texture = enlarger is not False or cleaner is not False
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
        tile_prompt=config.tile_prompt,
        prompt_mode=config.prompt_mode,
        captioner=pick(config.captioner, defaults.captioner),
        color_fix=pick(config.color_fix, defaults.color_fix),
        looks=looks,
        consistency=0.0 if config.consistency is None and looks == "damaged" else config.consistency,
        texture=pick(config.texture, defaults.texture if has_texture else 1.0),
        grain=pick(config.grain, defaults.grain if has_grain and pick(config.strength, sampling.t_start) > 0 else 0.0),
        enlarger=enlarger,
        cleaner=cleaner,
        removal=pick(config.removal, "lora" in bundle.config.parts and not enlarger and not cleaner),
        precision=config.precision,
        device=config.device,
        tile_batch=memory.tile_batch,
        fit_batch=config.tile_batch is None,
        text_bucket=config.text_bucket,
        compile=config.compile,
        quantize=memory.mode.quantize,
        offload=memory.mode.offload,
        memory=memory.sentence,
        tiling=config.tiling,
        tile_auto=tile_auto,
    )
    check_tiling(settings.tile, settings.overlap)
    _check_range("--steps", settings.steps, 1, 100)
    _check_range("--strength", settings.strength, 0, 1)
    _check_range("--tile-batch", settings.tile_batch, 1, 64)
    _check_choice("--tiling", settings.tiling, TILINGS)
    if settings.tiling == "shifted" and settings.overlap == 0 and settings.tile:
        raise UsageError("--tiling shifted moves the tiles by --overlap, which is 0", "use --overlap 64")
    if settings.text_bucket is not None:
        _check_range("--text-bucket", settings.text_bucket, 1, defaults.max_text_tokens)
    if settings.compile:
        check_compile(choose_device(config.device), memory.mode)
    _check_choice("--looks", settings.looks, (AUTO, *LOOKS))
    if settings.consistency is not None:
        _check_range("--consistency", settings.consistency, 0, 1)
    _check_range("--texture", settings.texture, 0, 1)
    if settings.texture < 1 and not has_texture:
        raise UsageError(
            "--texture is for photos that the model's cleaner or enlarger has made a picture of",
            "leave --texture out" if config.removal is None else "leave out --texture, or --removal and --no-removal",
        )
    _check_range("--grain", settings.grain, 0, 2)
    if settings.grain and not has_grain:
        message = f"--grain: model {bundle.config.name} has no network that says how strong it is to be"
        raise UsageError(message, "leave --grain out")
    _check_choice("--color-fix", settings.color_fix, COLOR_FIXES)
    if not is_captioner(settings.captioner):
        known = ", ".join(CAPTIONERS)
        raise UsageError(f"--captioner {settings.captioner!r} is not known", f"use one of: {known}, or a LLaVA folder")
    _check_choice("--prompt-mode", settings.prompt_mode, PROMPT_MODES)
    _check_prompts(settings)
    if settings.removal and "lora" not in bundle.config.parts:
        message = f"--removal: model {bundle.config.name} has no Restoration LoRA, so there is no stage 1"
        raise UsageError(message, "leave --removal out")
    if config.guidance is not None and sampling.guidance is None:
        raise UsageError(f"--guidance: model {bundle.config.name} has no guidance input", "leave --guidance out")
    return settings


def _check_prompts(settings: Settings) -> None:
    parse_tile_prompts(settings.tile_prompt)
    if settings.prompt is not None and (found := text_problem(settings.prompt)):
        raise UsageError(f"--prompt: {found[1]}", "write plain words")
    if settings.prompt_mode == "global" and settings.tile_prompt:
        raise UsageError("--tile-prompt has no effect with --prompt-mode global", "leave out one of the two")
    if settings.prompt_mode == "local" and settings.prompt is not None:
        raise UsageError("--prompt has no effect with --prompt-mode local", "leave out one of the two")


def _check_range(flag: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UsageError(f"{flag} {value} is not between {low} and {high}", f"use {flag} {min(max(value, low), high)}")


def _check_choice(flag: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{flag} {value} is not known", f"use {flag} {', '.join(known[:-1])} or {known[-1]}")
