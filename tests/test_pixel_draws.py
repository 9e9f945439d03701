"""2,000 draws per preset: every probability and every range of the published settings.

The table is typed here anew (docs/degrade.md), so that a slip in presets.py shows. Tolerances: five standard errors for
shares, ends of ranges within 1 % of their length, uniformity by the mean and the quarters.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest

from dreamsr_cli.degradations import pixel
from dreamsr_cli.degradations.kernels import KernelParams
from dreamsr_cli.degradations.presets import looks_after

DRAWS = 2000


@dataclass(frozen=True)
class Published:
    """One column of the table; pairs are (pass 1, pass 2)."""

    resize: tuple[tuple[float, float], tuple[float, float]]
    gaussian: tuple[tuple[float, float], tuple[float, float]]
    poisson: tuple[tuple[float, float], tuple[float, float]]
    jpeg: tuple[tuple[int, int], tuple[int, int]]
    second_blur: float
    sharpen: bool


STRONG = Published(
    ((0.15, 1.5), (0.3, 1.2)), ((1, 30), (1, 25)), ((0.05, 3), (0.05, 2.5)), ((30, 95), (30, 95)), 0.8, True
)
TABLE = {
    "seesr-mild": Published(
        ((0.3, 1.5), (0.6, 1.2)), ((1, 15), (1, 12)), ((0.05, 2), (0.05, 1)), ((60, 95), (60, 100)), 0.5, False
    ),
    "seesr-pairs": STRONG,
    "realesrgan": STRONG,
}
UP_DOWN_KEEP = ((0.2, 0.7, 0.1), (0.3, 0.4, 0.3))
KIND_SHARES = {
    "iso": 0.45,
    "aniso": 0.25,
    "generalized-iso": 0.12,
    "generalized-aniso": 0.03,
    "plateau-iso": 0.12,
    "plateau-aniso": 0.03,
}
SIGMA = ((0.2, 3.0), (0.2, 1.5))


@cache
def drawn(preset: str) -> list[pixel.PixelParams]:
    return [pixel.draw(preset, 1, hashlib.sha256(b"%d" % (i // 7)).hexdigest(), i % 7) for i in range(DRAWS)]


def is_share(hits: Sequence[bool], share: float) -> None:
    error = math.sqrt(share * (1 - share) / len(hits))
    assert np.mean(hits) == pytest.approx(share, abs=5 * error), f"{np.mean(hits):.4f} instead of {share}"


def is_uniform(values: Sequence[float], low: float, high: float) -> None:
    """Inside the range, reaching its ends as far as this many draws do, a quarter of them in each quarter."""
    assert low <= min(values) and max(values) <= high
    unit = (np.asarray(values) - low) / (high - low)
    reach = 12 / len(values)  # the chance of missing it is e^-12
    assert unit.min() < reach and unit.max() > 1 - reach
    for quarter in range(4):
        is_share(list((unit >= quarter / 4) & (unit < (quarter + 1) / 4 + (quarter == 3))), 0.25)


def is_blur(kernels: list[KernelParams], sigma: tuple[float, float]) -> None:
    is_share([k.kind == "sinc" for k in kernels], 0.1)
    gaussians = [k for k in kernels if k.kind != "sinc"]
    for kind, share in KIND_SHARES.items():
        is_share([k.kind == kind for k in gaussians], share)
    for size in range(7, 22, 2):
        is_share([k.size == size for k in kernels], 1 / 8)
    is_uniform([k.sigma_x for k in gaussians], *sigma)
    oblong = [k for k in gaussians if k.kind.endswith("aniso")]
    is_uniform([k.sigma_y for k in oblong], *sigma)
    is_uniform([k.rotation for k in oblong], -math.pi, math.pi)
    assert all(k.sigma_x == k.sigma_y and k.rotation == 0 for k in gaussians if k not in oblong)
    generalized = [k.beta for k in gaussians if k.kind.startswith("generalized")]
    plateau = [k.beta for k in gaussians if k.kind.startswith("plateau")]
    # drawn from both sides of 1 equally often; the plateau's range begins at 1
    is_share([b < 1 for b in generalized], 0.5)
    is_uniform([b for b in generalized if b < 1], 0.5, 1)
    is_uniform([b for b in generalized if b >= 1], 1, 4)
    is_share([b == 1 for b in plateau], 0.5)
    is_uniform([b for b in plateau if b > 1], 1, 2)
    sincs = [k for k in kernels if k.kind == "sinc"]
    is_uniform([k.cutoff for k in sincs if k.size < 13], math.pi / 3, math.pi)
    is_uniform([k.cutoff for k in sincs if k.size >= 13], math.pi / 5, math.pi)


@pytest.mark.parametrize("preset", TABLE)
@pytest.mark.parametrize("number", [0, 1])
def test_a_pass_draws_as_published(preset: str, number: int) -> None:
    table, passes = TABLE[preset], [params.passes[number] for params in drawn(preset)]
    low, high = table.resize[number]
    up, down, keep = UP_DOWN_KEEP[number]
    factors = [p.factor for p in passes]
    is_share([f > 1 for f in factors], up)
    is_share([f < 1 for f in factors], down)
    is_share([f == 1 for f in factors], keep)
    is_uniform([f for f in factors if f > 1], 1, high)
    is_uniform([f for f in factors if f < 1], low, 1)
    for name in ("area", "bilinear", "bicubic"):
        is_share([p.filter == name for p in passes], 1 / 3)

    is_share([p.noise.kind == "gaussian" for p in passes], 0.5)
    assert {p.noise.kind for p in passes} == {"gaussian", "poisson"}
    is_share([p.noise.grey for p in passes], 0.4)
    is_uniform([p.noise.strength for p in passes if p.noise.kind == "gaussian"], *table.gaussian[number])
    is_uniform([p.noise.strength for p in passes if p.noise.kind == "poisson"], *table.poisson[number])

    lowest, highest = table.jpeg[number]
    qualities = [p.jpeg for p in passes]
    assert set(qualities) == set(range(lowest, highest + 1))
    assert np.mean(qualities) == pytest.approx(
        (lowest + highest) / 2, abs=5 * (highest - lowest) / math.sqrt(12 * DRAWS)
    )

    blurs = [p.blur for p in passes if p.blur is not None]
    if number == 0:
        assert len(blurs) == DRAWS
    else:
        is_share([p.blur is not None for p in passes], table.second_blur)
    is_blur(blurs, SIGMA[number])


@pytest.mark.parametrize("preset", TABLE)
def test_the_end_of_the_pipeline_draws_as_published(preset: str) -> None:
    params = drawn(preset)
    assert all(p.sharpen == TABLE[preset].sharpen and p.scale == 4 and len(p.passes) == 2 for p in params)
    is_share([p.final_sinc is not None for p in params], 0.8)
    is_share([p.sinc_first for p in params], 0.5)
    for name in ("area", "bilinear", "bicubic"):
        is_share([p.final_filter == name for p in params], 1 / 3)
    sincs = [p.final_sinc for p in params if p.final_sinc is not None]
    assert {k.kind for k in sincs} == {"sinc"}
    is_uniform([k.cutoff for k in sincs], math.pi / 3, math.pi)
    for size in range(7, 22, 2):
        is_share([k.size == size for k in sincs], 1 / 8)
    assert len({p.noise_seed for p in params}) == DRAWS


def test_what_is_drawn_does_not_hang_together() -> None:
    """Draws that a pipeline must not couple: noise with JPEG, sinc with order, first pass with second."""
    params = drawn("seesr-pairs")
    columns = [
        [p.passes[0].jpeg for p in params],
        [p.passes[1].jpeg for p in params],
        [p.passes[0].factor for p in params],
        [p.passes[1].factor for p in params],
        [p.passes[0].noise.kind == "gaussian" for p in params],
        [p.passes[1].noise.grey for p in params],
        [p.final_sinc is not None for p in params],
        [p.sinc_first for p in params],
    ]
    together = np.corrcoef(np.asarray(columns, float))
    assert np.abs(together - np.eye(len(columns))).max() < 5 / math.sqrt(DRAWS)


def test_bicubic_draws_nothing_and_usm_can_be_set() -> None:
    plain = pixel.draw("bicubic", 1, "ab", 0)
    assert plain.passes == () and plain.final_sinc is None and not plain.sharpen
    assert plain == pixel.draw("bicubic", 2, "cd", 5)
    for preset in TABLE:
        assert [pixel.draw(preset, 1, "ab", 0, usm=usm).sharpen for usm in (True, False)] == [True, False]


def test_jpeg_is_bicubic_and_a_fair_quality() -> None:
    params = drawn("jpeg")
    bicubic = replace(pixel.draw("bicubic", 1, "ab", 0), preset="jpeg")
    assert all(replace(p, only_jpeg=None) == bicubic for p in params)
    qualities = [p.only_jpeg or 0 for p in params]
    assert set(qualities) == set(range(70, 99))
    assert np.mean(qualities) == pytest.approx(84, abs=5 * 28 / math.sqrt(12 * DRAWS))


@pytest.mark.parametrize(
    ("preset", "quality", "looks"),
    [
        ("bicubic", None, "clean"),
        ("jpeg", 91, "compressed"),
        ("jpeg", 92, "clean"),
        ("camera", None, "damaged"),
        ("soft", None, "damaged"),
        ("realesrgan", None, "damaged"),
    ],
)
def test_presets_leave_looks(preset: str, quality: int | None, looks: str) -> None:
    assert looks_after(preset, quality) == looks


@pytest.mark.parametrize(
    ("preset", "sigma", "jpegs"), [("camera", (0.4, 3.0), (92, 85)), ("soft", (2.0, 4.5), (85, 75))]
)
def test_cameras_keep_the_size_and_add_little(preset: str, sigma: tuple, jpegs: tuple) -> None:
    params = drawn(preset)
    ranges = (((0, 3), (0.01, 0.2), jpegs[0]), ((0, 2), (0.01, 0.1), jpegs[1]))
    for number, (gaussian, poisson, jpeg) in enumerate(ranges):
        passes = [p.passes[number] for p in params]
        assert all(p.factor == 1 and (p.blur is not None) == (number == 0) for p in passes)
        is_uniform([p.noise.strength for p in passes if p.noise.kind == "gaussian"], *gaussian)
        is_uniform([p.noise.strength for p in passes if p.noise.kind == "poisson"], *poisson)
        assert {p.jpeg for p in passes} == set(range(jpeg, 101))
    is_blur([p.passes[0].blur for p in params if p.passes[0].blur is not None], sigma)
    assert not any(p.sharpen or p.final_sinc for p in params)
