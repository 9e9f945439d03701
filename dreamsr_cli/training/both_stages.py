"""Both stages on whole crops, as training calls them: texts, stage 1, one call or all steps of stage 2.

Axes: B batch, C channels, H W latent.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from dreamsr_cli import flow
from dreamsr_cli.config import SamplingConfig
from dreamsr_cli.draws import generator
from dreamsr_cli.models.conditioned_dit import Injections
from dreamsr_cli.models.text_encoder import ByteTextEncoder, TextEmbedding, stack
from dreamsr_cli.training.networks import Networks
from dreamsr_cli.training.step_data import Crops

TEXT_BUCKET = 24
"""Prompts of a batch are padded to a multiple of this many tokens: compiled blocks then meet few shapes."""


def encode_texts(networks: Networks, texts: list[str]) -> TextEmbedding:
    """Embeddings of a batch of prompts, with gradients into the text encoder where it is trained."""
    encoder = networks.text_encoder
    if isinstance(encoder, ByteTextEncoder):
        ids, mask, _ = encoder.tokenize(texts, encoder.max_tokens, TEXT_BUCKET)
        return encoder(ids.to(networks.device), mask.to(networks.device))
    found, _ = encoder.encode(texts, networks.config.defaults.max_text_tokens)
    return stack(found).to(networks.device, networks.transformer.dtype)


def _control(networks: Networks, condition: Tensor, t_B: Tensor, local: TextEmbedding) -> Injections:
    """Control features of whole crops, told t as `control.timestep` says."""
    control = networks.config.control
    seen = torch.zeros_like(t_B) if control.timestep == "clean" else t_B
    mask_pads = not networks.text_encoder.pads_are_seen
    features = networks.controlnet(condition, seen, local, mask_pads=mask_pads, guidance=networks.guidance)
    return networks.dit.prepare(features, control.scale)


def remove(
    networks: Networks, z_lq: Tensor, local: TextEmbedding, glob: TextEmbedding, sampling: SamplingConfig
) -> Tensor:
    """Stage 1 on whole crops: z_dr = z_lq - t_r * v, LoRA on (where there is one)."""
    t_r = sampling.t_r
    times = z_lq.new_full((len(z_lq),), t_r)
    ready = _control(networks, z_lq, times, local)
    with nullcontext() if networks.lora is None else networks.lora.on():
        made = networks.dit(z_lq, times, glob, ready, networks.guidance)
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
    made = networks.dit(z_t, t_B, glob, _control(networks, condition, t_B, local), networks.guidance)
    if kind == "velocity":
        return made
    return flow.velocity_of_correction(z_t, condition, made, t_B[:, None, None, None])


def draw_texture(
    seed: int, step: int, shape: torch.Size, t_range: tuple[float, float], first: int = 0
) -> tuple[Tensor, Tensor]:
    """(t_B, eps_BCHW) of a texture step; those of sample b depend on (seed, step, first + b) alone."""
    t, eps = np.empty(shape[0], np.float32), np.empty(shape, np.float32)
    low, high = t_range
    for b in range(shape[0]):
        rng = generator(seed, "texture-step", step, first + b)
        t[b] = low + (high - low) * rng.random()
        rng.standard_normal(dtype=np.float32, out=eps[b])
    return torch.from_numpy(t), torch.from_numpy(eps)


def textured(
    networks: Networks,
    condition: Tensor,
    eps: Tensor,
    local: TextEmbedding,
    glob: TextEmbedding,
    sampling: SamplingConfig,
) -> Tensor:
    """Stage 2 as the bundle runs it: z_0 from the renoised condition (eq. 3), all steps."""

    def velocity(z_t: Tensor, t: float) -> Tensor:
        t_B = z_t.new_full((len(z_t),), t)
        return texture_velocity(networks, z_t, t_B, condition, local, glob, sampling.prediction)

    start = flow.mix(condition, eps, sampling.t_start)
    return flow.euler(start, velocity, flow.timesteps(sampling.t_start, sampling.steps))


def encoded(networks: Networks, crops: Crops) -> tuple[Tensor, Tensor, Tensor]:
    """(good crops on [-1, 1], z_0, z_lq), without gradient."""
    target = crops.hq * 2 - 1
    return target, networks.encode(target), networks.encode(crops.lq_up * 2 - 1)


def texts_of(networks: Networks, crops: Crops) -> tuple[TextEmbedding, TextEmbedding]:
    """(local, global); both global where there is no text branch (the ablation)."""
    glob = encode_texts(networks, crops.global_texts)
    return (encode_texts(networks, crops.local_texts) if networks.config.control.text else glob), glob
