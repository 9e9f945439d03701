"""Training samples: a good crop, its bad small version, and the two prompts, pure functions of (seed, step, index).

Receptive-Field Enhancement (method.md, Training): crops come from native photos with the crop's own local prompt, and
in a share of the steps from shrunk photos, with local prompt = global prompt where a crop shows about all of its photo.

Axes: C channels, P Q pixel rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from dreamsr_cli import draws
from dreamsr_cli.config import TOKEN_SIDE, Looks
from dreamsr_cli.degradations import pixel
from dreamsr_cli.degradations.presets import PRESETS, looks_after
from dreamsr_cli.errors import ConfigError, InputError, TrainingError
from dreamsr_cli.models.captioner import Describer
from dreamsr_cli.models.detail_words import with_detail
from dreamsr_cli.training.cutting import SLANTED_FROM, Slanted, busy_corner, cut, palette, slanted
from dreamsr_cli.training.dead_leaves import dead_leaves
from dreamsr_cli.training.photos import PhotoSource, TrainingPhoto, describe_whole, turned
from dreamsr_cli.training.recolouring import recoloured
from dreamsr_cli.training.sources import Item, Pictures, SkippedPhoto, Source

DEAD_LEAVES = "dead leaves"
SAMPLES_PER_STEP = 1 << 20
"""More than any global batch: keeps crop indices of different steps apart."""
MOST_TRIES = 16
"""Items drawn for one sample before the run stops."""
WHOLE = 1.25
"""A crop shows the whole photo where the photo's short side is at most this many times the crop's."""
TURNS = {1: (0,), 2: (0, 4), 8: tuple(range(8))}
"""Turns used (see `photos.turned`), by how many there are."""


@dataclass(frozen=True)
class CropSettings:
    """How samples are cut and degraded."""

    crop: int = 256
    """Side of the good crop in pixels, a multiple of 16."""
    preset: str = "seesr-pairs"
    """Degradation preset, a key of `presets.PRESETS`."""
    mix: tuple[tuple[str, float], ...] = ()
    """(preset, share of samples) of further presets; the rest of the samples use `preset`."""
    seed: int = 42
    """Seed of every draw."""
    scale: int = 4
    """Crop side over the bad crop's side."""
    dead_leaves: float = 0.0
    """Share of samples that are dead leaves instead of photos."""
    p_full: float = 0.2
    """Chance of a step that its photos are shrunk first."""
    full_side: int = 1024
    """Short side of a shrunk photo."""
    full_sides: tuple[int, ...] = ()
    """Further short sides, one of all drawn per sample."""
    full_crop: int | None = None
    """Side of the crops of shrunk photos; None: `crop`."""
    slanted: float = 0.0
    """Share of the samples of shrunk photos that are turned by any angle and shrunk by any factor near theirs."""
    recoloured: float = 0.0
    """Share of the samples whose good crop gets other colours before it is degraded; for samples without prompts."""
    turns: int = 8
    """Flips and quarter turns used: 8 all, 2 mirroring only (for prompts and writing), 1 none."""
    candidates: int = 3
    """Crops drawn per sample, one of which is kept with a chance that grows with its gradient energy."""
    words: bool = True
    """Whether samples have prompts; else they are empty."""
    detail_words: float = 0.0
    """Chance that the describer's local prompt ends with how much fine detail the good crop has."""
    usm: bool | None = None
    """Sharpening of the good crop; None: the preset's."""
    held_out: bool = False
    """Take the validation photos instead of the training ones."""

    def __post_init__(self) -> None:
        for preset in (self.preset, *(name for name, _ in self.mix)):
            if preset not in PRESETS:
                raise ConfigError(f"unknown preset {preset!r}", f"choose one of: {', '.join(PRESETS)}")
        if any(share < 0 for _, share in self.mix) or sum(share for _, share in self.mix) > 1 + 1e-9:
            raise ConfigError(f"shares of mix {dict(self.mix)} exceed 1", "the rest is left to preset")
        if self.crop < TOKEN_SIDE or self.crop % TOKEN_SIDE or self.crop % self.scale:
            raise ConfigError(f"crop {self.crop} is not a multiple of {TOKEN_SIDE} and of the scale", "try crop = 256")
        for name in ("dead_leaves", "p_full", "slanted", "recoloured", "detail_words"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} = {getattr(self, name)} is not a share", "give a number from 0 to 1")
        if self.recoloured and self.words:
            raise ConfigError("recoloured photos no longer look as their texts say", "--set data.words=false")
        for side in (self.full_side, *self.full_sides):
            if side < self.crop:
                raise ConfigError(f"full_side {side} is below crop {self.crop}", "raise full_side")
        if self.candidates < 1:
            raise ConfigError(f"candidates = {self.candidates}", "give 1 or more")
        if self.full_crop is not None and (
            self.full_crop % TOKEN_SIDE
            or self.full_crop % self.scale
            or not TOKEN_SIDE <= self.full_crop <= self.full_side
        ):
            raise ConfigError(
                f"full_crop {self.full_crop} is not a multiple of {TOKEN_SIDE} up to full_side {self.full_side}",
                f"try full_crop = {self.full_side // TOKEN_SIDE * TOKEN_SIDE}",
            )
        if self.turns not in TURNS:
            raise ConfigError(f"turns = {self.turns}", "give 8 (all), 2 (mirroring) or 1 (none)")


