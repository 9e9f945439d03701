"""What the networks make of held-out crops, for the sheets in the run folder: both stages on whole crops.

Axes: B batch, C channels, H W latent.
"""

from __future__ import annotations

import torch

from dreamsr_cli.draws import generator
from dreamsr_cli.models.cleaner import FAITHFUL, PLEASING
from dreamsr_cli.training.both_stages import encode_texts, remove, textured
from dreamsr_cli.training.clean_steps import cleaned, cleaned_latent
from dreamsr_cli.training.crops import batches
from dreamsr_cli.training.finishing import added_by_default, grain_on
from dreamsr_cli.training.grain_steps import finished
from dreamsr_cli.training.looks_steps import enlarged
from dreamsr_cli.training.networks import Networks
from dreamsr_cli.training.recipe import Recipe
from dreamsr_cli.training.samples import Row
from dreamsr_cli.training.sources import Source
from dreamsr_cli.training.stages import Stage
from dreamsr_cli.training.step_crops import crop_settings, on_device

SHOWN = 4
"""Crops on a sheet."""


@torch.no_grad()
def sample_rows(networks: Networks, recipe: Recipe, source: Source, stage: Stage) -> list[Row]:
    """One row per crop, pictures in [0, 1]: the same crops, texts and noise every time."""
    stream = batches(source, crop_settings(recipe, 0, held_out=True), SHOWN, workers=0)
    crops = on_device(next(stream), networks.device)
    stream.close()
    autoencoder, sampling = networks.autoencoder, networks.config.sampling
    shown = {"LQ": crops.lq_up, "HQ": crops.hq}
    if not stage.restore:
        if stage.enlarges:
            shown["enlarged"] = enlarged(networks, crops)
        elif stage.cleans:
            shown["cleaned"] = cleaned(networks, crops, PLEASING if stage.pleases else FAITHFUL)
            if stage.pleases and recipe.loss.cleaner_seen == "finished":
                picture = shown["cleaned"].clamp(0, 1) * 2 - 1
                shown["finished"] = (picture + added_by_default(networks, recipe, crops, picture)) / 2 + 0.5
        elif not stage.judges:
            shown["round trip"] = autoencoder.decode(autoencoder.encode(crops.hq * 2 - 1)) / 2 + 0.5
    else:
        glob = encode_texts(networks, crops.global_texts)
        local = encode_texts(networks, crops.local_texts) if networks.config.control.text else glob
        z = autoencoder.encode(crops.lq_up * 2 - 1)
        if networks.lora is not None:
            z = remove(networks, z, local, glob, sampling)
            shown["removed"] = autoencoder.decode(z, restored=True) / 2 + 0.5
        begun = cleaned_latent(networks, crops)
        z = z if begun is None else begun
        noise = [generator(recipe.seed, "sample-noise", b).standard_normal(z.shape[1:]) for b in range(len(z))]
        eps = torch.stack([torch.from_numpy(n).float() for n in noise]).to(z)
        made = autoencoder.decode(textured(networks, z, eps, local, glob, sampling))
        shown["textured"] = made / 2 + 0.5
        if networks.grain is not None:
            plain = finished(networks, recipe, crops)
            shown["grained"] = (plain + grain_on(networks, recipe, crops, plain)) / 2 + 0.5
    names = [f"crop {b + 1}: {text}" for b, text in enumerate(crops.local_texts)]
    return [(name, {label: x[b] for label, x in shown.items()}) for b, name in enumerate(names)]
