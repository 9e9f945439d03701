"""Colour fix: shifts go, detail stays, strips equal the whole."""

from __future__ import annotations

import numpy as np
import pytest

from dreamsr_cli.colour import HALO, adain_fix, fix_strips, low_frequencies, wavelet_fix

HEIGHT, WIDTH = 150, 41


def picture(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A smooth gradient with detail on top, float32 (height, width, 3) in [0, 1]."""
    rng = np.random.default_rng(seed)
    rows, cols = np.linspace(0.2, 0.7, height)[:, None, None], np.linspace(0, 0.2, width)[None, :, None]
    detail = rng.uniform(-0.05, 0.05, (height, width, 3))
    return (rows + cols + detail).astype(np.float32)


def strips(method: str, result: np.ndarray, reference: np.ndarray, rows: int) -> np.ndarray:
    pieces = fix_strips(
        method, *result.shape[:2], lambda a, b: result[a:b], lambda a, b: reference[a:b], strip_rows=rows
    )
    return np.concatenate(list(pieces))


@pytest.mark.parametrize("rows", [1, 16, 31, 64, 150, 400])
def test_wavelet_strips_equal_the_whole_bit_by_bit(rows: int) -> None:
    result, reference = picture(1), picture(2) * np.float32(0.8)
    assert np.array_equal(strips("wavelet", result, reference, rows), wavelet_fix(result, reference))


@pytest.mark.parametrize("rows", [7, 64, 400])
def test_adain_strips_equal_the_whole(rows: int) -> None:
    result, reference = picture(1), picture(2) * np.float32(0.8)
    np.testing.assert_allclose(strips("adain", result, reference, rows), adain_fix(result, reference), atol=1e-6)


def test_halo_is_as_small_as_it_can_be() -> None:
    """A single bright row reaches exactly HALO rows, so a smaller halo would show at strip edges."""
    line = np.zeros((200, 5, 1), np.float32)
    line[100] = 1
    touched = np.flatnonzero(low_frequencies(line)[:, 2, 0])
    assert (touched.min(), touched.max()) == (100 - HALO, 100 + HALO)


def test_first_level_by_hand() -> None:
    """Against the definition: five levels, each padded by repetition, of [1 2 1] / 4 in both directions."""
    image = picture(3, 20, 9)
    expected = image.astype(np.float64)
    for d in (1, 2, 4, 8, 16):
        for axis in (0, 1):
            n = expected.shape[axis]
            before = np.take(expected, np.clip(np.arange(n) - d, 0, n - 1), axis)
            after = np.take(expected, np.clip(np.arange(n) + d, 0, n - 1), axis)
            expected = before / 4 + expected / 2 + after / 4
    np.testing.assert_allclose(low_frequencies(image), expected, atol=1e-6)


@pytest.mark.parametrize("fix", [wavelet_fix, adain_fix])
def test_a_colour_shift_is_removed_and_detail_kept(fix) -> None:
    reference = picture(4)
    shifted = reference + np.array([0.1, -0.05, 0.02], np.float32)
    np.testing.assert_allclose(fix(shifted, reference), reference, atol=1e-5)


def test_wavelet_takes_detail_from_the_result_only() -> None:
    """A flat reference takes the low frequencies away and none of the detail."""
    result = picture(5)
    flat = np.full_like(result, 0.5)
    fixed = wavelet_fix(result, flat)
    np.testing.assert_allclose(fixed - 0.5, result - low_frequencies(result), atol=1e-6)
    assert np.std(fixed) > 0.8 * np.std(result - low_frequencies(result))


def test_adain_matches_mean_and_deviation() -> None:
    result, reference = picture(6) * np.float32(0.5), picture(7)[::-1] ** 2
    fixed = adain_fix(result, reference)
    np.testing.assert_allclose(fixed.mean((0, 1)), reference.mean((0, 1)), atol=1e-5)
    np.testing.assert_allclose(fixed.std((0, 1)), reference.std((0, 1)), rtol=2e-3)


def test_adain_of_a_plain_result_stays_calm() -> None:
    """Rounding noise of a plain result must not be stretched to the reference's contrast."""
    plain = np.full((40, 40, 3), 0.5, np.float32) + np.random.default_rng(1).normal(0, 1e-6, (40, 40, 3))
    assert adain_fix(plain.astype(np.float32), picture(1, 40, 40)).std() < 1e-3


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (16, 40), (33, 5)])
@pytest.mark.parametrize("method", ["wavelet", "adain"])
def test_tiny_photos(size: tuple[int, int], method: str) -> None:
    reference = picture(8, *size)
    fixed = strips(method, reference + np.float32(0.1), reference, 16)
    assert fixed.shape == reference.shape
    np.testing.assert_allclose(fixed, reference, atol=1e-5)


def test_none_returns_the_result() -> None:
    assert np.array_equal(strips("none", picture(1), picture(2), 16), picture(1))


def test_wrong_calls_are_refused_at_once() -> None:
    image = picture(1)
    with pytest.raises(ValueError, match="unknown colour fix"):
        fix_strips("wavelets", 4, 4, lambda a, b: image[a:b], lambda a, b: image[a:b], 16)
    with pytest.raises(ValueError, match="strip_rows"):
        fix_strips("none", 4, 4, lambda a, b: image[a:b], lambda a, b: image[a:b], 0)
    with pytest.raises(ValueError, match="differ in shape"):
        wavelet_fix(image, image[:5])
    with pytest.raises(ValueError, match="expected width"):
        list(fix_strips("none", HEIGHT, WIDTH + 1, lambda a, b: image[a:b], lambda a, b: image[a:b], 16))
