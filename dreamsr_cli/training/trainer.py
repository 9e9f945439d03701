"""One `dreamsr train`: settings checked, networks built, the loop run, the bundle written."""

from __future__ import annotations

import dataclasses
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dreamsr_cli import __version__
from dreamsr_cli.config import TrainingRecord
from dreamsr_cli.errors import TrainingError, UsageError
from dreamsr_cli.folder_lock import FolderLock
from dreamsr_cli.models.bundle import Bundle, open_bundle
from dreamsr_cli.models.perceptual import Perceptual, describe, load_perceptual
from dreamsr_cli.progress import Progress, SilentProgress
from dreamsr_cli.training import checkpoints, curves, provenance
from dreamsr_cli.training.crops import batches
from dreamsr_cli.training.distributed import Team, share_of
from dreamsr_cli.training.interruption import Interruptions
from dreamsr_cli.training.latent_cache import LatentCache
from dreamsr_cli.training.loop import Run
from dreamsr_cli.training.networks import Networks, base_bundle, build, build_on
from dreamsr_cli.training.open_source import open_source
from dreamsr_cli.training.recipe import Recipe, for_ablation, recipe_dict
from dreamsr_cli.training.run_bundle import Card, export, is_flux, untouched
from dreamsr_cli.training.sources import Source
from dreamsr_cli.training.stages import Stage
from dreamsr_cli.training.step_crops import crop_settings
from dreamsr_cli.training.trackers import check_names, open_trackers
from dreamsr_cli.weights import cache_folder

_TABLES = ("recipe", "sizes", "latent", "control", "sampling", "defaults", "data", "loss", "optim")
FIT_CROPS = 320
"""Crops that the patch transform is fitted on."""


@dataclass(frozen=True)
class TrainJob:
    """What one `dreamsr train` was asked for."""

    stage: Stage
    recipe: Recipe
    recipe_name: str
    data: Path
    out: Path
    model: str | None = None
    """Bundle that the paper's stages train on; None: that of `init_from`, the recipe's, or mini."""
    init_from: str | None = None
    """Bundle whose weights the trained parts start from, with a fresh optimizer."""
    perceptual_weights: Path | None = None
    resume: bool = False
    max_steps: int | None = None
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    compile: bool = False
    keep: int = checkpoints.DEFAULT_KEEP
    """Checkpoints kept."""
    trackers: tuple[str, ...] = ()
    """Names of accelerate's trackers."""


@dataclass(frozen=True)
class TrainResult:
    """What it came to."""

    bundle: Path
    steps: int
    seconds: float
    validation: dict[str, float]
    main: bool = True
    """Whether this process is the one that speaks."""


def train(job: TrainJob, progress: Progress) -> TrainResult:
    """Run the stage up to the recipe's steps (or `max_steps` more), then write `out/bundle/`.

    Raises `TrainingError` on a loss that isn't finite or explodes, on a run folder of other settings, and where there
    are too few photos; `OutputError` on a full disk; `UsageError` for settings that make no sense. A signal leaves a
    checkpoint and raises `KeyboardInterrupt`.
    """
    began = time.monotonic()
    recipe = for_ablation(job.recipe, job.stage.name)
    check_names(job.trackers)
    team = Team(job.device, job.dtype)
    for plan in recipe.data.crops:
        share_of(plan.batch, team.rank, team.world, recipe.accumulate)
    if not team.main:
        progress = SilentProgress()
    interruptions = Interruptions(shared=team.world > 1)
    with interruptions.caught():
        result = _train(dataclasses.replace(job, recipe=recipe, device=team.device), progress, team, interruptions)
    team.leave()
    return dataclasses.replace(result, seconds=time.monotonic() - began, main=team.main)


