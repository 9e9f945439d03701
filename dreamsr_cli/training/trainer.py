"""The training loop: any stage, checkpointed, resumable at a step, the same result whatever the interruptions."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import torch

from dreamsr_cli import __version__
from dreamsr_cli.config import TrainingRecord
from dreamsr_cli.draws import generator
from dreamsr_cli.errors import TrainingError
from dreamsr_cli.models.bundle import Bundle
from dreamsr_cli.models.perceptual import Lpips, Perceptual, load_perceptual
from dreamsr_cli.progress import Progress
from dreamsr_cli.training import checkpoints
from dreamsr_cli.training.crops import Batch, CropSettings, batches
from dreamsr_cli.training.networks import Masters, Networks, build, export
from dreamsr_cli.training.photos import PhotoSource
from dreamsr_cli.training.recipe import Recipe, recipe_dict
from dreamsr_cli.training.stages import Stage
from dreamsr_cli.training.steps import reconstruction_step, restoration_step
from dreamsr_cli.training.validation import validate
from dreamsr_cli.weights import cache_folder

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
    start: Bundle | None
    perceptual_weights: Path | None
    resume: bool
    max_steps: int | None
    device: torch.device
    dtype: torch.dtype
    compile: bool = False


@dataclass(frozen=True)
class TrainResult:
    """What it came to."""

    bundle: Path
    steps: int
    seconds: float
    validation: dict[str, float]


def train(job: TrainJob, progress: Progress) -> TrainResult:
    """Run the stage up to the recipe's steps (or `max_steps` more), then write `out/bundle/`.

    Raises `TrainingError` on a loss that is not finite, on a run folder of other settings, and where there are too
    few photos.
    """
    began = time.monotonic()
    recipe, stage = job.recipe, job.stage
    settings = {
        "stage": stage.name,
        "recipe": recipe_dict(recipe),
        "data": str(job.data.resolve()),
        "start": None if job.start is None else job.start.sha256,
    }
    perceptual = load_perceptual(recipe.loss.perceptual if stage.restore else "none", job.perceptual_weights)
    if isinstance(perceptual, Lpips):
        perceptual.to(job.device)
    checkpoints.start_run(job.out, settings, job.resume)
    source = PhotoSource(
        job.data, cache_folder() / "photos", recipe.data.hold_out, smallest=max(c.size for c in recipe.data.crops)
    )
    for skipped in source.skipped:
        progress.note(f"skipped {skipped.name}: {skipped.reason}")
    networks = build(recipe, job.start)
    saved = checkpoints.load(job.out)
    if stage.fit_transform and saved is None:
        kept = _fit(networks, source, recipe)
        progress.note(f"patch transform keeps {kept['variance_kept']:.4f} of the variance, {kept['psnr_db']:.1f} dB")
        checkpoints.append_log(job.out, {"step": 0, **kept})
    networks.to(job.device, job.dtype)
    if job.compile:
        networks.compile_blocks()
    run = _Run(job, networks, source, perceptual)
    if saved is not None:
        run.restore(*saved)
    last = recipe.steps if job.max_steps is None else min(recipe.steps, run.step + job.max_steps)
    figures = run.go(last, progress)
    record = TrainingRecord(
        recipe=job.recipe_name,
        steps=run.step + networks.config.training.steps,
        data_sha256=source.data_sha256,
        dreamsr=__version__,
    )
    config = dataclasses.replace(recipe.bundle_config(), control=networks.config.control, training=record)
    export(networks, run.masters, job.out / "bundle", config)
    return TrainResult(job.out / "bundle", run.step, time.monotonic() - began, figures)


class _Run:
    """State of a run between checkpoints."""

    def __init__(self, job: TrainJob, networks: Networks, source: PhotoSource, perceptual: Perceptual | None) -> None:
        self.job, self.networks, self.source, self.perceptual = job, networks, source, perceptual
        self.step = 0
        self._between_steps = True
        optim = job.recipe.optim
        named = networks.named(job.stage.trains)
        for parameter in [*networks.dit.parameters(), *networks.controlnet.parameters()]:
            parameter.requires_grad_(False)
        for parameter in named.values():
            parameter.requires_grad_(True)
        # Matrices first, since only they decay; the optimizer's order is the masters' order.
        named = dict(sorted(named.items(), key=lambda item: item[1].ndim < 2))
        self.masters = Masters(named, optim.ema)
        decays = [m for m in self.masters.master if m.ndim >= 2]
        plain = [m for m in self.masters.master if m.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decays, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=optim.lr,
            betas=optim.betas,
            fused=True,
        )

    def restore(self, tensors: dict[str, dict[str, torch.Tensor]], state: dict) -> None:
        """Continue from a checkpoint's content."""
        with torch.no_grad():
            for name, master, average in zip(
                self.masters.names, self.masters.master, self.masters.average, strict=True
            ):
                master.copy_(tensors["weights"][name])
                average.copy_(tensors["average"][name])
            for name in ("mean_K", "basis_CK", "gain_C"):
                getattr(self.networks.autoencoder, name).copy_(tensors["transform"][name])
        self.masters.restore()
        checkpoints.restore_optimizer(self.optimizer, self.masters.names, tensors["optimizer"])
        self.step = int(state["step"])

    def save(self) -> None:
        masters, autoencoder = self.masters, self.networks.autoencoder
        checkpoints.save(
            self.job.out,
            self.step,
            {
                "weights": dict(zip(masters.names, masters.master, strict=True)),
                "average": masters.averages(),
                "optimizer": checkpoints.optimizer_tensors(self.optimizer, masters.names),
                "transform": {name: getattr(autoencoder, name) for name in ("mean_K", "basis_CK", "gain_C")},
            },
            {"recipe": self.job.recipe_name, "version": __version__},
        )

    def go(self, last: int, progress: Progress) -> dict[str, float]:
        """Steps up to `last`; saves on the way, at the end and when interrupted. Returns the last validation's
        figures."""
        recipe, figures = self.job.recipe, {}
        progress.phase(f"train {self.job.stage.name}", last)
        progress.advance(self.step)
        crops = _Crops(self.source, recipe, self.step)
        try:
            while self.step < last:
                began = time.monotonic()
                terms = self._one(next(crops))
                progress.advance()
                if self.step % recipe.log_every == 0:
                    line = {k: round(v, 5) for k, v in terms.items()}
                    line["seconds"] = round(time.monotonic() - began, 3)
                    checkpoints.append_log(self.job.out, {"step": self.step, **line})
                if self.step % recipe.save_every == 0:
                    self.save()
                if self.step % recipe.validate_every == 0 or self.step == last:
                    figures = self._validate(progress)
        finally:
            crops.close()
            # Also on Ctrl-C: the step in progress is lost, none before it. Weights that are half a step ahead are
            # not saved: the checkpoint before them leads to the same result.
            if self._between_steps:
                self.save()
        return figures

    def _one(self, batch: Batch) -> dict[str, float]:
        job, recipe = self.job, self.job.recipe
        hq, lq_up = batch.hq_BCPQ.to(job.device), batch.lq_up_BCPQ.to(job.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, self.step)
        with torch.autocast(job.device.type, job.dtype, enabled=job.dtype != torch.float32):
            if job.stage.restore:
                texts = blank_some(recipe, self.step, batch.local_texts, batch.global_texts)
                loss, terms = restoration_step(self.networks, recipe, self.perceptual, self.step, hq, lq_up, texts)
            else:
                loss, terms = reconstruction_step(self.networks, hq)
        loss.backward()
        norm = self.masters.take_gradients(recipe.optim.clip)
        if not torch.isfinite(torch.tensor([float(loss.detach()), norm])).all():
            raise TrainingError(
                f"the loss is not finite at step {self.step}",
                "write the last checkpoint's bundle with --resume --max-steps 0, then start a new run from it with "
                "--init-from and a lower --set optim.lr",
            )
        self._between_steps = False
        self.optimizer.step()
        self.masters.publish(self.step)
        self.step += 1
        self._between_steps = True
        return {"loss": float(loss.detach()), **terms, "norm": norm}

    def _validate(self, progress: Progress) -> dict[str, float]:
        self.masters.show_average()
        figures = validate(self.networks, self.job.recipe, self.source, self.perceptual, self.job.stage)
        self.masters.restore()
        checkpoints.append_log(self.job.out, {"step": self.step, "validation": figures})
        progress.note(f"step {self.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
        return figures


class _Crops:
    """Batches in step order; the size of a step's crops is drawn from the step alone."""

    def __init__(self, source: PhotoSource, recipe: Recipe, start: int) -> None:
        plans = recipe.data.crops
        self._recipe, self._step = recipe, start
        before = [0] * len(plans)
        for step in range(start):
            before[plan_of_step(recipe, step)] += 1
        self._streams: list[Generator[Batch]] = [
            batches(source, crop_settings(recipe, i), plan.batch, before[i], recipe.data.workers)
            for i, plan in enumerate(plans)
        ]

    def __next__(self) -> Batch:
        plan = plan_of_step(self._recipe, self._step)
        self._step += 1
        return next(self._streams[plan])

    def close(self) -> None:
        for stream in self._streams:
            stream.close()


def plan_of_step(recipe: Recipe, step: int) -> int:
    """Index into `recipe.data.crops` of the crop size used in `step`."""
    draw = generator(recipe.seed, "crop-plan", step).random()
    for index, plan in enumerate(recipe.data.crops):
        draw -= plan.share
        if draw < 0:
            return index
    return len(recipe.data.crops) - 1


def crop_settings(recipe: Recipe, plan: int, held_out: bool = False) -> CropSettings:
    """Settings of the crops of one plan; plans draw from different seeds."""
    data = recipe.data
    return CropSettings(
        crop=data.crops[plan].size,
        preset=data.preset,
        mix=tuple(sorted(data.mix.items())),
        usm=data.sharpen,
        seed=recipe.seed + 1000 * plan,
        dead_leaves=0.0 if held_out else data.dead_leaves,
        p_full=0.0 if held_out else data.full_photo,
        held_out=held_out,
    )


def blank_some(recipe: Recipe, step: int, local: list[str], glob: list[str]) -> tuple[list[str], list[str]]:
    """The prompts, with both of a sample empty at the recipe's rate, so that `--captioner none` works."""
    kept = [generator(recipe.seed, "no-text", step, b).random() >= recipe.data.no_text for b in range(len(local))]
    return [t if k else "" for t, k in zip(local, kept, strict=True)], [
        t if k else "" for t, k in zip(glob, kept, strict=True)
    ]


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then cosine decay to `final` of the peak at the recipe's last step."""
    optim = recipe.optim
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    done = min(1.0, (step - optim.warmup) / max(1, recipe.steps - optim.warmup))
    cosine = 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * done))))
    return optim.lr * (optim.final + (1 - optim.final) * cosine)


def _fit(networks: Networks, source: PhotoSource, recipe: Recipe) -> dict[str, float]:
    stream = batches(source, crop_settings(recipe, 0), 16, workers=0)
    tensors = [next(stream).hq_BCPQ * 2 - 1 for _ in range(FIT_CROPS // 16)]
    return networks.autoencoder.fit(tensors)
