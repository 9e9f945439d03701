"""The noised latents of a texture erasure, denoised in units of a fixed number of crops: by Euler steps along
velocities, or as a mean of predictions where the transformer predicts corrections.

Axes: B crops of a unit, C channels, H W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from dreamsr_cli import flow
from dreamsr_cli.config import ControlConfig
from dreamsr_cli.degradations.erasure_params import ErasureParams
from dreamsr_cli.draws import normal_rows
from dreamsr_cli.models.bundle import Restorer
from dreamsr_cli.models.conditioned_dit import ConditionedDiT
from dreamsr_cli.models.text_encoder import TextEmbedding, stack

TEXT_BUCKET = 32
"""Texts are padded to a multiple of this many tokens, so that the length depends on no neighbour."""
Report = Callable[[str], None]
"""Told where inside a unit the work is."""


@dataclass(frozen=True)
class Job:
    """One crop to be denoised; tensors on the CPU."""

    index: int
    """Its place among the crops of the call."""
    params: ErasureParams
    text: TextEmbedding
    """Of batch 1, in the networks' dtype."""
    z_hq_CHW: Tensor
    """Latent of the crop shrunk by `params.factor` and enlarged again."""
    condition_CHW: Tensor | None
    """For bundles that predict corrections: the latent that they correct."""

    @property
    def text_length(self) -> int:
        """Tokens with padding."""
        return -(-self.text.tokens_BTD.shape[1] // TEXT_BUCKET) * TEXT_BUCKET

    def noised(self, draw: int) -> Tensor:
        """z_s = (1 - s) z_hq + s eps; eps depends on (noise seed, draw, latent row)."""
        channels, height, width = self.z_hq_CHW.shape
        eps_HWC = normal_rows(self.params.noise_seed, "erasure-noise", 0, height, width, channels, draw)
        return flow.mix(self.z_hq_CHW, torch.from_numpy(eps_HWC).permute(2, 0, 1), self.params.strength)


def units(jobs: Sequence[Job], batch: int) -> Iterator[list[Job]]:
    """Units of up to `batch` jobs of one length of text, those with like numbers of steps together."""
    ordered = sorted(jobs, key=lambda job: (job.text_length, job.params.steps))
    for _, group in groupby(ordered, key=lambda job: job.text_length):
        alike = list(group)
        for first in range(0, len(alike), batch):
            yield alike[first : first + batch]


@torch.inference_mode()
def by_euler(
    dit: ConditionedDiT, unit: Sequence[Job], guidance: float | None, device: torch.device, report: Report
) -> Tensor:
    """z_0 (B, C, H, W) of a unit: Euler from z_s to t = 0 along velocities, in each crop's own number of equal steps,
    without control features."""
    text = _texts(unit, dit, device)
    z_BCHW = torch.stack([job.noised(0) for job in unit]).to(device)
    paths = [flow.timesteps(job.params.strength, job.params.steps) for job in unit]
    longest = max(len(path) for path in paths)
    for step in range(longest - 1):
        report(f"step {step + 1} of {longest - 1}")
        # A crop that has arrived stays at t = 0: its further steps are of length 0.
        t_B, t_next_B = (
            torch.tensor([path[min(k, len(path) - 1)] for path in paths], device=device) for k in (step, step + 1)
        )
        v_BCHW = dit(z_BCHW, t_B, text, None, guidance)
        z_BCHW = z_BCHW + (t_next_B - t_B)[:, None, None, None] * v_BCHW
    return z_BCHW


@torch.inference_mode()
def by_mean(
    restorer: Restorer,
    unit: Sequence[Job],
    control: ControlConfig,
    guidance: float | None,
    device: torch.device,
    report: Report,
) -> Tensor:
    """z_0 (B, C, H, W) of a unit (ours): the mean of `steps` predictions, each from fresh noise at the strength itself.

    A prediction, condition - correction, estimates the mean of all that could lie under the noise, in which texture
    cancels out and structure doesn't. The mean over draws removes what a small network leaves of the noise; Euler steps
    would instead feed it back (docs/texture_erasure.md has the figures).
    """
    dit = restorer.dit
    text = _texts(unit, dit, device)
    s_B = torch.tensor([job.params.strength for job in unit], device=device)
    draws_B = torch.tensor([job.params.steps for job in unit], device=device)
    condition_BCHW = torch.stack([z for job in unit if (z := job.condition_CHW) is not None]).to(device)
    seen_B = torch.zeros_like(s_B) if control.timestep == "clean" else s_B
    features = restorer.controlnet(condition_BCHW, seen_B, text, dit.mask_pads, guidance)
    injections = dit.prepare(features, control.scale)
    total_BCHW = torch.zeros_like(condition_BCHW)
    longest = max(job.params.steps for job in unit)
    for draw in range(longest):
        report(f"draw {draw + 1} of {longest}")
        z_s_BCHW = torch.stack([job.noised(draw) for job in unit]).to(device)
        z_0_BCHW = condition_BCHW - dit(z_s_BCHW, s_B, text, injections, guidance)
        total_BCHW = total_BCHW + z_0_BCHW * (draw < draws_B)[:, None, None, None]
    return total_BCHW / draws_B[:, None, None, None]


def _texts(unit: Sequence[Job], dit: ConditionedDiT, device: torch.device) -> TextEmbedding:
    """The unit's texts, padded and masked; if the transformer was trained to see padding, they are of one length."""
    text = stack([job.text for job in unit], unit[0].text_length if dit.mask_pads else None)
    mask_BT = text.mask_BT
    if dit.mask_pads and mask_BT is None:
        # Also where nothing is padded: attention with a mask and without one differ in the last bits.
        mask_BT = torch.ones(text.tokens_BTD.shape[:2], dtype=torch.bool)
    return TextEmbedding(text.tokens_BTD, text.pooled_BD, mask_BT).to(device, text.tokens_BTD.dtype)
