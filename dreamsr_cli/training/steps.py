"""One training step as arithmetic: a batch of crops in, a loss and its terms out (method.md, Training; eq. 4 to 7).

Axes: B batch, C channels, H W latent, P Q pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dreamsr_cli import flow
from dreamsr_cli.draws import generator
from dreamsr_cli.errors import TrainingError
from dreamsr_cli.losses import (
    hinge_generator,
    lattice_strength,
    pixel_loss,
    removal_loss,
    velocity_loss,
)
from dreamsr_cli.models.perceptual import Perceptual, on_window
from dreamsr_cli.models.text_encoder import TextEmbedding
from dreamsr_cli.training.both_stages import draw_texture, encoded, remove, texts_of, texture_velocity
from dreamsr_cli.training.clean_steps import both_step, clean_step, cleaned_latent, please_step
from dreamsr_cli.training.grain_steps import grain_step
from dreamsr_cli.training.looks_steps import enlarge_step, judge_step
from dreamsr_cli.training.networks import Networks
from dreamsr_cli.training.recipe import PAPERS_GAN, Recipe
from dreamsr_cli.training.stages import CONTROL
from dreamsr_cli.training.step_data import Critic, Crops, Outcome

PIXEL_T = 0.2
"""Largest t of a texture step for which eq. 6 counts (paper, section 3.3)."""


def draw_renoised(recipe: Recipe, step: int, batch: int, first: int = 0) -> Tensor:
    """t of each sample that begins from its renoised condition, 0 for the others; (B,), on the CPU."""
    t = np.zeros(batch, np.float32)
    low, high = recipe.renoised_t
    for b in range(batch if recipe.renoised_share else 0):
        rng = generator(recipe.seed, "renoised", step, first + b)
        if rng.random() < recipe.renoised_share:
            t[b] = low + (high - low) * rng.random()
    return torch.from_numpy(t)


def run_step(
    kind: str, networks: Networks, recipe: Recipe, perceptual: Perceptual | None, critic: Critic | None, crops: Crops
) -> Outcome:
    """The step called `kind` in `Stage.learners`."""
    shift = recipe.loss.perceptual_shift
    if perceptual is not None and shift:
        top, left = generator(recipe.seed, "perceptual-window", crops.step).integers(shift, size=2).tolist()
        perceptual = on_window(perceptual, shift, top, left)
    match kind:
        case "reconstruct":
            return Outcome(*reconstruction_step(networks, crops.hq))
        case "removal":
            return removal_step(networks, recipe, perceptual, critic, crops)
        case "texture":
            return texture_step(networks, recipe, perceptual, crops)
        case "both":
            return restoration_step(networks, recipe, perceptual, critic, crops)
        case "judge":
            return judge_step(networks, crops)
        case "enlarge":
            return enlarge_step(networks, recipe, crops)
        case "clean":
            return clean_step(networks, recipe, crops)
        case "please":
            return please_step(networks, recipe, perceptual, critic, crops)
        case "clean-both":
            return both_step(networks, recipe, perceptual, critic, crops)
        case "grain":
            return grain_step(networks, recipe, perceptual, crops)
    raise ValueError(f"no step of kind {kind!r}")


def removal_step(
    networks: Networks, recipe: Recipe, perceptual: Perceptual | None, critic: Critic | None, crops: Crops
) -> Outcome:
    """A removal step of the paper's stages (eq. 7): transformer and ControlNet both get z_lq; only the LoRA learns."""
    target, z_0, z_lq = encoded(networks, crops)
    local, glob = texts_of(networks, crops)
    # The cross-attention lies in the transformer's walk, so it is not enough to run the ControlNet without gradient.
    with networks.held(CONTROL):
        z_dr = remove(networks, z_lq, local, glob, networks.config.sampling)
    return _removal(networks, recipe, perceptual, critic, z_dr, z_0, target)


