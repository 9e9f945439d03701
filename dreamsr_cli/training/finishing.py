"""What users get from crops that are cleaned, enlarged or through stage 1: stage 2 by the bundle's defaults, decoded,
and grain on it.

Axes: B batch, C channels, H W latent, P Q pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dreamsr_cli.draws import generator
from dreamsr_cli.models.grain import MARGIN
from dreamsr_cli.training.both_stages import draw_texture, texts_of, textured
from dreamsr_cli.training.networks import Networks
from dreamsr_cli.training.recipe import Recipe
from dreamsr_cli.training.step_data import Crops


@torch.no_grad()
def decoded_texture(networks: Networks, recipe: Recipe, crops: Crops, z_dr_BCHW: Tensor) -> Tensor:
    """Stage 2 from latents after stage 1 or of pictures in its place, all steps, decoded: (B, 3, P, Q), float32, about
    [-1, 1]. Noise of sample b depends on (seed, step, first + b) alone."""
    local, glob = texts_of(networks, crops)
    _, eps = draw_texture(recipe.seed, crops.step, z_dr_BCHW.shape, recipe.t_range, crops.first)
    z = textured(networks, z_dr_BCHW, eps.to(z_dr_BCHW.device), local, glob, networks.config.sampling)
    return networks.autoencoder.decode(z).float()


def grain_on(networks: Networks, recipe: Recipe, crops: Crops, plain: Tensor) -> Tensor:
    """Grain, as strong as its network says, for crops (B, 3, P, Q) on [-1, 1] after stage 2: the same shape, float32.
    Noise of sample b depends on (seed, step, first + b) alone."""
    assert networks.grain is not None
    height, width = (side + 2 * MARGIN for side in plain.shape[2:])
    noise = np.empty((len(plain), 1, height, width), np.float32)
    for b in range(len(plain)):
        rng = generator(recipe.seed, "grain-step", crops.step, crops.first + b)
        rng.standard_normal(dtype=np.float32, out=noise[b, 0])
    return networks.grain(plain, crops.lq_up * 2 - 1, torch.from_numpy(noise).to(plain.device))


@torch.no_grad()
def added_by_default(networks: Networks, recipe: Recipe, crops: Crops, cleaned_B3PQ: Tensor) -> Tensor:
    """What stage 2 and grain, as much of them as the bundle's users get, change in cleaned crops (B, 3, P, Q)
    on [-1, 1]: the same shape, float32. A bundle without grain adds none."""
    defaults = networks.config.defaults
    cleaned_B3PQ = cleaned_B3PQ.float()
    made_B3PQ = decoded_texture(networks, recipe, crops, networks.encode(cleaned_B3PQ))
    plain_B3PQ = torch.lerp(cleaned_B3PQ, made_B3PQ, defaults.texture).clamp(-1, 1)
    added_B3PQ = plain_B3PQ - cleaned_B3PQ
    if networks.grain is None or not defaults.grain:
        return added_B3PQ
    return added_B3PQ + defaults.grain * grain_on(networks, recipe, crops, plain_B3PQ)
