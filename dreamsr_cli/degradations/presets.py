"""Settings of the pixel degradation: what SeeSR's two, Real-ESRGAN and our `camera`, `soft` and `jpeg` draw from."""

from __future__ import annotations

from dataclasses import dataclass

from dreamsr_cli.config import Looks

Range = tuple[float, float]


@dataclass(frozen=True)
class PassPreset:
    """Ranges one pass draws from."""

    resize: Range
    """Smallest and largest resize factor."""
    resize_shares: tuple[float, float, float]
    """Chances of up, down and keep."""
    blur_share: float
    """Chance that this pass blurs at all."""
    sigma: Range
    """Blur sigma in pixels."""
    gaussian: Range
    """Sigma of Gaussian noise in levels of 255."""
    poisson: Range
    """Factor on Poisson noise."""
    jpeg: tuple[int, int]
    """Lowest and highest JPEG quality, both included."""


@dataclass(frozen=True)
class Preset:
    """A setting of the pipeline."""

    first: PassPreset
    second: PassPreset
    sharpen: bool
    """Whether the ground truth is sharpened (USM) before degradation, and as the target."""
    sinc_share: float = 0.8
    """Chance of a last sinc filter."""


@dataclass(frozen=True)
class ShrinkPreset:
    """The field's antialiased cubic downscale, and nothing else but perhaps a JPEG."""

    jpeg: tuple[int, int] | None = None
    """Lowest and highest JPEG quality, both included; None: no JPEG."""
    sharpen: bool = False
    """As in `Preset`."""


def _first(resize: Range, gaussian: Range, poisson: Range, jpeg: tuple[int, int]) -> PassPreset:
    return PassPreset(resize, (0.2, 0.7, 0.1), 1.0, (0.2, 3.0), gaussian, poisson, jpeg)


def _second(resize: Range, blur: float, gaussian: Range, poisson: Range, jpeg: tuple[int, int]) -> PassPreset:
    return PassPreset(resize, (0.3, 0.4, 0.3), blur, (0.2, 1.5), gaussian, poisson, jpeg)


def _camera(blur: float, sigma: Range, gaussian: Range, poisson: Range, jpeg: tuple[int, int]) -> PassPreset:
    return PassPreset((1.0, 1.0), (0.0, 0.0, 1.0), blur, sigma, gaussian, poisson, jpeg)


_STRONG = Preset(
    _first((0.15, 1.5), (1, 30), (0.05, 3.0), (30, 95)),
    _second((0.3, 1.2), 0.8, (1, 25), (0.05, 2.5), (30, 95)),
    sharpen=True,
)

PRESETS: dict[str, Preset | ShrinkPreset] = {
    "seesr-mild": Preset(
        _first((0.3, 1.5), (1, 15), (0.05, 2.0), (60, 95)),
        _second((0.6, 1.2), 0.5, (1, 12), (0.05, 1.0), (60, 100)),
        sharpen=False,
    ),
    "seesr-pairs": _STRONG,
    "realesrgan": _STRONG,
    # Ours: a good lens and sensor and nothing that was done to the photo later, as in the pairs of RealSR.
    "camera": Preset(
        _camera(1.0, (0.4, 3.0), (0, 3), (0.01, 0.2), (92, 100)),
        _camera(0.0, (0.2, 0.8), (0, 2), (0.01, 0.1), (85, 100)),
        sharpen=False,
        sinc_share=0.0,
    ),
    # Ours: a photo without detail at its own size: a little out of focus, or enlarged before.
    "soft": Preset(
        _camera(1.0, (2.0, 4.5), (0, 3), (0.01, 0.2), (85, 100)),
        _camera(0.0, (0.2, 0.8), (0, 2), (0.01, 0.1), (75, 100)),
        sharpen=False,
        sinc_share=0.0,
    ),
    # Ours: a good photo as sites and phones hand it on.
    "jpeg": ShrinkPreset((70, 98)),
    "bicubic": ShrinkPreset(),
}
"""Presets by name."""


CLEAN_JPEG = 92
"""JPEG quality from which on a photo counts as clean: it fares better as one than as a compressed one (docs/mini.md,
row 34)."""


def looks_after(preset: str, only_jpeg: int | None) -> Looks:
    """What photos look like that this preset, a key of `PRESETS`, degraded; `only_jpeg` as in `PixelParams`."""
    if isinstance(PRESETS[preset], Preset):
        return "damaged"
    return "clean" if only_jpeg is None or only_jpeg >= CLEAN_JPEG else "compressed"
