"""One training step as arithmetic: a batch of crops in, a loss and its terms out (method.md, Training; eq. 4 to 7).

Axes: B batch, C channels, H W latent, P Q pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dreamsr_cli import flow
from dreamsr_cli.config import SamplingConfig
from dreamsr_cli.draws import generator
from dreamsr_cli.losses import pixel_loss, removal_loss, velocity_loss
from dreamsr_cli.models.conditioned_dit import Injections
from dreamsr_cli.models.perceptual import Perceptual
from dreamsr_cli.models.text_encoder import TextEmbedding
from dreamsr_cli.training.networks import Networks
from dreamsr_cli.training.recipe import Recipe

TEXT_BUCKET = 24
"""Prompts of a batch are padded to a multiple of this many tokens: compiled blocks then meet few shapes."""
PIXEL_T = 0.2
"""Largest t of a texture step for which eq. 6 counts (paper, section 3.3)."""


def encode_texts(networks: Networks, texts: list[str]) -> TextEmbedding:
    """Embeddings of a batch of prompts, with gradients into the text encoder."""
    encoder = networks.text_encoder
    ids, mask, _ = encoder.tokenize(texts, encoder.max_tokens, TEXT_BUCKET)
    device = encoder.device
    return encoder(ids.to(device), mask.to(device))


def _control(networks: Networks, condition: Tensor, t_B: Tensor, local: TextEmbedding) -> Injections:
    """Control features of whole crops, told t as `control.timestep` says."""
    control = networks.config.control
    seen = torch.zeros_like(t_B) if control.timestep == "clean" else t_B
    return networks.dit.prepare(networks.controlnet(condition, seen, local, mask_pads=True), control.scale)


def remove(
    networks: Networks, z_lq: Tensor, local: TextEmbedding, glob: TextEmbedding, sampling: SamplingConfig
) -> Tensor:
    """Stage 1 on whole crops: z_dr = z_lq - t_r * v, LoRA on."""
    t_r = sampling.t_r
    times = z_lq.new_full((len(z_lq),), t_r)
    ready = _control(networks, z_lq, times, local)
    with networks.lora.on():
        made = networks.dit(z_lq, times, glob, ready)
    return z_lq - (t_r * made if sampling.prediction == "velocity" else made)


def texture_velocity(
    networks: Networks,
    z_t: Tensor,
    t_B: Tensor,
    condition: Tensor,
    local: TextEmbedding,
    glob: TextEmbedding,
    kind: str,
) -> Tensor:
    """Stage 2 on whole crops, LoRA off: the velocity at `t_B`, whatever the transformer predicts (`kind`)."""
    made = networks.dit(z_t, t_B, glob, _control(networks, condition, t_B, local))
    if kind == "velocity":
        return made
    return flow.velocity_of_correction(z_t, condition, made, t_B[:, None, None, None])


def draw_texture(seed: int, step: int, shape: torch.Size, t_range: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """(t_B, eps_BCHW) of a texture step; sample b's depend on (seed, step, b) alone."""
    t, eps = np.empty(shape[0], np.float32), np.empty(shape, np.float32)
    low, high = t_range
    for b in range(shape[0]):
        rng = generator(seed, "texture-step", step, b)
        t[b] = low + (high - low) * rng.random()
        rng.standard_normal(dtype=np.float32, out=eps[b])
    return torch.from_numpy(t), torch.from_numpy(eps)


def restoration_step(
    networks: Networks,
    recipe: Recipe,
    perceptual: Perceptual | None,
    step: int,
    hq: Tensor,
    lq_up: Tensor,
    texts: tuple[list[str], list[str]],
) -> tuple[Tensor, dict[str, float]]:
    """Loss of one step of stage `backbone`: a removal part (eq. 7), then a texture part (eq. 5, 6) conditioned on its
    detached result.

    `hq`, `lq_up` are (B, 3, P, Q) in [0, 1], `texts` the local and the global prompts. Sharing the crops gives the
    texture part exactly the condition it meets at inference, at no extra forward pass.
    """
    autoencoder, weights = networks.autoencoder, recipe.loss
    target = hq * 2 - 1
    with torch.no_grad():
        z_0, z_lq = autoencoder.encode(target), autoencoder.encode(lq_up * 2 - 1)
    local, glob = encode_texts(networks, texts[0]), encode_texts(networks, texts[1])

    z_dr = remove(networks, z_lq, local, glob, recipe.sampling)
    loss, terms = removal_loss(
        z_dr,
        z_0,
        autoencoder.decode(z_dr),
        target,
        perceptual,
        perceptual_weight=weights.removal_perceptual,
        kind=weights.pixel_kind,
    )

    t, eps = draw_texture(recipe.seed, step, z_0.shape, recipe.t_range)
    t, eps = t.to(z_0.device), eps.to(z_0.device)
    t_B111 = t[:, None, None, None]
    z_t = flow.mix(z_0, eps, t_B111)
    v = texture_velocity(networks, z_t, t, z_dr.detach(), local, glob, recipe.sampling.prediction)
    velocity = velocity_loss(v, z_0, eps, t, recipe.loss.t_floor)
    loss = loss + velocity
    terms["texture_velocity"] = float(velocity.detach())
    near = (t <= PIXEL_T).nonzero()[:, 0]
    if len(near):
        clean = autoencoder.decode(flow.predict_clean(z_t, v, t_B111)[near])
        pixel = pixel_loss(clean, target[near], perceptual, weights.texture_perceptual, weights.pixel_kind)
        # Per sample: the batch's loss is the mean over all samples, also those whose t is too large for this term.
        loss = loss + pixel * len(near) / len(t)
        terms["texture_pixel"] = float(pixel.detach())
    return loss, terms


def reconstruction_step(networks: Networks, hq: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Loss of one step of stage `autoencoder`: the refiner mends what the linear round trip of clean crops lost."""
    target = hq * 2 - 1
    autoencoder = networks.autoencoder
    error = autoencoder.decode(autoencoder.encode(target)) - target
    loss = (error.square() + 1e-6).sqrt().mean()
    return loss, {"psnr": float(10 * torch.log10(4 / error.detach().square().mean()))}