@dataclass(frozen=True)
class Sample:
    """One pair with its prompts."""

    hq_CPQ: np.ndarray
    """Good crop (3, P, P) uint8, sharpened where the preset says so."""
    lq_CPQ: np.ndarray
    """Bad crop (3, P/scale, P/scale) uint8."""
    local_text: str
    """Words for the good crop."""
    global_text: str
    """Words for the whole photo, turned as the crop is."""
    origin: str
    """Name of the photo, or `DEAD_LEAVES`."""
    looks: Looks | None
    """What the bad crop looks like; None for pairs on disk, which don't say."""
    erased_CPQ: np.ndarray | None = None
    """The good crop with its texture erased (3, P, P) uint8, where the set has it."""
    bad: tuple[SkippedPhoto, ...] = ()
    """Items that were drawn before and couldn't be read."""


def make_sample(source: Source, settings: CropSettings, step: int, index: int) -> Sample:
    """The sample at `index` of the global batch of `step`: the same whatever was made before, and wherever.

    Items that can't be read, or turn out too small, are passed over for the next draw and listed in `.bad`;
    `TrainingError` after `MOST_TRIES` of them in a row.
    """
    check_source(source, settings)
    bad: list[SkippedPhoto] = []
    for attempt in range(MOST_TRIES):
        try:
            sample = _try(source, settings, step, index, attempt)
        except InputError as error:
            bad.append(SkippedPhoto(_item(source, settings, step, index, attempt)[1].name, error.message))
            continue
        if sample is not None:
            return replace(sample, bad=tuple(bad))
    what = f"the last damaged one: {bad[-1].name}: {bad[-1].reason}" if bad else "all too small"
    raise TrainingError(
        f"{MOST_TRIES} draws in a row gave no photo for a crop ({what})",
        "give larger photos, or train with --set data.full_photo=0 and smaller crops",
    )


def check_source(source: Source, settings: CropSettings) -> None:
    """`TrainingError` where the set can't give such crops."""
    if settings.held_out and not source.validation:
        raise TrainingError("no photo is held out to validate on", "hold out at least one")
    if source.smallest < settings.crop:
        raise TrainingError(
            f"photos may be as small as {source.smallest} pixels, crops are {settings.crop}",
            "open the folder with smallest = crop",
        )
    if source.erased and settings.dead_leaves:
        raise TrainingError(
            "texture pairs can't be mixed with dead leaves: these have no erased version",
            "train with --set data.dead_leaves=0",
        )


def is_full(source: Source, settings: CropSettings, step: int) -> bool:
    """Whether all photos of `step` are shrunk first: one draw for all ranks, so that batches have one size. Pairs on
    disk are never shrunk."""
    site = "validation-crop" if settings.held_out else "crop"
    draw = draws.generator(settings.seed, f"{site}-full", step).random()
    return draw < settings.p_full and source.longest_short_side != 0


def crop_side(source: Source, settings: CropSettings, step: int) -> int:
    """Side of the crops of `step`: `full_crop` in steps of shrunk photos, where photos are large enough for it."""
    wanted = settings.full_crop or settings.crop
    longest = source.longest_short_side
    if is_full(source, settings, step) and (longest is None or longest >= wanted):
        return wanted
    return settings.crop


def _item(
    source: Source, settings: CropSettings, step: int, index: int, attempt: int
) -> tuple[np.random.Generator, Item]:
    """The sample's generator, and the item drawn from it."""
    site = "validation-crop" if settings.held_out else "crop"
    rng = draws.generator(settings.seed, site, step, index, *([attempt] if attempt else []))
    items = source.validation if settings.held_out else source.training
    return rng, items[int(rng.integers(len(items)))]


