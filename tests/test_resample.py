"""The antialiased cubic against values worked out from its definition."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamsr_cli.resample import cubic_contributions, resize, resize_rows


def keys(x: Fraction) -> Fraction:
    """Keys' kernel, a = -1/2, in exact fractions."""
    x = abs(x)
    if x <= 1:
        return Fraction(3, 2) * x**3 - Fraction(5, 2) * x**2 + 1
    if x <= 2:
        return Fraction(-1, 2) * x**3 + Fraction(5, 2) * x**2 - 4 * x + 2
    return Fraction(0)


def exact_line(values: list[int], n_out: int, scale: Fraction) -> list[float]:
    """MATLAB's definition, pixel by pixel: 1-based u = x/s + (1 - 1/s)/2, mirrored borders, normalised weights."""
    stretch, n = min(scale, Fraction(1)), len(values)
    line = []
    for x in range(1, n_out + 1):
        u = x / scale + Fraction(1, 2) * (1 - 1 / scale)
        total = norm = Fraction(0)
        for i in range(-40 - n, 40 + 3 * n):
            weight = keys(stretch * (u - i))
            folded = (i - 1) % (2 * n)
            total += weight * values[folded if folded < n else 2 * n - 1 - folded]
            norm += weight
        line.append(float(total / norm))
    return line


def test_up_four_weights_by_hand() -> None:
    """The first of four phases lies 3/8 left of a source pixel: distances 13/8, 5/8, 3/8, 11/8."""
    indices, weights = cubic_contributions(8, 32)
    assert weights.shape[1] == 4
    row = dict(zip(indices[16].tolist(), weights[16].tolist(), strict=True))
    expected = {2: -45 / 1024, 3: 399 / 1024, 4: 745 / 1024, 5: -75 / 1024}
    for index, weight in expected.items():
        assert row[index] == pytest.approx(weight, abs=1e-12)


def test_down_four_weights_by_hand() -> None:
    """At x0.25 the centre falls between two pixels: distances 1/8, 3/8, ... 15/8 after shrinking, mirrored."""
    indices, weights = cubic_contributions(64, 16)
    half = [float(keys(Fraction(2 * k + 1, 8)) / 4) for k in range(8)]
    assert sum(half) * 2 == pytest.approx(1, abs=1e-12)
    assert weights.shape == (16, 16)
    np.testing.assert_allclose(weights[8], half[::-1] + half, atol=1e-12)
    assert indices[8].tolist() == list(range(26, 42))


@pytest.mark.parametrize(
    ("n_in", "n_out", "scale"),
    [(5, 20, None), (20, 5, None), (7, 17, None), (17, 7, None), (9, 3, Fraction(1, 4)), (1, 4, None), (3, 1, None)],
)
def test_a_line_equals_the_definition(n_in: int, n_out: int, scale: Fraction | None) -> None:
    values = [(37 * i * i + 11 * i) % 101 for i in range(n_in)]
    got = resize(
        torch.tensor([values], dtype=torch.float64).repeat(n_out, 1)[None, None],
        n_out,
        n_out,
        scale=None,
    )
    expected = exact_line(values, n_out, Fraction(n_out, n_in))
    np.testing.assert_allclose(got[0, 0, 0].numpy(), expected, atol=1e-10)
    if scale is not None:
        indices, weights = cubic_contributions(n_in, n_out, float(scale))
        line = (np.asarray(values, float)[indices] * weights).sum(1)
        np.testing.assert_allclose(line, exact_line(values, n_out, scale), atol=1e-10)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 60))
def test_weights_sum_to_one_and_indices_stay_inside(n_in: int, n_out: int) -> None:
    indices, weights = cubic_contributions(n_in, n_out)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-12)
    assert indices.min() >= 0 and indices.max() < n_in


@pytest.mark.parametrize("size", [(44, 52), (3, 3), (11, 13), (29, 7)])
def test_a_constant_stays_constant(size: tuple[int, int]) -> None:
    out = resize(torch.full((1, 3, 11, 13), 0.3), *size)
    assert out.shape == (1, 3, *size) and out.dtype == torch.float32
    torch.testing.assert_close(out, torch.full_like(out, 0.3), atol=1e-6, rtol=0)


def test_same_size_changes_nothing() -> None:
    image = torch.rand(2, 3, 9, 14)
    assert torch.equal(resize(image, 9, 14), image)


def test_half_precision_is_kept_and_integers_are_refused() -> None:
    image = torch.rand(1, 3, 16, 16)
    out = resize(image.bfloat16(), 4, 4)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, resize(image.bfloat16().float(), 4, 4).bfloat16())
    with pytest.raises(ValueError, match="floating point"):
        resize(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 4, 4)


@pytest.mark.parametrize("out", [(92, 68), (6, 4), (31, 45), (23, 17)])
def test_by_rows_equals_the_whole(out: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    photo = rng.random((23, 17, 3), dtype=np.float32)
    whole = resize(torch.from_numpy(photo).permute(2, 0, 1)[None], *out)[0].permute(1, 2, 0).numpy()
    for step in (1, 5, 16):
        strips = []
        for top in range(0, out[0], step):
            bottom = min(top + step, out[0])
            strips.append(resize_rows(lambda a, b: photo[a:b], 23, 17, *out, top, bottom))
        assert np.array_equal(np.concatenate(strips), whole)


def test_by_rows_reads_only_what_it_needs() -> None:
    photo = np.random.default_rng(2).random((200, 5, 1), dtype=np.float32)
    asked = []

    def read(first: int, last: int) -> np.ndarray:
        asked.append(last - first)
        return photo[first:last]

    resize_rows(read, 200, 5, 800, 20, 400, 416)
    assert asked == [8]  # 16 rows = 4 source rows, and two more at each side


def test_rows_outside_are_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        resize_rows(lambda a, b: np.zeros((b - a, 4, 3), np.float32), 4, 4, 8, 8, 4, 9)
