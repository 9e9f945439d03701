"""Figures on photos held back from training, on the same crops and draws every time."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from dreamsr_cli import flow
from dreamsr_cli.config import LOOKS
from dreamsr_cli.models.cleaner import FAITHFUL, PLEASING
from dreamsr_cli.models.perceptual import Perceptual
from dreamsr_cli.training.both_stages import draw_texture, encode_texts, remove, texture_velocity, textured
from dreamsr_cli.training.clean_steps import cleaned, cleaned_latent
from dreamsr_cli.training.crops import batches
from dreamsr_cli.training.finishing import added_by_default
from dreamsr_cli.training.grain_steps import grain_figures
from dreamsr_cli.training.looks_steps import enlarged, judged
from dreamsr_cli.training.networks import Networks
from dreamsr_cli.training.recipe import Recipe
from dreamsr_cli.training.sources import Source
from dreamsr_cli.training.stages import Stage
from dreamsr_cli.training.step_crops import crop_settings, on_device

CROPS = 16
"""Held-out crops of the first plan's size."""
JUDGED = 96
"""Held-out crops for a judge, which needs many and takes little time for each."""
GRAINED = 48
"""Held-out crops for grain, whose figures differ little."""
BATCH = 8
"""Crops at once, at most."""
TEXTURE_T = (0.2, 0.8)
"""Times at which the clean latent that texture steps predict is scored."""