def _train(job: TrainJob, progress: Progress, team: Team, interruptions: Interruptions) -> TrainResult:
    recipe, stage = job.recipe, job.stage
    perceptual = load_perceptual(recipe.loss.perceptual if stage.compares else "none", job.perceptual_weights)
    if isinstance(perceptual, torch.nn.Module):
        perceptual.to(job.device)
    base, start = _bundles(job)
    settings = _settings(job, base, start)
    if team.main:
        checkpoints.check_run(job.out, settings, job.resume, lambda old: _todays(old, settings))
    with FolderLock(job.out) if team.main else nullcontext():
        return _train_in(job, progress, team, interruptions, perceptual, base, start, settings)


def _train_in(
    job: TrainJob,
    progress: Progress,
    team: Team,
    interruptions: Interruptions,
    perceptual: Perceptual | None,
    base: Bundle | None,
    start: Bundle | None,
    settings: dict[str, Any],
) -> TrainResult:
    """`_train`, once the run folder is this run's."""
    recipe, stage = job.recipe, job.stage
    source = _open(job, team, progress)
    if team.main:
        checkpoints.start_run(job.out, settings, _facts(job, team))
        _same_photos(job.out, source)
    team.wait()
    networks = build(recipe, start) if base is None else build_on(recipe, stage, base, start, job.device, job.dtype)
    saved = checkpoints.load(job.out)
    if stage.fit_transform and saved is None:
        kept = _fit(networks, source, recipe)
        progress.note(f"patch transform keeps {kept['variance_kept']:.4f} of the variance, {kept['psnr_db']:.1f} dB")
        if team.main:
            checkpoints.append_log(job.out, {"step": 0, **kept})
    networks.to(job.device, job.dtype, large=not team.sharded)
    if recipe.data.cache_latents and base is not None:
        networks.latent_cache = LatentCache(cache_folder() / "latents", base.sha256)
    if recipe.checkpointing:
        networks.checkpoint_blocks()
    if job.compile:
        networks.compile_blocks()
        if isinstance(perceptual, torch.nn.Module):
            # Its elementwise work on large features is a seventh of a step on a CPU.
            perceptual.compile()
    trackers = open_trackers(job.trackers, job.out, recipe_dict(recipe), main=team.main)
    run = Run(stage, recipe, job.out, networks, source, perceptual, team, interruptions, trackers, job.keep)
    if saved is not None:
        run.restore(*saved)
    last = recipe.steps if job.max_steps is None else min(recipe.steps, run.step + job.max_steps)
    try:
        figures = run.go(last, progress)
    finally:
        trackers.close()
    _write_bundle(job, run, source, base, start, figures)
    log = job.out / checkpoints.LOG_FILE
    if team.main and log.is_file():
        curves.draw(log, job.out / "curves.png")
    return TrainResult(job.out / "bundle", run.step, 0.0, figures)


def _bundles(job: TrainJob) -> tuple[Bundle | None, Bundle | None]:
    """(base of a stage with a prior, what the trained parts start from)."""
    start = open_bundle(job.init_from) if job.init_from else None
    if job.stage.prior:
        return base_bundle(job.recipe, job.model, start), start
    if job.model is not None:
        raise UsageError(
            f"--model doesn't go with --stage {job.stage.name}, which trains every part",
            f"start from that bundle's weights: --init-from {job.model}",
        )
    return None, start


def _settings(job: TrainJob, base: Bundle | None, start: Bundle | None) -> dict[str, Any]:
    """What decides a run's result: the same on every resume."""
    return {
        "stage": job.stage.name,
        "recipe": recipe_dict(job.recipe),
        "data": str(job.data.resolve()),
        "start": None if start is None else start.sha256,
        "base": None if base is None else base.sha256,
    }


