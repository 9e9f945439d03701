"""The second-order pixel degradation of Real-ESRGAN (Wang et al. 2021) as a function of picture and parameters.

Parameters are drawn first (`draw`), as plain data that a log or a test can hold; `degrade` is then a pure function of
picture and parameters. Two passes of blur, resize, noise and JPEG; the last JPEG and a last sinc filter come in random
order. Ranges and chances: presets.py.

Any device: filters and resizes run where the picture is; noise is drawn by numpy, and JPEG coded by Pillow, on the CPU,
so that the draws are the same everywhere. Bytes are the same for one kind of device and one number of threads.

Axes: B batch, C channels, P Q pixel rows and columns. Pictures are float32 RGB in [0, 1].
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from dreamsr_cli import draws, resample
from dreamsr_cli.degradations.kernels import KernelParams, draw_blur, draw_sinc, gaussian, kernel_PQ
from dreamsr_cli.degradations.presets import PRESETS, PassPreset, ShrinkPreset

FILTERS = ("area", "bilinear", "bicubic")
GREY_NOISE_SHARE = 0.4
GAUSSIAN_NOISE_SHARE = 0.5
USM_SIZE, USM_WEIGHT, USM_THRESHOLD = 51, 0.5, 10 / 255
USM_SIGMA = 0.3 * ((USM_SIZE - 1) * 0.5 - 1) + 0.8  # what OpenCV derives from the size, as Real-ESRGAN relies on


@dataclass(frozen=True)
class NoiseParams:
    """Noise of one pass."""

    kind: str
    """Either "gaussian" or "poisson"."""
    strength: float
    """Sigma in levels of 255, or the factor on Poisson noise."""
    grey: bool
    """One noise for all channels."""


@dataclass(frozen=True)
class PassParams:
    """What one pass does, in this order; its JPEG comes last (for the second pass: see `PixelParams.sinc_first`)."""

    blur: KernelParams | None
    """None: this pass doesn't blur."""
    factor: float
    """Resize factor; against the incoming picture in pass 1, against the final size in pass 2."""
    filter: str
    """Resize filter, one of `FILTERS`."""
    noise: NoiseParams
    jpeg: int
    """JPEG quality."""


@dataclass(frozen=True)
class PixelParams:
    """Everything `degrade` needs besides the picture; JSON-able through `config.to_dict` and `config.from_dict`."""

    preset: str
    scale: int
    """Sides of the result are those of the picture divided by this."""
    sharpen: bool
    """Whether caller should `sharpen` the ground truth first and train towards the sharpened one."""
    noise_seed: int
    """Key of the noise draws."""
    passes: tuple[PassParams, ...]
    """Two, or none where the picture is only shrunk by the antialiased cubic."""
    final_filter: str
    """Filter of the resize to the final size."""
    final_sinc: KernelParams | None
    """None: no last sinc filter."""
    sinc_first: bool
    """Final resize and sinc before the last JPEG, instead of after it."""
    only_jpeg: int | None = None
    """Quality of the JPEG where there are no passes; None: none."""


def draw(
    preset: str, seed: int, source_sha256: str, crop_index: int, scale: int = 4, usm: bool | None = None
) -> PixelParams:
    """Draw the parameters of one crop, a function of the arguments only.

    `preset` is a key of `PRESETS` (KeyError otherwise: callers check names against it); `usm` overrides the preset's
    sharpening.
    """
    chosen = PRESETS[preset]
    rng = draws.generator(seed, "degradation", source_sha256, crop_index)
    if isinstance(chosen, ShrinkPreset):
        quality = None if chosen.jpeg is None else int(rng.integers(chosen.jpeg[0], chosen.jpeg[1] + 1))
        return PixelParams(preset, scale, bool(usm), 0, (), "cubic", None, False, quality)
    passes = (_draw_pass(rng, chosen.first), _draw_pass(rng, chosen.second))
    return PixelParams(
        preset=preset,
        scale=scale,
        sharpen=chosen.sharpen if usm is None else usm,
        noise_seed=int(rng.integers(2**62)),
        passes=passes,
        final_filter=str(rng.choice(FILTERS)),
        final_sinc=draw_sinc(rng, lowest=math.pi / 3) if rng.random() < chosen.sinc_share else None,
        sinc_first=bool(rng.random() < 0.5),
    )


def _draw_pass(rng: np.random.Generator, preset: PassPreset) -> PassParams:
    blur = draw_blur(rng, preset.sigma) if rng.random() < preset.blur_share else None
    low, high = preset.resize
    way = rng.choice(3, p=preset.resize_shares)
    factor = (float(rng.uniform(1.0, high)), float(rng.uniform(low, 1.0)), 1.0)[way]
    kind = "gaussian" if rng.random() < GAUSSIAN_NOISE_SHARE else "poisson"
    strength = float(rng.uniform(*(preset.gaussian if kind == "gaussian" else preset.poisson)))
    return PassParams(
        blur=blur,
        factor=factor,
        filter=str(rng.choice(FILTERS)),
        noise=NoiseParams(kind, strength, bool(rng.random() < GREY_NOISE_SHARE)),
        jpeg=int(rng.integers(preset.jpeg[0], preset.jpeg[1] + 1)),
    )