@torch.no_grad()
def validate(
    networks: Networks, recipe: Recipe, source: Source, perceptual: Perceptual | None, stage: Stage
) -> dict[str, float]:
    """Mean PSNR in dB (RGB, peak 1) and perceptual distance of the enlarged input ("cubic") and of stage 1
    ("removed") and of both stages ("textured"), and the mean squared error of the predicted clean latent at fixed
    times; for stage autoencoder the round trip's PSNR, for stage cleanliness how often and how surely it is right, for
    stage enlarger the PSNR of the cubic and of the enlarger, for stage cleaner PSNR and LPIPS of the cubic and of the
    cleaner, and of what users get where the loss sees that; for stage grain what `grain_figures` says.
    Called under the run's mixed precision."""
    plan = recipe.data.crops[0]
    settings, sampling = crop_settings(recipe, 0, held_out=True), networks.config.sampling
    if stage.judges:
        return _judged(networks, recipe, source)
    if stage.enlarges:
        return _enlarged(networks, recipe, source)
    if stage.cleans:
        return _cleaned(networks, recipe, source, perceptual, PLEASING if stage.pleases else FAITHFUL)
    if stage.grains:
        return _grained(networks, recipe, source, perceptual)
    figures: dict[str, list[float]] = {}

    def add(name: str, value: torch.Tensor | float) -> None:
        figures.setdefault(name, []).append(float(value))

    device = networks.device
    batch_size = min(plan.batch, BATCH)
    stream = batches(source, settings, batch_size, workers=0)
    for _ in range(max(1, CROPS // batch_size)):
        batch = next(stream)
        hq, lq_up = batch.hq_BCPQ.to(device) * 2 - 1, batch.lq_up_BCPQ.to(device) * 2 - 1
        autoencoder = networks.autoencoder
        z_0, z_lq = networks.encode(hq), networks.encode(lq_up)
        add("round_trip_psnr", _psnr(autoencoder.decode(z_0), hq))
        if not stage.restore:
            continue
        glob = encode_texts(networks, batch.global_texts)
        local = encode_texts(networks, batch.local_texts) if networks.config.control.text else glob
        add("cubic_psnr", _psnr(lq_up, hq))
        if perceptual is not None:
            add("cubic_perceptual", perceptual(lq_up, hq).mean())
        condition = z_lq
        if networks.lora is not None:
            condition = z_dr = remove(networks, z_lq, local, glob, sampling)
            removed = autoencoder.decode(z_dr, restored=True).clamp(-1, 1)
            add("removed_psnr", _psnr(removed, hq))
            if perceptual is not None:
                add("removed_perceptual", perceptual(removed, hq).mean())
        cleaned_BCHW = cleaned_latent(networks, on_device(batch, device))
        if cleaned_BCHW is not None:
            condition = cleaned_BCHW
        if recipe.condition == "erased" and stage.prior and batch.erased_BCPQ is not None:
            condition = networks.encode(batch.erased_BCPQ.to(device) * 2 - 1)
        _, eps = draw_texture(recipe.seed, -1 - batch.step, z_0.shape, (0.0, 1.0))
        for t in TEXTURE_T:
            t_B = z_0.new_full((len(z_0),), t)
            z_t = flow.mix(z_0, eps.to(device), t)
            v = texture_velocity(networks, z_t, t_B, condition, local, glob, sampling.prediction)
            add(f"clean_{t}", (flow.predict_clean(z_t, v, t) - z_0).square().mean())
        if networks.lora is None:
            continue
        # Stage 2 as the bundle runs it.
        made = autoencoder.decode(textured(networks, condition, eps.to(device), local, glob, sampling)).clamp(-1, 1)
        add("textured_psnr", _psnr(made, hq))
        if perceptual is not None:
            add("textured_perceptual", perceptual(made, hq).mean())
    stream.close()
    return {name: sum(values) / len(values) for name, values in figures.items()}


def _judged(networks: Networks, recipe: Recipe, source: Source) -> dict[str, float]:
    """Of a judge's opinions on held-out crops, degraded as training crops are: the mean cross-entropy, and for each
    of `LOOKS` the share of such crops that it takes for what they are."""
    settings = crop_settings(recipe, 0, held_out=True, mixed=True)
    stream = batches(source, settings, JUDGED, workers=0)
    batch = next(stream)
    stream.close()
    logits_BK, looks_B = judged(networks, on_device(batch, networks.device))
    figures = {"judge_entropy": float(F.cross_entropy(logits_BK, looks_B))}
    for index, looks in enumerate(LOOKS):
        those = logits_BK[looks_B == index].argmax(1)
        if len(those):
            figures[f"{looks}_right"] = float((those == index).float().mean())
    return figures


def _enlarged(networks: Networks, recipe: Recipe, source: Source) -> dict[str, float]:
    """PSNR of held-out crops, shrunk as training crops are, enlarged by the cubic and by the enlarger."""
    stream = batches(source, crop_settings(recipe, 0, held_out=True, mixed=True), JUDGED, workers=0)
    batch = next(stream)
    stream.close()
    crops = on_device(batch, networks.device)
    found: dict[str, list[torch.Tensor]] = {"cubic_psnr": [], "enlarged_psnr": []}
    for first in range(0, JUDGED, BATCH):
        part = slice(first, first + BATCH)
        assert crops.lq is not None
        few = replace(crops, hq=crops.hq[part], lq_up=crops.lq_up[part], lq=crops.lq[part], looks=crops.looks[part])
        for name, made in (("cubic_psnr", few.lq_up), ("enlarged_psnr", enlarged(networks, few))):
            found[name].append(_psnr(made * 2 - 1, few.hq * 2 - 1))
    return {name: float(torch.stack(values).mean()) for name, values in found.items()}


def _cleaned(
    networks: Networks, recipe: Recipe, source: Source, perceptual: Perceptual | None, manner: str
) -> dict[str, float]:
    """PSNR of held-out crops, degraded as training crops are, enlarged by the cubic and cleaned in that manner, and
    LPIPS where there is one; with `loss.cleaner_seen = "finished"` also after stage 2 and grain."""
    figures: dict[str, list[float]] = {}
    stream = batches(source, crop_settings(recipe, 0, held_out=True, mixed=True), BATCH, workers=0)
    for _ in range(JUDGED // BATCH):
        crops = on_device(next(stream), networks.device)
        target = crops.hq * 2 - 1
        pictures = {"cubic": crops.lq_up * 2 - 1, "cleaned": cleaned(networks, crops, manner).clamp(0, 1) * 2 - 1}
        if manner == PLEASING and recipe.loss.cleaner_seen == "finished":
            added = added_by_default(networks, recipe, crops, pictures["cleaned"])
            pictures["finished"] = (pictures["cleaned"] + added).clamp(-1, 1)
        for name, picture in pictures.items():
            figures.setdefault(f"{name}_psnr", []).append(float(_psnr(picture, target)))
            if perceptual is not None:
                figures.setdefault(f"{name}_perceptual", []).append(float(perceptual(picture, target).mean()))
    stream.close()
    return {name: sum(values) / len(values) for name, values in figures.items()}


def _grained(networks: Networks, recipe: Recipe, source: Source, perceptual: Perceptual | None) -> dict[str, float]:
    """Figures of held-out crops, degraded as training crops are, without and with grain."""
    figures: dict[str, list[float]] = {}
    stream = batches(source, crop_settings(recipe, 0, held_out=True, mixed=True), BATCH, workers=0)
    for _ in range(GRAINED // BATCH):
        found = grain_figures(networks, recipe, perceptual, on_device(next(stream), networks.device))
        for name, value in found.items():
            figures.setdefault(name, []).append(value)
    stream.close()
    return {name: sum(values) / len(values) for name, values in figures.items()}


def _psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return 10 * torch.log10(4 / (a.clamp(-1, 1) - b).square().mean((1, 2, 3))).mean()