def texture_step(networks: Networks, recipe: Recipe, perceptual: Perceptual | None, crops: Crops) -> Outcome:
    """A texture step of the paper's stages (eq. 5 and 6), LoRA off: only the MM-ControlNet learns."""
    target, z_0, z_lq = encoded(networks, crops)
    local, glob = texts_of(networks, crops)
    condition = _condition(networks, recipe, crops, z_lq, local, glob)
    return _texture(networks, recipe, perceptual, None, crops, z_0, target, condition, local, glob)._replace(
        fake=None, real=None
    )


def restoration_step(
    networks: Networks, recipe: Recipe, perceptual: Perceptual | None, critic: Critic | None, crops: Crops
) -> Outcome:
    """A step of stage `backbone`: a removal part (eq. 7), then a texture part (eq. 5, 6) conditioned on its detached
    result, or on what the bundle's cleaner makes of the crops.

    Sharing the crops gives the texture part exactly the condition it meets at inference, at no extra forward pass.
    Steps between those of `texture_every` have the removal part alone.
    """
    target, z_0, z_lq = encoded(networks, crops)
    local, glob = texts_of(networks, crops)
    z_dr = remove(networks, z_lq, local, glob, networks.config.sampling)
    # Where the texture part ends in pictures as inference makes them, these are what has to look like photos.
    first, second = (None, critic) if recipe.renoised_share else (critic, None)
    removal = _removal(networks, recipe, perceptual, first, z_dr, z_0, target)
    removal = removal._replace(loss=removal.loss * recipe.loss.removal_part)
    if not recipe.texture_every or crops.step % recipe.texture_every:
        return removal._replace(fake=None, real=None) if recipe.renoised_share else removal
    cleaned = cleaned_latent(networks, crops)
    condition = z_dr.detach() if cleaned is None else cleaned
    texture = _texture(networks, recipe, perceptual, second, crops, z_0, target, condition, local, glob)
    judged = texture if recipe.renoised_share else removal
    return Outcome(removal.loss + texture.loss, removal.terms | texture.terms, judged.fake, judged.real)


def _condition(
    networks: Networks, recipe: Recipe, crops: Crops, z_lq: Tensor, local: TextEmbedding, glob: TextEmbedding
) -> Tensor:
    """What the ControlNet sees in a texture step, without gradient (`Recipe.condition`)."""
    if recipe.condition == "degraded":
        return z_lq
    with torch.no_grad():
        removed = erased = z_lq
        cleaned = None if recipe.condition == "erased" else cleaned_latent(networks, crops)
        if cleaned is not None:
            removed = cleaned
        elif recipe.condition != "erased":
            removed = remove(networks, z_lq, local, glob, networks.config.sampling)
        if recipe.condition != "removed":
            if crops.erased is None:
                raise TrainingError(
                    f"condition {recipe.condition!r} needs erased pictures, which these data don't have",
                    "make them with dreamsr degrade, or --set condition=removed",
                )
            erased = networks.encode(crops.erased * 2 - 1)
    if recipe.condition != "mixed":
        return erased if recipe.condition == "erased" else removed
    draws = [generator(recipe.seed, "condition", crops.step, crops.first + b).random() for b in range(len(z_lq))]
    pick = torch.tensor(draws, device=z_lq.device) < 0.5
    return torch.where(pick[:, None, None, None], erased, removed)


def _removal(
    networks: Networks,
    recipe: Recipe,
    perceptual: Perceptual | None,
    critic: Critic | None,
    z_dr: Tensor,
    z_0: Tensor,
    target: Tensor,
) -> Outcome:
    weights, decoded = recipe.loss, networks.autoencoder.decode(z_dr, restored=True)
    loss, terms = removal_loss(
        z_dr,
        z_0,
        decoded,
        target,
        perceptual,
        perceptual_weight=weights.removal_perceptual,
        fake_logits=None if critic is None else critic(decoded),
        gan_weight=PAPERS_GAN if weights.gan is None else weights.gan,
        kind=weights.pixel_kind,
    )
    if weights.lattice:
        lattice = lattice_strength(decoded - target)
        loss, terms["removal_lattice"] = loss + weights.lattice * lattice, lattice.detach()
    return Outcome(loss, terms, decoded.detach(), target)


