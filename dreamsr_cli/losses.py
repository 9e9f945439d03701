"""The training losses of method.md: eq. 5 (velocity), eq. 6 (pixels and perception at small t), eq. 7 (removal) and
the hinge losses of its GAN term.

Squared norms are means over elements, pictures are on [-1, 1] (both *ours*: the paper leaves them open). Nothing here
knows a network besides the perceptual distance it is given; None leaves that term out.

Axes: B batch, C channels, H W latent rows and columns, P Q pixel rows and columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dreamsr_cli.models.perceptual import Perceptual

CHARBONNIER_EPSILON = 1e-3
"""Rounds the corner of |x| at zero."""
LATTICE = 16
"""Pixels of a token's side: the networks' own grid, which the refiner's of 4 and the transform's of 8 divide."""
LATTICE_EPSILON = 1e-4
"""Rounds the corner of the lattice's root at zero."""
CONTRAST_WINDOW = 15
"""Pixels of a window's side in which `contrast_distance` asks how strong texture is."""


def velocity_loss(
    v_BCHW: torch.Tensor,
    z0_BCHW: torch.Tensor,
    z1_BCHW: torch.Tensor,
    t_B: torch.Tensor | None = None,
    t_floor: float = 0.0,
) -> torch.Tensor:
    """Eq. 5: the mean of (v - (z_1 - z_0))^2, z_0 the good picture's latent and z_1 noise.

    With `t_floor` (ours) samples with t below it weigh (t / t_floor)^2: a network that predicts z_0 has a velocity
    error of its z_0 error over t, which would drown everything else as t goes to 0.
    """
    error = (v_BCHW - (z1_BCHW - z0_BCHW)).square()
    if t_B is None or t_floor <= 0:
        return error.mean()
    return (error.mean((1, 2, 3)) * (t_B / t_floor).clamp(max=1.0).square()).mean()


def pixel_distance(x_BCPQ: torch.Tensor, target_BCPQ: torch.Tensor, kind: str = "mse") -> torch.Tensor:
    """Mean distance of pixel values on [-1, 1], a scalar.

    "mse": (x - y)^2, the paper's. "charbonnier": sqrt((x - y)^2 + eps^2) - eps, ours, less drawn to blur. ValueError
    for another kind.
    """
    square = (x_BCPQ - target_BCPQ).square()
    if kind == "mse":
        return square.mean()
    if kind == "charbonnier":
        return ((square + CHARBONNIER_EPSILON**2).sqrt() - CHARBONNIER_EPSILON).mean()
    raise ValueError(f"pixel distance {kind!r}: expected mse or charbonnier")


def rounded_distance(x_BCPQ: torch.Tensor, target_BCPQ: torch.Tensor, knee: float) -> torch.Tensor:
    """Mean Charbonnier distance of pixel values on [0, 1] with a wide corner: below `knee` errors count by their square
    over twice the knee, beyond it by their size, so that neither small errors nor a few large ones decide alone."""
    return (((x_BCPQ - target_BCPQ).square() + knee**2).sqrt() - knee).mean()


def pixel_loss(
    decoded_BCPQ: torch.Tensor,
    target_BCPQ: torch.Tensor,
    perceptual: Perceptual | None,
    weight: float = 2.0,
    kind: str = "mse",
) -> torch.Tensor:
    """Eq. 6: pixel distance + weight * LPIPS of the decoded prediction and the good picture, meaned over the batch.

    The caller gives only the samples with t <= 0.2, z_0 being predicted as z_t - t v.
    """
    loss = pixel_distance(decoded_BCPQ, target_BCPQ, kind)
    if perceptual is not None and weight:
        loss = loss + weight * perceptual(decoded_BCPQ, target_BCPQ).mean()
    return loss


def lattice_strength(error_BCPQ: torch.Tensor, period: int = LATTICE) -> torch.Tensor:
    """How strong a pattern repeats every `period` pixels in the errors of a batch of pictures (ours): a scalar, the sum
    of two root mean squares over the places of a cell of `period` x `period` pixels and over channels. The first is of
    what these places have on average beyond their surroundings of 5 x 5 pixels (a fine weave), the second of what they
    have beyond the cell's mean (a mosaic of cells). Both sides are multiples of `period`.

    The texture of photos averages out over cells and samples; a pattern that the networks lay over everything, because
    it pleases LPIPS, doesn't.
    """
    surroundings = F.avg_pool2d(error_BCPQ, 5, stride=1, padding=2, count_include_pad=False)
    fine_Cpq = _mean_cell(error_BCPQ - surroundings, period)
    coarse_Cpq = _mean_cell(error_BCPQ, period)
    coarse_Cpq = coarse_Cpq - coarse_Cpq.mean((1, 2), keepdim=True)
    fine, coarse = ((cell.square().mean() + LATTICE_EPSILON**2).sqrt() for cell in (fine_Cpq, coarse_Cpq))
    return fine + coarse