@torch.no_grad()
def degrade(hq_CPQ: torch.Tensor, params: PixelParams) -> torch.Tensor:
    """The bad small picture (3, P/scale, Q/scale), float32 in [0, 1] on whole 8-bit levels.

    hq_CPQ: (3, P, Q) float32 in [0, 1], already sharpened where `params.sharpen` asks for it; P and Q divisible by
    `params.scale` (ValueError otherwise).
    """
    channels, P, Q = hq_CPQ.shape
    if channels != 3 or P % params.scale or Q % params.scale:
        raise ValueError(f"picture {tuple(hq_CPQ.shape)}: expected 3 channels and sides divisible by {params.scale}")
    p, q = P // params.scale, Q // params.scale
    if not params.passes:
        small_CPQ = _cubic_levels(hq_CPQ, p, q)
        return small_CPQ if params.only_jpeg is None else jpeg(small_CPQ, params.only_jpeg)
    first, second = params.passes
    x_CPQ = _soften(hq_CPQ, first.blur)
    x_CPQ = _interpolate(x_CPQ, int(P * first.factor), int(Q * first.factor), first.filter)
    x_CPQ = add_noise(x_CPQ, first.noise, draws.generator(params.noise_seed, "noise", 1))
    x_CPQ = jpeg(x_CPQ, first.jpeg)
    x_CPQ = _soften(x_CPQ, second.blur)
    x_CPQ = _interpolate(x_CPQ, int(p * second.factor), int(q * second.factor), second.filter)
    x_CPQ = add_noise(x_CPQ, second.noise, draws.generator(params.noise_seed, "noise", 2))
    if not params.sinc_first:
        x_CPQ = jpeg(x_CPQ, second.jpeg)
    x_CPQ = _soften(_interpolate(x_CPQ, p, q, params.final_filter), params.final_sinc)
    if params.sinc_first:
        x_CPQ = jpeg(x_CPQ, second.jpeg)
    return _round8(x_CPQ)


def degrade_batch(hq_BCPQ: torch.Tensor, params: Sequence[PixelParams]) -> torch.Tensor:
    """Bad small pictures (B, 3, P/scale, Q/scale) of a batch, each by its own parameters; one scale for all.

    A picture's result is that of `degrade`, whatever else is in the batch. ValueError for another number of parameters,
    an empty batch, or different scales.
    """
    if len(hq_BCPQ) != len(params) or not params:
        raise ValueError(f"{len(hq_BCPQ)} pictures, {len(params)} parameters")
    if len({one.scale for one in params}) > 1:
        raise ValueError(f"scales {sorted({one.scale for one in params})} in one batch")
    return torch.stack([degrade(hq_CPQ, one) for hq_CPQ, one in zip(hq_BCPQ, params, strict=True)])


def enlarge(lq_CPQ: torch.Tensor, P: int, Q: int) -> torch.Tensor:
    """The small picture at the target size (3, P, Q) by the field's cubic, in [0, 1]: what `z_lq` is encoded from."""
    return resample.resize(lq_CPQ[None], P, Q)[0].clamp(0, 1)


@torch.no_grad()
def sharpen(hq_CPQ: torch.Tensor) -> torch.Tensor:
    """Unsharp mask of Real-ESRGAN's ground truth: only where a picture differs from its blur by more than 10 levels.

    (3, P, Q) float32 in [0, 1] -> the same.
    """
    kernel = _usm_kernel()
    residual = hq_CPQ - filter2d(hq_CPQ, kernel)
    mask = (residual.abs() > USM_THRESHOLD).float()
    soft = filter2d(mask, kernel)
    strong = (hq_CPQ + USM_WEIGHT * residual).clamp(0, 1)
    return (soft * strong + (1 - soft) * hq_CPQ).clamp(0, 1)


@lru_cache(maxsize=1)
def _usm_kernel() -> np.ndarray:
    return gaussian(USM_SIZE, USM_SIGMA)


def filter2d(x_CPQ: torch.Tensor, kernel: np.ndarray) -> torch.Tensor:
    """Correlate every channel with a square odd kernel under reflected borders; the shape stays.

    Done by FFT: 1.4 ms for 3x256x256 whatever the kernel's size, where a direct 21x21 convolution takes 10 ms.
    """
    size, (P, Q) = kernel.shape[0], x_CPQ.shape[1:]
    margin = size // 2
    if margin < min(P, Q):
        wide_CPQ = F.pad(x_CPQ, (margin,) * 4, mode="reflect")
    else:
        rows, cols = (_reflected(n, margin).to(x_CPQ.device) for n in (P, Q))
        wide_CPQ = x_CPQ.index_select(1, rows).index_select(2, cols)
    shape = (_smooth(P + size - 1), _smooth(Q + size - 1))
    flipped = torch.from_numpy(np.ascontiguousarray(kernel[::-1, ::-1], np.float32)).to(x_CPQ.device)
    spectrum = torch.fft.rfft2(wide_CPQ, s=shape) * torch.fft.rfft2(flipped, s=shape)
    return torch.fft.irfft2(spectrum, s=shape)[:, size - 1 : size - 1 + P, size - 1 : size - 1 + Q]


