"""Kernels of the pixel degradation against their closed forms, worked out here from the formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamsr_cli.degradations.kernels import KINDS, SIZES, KernelParams, gaussian, kernel_PQ, sinc


def mahalanobis(x: int, y: int, params: KernelParams) -> float:
    """Squared distance from the covariance matrix, inverted here: R diag(sx^2, sy^2) R^T."""
    c, s = math.cos(params.rotation), math.sin(params.rotation)
    turn = np.array([[c, -s], [s, c]])
    covariance = turn @ np.diag([params.sigma_x**2, params.sigma_y**2]) @ turn.T
    place = np.array([x, y])
    return float(place @ np.linalg.inv(covariance) @ place)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_the_closed_form(kind: str) -> None:
    """Value over the value at the centre, which is 1 in every closed form: exp(-d/2), exp(-d^b/2), 1/(1+d^b)."""
    beta = 1.0 if kind in ("iso", "aniso") else 1.7
    params = KernelParams(kind, 13, 2.2, 0.9 if kind.endswith("aniso") else 2.2, 0.6, beta)
    kernel = kernel_PQ(params)
    for x, y in [(1, 0), (0, 1), (3, -2), (-4, 5), (6, 6)]:
        d = mahalanobis(x, y, params)
        expected = 1 / (1 + d**beta) if kind.startswith("plateau") else math.exp(-0.5 * d**beta)
        assert kernel[6 + y, 6 + x] / kernel[6, 6] == pytest.approx(expected, rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([*KINDS, "sinc"]),
    st.sampled_from(SIZES),
    st.floats(0.2, 3),
    st.floats(0.2, 3),
    st.floats(-math.pi, math.pi),
    st.floats(0.5, 4),
    st.floats(math.pi / 5, math.pi),
)
def test_any_kernel_sums_to_one_and_is_symmetric_about_its_centre(
    kind: str, size: int, sigma_x: float, sigma_y: float, rotation: float, beta: float, cutoff: float
) -> None:
    kernel = kernel_PQ(KernelParams(kind, size, sigma_x, sigma_y, rotation, beta, cutoff))
    assert kernel.shape == (size, size) and kernel.dtype == np.float64
    assert kernel.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-14)
    assert np.unravel_index(kernel.argmax(), kernel.shape) == (size // 2, size // 2)
    if kind != "sinc":
        assert kernel.min() >= 0


def test_half_a_turn_changes_nothing_and_a_quarter_turn_swaps_the_axes() -> None:
    def made(rotation: float) -> np.ndarray:
        return kernel_PQ(KernelParams("aniso", 15, 3.0, 1.0, rotation))

    np.testing.assert_allclose(made(0.4), made(0.4 + math.pi), atol=1e-15)
    np.testing.assert_allclose(made(0.0), made(math.pi / 2).T, atol=1e-15)
    assert np.abs(made(0.0) - made(math.pi / 2)).max() > 0.01


def test_a_gaussian_of_one_pixel_by_hand() -> None:
    """sigma 1, 7x7: the line exp(-k^2/2) sums to 1 + 2(0.606531 + 0.135335 + 0.011109) = 2.505950."""
    assert gaussian(7, 1.0)[3, 3] == pytest.approx(2.5059497**-2, rel=1e-6)


@pytest.mark.parametrize("cutoff", [math.pi / 5, math.pi / 3, math.pi / 2, 2.2])
def test_sinc_halves_its_cut_off_frequency(cutoff: float) -> None:
    """The ideal filter passes 1 below the cut-off and 0 above. Cut to a window it passes half at the cut-off, along
    rows, columns and diagonals alike; a large window leaves a narrow slope around it."""
    size = 121
    reach = np.arange(size) - size // 2
    kernel = sinc(size, cutoff)

    def passed(frequency: float, angle: float) -> float:
        wave = np.cos(frequency * (math.cos(angle) * reach[None, :] + math.sin(angle) * reach[:, None]))
        return float((kernel * wave).sum())

    for angle in (0.0, math.pi / 2, math.pi / 4):
        assert passed(cutoff, angle) == pytest.approx(0.5, abs=0.06)
        assert passed(cutoff - 0.15, angle) == pytest.approx(1, abs=0.1)
        assert passed(cutoff + 0.15, angle) == pytest.approx(0, abs=0.1)


def test_sinc_is_the_bessel_form() -> None:
    """cutoff J1(cutoff r) / (2 pi r), with J1 from its power series."""

    def j1(x: float) -> float:
        return sum((-1) ** m / (math.factorial(m) * math.factorial(m + 1)) * (x / 2) ** (2 * m + 1) for m in range(40))

    cutoff, kernel = 1.3, sinc(9, 1.3)
    for x, y in [(1, 0), (2, 1), (4, 4)]:
        r = math.hypot(x, y)
        expected = cutoff * j1(cutoff * r) / (2 * math.pi * r) / (cutoff**2 / (4 * math.pi))
        assert kernel[4 + y, 4 + x] / kernel[4, 4] == pytest.approx(expected, rel=1e-6)
