"""The crops of each step, in step order: which size a step uses, and which of its crops are this process'."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace

import torch

from dreamsr_cli.draws import generator
from dreamsr_cli.training.crops import Batch, CropSettings, batches
from dreamsr_cli.training.distributed import share_of
from dreamsr_cli.training.recipe import Recipe
from dreamsr_cli.training.sources import SkippedPhoto, Source
from dreamsr_cli.training.step_data import Crops


class StepCrops:
    """Iterates over steps; each gives the crops of this process' passes."""

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        start: int,
        device: torch.device,
        *,
        rank: int = 0,
        world: int = 1,
        on_bad: Callable[[SkippedPhoto], None] | None = None,
    ) -> None:
        """From step `start` on. Raises `UsageError` for a batch that `world` processes can't share evenly."""
        self._recipe, self._step, self._device = recipe, start, device
        plans = recipe.data.crops
        before = [0] * len(plans)
        for step in range(start):
            before[plan_of_step(recipe, step)] += 1
        self._streams: list[Generator[Batch]] = [
            batches(
                source,
                crop_settings(recipe, i),
                share_of(plan.batch, rank, world, recipe.accumulate)[1],
                before[i],
                recipe.data.workers,
                rank=rank,
                world=world,
                accumulate=recipe.accumulate,
                on_bad=on_bad,
            )
            for i, plan in enumerate(plans)
        ]

    def __next__(self) -> list[Crops]:
        stream = self._streams[plan_of_step(self._recipe, self._step)]
        made = [self._ready(next(stream)) for _ in range(self._recipe.accumulate)]
        self._step += 1
        return made

    def close(self) -> None:
        """End the processes that make crops."""
        for stream in self._streams:
            stream.close()

    def _ready(self, batch: Batch) -> Crops:
        crops = on_device(batch, self._device)
        texts = blank_some(self._recipe, self._step, batch.local_texts, batch.global_texts, batch.first)
        # Draws go by the run's step, not by how often this size of crops came before.
        return replace(crops, step=self._step, local_texts=texts[0], global_texts=texts[1])


def on_device(batch: Batch, device: torch.device) -> Crops:
    """The batch as a step wants it."""
    return Crops(
        batch.step,
        batch.hq_BCPQ.to(device),
        batch.lq_up_BCPQ.to(device),
        batch.local_texts,
        batch.global_texts,
        None if batch.erased_BCPQ is None else batch.erased_BCPQ.to(device),
        batch.first,
        batch.lq_BCPQ.to(device),
        tuple(batch.looks),
    )


def plan_of_step(recipe: Recipe, step: int) -> int:
    """Index into `recipe.data.crops` of the crop size used in `step`."""
    draw = generator(recipe.seed, "crop-plan", step).random()
    for index, plan in enumerate(recipe.data.crops):
        draw -= plan.share
        if draw < 0:
            return index
    return len(recipe.data.crops) - 1


def crop_settings(recipe: Recipe, plan: int, held_out: bool = False, mixed: bool = False) -> CropSettings:
    """Settings of the crops of one plan; plans draw from different seeds. Held-out crops have one preset, unless
    `mixed`."""
    data = recipe.data
    return CropSettings(
        crop=data.crops[plan].size,
        preset=data.preset,
        mix=() if held_out and not mixed else tuple(sorted(data.mix.items())),
        usm=data.sharpen,
        seed=recipe.seed + 1000 * plan,
        dead_leaves=0.0 if held_out else data.dead_leaves,
        p_full=0.0 if held_out else data.full_photo,
        full_side=data.full_side,
        full_sides=data.full_sides,
        slanted=0.0 if held_out else data.slanted,
        recoloured=0.0 if held_out else data.recoloured,
        words=data.words,
        detail_words=0.0 if held_out else data.detail_words,
        full_crop=data.full_crop,
        turns=data.turns,
        held_out=held_out,
    )


def blank_some(
    recipe: Recipe, step: int, local: list[str], glob: list[str], first: int = 0
) -> tuple[list[str], list[str]]:
    """The prompts, with both of a sample empty at the recipe's rate, so that `--captioner none` works."""
    rate = recipe.data.no_text
    kept = [generator(recipe.seed, "no-text", step, first + b).random() >= rate for b in range(len(local))]
    return [t if k else "" for t, k in zip(local, kept, strict=True)], [
        t if k else "" for t, k in zip(glob, kept, strict=True)
    ]
