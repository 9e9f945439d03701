"""Means with intervals: 95 % by bootstrap over photos, the same on every machine for the same figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dreamsr_cli.draws import generator
from dreamsr_cli.evaluation.results import PairedDifference, Summary

RESAMPLES = 10_000
LEVEL = 0.95
_AT_ONCE = 2_000_000
"""Drawn indices held in memory together."""


def bootstrap_interval(values: Sequence[float], seed: int, *index: int | str) -> tuple[float, float]:
    """95 % percentile interval of the mean (Efron 1979) over `RESAMPLES` draws of the photos with replacement.

    `index` names the draw; equal figures, seed and name give equal intervals. ValueError without values.
    """
    figures = np.asarray(values, np.float64)
    if not len(figures):
        raise ValueError("no values")
    rng = generator(seed, "bootstrap", *index)
    rows = max(1, _AT_ONCE // len(figures))
    means = np.concatenate(
        [
            figures[rng.integers(0, len(figures), (min(rows, RESAMPLES - done), len(figures)))].mean(axis=1)
            for done in range(0, RESAMPLES, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def summarise(values: Sequence[float], seed: int, *index: int | str) -> Summary:
    """Mean, median, interval and count of one column; ValueError without values."""
    low, high = bootstrap_interval(values, seed, *index)
    return Summary(float(np.mean(values)), float(np.median(values)), low, high, len(values))


def paired_difference(
    metric: str,
    lower_better: bool,
    first: tuple[str, Mapping[str, float]],
    second: tuple[str, Mapping[str, float]],
    seed: int,
) -> PairedDifference | None:
    """Mean of (first - second) over the photos that both (name, figure by photo) have; None if they share none."""
    names = sorted(first[1].keys() & second[1].keys())
    if not names:
        return None
    differences = [first[1][name] - second[1][name] for name in names]
    low, high = bootstrap_interval(differences, seed, "paired", metric, first[0], second[0])
    better = sum(d < 0 if lower_better else d > 0 for d in differences)
    return PairedDifference(
        metric, first[0], second[0], float(np.mean(differences)), low, high, len(differences), better
    )
