"""An evaluation's summary as Markdown and as LaTeX, each with label, definitions and the paper's figures as marked."""

from __future__ import annotations

from collections.abc import Callable

from dreamsr_cli.evaluation.figures_text import best_methods, defined, figure, head, paper_lines, paper_marks
from dreamsr_cli.evaluation.results import Evaluation, MetricId, Summary

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # after a line's end a bracket would be read as an argument
    "]": "{]}",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "∞": r"$\infty$",
    "−": r"$-$",
    "–": "--",
    "≈": r"$\approx$",
    "≠": r"$\neq$",
    "×": r"$\times$",
    "Δ": r"$\Delta$",
}


def markdown(evaluation: Evaluation) -> str:
    """GitHub's Markdown: one table, footnotes on the paper's figures, definitions, failures. Ends with a newline."""

    def cell(value: str) -> str:
        for special in "\\|`*_<>[]":
            value = value.replace(special, "\\" + special)
        return " ".join(value.split())

    metrics = evaluation.metrics
    lines = [
        f"| {cell(evaluation.label)} | {' | '.join(cell(head(metric)) for metric in metrics)} |",
        f"| --- |{' ---: |' * len(metrics)}",
    ]
    lines += [f"| {cell(method)} | {' | '.join(cells)} |" for method, cells in _method_cells(evaluation, str, "**{}**")]
    marks = paper_marks(evaluation)
    for table, method, figures in paper_lines(evaluation):
        cells = []
        for metric in metrics:
            row = figures.get(metric.id)
            cells.append("–" if row is None else f"{row.value:g} {_sign(row.comparable)} ({marks[row.reason]})")
        lines.append(f"| *paper, {cell(table)}: {cell(method)}* | {' | '.join(cells)} |")
    lines += ["", "Mean over photos [95 % bootstrap interval]; bold: the best mean over the same number of photos."]
    lines += [f"\n({mark}) {_verdict(evaluation, why)}: {cell(why)}" for why, mark in marks.items()]
    lines.append("")
    for metric in metrics:
        weights = f" Weights sha256 {metric.weights_sha256}." if metric.weights_sha256 else ""
        lines.append(f"- **{cell(metric.id)}**: {cell(defined(metric))}{weights}")
    lines += [f"- **{cell(id)}** not available: {cell(why)}" for id, why in evaluation.unavailable.items()]
    if evaluation.failures:
        lines += ["", f"Not scored ({len(evaluation.failures)}):", ""]
        lines += [f"- {cell(f.name)} ({cell(f.method)}): {cell(f.reason)}" for f in evaluation.failures]
    return "\n".join(lines) + "\n"


def latex(evaluation: Evaluation) -> str:
    """A `table` with booktabs' rules; needs \\usepackage{booktabs}. Every special character is escaped."""

    def cell(value: str) -> str:
        return "".join(_LATEX.get(letter, letter) for letter in " ".join(value.split()))

    metrics = evaluation.metrics
    found = _method_cells(evaluation, cell, r"\textbf{{{}}}")
    rows = [rf"{cell(name)} & {' & '.join(cells)} \\" for name, cells in found]
    marks, last = paper_marks(evaluation), None
    for table, method, figures in paper_lines(evaluation):
        if table != last:
            rows += [r"\midrule", rf"\multicolumn{{{len(metrics) + 1}}}{{l}}{{\emph{{The paper, {cell(table)}}}}} \\"]
            last = table
        cells = []
        for metric in metrics:
            row = figures.get(metric.id)
            cells.append(
                "--"
                if row is None
                else rf"{row.value:g}\,{cell(_sign(row.comparable))}\textsuperscript{{{marks[row.reason]}}}"
            )
        rows.append(rf"{cell(method)} & {' & '.join(cells)} \\")
    notes = " ".join(
        rf"\textsuperscript{{{mark}}}~{_verdict(evaluation, why)}: {cell(why)}" for why, mark in marks.items()
    )
    variants = " ".join(f"{cell(metric.id)}: {cell(metric.variant.rstrip('.'))}." for metric in metrics)
    caption = rf"{cell(evaluation.label)}. Mean over photos [95\,\% bootstrap interval]. {variants}"
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{l{'r' * len(metrics)}}}",
            r"\toprule",
            rf"{cell(evaluation.label)} & {' & '.join(cell(head(metric)) for metric in metrics)} \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            *([rf"\par\footnotesize {notes}"] if notes else []),
            r"\end{table}",
            "",
        ]
    )


def _method_cells(evaluation: Evaluation, cell: Callable[[str], str], bold: str) -> list[tuple[str, list[str]]]:
    """(method, its cells), the best mean of each column in `bold`; `cell` escapes figures."""
    best = best_methods(evaluation)
    lines = []
    for method in evaluation.methods:
        cells = []
        for metric in evaluation.metrics:
            summary = evaluation.summaries.get(method, {}).get(metric.id)
            shown, interval = _shown(summary, metric)
            strong = bold.format(cell(shown)) if best.get(metric.id) == method else cell(shown)
            cells.append(f"{strong} {cell(interval)}".strip())
        lines.append((method, cells))
    return lines


def _shown(summary: Summary | None, metric: MetricId) -> tuple[str, str]:
    if summary is None:
        return "–", ""
    return figure(summary.mean, metric), f"[{figure(summary.low, metric)}, {figure(summary.high, metric)}]"


def _sign(comparable: bool) -> str:
    return "≈" if comparable else "≠"


def _verdict(evaluation: Evaluation, reason: str) -> str:
    shown = [row for _, _, rows in paper_lines(evaluation) for row in rows.values()]
    comparable = any(row.comparable for row in shown if row.reason == reason)
    return "comparable" if comparable else "not comparable"
