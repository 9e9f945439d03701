"""Training steps of polish on what the frozen networks make of bad crops.

Axes: B batch, P Q pixels.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dreamsr_cli.draws import generator
from dreamsr_cli.losses import pixel_distance
from dreamsr_cli.models.perceptual import Perceptual
from dreamsr_cli.training.finished_crops import finished, polished
from dreamsr_cli.training.networks import Networks
from dreamsr_cli.training.recipe import Recipe
from dreamsr_cli.training.step_data import Crops, Outcome


def polish_step(networks: Networks, recipe: Recipe, perceptual: Perceptual | None, crops: Crops) -> Outcome:
    """A step of stage `polish`: LPIPS of what comes out, and the pixel distance, which holds colours and brightness."""
    assert networks.polish is not None
    weights = recipe.loss
    plain, cubic, target = _pictures(networks, recipe, crops)
    made = plain + networks.polish(plain, cubic)
    distance = pixel_distance(made, target, weights.pixel_kind)
    loss, terms = weights.polish_pixel * distance, {"polish_pixel": distance.detach()}
    if perceptual is not None and weights.polish_perceptual:
        looks = perceptual(made, target).mean()
        loss, terms["polish_perceptual"] = loss + weights.polish_perceptual * looks, looks.detach()
    return Outcome(loss, terms)


@torch.no_grad()
def _pictures(networks: Networks, recipe: Recipe, crops: Crops) -> tuple[Tensor, Tensor, Tensor]:
    """(finished crops, the cubic's, good ones) on [-1, 1]. Crops that come again are turned otherwise each time, all
    of a batch in the same way; what was made of them is remembered as it was."""
    if crops.place is None:
        return finished(networks, recipe, crops), crops.lq_up * 2 - 1, crops.hq * 2 - 1
    known, key = networks.finished, (crops.place, crops.first)
    if key not in known:
        # Noise must not depend on whether the run was resumed meanwhile.
        made = finished(networks, recipe, replace(crops, step=crops.place))
        known[key] = ((made / 2 + 0.5) * 255).round().to(torch.uint8)
    turn = int(generator(recipe.seed, "polish-turn", crops.step).integers(8))
    plain = known[key].float() / 255
    plain, cubic, target = (_turned(x * 2 - 1, turn) for x in (plain, crops.lq_up, crops.hq))
    return plain, cubic, target


def _turned(rgb_BCPQ: Tensor, turn: int) -> Tensor:
    """Turned by `turn % 4` quarters, and mirrored from 4 on."""
    made = torch.rot90(rgb_BCPQ, turn % 4, (2, 3))
    return (made.flip(3) if turn >= 4 else made).contiguous()


@torch.no_grad()
def polish_figures(networks: Networks, recipe: Recipe, perceptual: Perceptual | None, crops: Crops) -> dict[str, float]:
    """Of finished crops without and with polish: PSNR in dB (RGB, peak 1), and LPIPS where there is one."""
    plain = finished(networks, recipe, crops)
    target, figures = crops.hq * 2 - 1, {}
    for name, made in (("textured", plain), ("polished", polished(networks, crops, plain))):
        errors_B = (made - target).square().mean((1, 2, 3))
        figures[f"{name}_psnr"] = float(10 * torch.log10(4 / errors_B).mean())
        if perceptual is not None:
            figures[f"{name}_perceptual"] = float(perceptual(made, target).mean())
    return figures
