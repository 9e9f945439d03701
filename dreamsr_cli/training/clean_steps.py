"""Training steps of the cleaner, and what texture steps begin from where a bundle has one.

Axes: B batch, P Q pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dreamsr_cli.errors import TrainingError
from dreamsr_cli.losses import hinge_generator, lattice_strength, rounded_distance
from dreamsr_cli.models.cleaner import ALIGN, FAITHFUL, PLEASING, Cleaner
from dreamsr_cli.models.fourfold import FACTOR
from dreamsr_cli.models.perceptual import Perceptual
from dreamsr_cli.training.finishing import added_by_default
from dreamsr_cli.training.networks import Networks
from dreamsr_cli.training.recipe import Recipe
from dreamsr_cli.training.step_data import Critic, Crops, Outcome


def clean_step(networks: Networks, recipe: Recipe, crops: Crops) -> Outcome:
    """A step of stage `cleaner`: the distance of faithfully cleaned and good crops. Raises as `cleaned` does."""
    loss = rounded_distance(cleaned(networks, crops, FAITHFUL), crops.hq, recipe.loss.cleaner_knee)
    return Outcome(loss, {"clean_pixel": loss.detach()})


def please_step(
    networks: Networks, recipe: Recipe, perceptual: Perceptual | None, critic: Critic | None, crops: Crops
) -> Outcome:
    """A step of stage `cleaner-looks`: that distance, LPIPS, the lattice and the GAN term of pleasingly cleaned crops.
    Raises as `cleaned` does."""
    return _pleased(networks, recipe, perceptual, critic, cleaned(networks, crops, PLEASING), crops)


def both_step(
    networks: Networks, recipe: Recipe, perceptual: Perceptual | None, critic: Critic | None, crops: Crops
) -> Outcome:
    """A step of stage `cleaner-both`: the losses of `clean_step` and `please_step`, from one way down, which learns
    from both. Raises as `cleaned` does."""
    cleaner, lq = _ready(networks, crops)
    faithful, pleasing = (crops.lq_up + added for added in cleaner.both(lq, recipe.loss.cleaner_sharing))
    distance = rounded_distance(faithful, crops.hq, recipe.loss.cleaner_knee)
    pleased = _pleased(networks, recipe, perceptual, critic, pleasing, crops)
    terms = {"clean_faithful": distance.detach(), **pleased.terms}
    return pleased._replace(loss=distance + pleased.loss, terms=terms)


def _pleased(
    networks: Networks,
    recipe: Recipe,
    perceptual: Perceptual | None,
    critic: Critic | None,
    made: Tensor,
    crops: Crops,
) -> Outcome:
    """The second manner's loss of crops (B, 3, P, Q) that it made, about [0, 1]."""
    weights = recipe.loss
    loss = rounded_distance(made, crops.hq, weights.cleaner_knee)
    terms = {"clean_pixel": loss.detach()}
    picture, target = made.clamp(0, 1) * 2 - 1, crops.hq * 2 - 1
    if perceptual is not None and weights.cleaner_perceptual:
        seen = picture
        if weights.cleaner_seen == "finished":
            # Without a gradient of its own: the cleaner could keep grain away by smoothing what it looks at.
            seen = picture + added_by_default(networks, recipe, crops, picture)
        distance = perceptual(seen, target).mean()
        loss, terms["clean_perceptual"] = loss + weights.cleaner_perceptual * distance, distance.detach()
    if weights.lattice:
        lattice = lattice_strength((made - crops.hq) * 2)
        loss, terms["clean_lattice"] = loss + weights.lattice * lattice, lattice.detach()
    if critic is not None and weights.gan:
        adversarial = hinge_generator(critic(picture))
        loss, terms["clean_gan"] = loss + weights.gan * adversarial, adversarial.detach()
    return Outcome(loss, terms, picture.detach(), target)


def cleaned(networks: Networks, crops: Crops, manner: str) -> Tensor:
    """The bad crops cleaned in one of `MANNERS`, (B, 3, P, Q), float32, about [0, 1]. Raises `TrainingError` for crops
    of another scale than the cleaner's, and for sides that it can't halve twice."""
    cleaner, lq = _ready(networks, crops)
    return crops.lq_up + cleaner(lq, manner)


def _ready(networks: Networks, crops: Crops) -> tuple[Cleaner, Tensor]:
    """The cleaner, and bad crops that it can take."""
    if networks.cleaner is None or crops.lq is None:
        raise ValueError("cleaning needs the cleaner and bad crops at their own size")
    if crops.hq.shape[2] != FACTOR * crops.lq.shape[2]:
        raise TrainingError(
            f"the cleaner knows pairs of scale {FACTOR}, these have {crops.hq.shape[2] // crops.lq.shape[2]}",
            f"make them with dreamsr degrade --scale {FACTOR}",
        )
    if any(side % ALIGN for side in crops.lq.shape[2:]):
        raise TrainingError(
            f"bad crops of {crops.lq.shape[3]} pixels: the cleaner needs multiples of {ALIGN}",
            "--set 'data.crops=[{size=256,batch=16,share=1.0}]'",
        )
    return networks.cleaner, crops.lq


@torch.no_grad()
def cleaned_latent(networks: Networks, crops: Crops) -> Tensor | None:
    """z_BCHW of the pleasingly cleaned crops: what texture begins from where a bundle has a cleaner. None where it has
    none, or for crops of another scale than its own."""
    if networks.cleaner is None or crops.lq is None or crops.hq.shape[2] != FACTOR * crops.lq.shape[2]:
        return None
    return networks.encode(cleaned(networks, crops, PLEASING).clamp(0, 1) * 2 - 1)
