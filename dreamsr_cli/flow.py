"""Rectified flow as arithmetic: straight paths between a latent z_0 (t = 0) and noise z_1 (t = 1).

Equation numbers are the paper's (docs/method.md). Nothing here knows tiles, networks or devices: `z` may be a numpy
array or a tensor of any shape, `t` a number or an array that broadcasts against it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

Array = TypeVar("Array", bound=Any)


def mix(z: Array, eps: Array, t: Any) -> Array:
    """Eq. 3: z_t = (1 - t) z + t eps."""
    return (1 - t) * z + t * eps


def velocity_target(z0: Array, z1: Array) -> Array:
    """Eq. 4: v = z_1 - z_0, the derivative of z_t along the straight path."""
    return z1 - z0


def predict_clean(z_t: Array, v: Array, t: Any) -> Array:
    """The z_0 of eq. 6, that velocity `v` at `t` points back to, z_t - t v."""
    return z_t - t * v


def velocity_of_correction(z_t: Array, condition: Array, correction: Array, t: Any) -> Array:
    """The velocity at `t` that points back to z_0 = condition - correction: (z_t - z_0) / t (ours, for bundles
    without a prior)."""
    return (z_t - condition + correction) / t


def timesteps(t_start: float, steps: int) -> list[float]:
    """steps + 1 equally spaced values from t_start in [0, 1] down to exactly 0."""
    if steps < 1 or not 0 <= t_start <= 1:
        raise ValueError(f"needs t_start in [0, 1] and at least one step, got {t_start} and {steps}")
    return [t_start * (steps - i) / steps for i in range(steps)] + [0.0]


def euler(z: Array, velocity: Callable[[Array, float], Array], ts: Sequence[float]) -> Array:
    """Follow dz/dt = velocity(z, t) from ts[0] to ts[-1], one explicit Euler step between neighbouring values."""
    for t, t_next in pairwise(ts):
        z = z + (t_next - t) * velocity(z, t)
    return z