def _try(source: Source, settings: CropSettings, step: int, index: int, attempt: int) -> Sample | None:
    """The sample from one drawn item; None where it is too small. `InputError` where it is damaged."""
    rng, item = _item(source, settings, step, index, attempt)
    turn = TURNS[settings.turns][int(rng.integers(8)) % settings.turns]
    size, full, whole = crop_side(source, settings, step), False, False
    global_text: str | None = None
    local_text: str | None = None
    looks: Looks | None = None
    lq_PQC = erased_PQC = None
    sharpen = settings.usm
    if rng.random() < settings.dead_leaves:
        origin, sha256 = DEAD_LEAVES, DEAD_LEAVES
        hq_CPQ = dead_leaves(size, rng, palette(source.read(item).hq_PQC, rng) if rng.random() < 0.75 else None)
    else:
        origin, sha256 = item.name, item.sha256
        full = is_full(source, settings, step)
        pictures = Pictures(source.shrunk(item, _side(settings, step, index))) if full else source.read(item)
        hq_PQC, scale, shown = pictures.hq_PQC, pictures.scale, size
        if min(hq_PQC.shape[:2]) < size:
            return None
        if size % scale:
            raise InputError(f"{item.name}: its scale {scale} doesn't divide crops of {size}", "choose other crops")
        slant = _slanted(source, item, settings, step, index, size) if full else None
        if slant is None:
            corner = busy_corner(hq_PQC, size, settings.candidates, rng, scale)
            crop_PQC = cut(hq_PQC, corner, size)
        else:
            hq_PQC, (crop_PQC, corner, shown) = slant
        # A crop of a part of a shrunk photo still has words of its own.
        whole = min(hq_PQC.shape[:2]) <= WHOLE * shown
        hq_CPQ = _floats(turned(crop_PQC, turn))
        if pictures.lq_PQC is not None:
            small = (corner[0] // scale, corner[1] // scale)
            lq_PQC = turned(cut(pictures.lq_PQC, small, size // scale), turn)
        if pictures.erased_PQC is not None:
            # sharpening the target would leave the erased picture behind
            erased_PQC, sharpen = turned(cut(pictures.erased_PQC, corner, size), turn), False
        if settings.words:
            global_text, local_text = _texts(source, item, hq_PQC, corner, shown, turn)
    if lq_PQC is None:
        preset, crop_index = _preset(settings, step, index), step * SAMPLES_PER_STEP + index
        params = pixel.draw(preset, settings.seed, sha256, crop_index, settings.scale, sharpen)
        looks = looks_after(preset, params.only_jpeg)
        recolour = draws.generator(settings.seed, "recoloured", step, index)
        if recolour.random() < settings.recoloured:
            hq_CPQ = recoloured(hq_CPQ, recolour)
        hq_CPQ = _levels(pixel.sharpen(hq_CPQ) if params.sharpen else hq_CPQ)
        lq_CPQ = _levels(pixel.degrade(hq_CPQ.float() / 255, params)).numpy()
    else:
        hq_CPQ, lq_CPQ = _levels(hq_CPQ), np.ascontiguousarray(lq_PQC.transpose(2, 0, 1))
    if not settings.words:
        local_text = ""
    elif full and global_text is not None and whole:
        local_text = global_text
    elif local_text is None:
        crop_PQC = np.ascontiguousarray(hq_CPQ.permute(1, 2, 0).numpy(), np.float32) / 255
        local_text = Describer().describe(crop_PQC)
        if draws.generator(settings.seed, "detail-words", step, index).random() < settings.detail_words:
            local_text = with_detail(local_text, crop_PQC)
    erased_CPQ = None if erased_PQC is None else np.ascontiguousarray(erased_PQC.transpose(2, 0, 1))
    return Sample(hq_CPQ.numpy(), lq_CPQ, local_text, global_text or local_text, origin, looks, erased_CPQ)


def _texts(
    source: Source, item: Item, hq_PQC: np.ndarray, corner: tuple[int, int], size: int, turn: int
) -> tuple[str, str | None]:
    """(global text, local text): those the set brings along, else the describer's; local None: not known yet."""
    words = source.texts(item)
    if words is not None:
        height, width = hq_PQC.shape[:2]
        top, left = corner
        box = (left / width, top / height, (left + size) / width, (top + size) / height)
        return words.global_text, words.local_text(box)
    if isinstance(source, PhotoSource) and isinstance(item, TrainingPhoto):
        return source.global_text(item, turn, Describer()), None
    return describe_whole(hq_PQC, turn, Describer()), None


def _slanted(
    source: Source, item: Item, settings: CropSettings, step: int, index: int, size: int
) -> tuple[np.ndarray, Slanted] | None:
    """A larger version of the shrunk photo and the crop of `size` pixels that `cutting.slanted` cuts from it, for the
    samples that are slanted and have room for it. Draws of its own, so that all others are what they would be
    without."""
    rng = draws.generator(settings.seed, "slanted", step, index)
    if rng.random() >= settings.slanted:
        return None
    short_side = round(SLANTED_FROM * _side(settings, step, index))
    hq_PQC = source.shrunk(item, short_side)
    if min(hq_PQC.shape[:2]) < short_side:
        return None  # its texture would be coarser than that of the other crops
    found = slanted(hq_PQC, size, settings.candidates, rng)
    return None if found is None else (hq_PQC, found)


def _side(settings: CropSettings, step: int, index: int) -> int:
    """The short side that the sample's photo is shrunk to."""
    sides = (settings.full_side, *settings.full_sides)
    return sides[int(draws.generator(settings.seed, "full-side", step, index).integers(len(sides)))]


def _preset(settings: CropSettings, step: int, index: int) -> str:
    """The sample's preset, drawn from seed, step and index alone."""
    draw = draws.generator(settings.seed, "preset", step, index).random() if settings.mix else 1.0
    for name, share in settings.mix:
        draw -= share
        if draw < 0:
            return name
    return settings.preset


def _floats(rgb_PQC: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(rgb_PQC.transpose(2, 0, 1))).float() / 255


def _levels(x_CPQ: torch.Tensor) -> torch.Tensor:
    return (x_CPQ * 255).round().to(torch.uint8)
