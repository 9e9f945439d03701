"""What the frozen networks make of bad crops, as users get it: for the stages that come after both stages.

Axes: B batch, P Q pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dreamsr_cli.models.enlarger import FACTOR, MANNERS
from dreamsr_cli.training.both_stages import draw_texture, encoded, remove, texts_of, textured
from dreamsr_cli.training.networks import Networks
from dreamsr_cli.training.recipe import Recipe
from dreamsr_cli.training.step_data import Crops


@torch.no_grad()
def finished(networks: Networks, recipe: Recipe, crops: Crops) -> Tensor:
    """Bad crops after both stages, decoded, (B, 3, P, Q), float32, within [-1, 1]. Undamaged ones are enlarged instead
    of restored where there is an enlarger of their scale."""
    sampling = networks.config.sampling
    _, z_0, z_lq = encoded(networks, crops)
    local, glob = texts_of(networks, crops)
    z_dr = z_lq.clone() if networks.lora is None else remove(networks, z_lq, local, glob, sampling)
    if networks.enlarger is not None and crops.lq is not None and crops.hq.shape[2] == FACTOR * crops.lq.shape[2]:
        for manner in MANNERS:
            those = [index for index, looks in enumerate(crops.looks) if looks == manner]
            if those:
                large_B3PQ = networks.enlarger(networks.patches.refiner, crops.lq_up[those], manner).clamp(0, 1)
                z_dr[those] = networks.encode(large_B3PQ * 2 - 1).to(z_dr.dtype)
    _, eps = draw_texture(recipe.seed, crops.step, z_0.shape, recipe.t_range, crops.first)
    z = textured(networks, z_dr, eps.to(z_0.device), local, glob, sampling)
    return networks.autoencoder.decode(z).float().clamp(-1, 1)


@torch.no_grad()
def polished(networks: Networks, crops: Crops, plain: Tensor) -> Tensor:
    """`finished` crops after polish, where there is one, (B, 3, P, Q), float32, within [-1, 1]."""
    if networks.polish is None:
        return plain
    return (plain + networks.polish(plain, crops.lq_up * 2 - 1)).clamp(-1, 1)