@lru_cache(maxsize=256)
def _reflected(n: int, margin: int) -> torch.Tensor:
    """Indices -margin .. n-1+margin reflected into 0 .. n-1, edge pixels not repeated; also for margin >= n."""
    period = max(2 * (n - 1), 1)
    index = np.abs(np.arange(-margin, n + margin)) % period
    return torch.from_numpy(np.minimum(index, period - index) if n > 1 else np.zeros_like(index))


@lru_cache(maxsize=1024)
def _smooth(n: int) -> int:
    """The next even size >= n without prime factors above 5: fast to transform."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1 and n % 2 == 0:
            return n
        n += 1


def add_noise(x_CPQ: torch.Tensor, noise: NoiseParams, rng: np.random.Generator) -> torch.Tensor:
    """The picture with Gaussian or Poisson (shot) noise, clamped to [0, 1]."""
    shape = (1, *x_CPQ.shape[1:]) if noise.grey else tuple(x_CPQ.shape)
    z = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    if noise.kind == "gaussian":
        return (x_CPQ + z.to(x_CPQ.device) * (noise.strength / 255)).clamp(0, 1)
    base = luma(x_CPQ)[None] if noise.grey else x_CPQ
    levels = (base.clamp(0, 1) * 255).round().cpu()
    used = int(torch.count_nonzero(torch.bincount(levels.flatten().to(torch.int64), minlength=256)))
    photons = 2 ** math.ceil(math.log2(used)) if used > 1 else 1
    rate = levels * (photons / 255)
    shot = (_poisson(rate, z, rng) - rate) / photons
    return (x_CPQ + shot.to(x_CPQ.device) * noise.strength).clamp(0, 1)


def _poisson(rate: torch.Tensor, z: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Poisson counts: exact below a rate of 12, above it the normal draw `z` with its skewness corrected.

    numpy's exact sampler alone would take 10 ms per crop; the correction (Cornish-Fisher) keeps mean, variance and
    skewness.
    """
    counts = (rate + rate.sqrt() * z + (z * z - 1) / 6).round_()
    small = rate < 12
    if small.any():
        exact = rng.poisson(rate[small].numpy())
        counts[small] = torch.from_numpy(exact.astype(np.float32))
    return counts


def luma(x_CPQ: torch.Tensor) -> torch.Tensor:
    """(3, P, Q) RGB -> (P, Q) ITU-R BT.601 luma."""
    red, green, blue = x_CPQ.unbind(0)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def jpeg(x_CPQ: torch.Tensor, quality: int) -> torch.Tensor:
    """The picture after a real JPEG (4:2:0), encoded and decoded in memory; float32 in [0, 1] on 8-bit levels."""
    levels_PQC = (x_CPQ.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu()
    stream = io.BytesIO()
    Image.fromarray(levels_PQC.numpy()).save(stream, "JPEG", quality=quality, subsampling="4:2:0")
    decoded_PQC = torch.from_numpy(np.array(Image.open(stream)))
    return decoded_PQC.permute(2, 0, 1).contiguous().to(x_CPQ.device).float() / 255


def _soften(x_CPQ: torch.Tensor, kernel: KernelParams | None) -> torch.Tensor:
    return x_CPQ if kernel is None else filter2d(x_CPQ, kernel_PQ(kernel))


def _interpolate(x_CPQ: torch.Tensor, rows: int, cols: int, mode: str) -> torch.Tensor:
    """Torch's resize without antialiasing, which is what the pipeline's published networks were trained with."""
    size = (max(rows, 1), max(cols, 1))
    if size == tuple(x_CPQ.shape[1:]):
        return x_CPQ
    align = None if mode == "area" else False
    return F.interpolate(x_CPQ[None], size=size, mode=mode, align_corners=align)[0]


def _cubic_levels(x_CPQ: torch.Tensor, p: int, q: int) -> torch.Tensor:
    """The field's cubic as its published scripts use it: `im2double`, `imresize`, `imwrite`; rounded once, halves up.

    Computed on levels in float64: at x1/2, x1/4 and x1/8 weights and sums are exact, so a half is seen as one.
    """
    levels_CPQ = x_CPQ.cpu().double() * 255
    whole_CPQ = levels_CPQ.round()
    levels_CPQ = torch.where(
        (levels_CPQ - whole_CPQ).abs() < 1e-3, whole_CPQ, levels_CPQ
    )  # float32 of k/255 is inexact
    small_CPQ = (resample.resize(levels_CPQ[None], p, q)[0] + 0.5).floor().clamp(0, 255)
    return (small_CPQ.float() / 255).to(x_CPQ.device)


def _round8(x_CPQ: torch.Tensor) -> torch.Tensor:
    return (x_CPQ.clamp(0, 1) * 255).round() / 255
