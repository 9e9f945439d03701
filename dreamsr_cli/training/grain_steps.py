"""Training steps of grain: what the frozen networks make of bad crops, as users get it, and grain on it.

Axes: B batch, P Q pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dreamsr_cli.losses import contrast_distance
from dreamsr_cli.models.cleaner import PLEASING
from dreamsr_cli.models.enlarger import FACTOR, MANNERS
from dreamsr_cli.models.perceptual import Perceptual
from dreamsr_cli.training.both_stages import remove, texts_of
from dreamsr_cli.training.clean_steps import cleaned
from dreamsr_cli.training.finishing import decoded_texture, grain_on
from dreamsr_cli.training.networks import Networks
from dreamsr_cli.training.recipe import Recipe
from dreamsr_cli.training.step_data import Crops, Outcome


def grain_step(networks: Networks, recipe: Recipe, perceptual: Perceptual | None, crops: Crops) -> Outcome:
    """A step of stage `grain`. LPIPS asks for what a good picture is taken for, and by itself leaves hardly any grain;
    the distance of local contrast asks for as much fine texture as the good crop has, wherever that lies."""
    weights, target = recipe.loss, crops.hq * 2 - 1
    plain = finished(networks, recipe, crops)
    made = plain + grain_on(networks, recipe, crops, plain)
    contrast = contrast_distance(made, target)
    loss, terms = weights.grain_contrast * contrast, {"grain_contrast": contrast.detach()}
    if perceptual is not None and weights.grain_perceptual:
        distance = perceptual(made, target).mean()
        loss, terms["grain_perceptual"] = loss + weights.grain_perceptual * distance, distance.detach()
    terms["grain_levels"] = _levels(made - plain)
    return Outcome(loss, terms)


@torch.no_grad()
def finished(networks: Networks, recipe: Recipe, crops: Crops) -> Tensor:
    """Bad crops after both stages, decoded, (B, 3, P, Q), float32, within [-1, 1]: cleaned instead of stage 1 where
    there is a cleaner. Undamaged ones are enlarged instead where there is an enlarger of their scale. Of what stage 2
    changes as much is kept as the bundle's users get."""
    begun_B3PQ, has_begun_B = _begun(networks, crops)
    z_dr = networks.encode(begun_B3PQ)
    if not has_begun_B.all():
        z_lq = networks.encode(crops.lq_up * 2 - 1)
        removed = z_lq
        if networks.lora is not None:
            removed = remove(networks, z_lq, *texts_of(networks, crops), networks.config.sampling)
        z_dr = torch.where(has_begun_B[:, None, None, None], z_dr, removed)
    made_B3PQ = decoded_texture(networks, recipe, crops, z_dr)
    blended_B3PQ = torch.lerp(begun_B3PQ, made_B3PQ, networks.config.defaults.texture)
    return torch.where(has_begun_B[:, None, None, None], blended_B3PQ, made_B3PQ).clamp(-1, 1)


def _begun(networks: Networks, crops: Crops) -> tuple[Tensor, Tensor]:
    """(B, 3, P, Q) in [-1, 1]: the pictures that texture begins from where they are the cleaner's or the enlarger's,
    the enlarged input elsewhere; and (B,), where they are."""
    begun_B3PQ = crops.lq_up.float().clone()
    known_B = torch.zeros(len(begun_B3PQ), dtype=torch.bool, device=begun_B3PQ.device)
    if crops.lq is not None and crops.hq.shape[2] == FACTOR * crops.lq.shape[2]:
        if networks.cleaner is not None:
            begun_B3PQ, known_B = cleaned(networks, crops, PLEASING).float(), ~known_B
        for manner in MANNERS:
            those = [index for index, looks in enumerate(crops.looks) if looks == manner]
            if networks.enlarger is not None and those:
                begun_B3PQ[those] = networks.enlarger(networks.patches.refiner, crops.lq_up[those], manner)
                known_B[those] = True
    return begun_B3PQ.clamp(0, 1) * 2 - 1, known_B


def _levels(grain_BCPQ: Tensor) -> Tensor:
    """Root mean square in levels of 255."""
    return grain_BCPQ.detach().square().mean().sqrt() * 127.5


@torch.no_grad()
def grain_figures(networks: Networks, recipe: Recipe, perceptual: Perceptual | None, crops: Crops) -> dict[str, float]:
    """Of finished crops without and with grain: the distance of local contrast, and LPIPS where there is one."""
    plain = finished(networks, recipe, crops)
    grain = grain_on(networks, recipe, crops, plain)
    target, figures = crops.hq * 2 - 1, {"grain_levels": float(_levels(grain))}
    for name, made in (("textured", plain), ("grained", (plain + grain).clamp(-1, 1))):
        figures[f"{name}_contrast"] = float(contrast_distance(made, target))
        if perceptual is not None:
            figures[f"{name}_perceptual"] = float(perceptual(made, target).mean())
    return figures
