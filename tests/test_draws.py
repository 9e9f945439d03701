"""Draws depend on seed, purpose and index alone: not on order, state, neighbours or the machine."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dreamsr_cli.draws import generator, normal_rows


def test_values_are_the_same_on_every_machine() -> None:
    """Bundles and results name seeds: these numbers may never change."""
    drawn = generator(42, "canvas-noise", 3).integers(0, 2**32, size=3)
    assert drawn.tolist() == [2520007066, 1933253619, 2345191983]
    row = normal_rows(42, "canvas-noise", 5, 1, 2, 2)
    assert np.allclose(row.ravel(), [2.2606838, -0.0797701, 1.1328704, 0.3344758], atol=1e-6)


def test_another_process_draws_the_same() -> None:
    code = "from dreamsr_cli.draws import generator; print(generator(7, 'crop', 1, 'abc').integers(0, 2**60))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(printed) == generator(7, "crop", 1, "abc").integers(0, 2**60)


@pytest.mark.parametrize(
    "other",
    [(2, "crop", 3, 4), (1, "crops", 3, 4), (1, "crop", 4, 3), (1, "crop", 34), (1, "crop", 3), (1, "crop", 3, 4, 0)],
)
def test_seed_purpose_and_each_index_matter(other) -> None:
    first = generator(1, "crop", 3, 4).random(4)
    assert np.array_equal(first, generator(1, "crop", 3, 4).random(4))
    assert not np.array_equal(first, generator(*other).random(4))


def test_global_state_is_neither_read_nor_changed() -> None:
    np.random.seed(0)
    torch.manual_seed(0)
    expected = np.random.random(), torch.rand(1)
    np.random.seed(0)
    torch.manual_seed(0)
    one = generator(1, "x").random(3)
    assert (np.random.random(), torch.rand(1)) == expected
    assert np.array_equal(one, generator(1, "x").random(3))


@given(
    first=st.integers(0, 30), rows=st.integers(1, 12), start=st.integers(0, 11), count=st.integers(1, 12),
    width=st.integers(1, 5), channels=st.integers(1, 4),
)  # fmt: skip
def test_any_band_of_rows_can_be_drawn_alone(first, rows, start, count, width, channels) -> None:
    whole = normal_rows(5, "canvas-noise", first, rows + start + count, width, channels)
    band = normal_rows(5, "canvas-noise", first + start, count, width, channels)
    assert band.dtype == np.float32 and band.shape == (count, width, channels)
    assert np.array_equal(band, whole[start : start + count])


def test_noise_is_standard_normal_and_rows_are_unrelated() -> None:
    noise = normal_rows(0, "canvas-noise", 0, 256, 64, 4)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    flat = noise.reshape(256, -1)
    assert np.abs(np.corrcoef(flat) - np.eye(256)).max() < 0.35
    assert abs((flat[:-1] * flat[1:]).mean()) < 0.01
    assert not np.array_equal(noise, normal_rows(0, "canvas-noise", 0, 256, 64, 4, "other photo"))
