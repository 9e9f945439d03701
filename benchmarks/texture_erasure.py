"""What texture erasure does to good crops, in figures and as a sheet of pictures.

    python benchmarks/texture_erasure.py PHOTOS --sheet sheet.png

Three questions, each with a target: do low frequencies stay, does high-frequency energy fall, and does it differ from a
Gaussian blur that leaves the same high-frequency energy? Luma is that of BT.601; frequencies are in cycles per pixel.
Axes: B batch, P Q pixel rows and columns.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LOW_SIGMA = 2.0
"""Both pictures are blurred by this many pixels before low frequencies are compared."""
HIGH = 1 / 8
"""Frequencies above this are high: periods of less than 8 pixels."""
FINE_SIGMA = 1.5
"""Fine detail is luma less its blur of this many pixels."""
STRONG, WEAK = (0.95, 1.0), (0.3, 0.8)
"""Pixels by the size of the good crop's fine detail, as quantiles: its edges, and its texture."""
LOW_TARGET_DB = 30.0
CANDIDATES = 4
"""Crops drawn per photo, of which the one with most high-frequency energy is taken: a sky has no texture to erase."""


def blurred(x_BCPQ: Tensor, sigma: float) -> Tensor:
    """Gaussian of `sigma` pixels, cut at 4 sigma, reflected borders."""
    reach = max(1, int(np.ceil(4 * sigma)))
    k = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * sigma**2))
    k = (k / k.sum()).repeat(x_BCPQ.shape[1], 1, 1, 1)
    wide = F.pad(x_BCPQ, (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(wide, k, groups=len(k)), k.transpose(2, 3), groups=len(k))


def luma(x_BCPQ: Tensor) -> Tensor:
    """(B, P, Q)."""
    return (x_BCPQ * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)


def high_energy(x_BCPQ: Tensor) -> Tensor:
    """(B,) energy of luma above `HIGH`, under a Hann window."""
    y_BPQ = luma(x_BCPQ)
    rows, cols = y_BPQ.shape[1:]
    window = torch.hann_window(rows)[:, None] * torch.hann_window(cols)
    power = torch.fft.rfft2((y_BPQ - y_BPQ.mean((1, 2), keepdim=True)) * window).abs() ** 2
    radius = torch.hypot(torch.fft.fftfreq(rows)[:, None], torch.fft.rfftfreq(cols)[None])
    return (power * (radius > HIGH)).sum((1, 2))


def matched_blur(hq_BCPQ: Tensor, energy_B: Tensor) -> tuple[Tensor, list[float]]:
    """Each crop blurred so that its high-frequency energy is `energy_B`, and the sigmas found by bisection; a sigma of
    0.05 means that no blur leaves as much."""
    pictures, sigmas = [], []
    for hq, energy in zip(hq_BCPQ.split(1), energy_B, strict=True):
        low, high = 0.05, 8.0
        for _ in range(20):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if high_energy(blurred(hq, middle))[0] > energy else (low, middle)
        pictures.append(blurred(hq, low))
        sigmas.append(low)
    return torch.cat(pictures), sigmas


def psnr(a_BCPQ: Tensor, b_BCPQ: Tensor) -> Tensor:
    """(B,) in dB, peak 1."""
    return -10 * torch.log10((a_BCPQ - b_BCPQ).square().mean((1, 2, 3)).clamp_min(1e-12))


def kept(hq_BCPQ: Tensor, made_BCPQ: Tensor, quantiles: tuple[float, float]) -> Tensor:
    """(B,) share of the good crop's fine detail that is still there, where its size lies between the quantiles: the
    slope of a regression of made on good, so that noise and invented detail count for nothing."""
    good, made = (luma(x) - luma(blurred(x, FINE_SIGMA)) for x in (hq_BCPQ, made_BCPQ))
    shares = []
    for g, m in zip(good.flatten(1), made.flatten(1), strict=True):
        low, high = torch.quantile(g.abs(), torch.tensor(quantiles))
        chosen = (g.abs() >= low) & (g.abs() <= high)
        shares.append((g[chosen] * m[chosen]).sum() / g[chosen].square().sum().clamp_min(1e-12))
    return torch.stack(shares)


def crops(folder: Path, count: int, size: int, seed: int) -> Iterator[tuple[str, str, Tensor]]:
    """(photo's name, its sha256, (3, P, Q) in [0, 1]) of `count` crops, photo by photo in turn, by seed."""
    from dreamsr_cli.draws import generator
    from dreamsr_cli.errors import InputError
    from dreamsr_cli.images import is_photo_name, open_photo

    paths = sorted(p for p in folder.rglob("*") if p.is_file() and is_photo_name(p))
    usable = [p for p in paths if min(_size(p)) >= size]
    if not usable:
        raise InputError(
            f"{folder}: no photo with sides of at least {size}", "give another folder, or a smaller --size"
        )
    order = generator(seed, "erasure-photos").permutation(len(usable))
    for index in range(count):
        path = usable[int(order[index % len(usable)])]
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        rng = generator(seed, "erasure-crop", sha256, index)
        photo = open_photo(path)
        found = []
        for _ in range(CANDIDATES):
            top = int(rng.integers(photo.info.height - size + 1))
            left = int(rng.integers(photo.info.width - size + 1))
            rgb_PQC = np.array(photo.read_rows(top, top + size)[:, left : left + size], np.float32)
            found.append(torch.from_numpy(rgb_PQC).permute(2, 0, 1).clamp(0, 1))
        yield path.name, sha256, max(found, key=lambda crop: float(high_energy(crop[None])[0]))


def _size(path: Path) -> tuple[int, int]:
    from dreamsr_cli.images import read_info

    info = read_info(path)
    return info.width, info.height


def figures(hq: Tensor, made: Tensor) -> tuple[dict[str, Any], Tensor]:
    """All figures of a set of crops, plain data, and the matched blurs."""
    energy, energy_hq = high_energy(made), high_energy(hq)
    plain, sigmas = matched_blur(hq, energy)
    low = psnr(blurred(made, LOW_SIGMA), blurred(hq, LOW_SIGMA))
    edges, texture = kept(hq, made, STRONG), kept(hq, made, WEAK)
    edges_blur, texture_blur = kept(hq, plain, STRONG), kept(hq, plain, WEAK)
    ahead = edges / texture.clamp_min(1e-3) > edges_blur / texture_blur.clamp_min(1e-3)
    found = {
        "crops": len(hq),
        "psnr_db": float(psnr(made, hq).mean()),
        "low_sigma": LOW_SIGMA,
        "low_psnr_db": float(low.mean()),
        "low_psnr_db_least": float(low.min()),
        "low_above_target": float((low >= LOW_TARGET_DB).float().mean()),
        "high_frequency": HIGH,
        "high_ratio": float((energy / energy_hq).mean()),
        "high_ratio_median": float((energy / energy_hq).median()),
        "high_falls": float((energy < energy_hq).float().mean()),
        "blur_sigma": float(np.mean(sigmas)),
        "blur_difference_levels": float((made - plain).abs().mean() * 255),
        "edges_kept": float(edges.mean()),
        "edges_kept_by_blur": float(edges_blur.mean()),
        "texture_kept": float(texture.mean()),
        "texture_kept_by_blur": float(texture_blur.mean()),
        "edges_per_texture": float(edges.mean() / texture.mean()),
        "edges_per_texture_of_blur": float(edges_blur.mean() / texture_blur.mean()),
        "crops_ahead_of_blur": float(ahead.float().mean()),
    }
    return found, plain


def verdicts(found: dict[str, Any]) -> dict[str, bool]:
    """Which of the three targets are met."""
    return {
        "low frequencies stay": found["low_psnr_db"] >= LOW_TARGET_DB,
        "high-frequency energy falls": found["high_ratio"] < 1,
        "edges outlast texture more than in a blur": found["edges_per_texture"] > found["edges_per_texture_of_blur"],
    }


def text(found: dict[str, Any]) -> Iterator[str]:
    """The figures as lines for people."""
    yield f"{found['crops']} crops of {found['size']} px, {found['seconds_per_crop']:.2f} s each"
    yield ", ".join(f"{name} {value}" for name, value in found["settings"].items())
    yield f"PSNR {found['psnr_db']:.2f} dB; the autoencoder's round trip alone {found['round_trip_db']:.2f} dB"
    yield (
        f"after a blur of both by {LOW_SIGMA:g} px: {found['low_psnr_db']:.2f} dB on average, least "
        f"{found['low_psnr_db_least']:.2f}, {found['low_above_target']:.0%} of crops at {LOW_TARGET_DB:g} or more"
    )
    yield (
        f"energy above {HIGH:g} cycles/px: mean ratio {found['high_ratio']:.3f}, median "
        f"{found['high_ratio_median']:.3f}, falls in {found['high_falls']:.0%} of crops"
    )
    yield (
        f"against the Gaussian blur of the same energy (sigma {found['blur_sigma']:.2f} on average): mean difference "
        f"{found['blur_difference_levels']:.2f} levels"
    )
    for name, key in (("erased", ""), ("blurred", "_by_blur")):
        ratio = found["edges_per_texture_of_blur" if key else "edges_per_texture"]
        edges, texture = found[f"edges_kept{key}"], found[f"texture_kept{key}"]
        yield f"  {name}: {edges:.3f} of strong detail kept, {texture:.3f} of weak detail, ratio {ratio:.3f}"
    yield f"  ratio above the blur's in {found['crops_ahead_of_blur']:.0%} of crops"
    for name, met in found["targets"].items():
        yield f"{'met   ' if met else 'MISSED'} {name}"


def write_sheet(path: Path, rows: list[Tensor], shown: int) -> None:
    """`shown` crops side by side; one row for each of `rows` (B, 3, P, Q)."""
    from PIL import Image

    sheet = torch.cat([torch.cat(list(row[:shown]), 2) for row in rows], 1)
    Image.fromarray((sheet.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(path)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Erase, compare, write the sheet; every figure as plain data. Raises `DreamSRError`."""
    from dreamsr_cli.degradations.texture_erasure import ERASE_TEXT, draw_erasure, open_eraser
    from dreamsr_cli.device import choose_device, choose_dtype
    from dreamsr_cli.models.bundle import open_bundle
    from dreamsr_cli.models.captioner import Describer

    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    dtype = choose_dtype(options.precision, device)
    bundle = open_bundle(options.model, options.weights)
    erase_text = ERASE_TEXT if options.erase_text is None else options.erase_text
    taken = list(crops(options.photos, options.crops, options.size, options.seed))
    hq = torch.stack([crop for _, _, crop in taken])
    params = [draw_erasure(options.seed, sha256, i, erase_text) for i, (_, sha256, _) in enumerate(taken)]
    describer = Describer()
    prompts = [describer.describe(np.ascontiguousarray(crop.permute(1, 2, 0).numpy())) for crop in hq]
    began = time.perf_counter()
    with open_eraser(bundle, device, dtype, options.batch) as eraser:
        made = eraser.erase(hq, params, prompts)
        settings = eraser.settings
    seconds = time.perf_counter() - began
    autoencoder = bundle.open_autoencoder(device, dtype)
    with torch.inference_mode():
        whole = [autoencoder.decode(autoencoder.encode(x.to(device) * 2 - 1)).cpu() / 2 + 0.5 for x in hq.split(1)]
    found, plain = figures(hq, made)
    found |= {
        "round_trip_db": float(psnr(torch.cat(whole).clamp(0, 1), hq).mean()),
        "size": options.size,
        "seed": options.seed,
        "seconds_per_crop": seconds / len(hq),
        "settings": settings,
        "targets": verdicts(found),
    }
    if options.sheet:
        write_sheet(options.sheet, [hq, made, plain], options.shown)
    return found


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("photos", type=Path, help="folder of good photos")
    add("--model", default="mini", help="mini, or the folder of a bundle (default mini)")
    add("--weights", default=None, help="folder of a training run, laid over the model")
    add("--crops", type=int, default=50, help="crops in all (default 50)")
    add("--size", type=int, default=256, help="side of a crop in pixels, a multiple of 16 (default 256)")
    add("--seed", type=int, default=42, help="seed of crops and erasures (default 42)")
    add("--batch", type=int, default=4, help="crops per network call (default 4)")
    add("--erase-text", default=None, help="instead of the built-in text that is added to prompts")
    add("--sheet", type=Path, default=None, help="write a picture: crops, erased, and the blur of the same energy")
    add("--shown", type=int, default=8, help="crops on the sheet (default 8)")
    add("--precision", default="auto", help="auto, fp32, bf16 or fp16")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    add("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    add("--json", action="store_true", help="one JSON object instead of text")
    parsed = parser.parse_args(words)
    if parsed.crops < 1 or parsed.batch < 1 or parsed.size < 32 or parsed.size % 16:
        parser.error("--crops and --batch must be at least 1, --size a multiple of 16 from 32 on")
    return parsed


def main(words: list[str] | None = None) -> int:
    """Exit code 0 once measured, whatever the figures; a `DreamSRError`'s own else."""
    from command import report

    options = arguments(words)
    return report(lambda: {**measure(options), "load": round(os.getloadavg()[0], 2)}, text, options.json)


if __name__ == "__main__":
    sys.exit(main())
