"""Whose texts a run uses: typed ones before those of a file, and those before the captioner's."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dreamsr_cli.captioning import Captioner
from dreamsr_cli.config import CaptionConfig, OutputConfig
from dreamsr_cli.errors import OutputError
from dreamsr_cli.images import Photo
from dreamsr_cli.progress import Progress
from dreamsr_cli.prompt_fitting import fit_plan, parse_tile_prompts, place_texts, spread, with_texts
from dreamsr_cli.prompts import PhotoId, PromptPlan
from dreamsr_cli.prompts_file import PromptsError, check_photo, prompts_name, read_prompts
from dreamsr_cli.settings import Settings
from dreamsr_cli.tiling import TileGrid, make_grid
from dreamsr_cli.work_sharing import Crew


@dataclass(frozen=True)
class GivenPrompts:
    """What a person gave for one photo, made to fit its grid."""

    plan: PromptPlan | None = None
    """Of a prompts file; None: the captioner describes the tiles."""
    global_text: str | None = None
    """`--prompt`, or a file's one text for the whole photo."""
    tile_texts: Mapping[int, str] = field(default_factory=dict)
    """`--tile-prompt`, by index of the tile."""
    notes: tuple[str, ...] = ()
    """What was done to make it fit."""
    sha256: str | None = None
    """Of the texts that came from a file, None without one: part of the journal's fingerprint."""


def give_prompts(
    path: Path | None,
    photo_path: Path,
    photo: PhotoId,
    grid: TileGrid,
    width: int,
    height: int,
    settings: Settings,
) -> GivenPrompts:
    """Read and fit everything given, before any work. Raises `PromptsError` for the file (also where its only text
    would go unused), `InputError` for a point
    outside of the result."""
    tile_texts = place_texts(parse_tile_prompts(settings.tile_prompt), grid, width, height, photo_path)
    if path is None:
        return GivenPrompts(None, settings.prompt, tile_texts)
    file = read_prompts(path)
    check_photo(file, photo, photo_path)
    if file.plan is None:
        flag = "--prompt" if settings.prompt is not None else "--prompt-mode local"
        if settings.prompt is not None or settings.prompt_mode == "local":
            what = f"{path} holds one text, for the whole photo, and with {flag} it has no effect"
            raise PromptsError(what, "leave out one of the two")
        return GivenPrompts(None, file.caption, tile_texts, (), _digest(file.caption))
    plan, notes = fit_plan(file.plan, photo, grid, width, height)
    digest = _digest([plan.global_text, [[tile.box, tile.text] for tile in plan.tiles]])
    return GivenPrompts(plan, settings.prompt, tile_texts, notes, digest)


def make_prompts(
    photo: Photo,
    grid: TileGrid,
    width: int,
    height: int,
    given: GivenPrompts,
    settings: Settings,
    device: torch.device,
    resume_file: Path,
    progress: Progress,
    captioner: Captioner | None = None,
    crew: Crew | None = None,
) -> PromptPlan:
    """The texts of a run, one for each tile, with the captioner's where nothing else was given.

    `captioner` is one that is open already; None: it is opened and freed here. `resume_file` is where it keeps what it
    has said so far; `crew` share in its work. Raises `WeightsError`, `DeviceError`.
    """
    whole = settings.prompt_mode == "global"
    plan = given.plan
    if plan is None:
        # In mode "global" no tile needs a caption of its own.
        described = make_grid(height, width, 0, 0) if whole else grid
        with nullcontext(captioner) if captioner else Captioner(settings.captioner, CaptionConfig(), device) as opened:
            plan = opened.plan(photo, described, width, height, given.global_text, resume_file, progress, crew)
    else:
        plan = with_texts(plan, given.global_text, {})
    return spread(plan, grid) if whole else with_texts(plan, None, given.tile_texts)


def place_to_save(photo_path: Path, out_path: Path, output: OutputConfig) -> Path | None:
    """Where `--save-prompts` writes, None without it. Raises `OutputError` if a file is there and is to stay."""
    if not output.save_prompts:
        return None
    path = out_path.with_name(prompts_name(photo_path))
    if os.path.lexists(path) and not output.overwrite:
        raise OutputError(f"{path} exists already", "add --overwrite to replace it, or leave out --save-prompts")
    if path.is_dir():
        raise OutputError(f"{path} is a folder", "remove it, or leave out --save-prompts")
    return path


def _digest(texts: object) -> str:
    return hashlib.sha256(json.dumps(texts, ensure_ascii=False).encode()).hexdigest()
