"""Pixel degradation: kernels, noise, JPEG, presets, and that a crop's result depends on its parameters alone."""

from __future__ import annotations

import io
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from dreamsr_cli import draws, resample
from dreamsr_cli.degradations import kernels, pixel
from dreamsr_cli.degradations.kernels import KernelParams
from dreamsr_cli.degradations.presets import PRESETS
from dreamsr_cli.plain_data import from_dict, to_dict

SHA = "5e" * 32


def scene(size: int = 64) -> torch.Tensor:
    """A smooth ramp with a bright square and fine stripes, (3, size, size) on 8-bit levels."""
    y, x = np.mgrid[0:size, 0:size] / size
    rgb = np.stack([0.2 + 0.6 * x, 0.3 + 0.4 * y, 0.5 + 0.2 * np.sin(40 * x)])
    rgb[:, size // 4 : size // 2, size // 4 : size // 2] = 0.9
    return torch.from_numpy(np.rint(rgb * 255).astype(np.float32)) / 255


def noisy(strength: float, kind: str, grey: bool, level: float, seed: int = 1, size: int = 200) -> torch.Tensor:
    rng = draws.generator(seed, "test")
    return pixel.add_noise(torch.full((3, size, size), level), pixel.NoiseParams(kind, strength, grey), rng)


@pytest.mark.parametrize("preset", PRESETS)
def test_same_parameters_same_bytes_in_any_order(preset: str) -> None:
    def result(index: int) -> bytes:
        return pixel.degrade(scene(), pixel.draw(preset, 3, SHA, index)).numpy().tobytes()

    forward = [result(i) for i in range(8)]
    torch.manual_seed(123)
    np.random.seed(5)
    assert [result(i) for i in reversed(range(8))] == forward[::-1]
    # `jpeg` draws a quality alone, of which there are few
    assert len(set(forward)) >= {"bicubic": 1, "jpeg": 4}.get(preset, 8)


def test_draw_depends_on_seed_source_and_crop() -> None:
    base = pixel.draw("seesr-mild", 1, SHA, 0)
    assert base == pixel.draw("seesr-mild", 1, SHA, 0)
    others = [
        pixel.draw("seesr-mild", 2, SHA, 0),
        pixel.draw("seesr-mild", 1, "00", 0),
        pixel.draw("seesr-mild", 1, SHA, 1),
    ]
    assert all(other.noise_seed != base.noise_seed for other in others)


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_survive_json(preset: str) -> None:
    for index in range(20):
        params = pixel.draw(preset, 7, SHA, index)
        again = from_dict(pixel.PixelParams, json.loads(json.dumps(to_dict(params))), "test")
        assert again == params


def test_presets_draw_within_their_ranges() -> None:
    mild = [pixel.draw("seesr-mild", 0, SHA, i) for i in range(600)]
    first, second = [p.passes[0] for p in mild], [p.passes[1] for p in mild]
    assert min(p.factor for p in first) >= 0.3 and max(p.factor for p in first) <= 1.5
    assert min(p.factor for p in second) >= 0.6 and max(p.factor for p in second) <= 1.2
    assert {p.jpeg for p in first} <= set(range(60, 96)) and {p.jpeg for p in second} <= set(range(60, 101))
    assert np.mean([p.factor == 1.0 for p in first]) == pytest.approx(0.1, abs=0.05)
    assert np.mean([p.factor < 1.0 for p in first]) == pytest.approx(0.7, abs=0.07)
    assert np.mean([p.blur is None for p in second]) == pytest.approx(0.5, abs=0.08)
    assert all(p.blur is not None for p in first)
    assert np.mean([p.noise.kind == "gaussian" for p in first]) == pytest.approx(0.5, abs=0.08)
    assert np.mean([p.noise.grey for p in first + second]) == pytest.approx(0.4, abs=0.06)
    assert np.mean([p.final_sinc is not None for p in mild]) == pytest.approx(0.8, abs=0.06)
    assert np.mean([p.sinc_first for p in mild]) == pytest.approx(0.5, abs=0.08)
    assert not any(p.sharpen for p in mild)
    assert max(p.noise.strength for p in first if p.noise.kind == "gaussian") <= 15
    assert {p.blur.kind for p in first if p.blur} == {*kernels.KINDS, "sinc"}
    pairs = [pixel.draw("seesr-pairs", 0, SHA, i) for i in range(200)]
    assert all(p.sharpen for p in pairs) and min(p.passes[1].jpeg for p in pairs) < 60
    assert not pixel.draw("seesr-pairs", 0, SHA, 0, usm=False).sharpen


@pytest.mark.parametrize("kind", [*kernels.KINDS, "sinc"])
def test_kernels_sum_to_one_and_are_symmetric(kind: str) -> None:
    params = KernelParams(kind, 15, 2.5, 1.1 if kind.endswith("aniso") else 2.5, 0.7, 1.4, 1.6)
    kernel = kernels.kernel_PQ(params)
    assert kernel.shape == (15, 15)
    assert kernel.sum() == pytest.approx(1)
    assert np.allclose(kernel, kernel[::-1, ::-1], atol=1e-15)
    assert kernel.argmax() == 15 * 7 + 7
    turned = np.allclose(kernel, kernel.T, atol=1e-12)
    assert turned != kind.endswith("aniso")


def test_gaussian_kernel_has_its_sigma_along_its_axis() -> None:
    kernel = kernels.kernel_PQ(KernelParams("aniso", 41, 3.0, 1.0, math.pi / 2))
    reach = np.arange(41) - 20
    assert math.sqrt((kernel.sum(1) * reach**2).sum()) == pytest.approx(3.0, abs=0.02)
    assert math.sqrt((kernel.sum(0) * reach**2).sum()) == pytest.approx(1.0, abs=0.02)


def test_sinc_passes_low_frequencies_and_stops_high_ones() -> None:
    spectrum = np.abs(np.fft.fft2(kernels.sinc(21, math.pi / 3), s=(126, 126)))[0]
    assert spectrum[5] == pytest.approx(1, abs=0.15)
    assert spectrum[45:63].max() < 0.1


@pytest.mark.parametrize(("side", "size"), [(40, 9), (33, 21), (6, 21), (1, 7)])
def test_filter_equals_the_direct_sum(side: int, size: int) -> None:
    rng = np.random.default_rng(2)
    x, kernel = rng.random((3, side, side + 3), dtype=np.float32), rng.random((size, size))
    wide = np.pad(x, ((0, 0), *((size // 2, size // 2),) * 2), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(wide, (size, size), axis=(1, 2))
    expected = np.einsum("cpqab,ab->cpq", windows, kernel)
    assert np.allclose(pixel.filter2d(torch.from_numpy(x), kernel).numpy(), expected, rtol=1e-5)


def test_gaussian_noise_has_its_sigma() -> None:
    colour = noisy(10, "gaussian", False, 0.5) - 0.5
    assert colour.std().item() * 255 == pytest.approx(10, rel=0.02)
    assert abs(colour.mean().item()) * 255 < 0.15
    assert abs(np.corrcoef(colour.reshape(3, -1))[0, 1]) < 0.02
    grey = noisy(10, "gaussian", True, 0.5)
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])


@pytest.mark.parametrize("level", [5, 30, 200])
def test_poisson_noise_has_the_variance_and_skewness_of_photons(level: int) -> None:
    """All 256 levels are present, so a level is its own rate: variance = rate levels^2, skewness = rate^-1/2."""
    size = 200
    x = torch.full((3, size, size), level / 255)
    x[:, 0, : size // 2] = torch.arange(100) / 255
    x[:, 1, :] = torch.arange(56, 256) / 255
    x[:, 2, :100] = torch.arange(100, 200) / 255
    out = pixel.add_noise(x, pixel.NoiseParams("poisson", 0.2, False), draws.generator(4, "test"))
    error = ((out - x)[:, 4:] * 255 / 0.2).double()
    rate = level * 256 / 255
    assert error.mean().item() == pytest.approx(0, abs=4 * math.sqrt(rate / error.numel()))
    assert error.var().item() == pytest.approx(rate * (255 / 256) ** 2, rel=0.03)
    skewness = (error**3).mean().item() / error.var().item() ** 1.5
    assert skewness == pytest.approx(rate**-0.5, abs=0.04)


def test_jpeg_is_what_pillow_writes() -> None:
    x = scene(48)
    stream = io.BytesIO()
    levels = (x * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(levels).save(stream, "JPEG", quality=40)
    assert stream.getvalue()[:2] == b"\xff\xd8"
    expected = np.asarray(Image.open(stream))
    assert np.array_equal((pixel.jpeg(x, 40) * 255).round().byte().permute(1, 2, 0).numpy(), expected)
    worse, better = ((pixel.jpeg(x, q) - x).square().mean().item() for q in (20, 95))
    assert worse > 4 * better > 0


def test_constant_stays_constant_without_noise() -> None:
    grey = torch.full((3, 64, 96), 128 / 255)
    for index in range(12):
        params = pixel.draw("seesr-pairs", 0, SHA, index)
        quiet = to_dict(params)
        for one in quiet["passes"]:
            one["noise"] = {"kind": "gaussian", "strength": 0.0, "grey": False}
        lq = pixel.degrade(grey, from_dict(pixel.PixelParams, quiet, "test"))
        assert lq.shape == (3, 16, 24)
        assert (lq * 255 - 128).abs().max().item() <= 1.001
    assert torch.equal(pixel.degrade(grey, pixel.draw("bicubic", 0, SHA, 0)), torch.full((3, 16, 24), 128 / 255))
    assert torch.allclose(pixel.enlarge(grey[:, :16, :24], 64, 96), grey, atol=1e-6)


def test_result_is_on_whole_levels_and_a_quarter_of_the_size() -> None:
    for index in range(10):
        lq = pixel.degrade(scene(80), pixel.draw("seesr-mild", 1, SHA, index))
        assert lq.shape == (3, 20, 20) and lq.dtype == torch.float32
        assert lq.min() >= 0 and lq.max() <= 1
        assert (lq * 255 - (lq * 255).round()).abs().max() < 1e-4
    with pytest.raises(ValueError, match="divisible by 4"):
        pixel.degrade(scene(70)[:, :70], pixel.draw("seesr-mild", 1, SHA, 0))


def test_bicubic_is_only_the_antialiased_cubic() -> None:
    x = scene()
    expected = (resample.resize(x[None], 16, 16)[0].clamp(0, 1) * 255).round() / 255
    assert torch.equal(pixel.degrade(x, pixel.draw("bicubic", 9, SHA, 4)), expected)


def test_jpeg_is_the_cubic_saved_once() -> None:
    x, params = scene(), pixel.draw("jpeg", 9, SHA, 4)
    assert params.only_jpeg is not None
    cubic = pixel.degrade(x, pixel.draw("bicubic", 9, SHA, 4))
    assert torch.equal(pixel.degrade(x, params), pixel.jpeg(cubic, params.only_jpeg))


def test_last_jpeg_and_sinc_come_in_both_orders() -> None:
    params = next(p for p in (pixel.draw("seesr-pairs", 0, SHA, i) for i in range(50)) if p.final_sinc)
    swapped = from_dict(pixel.PixelParams, {**to_dict(params), "sinc_first": not params.sinc_first}, "test")
    assert not torch.equal(pixel.degrade(scene(), params), pixel.degrade(scene(), swapped))


def test_sharpening_raises_edges_and_leaves_flat_parts() -> None:
    x = torch.full((3, 160, 160), 0.3)
    x[:, :, 80:] = 0.6
    sharp = pixel.sharpen(x)
    assert sharp[0, 80, 80] > 0.64 and sharp[0, 80, 79] < 0.26
    assert (sharp[:, :, :20] - 0.3).abs().max() < 1e-5
    faint = torch.full((3, 64, 64), 0.3)
    faint[:, :, 32:] = 0.33
    assert torch.allclose(pixel.sharpen(faint), faint, atol=1e-5)


# ---------------------------------------------------------------- the field's downscale


def matlab_line_weights(n_in: int, scale: int) -> list[list[Fraction]]:
    """Row j: exact weight of each source pixel in `imresize(x, 1/scale, 'bicubic')`, from MATLAB's definition.

    1-based u = x * scale + (1 - scale) / 2; kernel h(d / scale) / scale with Keys' a = -1/2; borders mirrored, the edge
    pixel repeated; weights divided by their sum.
    """

    def keys(d: Fraction) -> Fraction:
        d = abs(d)
        if d >= 2:
            return Fraction(0)
        if d <= 1:
            return Fraction(3, 2) * d**3 - Fraction(5, 2) * d**2 + 1
        return -Fraction(1, 2) * d**3 + Fraction(5, 2) * d**2 - 4 * d + 2

    rows = []
    for x in range(1, n_in // scale + 1):
        u = x * scale + Fraction(1 - scale, 2)
        row = [Fraction(0)] * n_in
        for i in range(int(u) - 2 * scale - 1, int(u) + 2 * scale + 2):
            j = i
            while not 1 <= j <= n_in:  # ... 2 1 | 1 2 ... n | n n-1 ...
                j = 1 - j if j < 1 else 2 * n_in + 1 - j
            row[j - 1] += keys((u - i) / scale)
        total = sum(row)
        rows.append([w / total for w in row])
    return rows


def matlab_downscale(levels_PQ: np.ndarray, scale: int) -> tuple[np.ndarray, int]:
    """Exact, then rounded once with halves up, as imwrite does; and how many halves there were."""
    down, across = (matlab_line_weights(n, scale) for n in levels_PQ.shape)
    x = [[Fraction(int(v)) for v in row] for row in levels_PQ]
    narrow = [[sum((w * v for w, v in zip(ws, row, strict=True) if w), Fraction(0)) for ws in across] for row in x]
    small = [
        [sum((w * row[q] for w, row in zip(ws, narrow, strict=True) if w), Fraction(0)) for q in range(len(across))]
        for ws in down
    ]
    halves = sum((2 * v).denominator == 1 and v.denominator == 2 for row in small for v in row)
    return np.array([[min(max(math.floor(v + Fraction(1, 2)), 0), 255) for v in row] for row in small]), halves


def bicubic_levels(levels_PQ: np.ndarray, scale: int = 4) -> np.ndarray:
    x = torch.from_numpy(np.repeat(levels_PQ[None], 3, 0).astype(np.float32)) / 255
    small = pixel.degrade(x, pixel.draw("bicubic", 0, SHA, 0, scale))
    assert torch.equal(small[0], small[1]) and torch.equal(small[0], small[2])
    return (small[0].double() * 255).round().numpy().astype(int)


def pictures_for_imresize() -> dict[str, np.ndarray]:
    impulse, border = np.zeros((16, 24), int), np.zeros((16, 24), int)
    impulse[7, 9] = 255
    border[0, 0] = border[15, 11] = border[4, 23] = 255
    rng = np.random.default_rng(3)
    return {
        "impulse": impulse,
        "border": border,
        "ramp": np.arange(24)[None] * 10 + np.arange(16)[:, None],
        "slow ramp": np.repeat(np.arange(24)[None], 16, 0) + 100,
        "noise": rng.integers(0, 256, (20, 28)),
        "black and white": rng.integers(0, 2, (20, 28)) * 255,
        "one cell": rng.integers(0, 256, (4, 4)),
        "narrow": rng.integers(0, 256, (4, 32)),
    }


@pytest.mark.parametrize("name", pictures_for_imresize())
@pytest.mark.parametrize("scale", [4, 2])
def test_bicubic_is_imresize_in_every_pixel(name: str, scale: int) -> None:
    levels = pictures_for_imresize()[name]
    expected, _ = matlab_downscale(levels, scale)
    assert np.array_equal(bicubic_levels(levels, scale), expected)


def test_bicubic_by_hand() -> None:
    """A corner of 255 counts twice per axis (mirrored): h(3/8) = 0.7275390625, h(5/8) = 0.3896484375, their sum / 4 =
    0.279296875, squared times 255 = 19.89. A ramp of 1 per pixel is read between two pixels: halves, rounded up."""
    corner = np.zeros((32, 32), int)
    corner[0, 0] = 255
    assert bicubic_levels(corner)[0, 0] == 20
    assert bicubic_levels(corner)[0, 1] == 0  # h(11/8) + h(13/8) < 0: clamped
    ramp = np.repeat(np.arange(64)[None], 16, 0)
    assert bicubic_levels(ramp)[2, 2:-2].tolist() == [10 + 4 * k for k in range(12)]  # 9.5, 13.5, ...
    assert matlab_downscale(ramp, 4)[1] >= 48


def test_bicubic_is_not_pillows() -> None:
    levels = pictures_for_imresize()["noise"].astype(np.uint8)
    theirs = np.asarray(Image.fromarray(levels).resize((7, 5), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(theirs - bicubic_levels(levels)).max() > 2


# ---------------------------------------------------------------- batches, JPEG's blocks, resizes


@pytest.mark.parametrize("preset", ["seesr-pairs", "bicubic"])
def test_a_batch_is_its_pictures(preset: str) -> None:
    pictures = torch.stack([scene(), scene().flip(2), scene().flip(1)])
    params = [pixel.draw(preset, 4, SHA, i) for i in range(3)]
    together = pixel.degrade_batch(pictures, params)
    assert together.shape == (3, 3, 16, 16)
    for i in (2, 0, 1):
        assert torch.equal(together[i], pixel.degrade(pictures[i], params[i]))
    with pytest.raises(ValueError, match="2 parameters"):
        pixel.degrade_batch(pictures, params[:2])
    with pytest.raises(ValueError, match="scales"):
        pixel.degrade_batch(pictures, [*params[:2], pixel.draw(preset, 4, SHA, 2, scale=2)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_pictures_up_to_rounding() -> None:
    pictures = torch.stack([scene(256)] * 8)
    params = [pixel.draw("seesr-pairs", 4, SHA, i) for i in range(8)]
    far = pixel.degrade_batch(pictures.cuda(), params)
    assert far.is_cuda
    error = (far.cpu() - pixel.degrade_batch(pictures, params)).abs() * 255
    assert error.mean() < 0.5 and (error > 16).float().mean() < 0.01


JPEG_LUMA = """
16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55  14 13 16 24 40 57 69 56  14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92  49 64 78 87 103 121 120 101  72 92 95 98 112 100 103 99
"""
"""Quantisation table of luma for quality 50, ITU-T T.81 annex K."""


def distance_to_quantised(luma_PQ: np.ndarray, quality: int) -> float:
    """Mean distance of the 8x8 DCT coefficients from multiples of the standard's steps, as a share of the step."""
    steps = np.array(JPEG_LUMA.split(), float).reshape(8, 8)
    steps = np.floor((steps * (5000 // quality if quality < 50 else 200 - 2 * quality) + 50) / 100)
    k, n = np.mgrid[0:8, 0:8]
    dct = np.cos(math.pi * (2 * n + 1) * k / 16) * np.where(k == 0, math.sqrt(1 / 8), 0.5)
    rows, cols = luma_PQ.shape[0] // 8, luma_PQ.shape[1] // 8
    blocks = (luma_PQ[: rows * 8, : cols * 8] - 128).reshape(rows, 8, cols, 8).transpose(0, 2, 1, 3)
    scaled = (dct @ blocks @ dct.T) / steps
    return float(np.abs(scaled - np.rint(scaled))[:, :, steps >= 12].mean())


@pytest.mark.parametrize("quality", [30, 60, 80])
def test_jpeg_is_quantised_in_blocks_of_eight(quality: int) -> None:
    """Coefficients of the decoded picture lie on the standard's steps, on the 8x8 grid and no other."""
    grey = (
        scene(96)[:1] + 0.4 * torch.from_numpy(draws.generator(1, "test").random((1, 96, 96), np.float32) - 0.5)
    ).clamp(0, 0.9)
    x = grey.repeat(3, 1, 1)
    out = (pixel.jpeg(x, quality)[0] * 255).double().numpy()
    assert distance_to_quantised(out, quality) < 0.06
    assert distance_to_quantised(out[3:, 5:], quality) > 0.08
    assert distance_to_quantised((x[0] * 255).double().numpy(), quality) > 0.08


def test_the_last_step_is_the_jpeg_of_its_quality_or_the_sinc() -> None:
    """With the sinc first the result is a decoded JPEG: coding it again at that quality changes it far less."""
    hq = scene(256)
    last = [p for p in (pixel.draw("seesr-pairs", 2, SHA, i) for i in range(60)) if p.passes[1].jpeg < 60]
    changed = [
        float((pixel.jpeg(pixel.degrade(hq, p), p.passes[1].jpeg) - pixel.degrade(hq, p)).abs().mean()) for p in last
    ]
    first, after = ([c for c, p in zip(changed, last, strict=True) if p.sinc_first == way] for way in (True, False))
    assert len(first) > 5 and len(after) > 5 and np.mean(first) < 0.5 * np.mean(after)


@pytest.mark.parametrize("mode", pixel.FILTERS)
@pytest.mark.parametrize("size", [(13, 40), (32, 32), (77, 50), (1, 1)])
def test_a_resized_constant_is_that_constant(mode: str, size: tuple[int, int]) -> None:
    x = torch.full((3, 32, 32), 0.3)
    out = pixel._interpolate(x, *size, mode)
    assert out.shape == (3, *size)
    torch.testing.assert_close(out, torch.full_like(out, 0.3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("grey", [True, False])
def test_grey_and_coloured_poisson_noise_have_their_channels(grey: bool) -> None:
    x = torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(1)) * 0.5 + 0.25
    noise = pixel.add_noise(x, pixel.NoiseParams("poisson", 0.5, grey), draws.generator(3, "test")) - x
    together = np.corrcoef(noise.reshape(3, -1).numpy())
    assert together[0, 1] > 0.999 if grey else abs(together[0, 1]) < 0.05


@pytest.mark.parametrize("size", [(4, 4), (4, 64), (20, 4)])
def test_the_smallest_pictures_go_through(size: tuple[int, int]) -> None:
    x = torch.rand(3, *size, generator=torch.Generator().manual_seed(1))
    for index in range(30):
        lq = pixel.degrade(pixel.sharpen(x), pixel.draw("seesr-pairs", 0, SHA, index))
        assert lq.shape == (3, size[0] // 4, size[1] // 4) and torch.isfinite(lq).all()
