"""The `[loss]` table of a recipe: which terms a training loss has, and with what weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LossRecipe:
    """Terms of the loss (method.md, Training)."""

    perceptual: str = "lpips-squeeze"
    """Perceptual distance: a key of `models.perceptual.BACKBONES`, or "none"."""
    removal_perceptual: float = 2.0
    """lambda_1 of eq. 7, on LPIPS."""
    texture_perceptual: float = 2.0
    """lambda of eq. 6, on LPIPS."""
    perceptual_shift: int = 0
    """LPIPS looks at a window this many pixels smaller than the crop, at another place in every step (ours): with 16,
    the networks can't learn patterns that fit the strides of its layers (docs/method.md)."""
    lattice: float = 0.0
    """Weight of `losses.lattice_strength` beside each pixel distance (ours): against a weave at the networks' grid."""
    removal_part: float = 1.0
    """Weight of the removal part beside the texture part, stage backbone (ours): LPIPS has by far the larger gradient,
    and what both parts share would learn from it alone."""
    cleaner_perceptual: float = 0.3
    """Stages cleaner-looks and cleaner-both: weight of LPIPS beside the pixel distance (ours)."""
    cleaner_seen: str = "cleaned"
    """Those stages: what LPIPS sees. "cleaned": the cleaned crop; "finished": with what stage 2 and grain change in it
    by the bundle's defaults, which is a constant for the gradient (ours)."""
    cleaner_sharing: float = 0.1
    """Stage cleaner-both: how much of the second manner's gradient the way down gets, which has LPIPS in it and is
    about ten times as long as the first one's."""
    cleaner_knee: float = 0.03
    """Stages of the cleaner: errors below this count by their square, larger ones by their size; pixels on
    [0, 1]."""
    grain_perceptual: float = 1.0
    """Stage grain: weight of LPIPS, which wants little of it (ours)."""
    grain_contrast: float = 0.05
    """Stage grain: weight of `losses.contrast_distance`, which wants as much as good pictures have (ours)."""
    t_floor: float = 0.0
    """Below this t, eq. 5 weighs (t / t_floor)^2; for a transformer that predicts corrections."""
    pixel_kind: str = "mse"
    """"mse" (the paper's) or "charbonnier"."""
    gan: float | None = None
    """lambda_2 of eq. 7, on the GAN term; None: the paper's 0.5 in stages restoration and joint, 0 in backbone."""
    gan_sees: str = "pixels"
    """"pixels": a U-Net from nothing; "features": small heads on the network of `perceptual` (both ours)."""
    gan_start: int = 500
    """Step from which the GAN term counts."""
    gan_lead: int = 250
    """Steps before `gan_start` in which the discriminator alone learns already."""
    gan_lr: float = 1e-4
    """Learning rate of the discriminator (ours)."""
