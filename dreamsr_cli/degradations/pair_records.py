"""What is written about training pairs: one line of params.jsonl says everything needed to make a pair again.

A record holds no time, path, host or number of workers, so the lines are the same whoever made them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import PIL
import pyvips
import torch

from dreamsr_cli import __version__, draws
from dreamsr_cli.config import TOKEN_SIDE
from dreamsr_cli.degradations.erasure_params import ErasureParams
from dreamsr_cli.degradations.pixel import PixelParams
from dreamsr_cli.degradations.presets import PRESETS
from dreamsr_cli.errors import ConfigError, InputError, UsageError
from dreamsr_cli.plain_data import from_dict, to_dict

FORMAT = 1
KINDS = ("pixel", "texture")
SMALL = ("skip", "shrink")
CAPTIONERS = ("none", "describe")
_LONGEST_STEM = 160
"""Bytes of a photo's stem that go into its pairs' names."""


@dataclass(frozen=True)
class ModelId:
    """The networks that erased texture."""

    bundle: str
    """Its name."""
    bundle_sha256: str
    """Of its files."""
    denoise: str
    """Way of denoising: "euler" or "mean"."""
    precision: str
    """dtype of the networks."""
    device: str
    """Kind of device: its arithmetic differs in the last bits."""
    threads: int
    """Of the CPU, for the same reason."""
    batch: int
    """Pictures per call, for the same reason."""
    torch: str
    """Version."""


@dataclass(frozen=True)
class PairSettings:
    """What all pairs of a set share. `ConfigError` for values that make no sense."""

    kind: str
    """"pixel" or "texture"."""
    preset: str | None
    """Key of `presets.PRESETS`; None for texture."""
    scale: int
    """Sides of hq over those of lq; 1 for texture."""
    seed: int
    """Seed of crops and parameters."""
    size: int
    """Side of the good crop in pixels; 0: the whole photo."""
    sharpen: bool
    """Good crops are sharpened (USM) first, and written so."""
    small: str
    """Photos with a side below `size`: "skip", or "shrink" the crop to what there is."""
    captioner: str
    """"none" or "describe"."""
    model: ModelId | None = None
    """For texture."""

    def __post_init__(self) -> None:
        for flag, value, known in (
            ("--kind", self.kind, KINDS),
            ("--small", self.small, SMALL),
            ("--captioner", self.captioner, CAPTIONERS),
            ("--preset", self.preset, (None,) if self.kind == "texture" else tuple(PRESETS)),
        ):
            if value not in known:
                raise ConfigError(f"{flag} {value!r} is not known", f"use one of: {', '.join(map(str, known))}")
        if not 1 <= self.scale <= 8:
            raise ConfigError(f"--scale {self.scale} is out of range", "use 1 to 8")
        if self.size < 0 or self.size % self.side_step:
            near = max(self.side_step, round(self.size / self.side_step) * self.side_step)
            raise ConfigError(f"--size {self.size} is not a multiple of {self.side_step}", f"use --size {near}")

    @property
    def side_step(self) -> int:
        """Sides of good crops are multiples of this: the scale, or what the networks need."""
        return TOKEN_SIDE if self.kind == "texture" else self.scale


@dataclass(frozen=True)
class SourceId:
    """The photo a pair was cut from."""

    name: str
    """File name without folders."""
    sha256: str
    """Of the file."""
    width: int
    """Upright pixels."""
    height: int
    """Upright pixels."""


@dataclass(frozen=True)
class Versions:
    """What made a pair: other versions may give other bytes."""

    dreamsr: str = __version__
    torch: str = str(torch.__version__)
    numpy: str = numpy.__version__
    pillow: str = PIL.__version__
    libvips: str = field(default_factory=lambda: ".".join(str(pyvips.version(part)) for part in range(3)))


@dataclass(frozen=True)
class PairRecord:
    """One line of params.jsonl."""

    pair: str
    """Name of both files, without folder and ending."""
    source: SourceId
    crop_index: int
    """Counts the crops of one photo from 0; with seed and source it decides place and parameters."""
    box: tuple[int, int, int, int]
    """(left, top, right, bottom) of the good crop in upright photo pixels."""
    settings: PairSettings
    pixel: PixelParams | None
    """Parameters of kind pixel."""
    texture: ErasureParams | None
    """Parameters of kind texture."""
    prompt: str | None
    """Text the erasure was conditioned on (P_img)."""
    versions: Versions
    lq_sha256: str = ""
    """Of lq/NAME.png."""
    hq_sha256: str = ""
    """Of hq/NAME.png."""

    def to_line(self) -> str:
        """JSON without line end, keys in order of the fields."""
        return json.dumps({"format": FORMAT, **to_dict(self)})

    @classmethod
    def from_line(cls, line: str, where: str) -> PairRecord:
        """What `to_line` wrote; `ConfigError` naming `where` for anything else."""
        try:
            data = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where}: not JSON ({error})", "give the file that dreamsr degrade wrote") from error
        if not isinstance(data, dict) or (found := data.pop("format", None)) != FORMAT:
            found = found if isinstance(data, dict) else type(data).__name__
            raise ConfigError(f"{where}: format is {found!r}, this version reads {FORMAT}", "write the pairs anew")
        return from_dict(cls, data, where)


def read_records(path: Path) -> list[PairRecord]:
    """All records of a params.jsonl in its order. `InputError` if it can't be read; `ConfigError` names the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InputError(f"{path}: {reason}", "give a params.jsonl that dreamsr degrade wrote") from error
    records = [PairRecord.from_line(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise InputError(f"{path}: holds no pair", "give a params.jsonl that dreamsr degrade wrote")
    names = [record.pair for record in records]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{path}: pair {twice!r} occurs twice", "keep one line for each pair")
    for record in records:
        if record.pair != Path(record.pair).name or record.pair in ("", ".", ".."):
            raise InputError(f"{path}: {record.pair!r} is not a file name", "give the file as dreamsr degrade wrote it")
    return records


@dataclass(frozen=True)
class Source:
    """A photo of the set, found on this machine."""

    path: Path
    id: SourceId


def read_source(path: Path) -> Source:
    """Header and hash of a photo. `InputError` if it can't be read."""
    from dreamsr_cli.images import read_info

    info = read_info(path)
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}", "check the file and its permissions") from error
    name = os.fsencode(path.name).decode("utf-8", "replace")  # it may hold bytes that are no text
    return Source(path, SourceId(name, sha256, info.width, info.height))


def pair_stems(sources: Iterable[SourceId]) -> dict[str, str]:
    """For each photo (by sha256) the stem of its pairs' names, whatever the order.

    The photo's own stem; where two photos share one (letters' case aside, for disks that ignore it) or it is very long,
    part of the photo's sha256 is appended.
    """
    short: dict[str, str] = {}
    shared: dict[str, int] = {}
    for source in sources:
        stem = Path(source.name).stem
        if len(stem.encode()) > _LONGEST_STEM:
            stem = stem.encode()[:_LONGEST_STEM].decode("utf-8", "ignore")
            shared[stem.casefold()] = shared.get(stem.casefold(), 0) + 1
        short[source.sha256] = stem
        shared[stem.casefold()] = shared.get(stem.casefold(), 0) + 1
    for digits in (8, 16, 64):
        stems = {
            sha256: f"{stem}-{sha256[:digits]}" if shared[stem.casefold()] > 1 else stem
            for sha256, stem in short.items()
        }
        if len({stem.casefold() for stem in stems.values()}) == len(stems):
            return stems
    # only a photo named like another one's hash gets here
    return {sha256: f"{stem}-{sha256}" for sha256, stem in short.items()}


def refusal(source: SourceId, settings: PairSettings) -> str | None:
    """Why a photo gives no pair, or None."""
    shorter, size = min(source.width, source.height), f"{source.width}x{source.height}"
    if shorter < settings.side_step:
        return f"{size}: a side is below {settings.side_step} pixels"
    if settings.small == "skip" and shorter < settings.size:
        return f"{size}: a side is below --size {settings.size} (--small shrink takes it as it is)"
    return None


def crop_box(source: SourceId, settings: PairSettings, index: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a good crop: uniform over the photo; for a whole photo what lies right of or below
    a multiple of the scale is cut off, as the field's tables do."""
    step = settings.side_step
    width, height = (
        min(settings.size, n // step * step) if settings.size else n // step * step
        for n in (source.width, source.height)
    )
    if settings.size == 0:
        return 0, 0, width, height
    rng = draws.generator(settings.seed, "pair-crop", source.sha256, index)
    left, top = int(rng.integers(source.width - width + 1)), int(rng.integers(source.height - height + 1))
    return left, top, left + width, top + height


def check_crops(crops: int) -> None:
    """`UsageError` for a number of crops per photo that makes no sense."""
    if not 1 <= crops <= 1_000_000:
        raise UsageError(f"--crops {crops} is out of range", "use 1 to 1000000")


def pair_name(stem: str, index: int, settings: PairSettings, crops: int) -> str:
    """NAME_0000, or NAME alone where a whole photo has one pair."""
    return stem if settings.size == 0 and crops == 1 else f"{stem}_{index:04d}"