def _todays(settings: dict[str, Any], today: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run.json of an earlier version: keys that came since are those of `today`."""

    def laid_over(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        both = {k: (old[k], new[k]) for k in new if k in old}
        nested = {k: laid_over(a, b) for k, (a, b) in both.items() if isinstance(a, dict) and isinstance(b, dict)}
        # A table whose keys are free (data.mix) is a value.
        return {**new, **old, **{k: v for k, v in nested.items() if k in _TABLES}}

    return laid_over(settings, today)


def _facts(job: TrainJob, team: Team) -> dict[str, Any]:
    """What a resume needs to find again, and what a person wants to know."""

    def found(path: str | None) -> str | None:
        return str(Path(path).resolve()) if path is not None and Path(path).exists() else path

    weights = job.perceptual_weights
    return {
        "recipe_name": job.recipe_name,
        "model": found(job.model),
        "init_from": found(job.init_from),
        "perceptual_weights": None if weights is None else str(weights.resolve()),
        **provenance.facts(str(team.device), str(job.dtype).removeprefix("torch."), team.world),
    }


def _open(job: TrainJob, team: Team, progress: Progress) -> Source:
    data, prior = job.recipe.data, job.stage.prior
    if not team.main:
        team.wait()  # the first process decodes into the cache
    source = open_source(
        job.data,
        cache=cache_folder() / "photos",
        hold_out=data.hold_out,
        smallest=max(c.size for c in data.crops),
        max_bad=data.max_bad,
        progress=progress,
    )
    if team.main:
        team.wait()
    for skipped in source.skipped:
        progress.note(f"skipped {skipped.name}: {skipped.reason}")
    if prior and job.stage.textures and job.recipe.condition in ("erased", "mixed") and not source.erased:
        raise TrainingError(
            f"condition {job.recipe.condition!r} needs erased pictures, which {job.data} doesn't have",
            "make pairs with dreamsr degrade and train on them, or --set condition=removed",
        )
    return source


def _same_photos(out: Path, source: Source) -> None:
    """Record the fingerprint of the photos, or see that a resumed run has the same ones."""
    before = checkpoints.read_run(out).get("data_sha256")
    if before is None:
        photos = {"training": len(source.training), "held_out": len(source.validation), "skipped": len(source.skipped)}
        checkpoints.note_facts(out, {"data_sha256": source.data_sha256, "photos": photos})
    elif before != source.data_sha256:
        raise TrainingError(
            f"the photos changed since {out} was begun",
            f"bring them back, or warm-start a new run with --init-from {out / 'bundle'}",
        )


def _fit(networks: Networks, source: Source, recipe: Recipe) -> dict[str, float]:
    stream = batches(source, crop_settings(recipe, 0), 16, workers=0)
    tensors = [next(stream).hq_BCPQ * 2 - 1 for _ in range(FIT_CROPS // 16)]
    return networks.patches.fit(tensors)


def _write_bundle(
    job: TrainJob, run: Run, source: Source, base: Bundle | None, start: Bundle | None, figures: dict[str, float]
) -> None:
    networks, origin = run.networks, start or base
    before = 0 if origin is None else origin.config.training.steps
    record = TrainingRecord(
        recipe=job.recipe_name, steps=run.step + before, data_sha256=source.data_sha256, dreamsr=__version__
    )
    config = dataclasses.replace(networks.config, training=record)
    card = Card(
        stage=job.stage.name,
        recipe=job.recipe_name + ("" if job.recipe.ablation == "none" else f", ablation {job.recipe.ablation}"),
        steps=run.step,
        data=f"{len(source.training)} {source.kind} of {job.data.name}, {len(source.validation)} held back, "
        f"{len(source.skipped)} left out",
        data_sha256=source.data_sha256,
        perceptual=describe(job.recipe.loss.perceptual if job.stage.compares else "none"),
        losses=provenance.losses(job.stage, job.recipe),
        figures=figures,
        command=checkpoints.read_run(job.out).get("command", provenance.command()),
    )
    keep = () if base is None else untouched(networks, base, start, job.stage)
    folder = job.out / "bundle"
    export(networks, run.shipped(), folder, config, base=base, keep=keep, card=card, write=run.team.main)
    if run.team.main and is_flux(config.licence):
        run.progress.note(f"{folder}: derived from FLUX.1 [dev], so its non-commercial licence binds it (README.md)")
