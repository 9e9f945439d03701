"""Figures as text, the same in every table: decimals by unit, arrows for the better direction, which is the best."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dreamsr_cli.evaluation.results import Evaluation, MetricId, PaperRow


def figure(value: float | None, metric: MetricId) -> str:
    """Two decimals of decibels, four of numbers without a unit; "–" for none, "∞" for no difference at all."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    decimals = 2 if metric.unit == "dB" else 4 if abs(value) < 10 else 3
    return f"{value:.{decimals}f}".replace("-", "−")


def head(metric: MetricId) -> str:
    """Name of a column, with its unit and the direction that is better."""
    unit = f" ({metric.unit})" if metric.unit else ""
    return f"{metric.id}{unit} {'↓' if metric.lower_better else '↑'}"


def defined(metric: MetricId) -> str:
    """Variant and definition as sentences."""
    return f"{metric.variant.rstrip('.')}. {metric.definition.rstrip('.')}."


def best_methods(evaluation: Evaluation) -> Mapping[str, str]:
    """Metric id -> the method with the best mean; only where two methods have one, over the same number of photos."""
    best = {}
    for metric in evaluation.metrics:
        found = [(m, evaluation.summaries.get(m, {}).get(metric.id)) for m in evaluation.methods]
        known = [(summary.mean, method, summary.count) for method, summary in found if summary is not None]
        if len(known) < 2 or len({count for _, _, count in known}) > 1:
            continue
        means = [mean for mean, _, _ in known]
        wanted = min(means) if metric.lower_better else max(means)
        if means.count(wanted) == 1:
            best[metric.id] = known[means.index(wanted)][1]
    return best


def paper_lines(evaluation: Evaluation) -> list[tuple[str, str, dict[str, PaperRow]]]:
    """(table, method, figure by our metric id) of what the paper published for columns that we have, in its order."""
    shown = {metric.id for metric in evaluation.metrics}
    lines: dict[tuple[str, str], dict[str, PaperRow]] = {}
    for row in evaluation.paper:
        if row.metric_id in shown:
            lines.setdefault((row.table, row.method), {})[row.metric_id] = row
    return [(table, method, figures) for (table, method), figures in lines.items()]


def paper_marks(evaluation: Evaluation) -> dict[str, str]:
    """Reason -> letter of its footnote, for the paper's figures that are shown."""
    marks: dict[str, str] = {}
    for _, _, figures in paper_lines(evaluation):
        for row in figures.values():
            marks.setdefault(row.reason, chr(ord("a") + len(marks) % 26) * (1 + len(marks) // 26))
    return marks