def _mean_cell(x_BCPQ: torch.Tensor, period: int) -> torch.Tensor:
    rows, columns = (side // period for side in x_BCPQ.shape[2:])
    return x_BCPQ.mean(0).unflatten(2, (columns, period)).unflatten(1, (rows, period)).mean((1, 3))


def removal_loss(
    z_dr_BCHW: torch.Tensor,
    z0_BCHW: torch.Tensor,
    decoded_BCPQ: torch.Tensor,
    target_BCPQ: torch.Tensor,
    perceptual: Perceptual | None,
    *,
    latent_weight: float = 1.0,
    pixel_weight: float = 1.0,
    perceptual_weight: float = 2.0,
    fake_logits: torch.Tensor | None = None,
    gan_weight: float = 0.5,
    kind: str = "mse",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Eq. 7: the weighted sum, and its terms before weighting, detached, for a log.

    z_dr is the restored latent and z_0 the good picture's; `decoded_BCPQ` is z_dr decoded, pictures on [-1, 1];
    `perceptual_weight` and `gan_weight` are the paper's lambda_1 and lambda_2; `fake_logits` is what the discriminator
    says about `decoded_BCPQ`, None leaves the GAN term out.
    """
    latent = (z_dr_BCHW - z0_BCHW).square().mean()
    pixel = pixel_distance(decoded_BCPQ, target_BCPQ, kind)
    loss = latent_weight * latent + pixel_weight * pixel
    terms = {"removal_latent": latent.detach(), "removal_pixel": pixel.detach()}
    if perceptual is not None and perceptual_weight:
        perception = perceptual(decoded_BCPQ, target_BCPQ).mean()
        loss = loss + perceptual_weight * perception
        terms["removal_perceptual"] = perception.detach()
    if fake_logits is not None and gan_weight:
        adversarial = hinge_generator(fake_logits)
        loss = loss + gan_weight * adversarial
        terms["removal_gan"] = adversarial.detach()
    return loss, terms


def hinge_generator(fake_logits: torch.Tensor) -> torch.Tensor:
    """What the generator lowers: the mean of -D(fake) (Lim and Ye 2017)."""
    return -fake_logits.mean()


def hinge_discriminator(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """What the discriminator lowers: mean max(0, 1 - D(real)) + mean max(0, 1 + D(fake)); 2 for one that knows
    nothing, 0 for one that is sure."""
    return (1 - real_logits).clamp_min(0).mean() + (1 + fake_logits).clamp_min(0).mean()


def contrast_distance(x_BCPQ: torch.Tensor, target_BCPQ: torch.Tensor) -> torch.Tensor:
    """How differently strong the fine texture of pictures is, wherever its lines run (ours): a scalar, the mean over
    windows of `CONTRAST_WINDOW` pixels, half overlapping, of the distance of the logarithms of what brightness varies
    there beyond its mean of 7 x 7 pixels; at full and at half size. Pictures are RGB on [-1, 1],
    their sides at least twice a window's."""
    x_B1PQ, target_B1PQ = _brightness(x_BCPQ), _brightness(target_BCPQ)
    full = (_log_contrast(x_B1PQ) - _log_contrast(target_B1PQ)).abs().mean()
    half = (_log_contrast(F.avg_pool2d(x_B1PQ, 2)) - _log_contrast(F.avg_pool2d(target_B1PQ, 2))).abs().mean()
    return (full + half) / 2


def _brightness(rgb_BCPQ: torch.Tensor) -> torch.Tensor:
    """BT.601's Y in levels of 255, float32, (B, 1, P, Q)."""
    rgb_BCPQ = rgb_BCPQ.float() * 127.5
    return (rgb_BCPQ * rgb_BCPQ.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def _log_contrast(y_B1PQ: torch.Tensor) -> torch.Tensor:
    fine = y_B1PQ - F.avg_pool2d(y_B1PQ, 7, stride=1, padding=3, count_include_pad=False)
    varies = F.avg_pool2d(fine.square(), CONTRAST_WINDOW, stride=CONTRAST_WINDOW // 2)
    # What lies below a level doesn't show.
    return (varies + 1).log() / 2
