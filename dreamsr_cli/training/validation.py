"""Figures on photos held back from training, on the same crops and draws every time."""

from __future__ import annotations

import torch

from dreamsr_cli import flow
from dreamsr_cli.models.perceptual import Perceptual
from dreamsr_cli.training.crops import CropSettings, batches
from dreamsr_cli.training.networks import Networks
from dreamsr_cli.training.photos import PhotoSource
from dreamsr_cli.training.recipe import Recipe
from dreamsr_cli.training.stages import Stage
from dreamsr_cli.training.steps import draw_texture, encode_texts, remove, texture_velocity

CROPS = 16
"""Held-out crops of the first plan's size."""
TEXTURE_T = (0.2, 0.8)
"""Times at which the clean latent that texture steps predict is scored."""


@torch.no_grad()
def validate(
    networks: Networks, recipe: Recipe, source: PhotoSource, perceptual: Perceptual | None, stage: Stage
) -> dict[str, float]:
    """Mean PSNR in dB (RGB, peak 1) and perceptual distance of the enlarged input ("cubic") and of stage 1
    ("removed"), and the mean squared error of the predicted clean latent at fixed times; for stage autoencoder
    the round trip's PSNR."""
    plan = recipe.data.crops[0]
    settings = CropSettings(
        crop=plan.size, preset=recipe.data.preset, seed=recipe.seed, dead_leaves=0.0, p_full=0.0, held_out=True
    )
    figures: dict[str, list[float]] = {}

    def add(name: str, value: torch.Tensor | float) -> None:
        figures.setdefault(name, []).append(float(value))

    device = networks.transformer.device
    stream = batches(source, settings, min(plan.batch, CROPS), workers=0)
    for _ in range(max(1, CROPS // plan.batch)):
        batch = next(stream)
        hq, lq_up = batch.hq_BCPQ.to(device) * 2 - 1, batch.lq_up_BCPQ.to(device) * 2 - 1
        autoencoder = networks.autoencoder
        z_0, z_lq = autoencoder.encode(hq), autoencoder.encode(lq_up)
        add("round_trip_psnr", _psnr(autoencoder.decode(z_0), hq))
        if not stage.restore:
            continue
        local, glob = encode_texts(networks, batch.local_texts), encode_texts(networks, batch.global_texts)
        dtype = networks.transformer.dtype
        with torch.autocast(device.type, dtype, enabled=device.type == "cpu" and dtype != torch.float32):
            z_dr = remove(networks, z_lq, local, glob, recipe.sampling)
        removed = autoencoder.decode(z_dr).clamp(-1, 1)
        add("cubic_psnr", _psnr(lq_up, hq))
        add("removed_psnr", _psnr(removed, hq))
        if perceptual is not None:
            add("cubic_perceptual", perceptual(lq_up, hq).mean())
            add("removed_perceptual", perceptual(removed, hq).mean())
        _, eps = draw_texture(recipe.seed, -1 - batch.step, z_0.shape, (0.0, 1.0))
        for t in TEXTURE_T:
            t_B = z_0.new_full((len(z_0),), t)
            z_t = flow.mix(z_0, eps.to(device), t)
            v = texture_velocity(networks, z_t, t_B, z_dr, local, glob, recipe.sampling.prediction)
            add(f"clean_{t}", (flow.predict_clean(z_t, v, t) - z_0).square().mean())
    stream.close()
    return {name: sum(values) / len(values) for name, values in figures.items()}


def _psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return 10 * torch.log10(4 / (a.clamp(-1, 1) - b).square().mean((1, 2, 3))).mean()
