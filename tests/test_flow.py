"""Rectified flow: straight paths are followed exactly, for arrays and tensors alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dreamsr_cli.flow import euler, mix, predict_clean, timesteps, velocity_target


def latents() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    z0, z1 = rng.standard_normal((2, 4, 5, 6))
    return z0, z1


@given(st.floats(0, 1), st.integers(1, 40))
def test_timesteps_are_equally_spaced_and_end_at_zero(t_start: float, steps: int) -> None:
    ts = timesteps(t_start, steps)
    assert len(ts) == steps + 1
    assert ts[0] == pytest.approx(t_start) and ts[-1] == 0.0
    np.testing.assert_allclose(np.diff(ts), -t_start / steps, atol=1e-12)


def test_the_papers_sixteen_steps_start_at_exactly_the_strength() -> None:
    ts = timesteps(0.8, 16)
    assert ts[0] == 0.8 and len(ts) == 17


@pytest.mark.parametrize(("t_start", "steps"), [(0.8, 0), (-0.1, 4), (1.1, 4), (float("nan"), 4)])
def test_impossible_timesteps_are_refused(t_start: float, steps: int) -> None:
    with pytest.raises(ValueError, match="t_start"):
        timesteps(t_start, steps)


@given(st.floats(0.05, 1), st.integers(1, 20))
def test_euler_with_the_true_velocity_recovers_the_clean_latent(t_start: float, steps: int) -> None:
    z0, z1 = latents()
    v = velocity_target(z0, z1)
    restored = euler(mix(z0, z1, t_start), lambda z, t: v, timesteps(t_start, steps))
    np.testing.assert_allclose(restored, z0, atol=1e-12)


def test_euler_calls_the_velocity_at_each_step_but_not_at_the_end() -> None:
    seen: list[float] = []

    def velocity(z: np.ndarray, t: float) -> np.ndarray:
        seen.append(t)
        return z * t

    z = euler(np.ones(2), velocity, [1.0, 0.5, 0.0])
    assert seen == [1.0, 0.5]
    np.testing.assert_allclose(z, 1 * (1 - 0.5 * 1.0) * (1 - 0.5 * 0.5))


def test_euler_converges_to_the_solution_of_a_curved_path() -> None:
    errors = [abs(float(euler(np.array([np.e]), lambda z, t: z, timesteps(1.0, n))[0]) - 1.0) for n in (50, 100)]
    assert errors[1] < 0.55 * errors[0] < 0.02


def test_ends_and_clean_prediction() -> None:
    z0, z1 = latents()
    assert np.array_equal(mix(z0, z1, 0.0), z0) and np.array_equal(mix(z0, z1, 1.0), z1)
    for t in (0.0, 0.2, 0.8, 1.0):
        np.testing.assert_allclose(predict_clean(mix(z0, z1, t), velocity_target(z0, z1), t), z0, atol=1e-12)


def test_tensors_with_one_t_per_sample() -> None:
    z0, z1 = (torch.from_numpy(x).float() for x in latents())
    t_B = torch.tensor([0.0, 0.3, 0.6, 1.0]).view(4, 1, 1)
    z_t = mix(z0, z1, t_B)
    assert z_t.dtype == torch.float32
    for i in range(4):
        torch.testing.assert_close(z_t[i], mix(z0[i], z1[i], float(t_B[i])))
    torch.testing.assert_close(predict_clean(z_t, velocity_target(z0, z1), t_B), z0)