def _texture(
    networks: Networks,
    recipe: Recipe,
    perceptual: Perceptual | None,
    critic: Critic | None,
    crops: Crops,
    z_0: Tensor,
    target: Tensor,
    condition: Tensor,
    local: TextEmbedding,
    glob: TextEmbedding,
) -> Outcome:
    weights, fake, real = recipe.loss, None, None
    t, eps = draw_texture(recipe.seed, crops.step, z_0.shape, recipe.t_range, crops.first)
    again = draw_renoised(recipe, crops.step, len(t), crops.first)
    t, eps, again = (values.to(z_0.device) for values in (torch.where(again > 0, again, t), eps, again > 0))
    t_B111 = t[:, None, None, None]
    z_t = flow.mix(torch.where(again[:, None, None, None], condition, z_0), eps, t_B111)
    v = texture_velocity(networks, z_t, t, condition, local, glob, networks.config.sampling.prediction)
    clean = flow.predict_clean(z_t, v, t_B111)
    # Per sample: the batch's loss is the mean over all samples, whichever terms each of them has.
    loss = z_0.new_zeros(())
    terms = {name: loss.clone() for name in ("texture_velocity", "texture_latent", "texture_pixel")}
    if not recipe.renoised_share:
        del terms["texture_latent"]
    if weights.lattice:
        terms["texture_lattice"] = loss.clone()
    # The path of a renoised sample doesn't start at z_0, so it has no eq. 5: the latent's distance of eq. 7 instead.
    flowing, renoised, near = (mask.nonzero()[:, 0] for mask in (~again, again, again | (t <= PIXEL_T)))
    if len(flowing):
        part = velocity_loss(v[flowing], z_0[flowing], eps[flowing], t[flowing], weights.t_floor)
        loss, terms["texture_velocity"] = loss + part * (len(flowing) / len(t)), part.detach()
    if len(renoised):
        part = (clean[renoised] - z_0[renoised]).square().mean()
        loss, terms["texture_latent"] = loss + part * (len(renoised) / len(t)), part.detach()
    if len(near):
        decoded = networks.autoencoder.decode(clean[near])
        pixel = pixel_loss(decoded, target[near], perceptual, weights.texture_perceptual, weights.pixel_kind)
        pixel = pixel * (len(near) / len(t))
        loss, terms["texture_pixel"] = loss + pixel, pixel.detach()
        if weights.lattice:
            lattice = lattice_strength(decoded - target[near]) * (len(near) / len(t))
            loss, terms["texture_lattice"] = loss + weights.lattice * lattice, lattice.detach()
        fake, real = decoded.detach(), target[near]
        if critic is not None:
            made = hinge_generator(critic(decoded)) * (len(near) / len(t))
            loss = loss + (PAPERS_GAN if weights.gan is None else weights.gan) * made
            terms["texture_gan"] = made.detach()
    elif recipe.renoised_share:
        # Every process has pictures for the discriminator in every step: its gradients are averaged over all.
        fake, real = networks.autoencoder.decode(clean.detach()).detach(), target
    return Outcome(loss, terms, fake, real)


def reconstruction_step(networks: Networks, hq: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one step of stage `autoencoder`: the refiner mends what the linear round trip of clean crops lost, in
    each of its manners."""
    target = hq * 2 - 1
    autoencoder = networks.patches
    z = autoencoder.encode(target)
    manners = (False,) if autoencoder.refiner.restored is None else (False, True)
    error = torch.cat([autoencoder.decode(z, restored) - target for restored in manners])
    loss = (error.square() + 1e-6).sqrt().mean()
    return loss, {"psnr": 10 * torch.log10(4 / error.detach().square().mean())}
