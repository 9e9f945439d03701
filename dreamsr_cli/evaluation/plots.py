"""Distributions as inline SVG: for each method a dot for each photo, quartiles, median, and the mean's interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from dreamsr_cli.evaluation.figures_text import figure, head
from dreamsr_cli.evaluation.page import text
from dreamsr_cli.evaluation.results import Evaluation, MetricId, Summary

WIDTH, LEFT, RIGHT, LANE = 420, 16, 404, 62
COLOURS = 6
"""Methods beyond share colours with earlier ones; every lane has its name beside it."""


def distribution(evaluation: Evaluation, metric: MetricId) -> str | None:
    """An <svg> of one metric, or None where fewer than two photos have a finite figure."""
    figures = {
        method: [
            (row.name, value)
            for row in evaluation.rows
            if row.method == method and (value := row.values.get(metric.id)) is not None and math.isfinite(value)
        ]
        for method in evaluation.methods
    }
    values = [value for found in figures.values() for _, value in found]
    if len(values) < 2:
        return None
    ticks = _ticks(min(values), max(values))
    low, high = min(*values, *ticks), max(*values, *ticks)

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (RIGHT - LEFT)

    height = 34 + LANE * len(figures) + 26
    parts = [f'<text x="{LEFT}" y="20" font-weight="600">{text(head(metric))}</text>']
    for tick in ticks:
        anchor = "start" if x(tick) < 30 else "end" if x(tick) > WIDTH - 30 else "middle"
        parts.append(f'<line class="axis" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="30" y2="{height - 22}"/>')
        parts.append(f'<text class="soft" x="{x(tick):.1f}" y="{height - 6}" text-anchor="{anchor}">{tick:g}</text>')
    for lane, (method, found) in enumerate(figures.items()):
        summary = evaluation.summaries.get(method, {}).get(metric.id)
        marks = _lane(found, summary, 34 + lane * LANE, x, metric)
        parts.append(
            f'<g class="m{lane % COLOURS}"><text x="{LEFT}" y="{34 + lane * LANE + 14}">{text(_short(method))}</text>'
            f"{marks}</g>"
        )
    words = text(f"Distribution of {metric.id} over photos, by method")
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{words}">{"".join(parts)}</svg>'


def _lane(
    found: Sequence[tuple[str, float]], summary: Summary | None, top: int, x: Callable[[float], float], metric: MetricId
) -> str:
    if not found:
        return f'<text class="soft" x="{LEFT}" y="{top + 36}">no figures</text>'
    middle = top + 36
    values = np.array([value for _, value in found])
    lower, median, upper = np.quantile(values, (0.25, 0.5, 0.75))
    parts = [
        f'<rect class="box" x="{x(lower):.1f}" y="{middle - 11}" width="{max(1.0, x(upper) - x(lower)):.1f}" '
        f'height="22" rx="3"/>',
        f'<line class="box" x1="{x(median):.1f}" x2="{x(median):.1f}" y1="{middle - 11}" y2="{middle + 11}"/>',
    ]
    for number, (name, value) in enumerate(found):
        # steps of the golden ratio spread any number of dots evenly
        spread = (number * 0.618034 % 1 - 0.5) * 18
        title = text(f"{name}: {figure(value, metric)}")
        parts.append(
            f'<circle class="dot" cx="{x(value):.1f}" cy="{middle + spread:.1f}" r="3"><title>{title}</title></circle>'
        )
    if summary is not None and all(map(math.isfinite, (summary.low, summary.high, summary.mean))):
        at = x(summary.mean)
        parts.append(
            f'<line class="mean" x1="{x(summary.low):.1f}" x2="{x(summary.high):.1f}" y1="{middle}" y2="{middle}"/>'
            f'<path class="diamond" d="M{at:.1f} {middle - 6}l6 6l-6 6l-6 -6z"/>'
        )
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that reach over the values."""
    width = high - low or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(width / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if width / (step * factor) <= 4.5)
    first, last = math.floor(low / step), math.ceil(high / step)
    if last == first:
        last += 1
    return [round(number * step, 12) for number in range(first, last + 1)]


def _short(name: str) -> str:
    return name if len(name) <= 48 else name[:47] + "…"
