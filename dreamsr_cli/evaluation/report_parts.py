"""The report's tables and lists as HTML: summary beside the paper, differences, every photo, failures, definitions."""

from __future__ import annotations

import math
from collections.abc import Collection

from dreamsr_cli.evaluation.figures_text import best_methods, defined, figure, head, paper_lines, paper_marks
from dreamsr_cli.evaluation.page import sortable, text
from dreamsr_cli.evaluation.results import Evaluation

MIB = 2**20


def summary_table(evaluation: Evaluation) -> str:
    """Means with intervals, medians and counts by method; below them the paper's figures, each with its mark."""
    best = best_methods(evaluation)
    heads = "".join(f'<th scope="col">{text(head(metric))}</th>' for metric in evaluation.metrics)
    rows = []
    for method in evaluation.methods:
        cells = []
        for metric in evaluation.metrics:
            summary = evaluation.summaries.get(method, {}).get(metric.id)
            if summary is None:
                cells.append(f"<td>–<small>{text(evaluation.unavailable.get(metric.id, 'no figures'))}</small></td>")
                continue
            low, high = figure(summary.low, metric), figure(summary.high, metric)
            kind = ' class="best"' if best.get(metric.id) == method else ""
            cells.append(
                f"<td><span{kind}>{figure(summary.mean, metric)}</span><small>[{low}, {high}]</small>"
                f"<small>median {figure(summary.median, metric)} · {summary.count} photos</small></td>"
            )
        rows.append(f'<tr><th scope="row">{text(method)}</th>{"".join(cells)}</tr>')
    label = text(evaluation.label)
    return (
        f'<div class="scroll"><table><thead><tr><th scope="col">{label}</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}{_paper_rows(evaluation)}</tbody></table></div>{_paper_notes(evaluation)}"
    )


def _paper_rows(evaluation: Evaluation) -> str:
    marks = paper_marks(evaluation)
    rows, last = [], None
    for table, method, figures in paper_lines(evaluation):
        if table != last:
            verdict = _verdict(evaluation, table)
            words = f"The paper, {text(table)} <span class='label'>{verdict}</span>"
            rows.append(f'<tr class="group"><th colspan="{len(evaluation.metrics) + 1}">{words}</th></tr>')
            last = table
        cells = []
        for metric in evaluation.metrics:
            row = figures.get(metric.id)
            if row is None:
                cells.append("<td>–</td>")
                continue
            sign = "≈" if row.comparable else "≠"
            words = "comparable" if row.comparable else "not comparable"
            title = text(f"{words}: {row.reason}")
            cells.append(f'<td title="{title}">{row.value:g} {sign}<sup>{marks[row.reason]}</sup></td>')
        rows.append(f'<tr class="paper"><th scope="row">{text(method)}</th>{"".join(cells)}</tr>')
    return "".join(rows)


def _verdict(evaluation: Evaluation, table: str) -> str:
    shown = [row for name, _, rows in paper_lines(evaluation) if name == table for row in rows.values()]
    count = sum(row.comparable for row in shown)
    return "comparable as noted" if count == len(shown) else "in part comparable" if count else "not comparable"


def _paper_notes(evaluation: Evaluation) -> str:
    marks = paper_marks(evaluation)
    if not marks:
        return ""
    signs = {
        row.reason: "≈ comparable" if row.comparable else "≠ not comparable"
        for _, _, rows in paper_lines(evaluation)
        for row in rows.values()
    }
    notes = "".join(f"<li><sup>{mark}</sup> {signs[why]}: {text(why)}</li>" for why, mark in marks.items())
    return f'<ul class="soft" style="list-style:none;padding:0">{notes}</ul>'


def difference_table(evaluation: Evaluation) -> str:
    """Paired differences; "" where there are none."""
    if not evaluation.differences:
        return ""
    metrics = {metric.id: metric for metric in evaluation.metrics}
    rows = []
    for pair in evaluation.differences:
        metric = metrics.get(pair.metric)
        if metric is None:
            continue
        clear = pair.low > 0 or pair.high < 0
        better = (pair.mean < 0) == metric.lower_better
        words = f"{pair.first if better else pair.second} is better" if clear else "no clear difference"
        rows.append(
            f'<tr><th scope="row">{text(head(metric))}</th>'
            f'<td class="name">{text(pair.first)} − {text(pair.second)}</td>'
            f"<td>{figure(pair.mean, metric)}</td><td>[{figure(pair.low, metric)}, {figure(pair.high, metric)}]</td>"
            f'<td>{pair.better} of {pair.count} photos</td><td class="name">{text(words)}</td></tr>'
        )
    heads = ("metric", "difference", "mean", "95 % interval", "first better on", "so")
    top = "".join(
        f'<th scope="col"{" class=name" if name in ("metric", "difference", "so") else ""}>{name}</th>'
        for name in heads
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def photo_table(evaluation: Evaluation, with_pictures: Collection[str]) -> str:
    """One row per photo and method, sortable. `with_pictures`: names that have pictures in the page, and their ids."""
    links = dict(zip(with_pictures, (f"photo-{n}" for n in range(len(with_pictures))), strict=True))
    columns = [sortable("photo", "text"), sortable("method", "text")]
    columns += [sortable(head(metric), "number") for metric in evaluation.metrics]
    columns += [sortable("seconds", "number"), sortable("peak MiB", "number")]
    rows = []
    for row in evaluation.rows:
        name = text(row.name)
        shown = f'<a href="#{links[row.name]}">{name}</a>' if row.name in links else name
        cells = [
            f'<td data-value="{name}">{shown}</td><td class="name" data-value="{text(row.method)}">'
            f"{text(row.method)}</td>"
        ]
        for metric in evaluation.metrics:
            value = row.values.get(metric.id)
            why = row.reasons.get(metric.id, "")
            title = f' title="{text(why)}"' if value is None and why else ""
            cells.append(f'<td data-value="{_key(value)}"{title}>{figure(value, metric)}</td>')
        peak = None if row.peak_bytes is None else row.peak_bytes / MIB
        for value, form in ((row.seconds, ".1f"), (peak, ".0f")):
            cells.append(f'<td data-value="{_key(value)}">{"–" if value is None else format(value, form)}</td>')
        rows.append(f'<tr data-method="{text(row.method)}" data-name="{text(row.name.lower())}">{"".join(cells)}</tr>')
    options = "".join(f'<option value="{text(method)}">{text(method)}</option>' for method in evaluation.methods)
    tools = (
        '<div class="tools"><label>Method <select id="only-method" autocomplete="off"><option value="">all</option>'
        f'{options}</select></label><label>Name has <input type="search" id="only-name" autocomplete="off"></label>'
        '<span class="soft" id="shown" role="status"></span></div>'
    )
    return (
        f'{tools}<div class="scroll tall" tabindex="0" role="region" aria-label="Figures of every photo">'
        f'<table id="photos-table"><thead><tr>{"".join(columns)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _key(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return "Infinity" if value == math.inf else repr(float(value))


def failure_list(evaluation: Evaluation) -> str:
    """Photos that could not be scored, and metrics that no photo has; "" where there are none."""
    failed = "".join(
        f'<tr><th scope="row">{text(f.name)}</th><td class="name">{text(f.method)}</td>'
        f'<td class="words">{text(f.reason)}</td></tr>'
        for f in evaluation.failures
    )
    parts = []
    if failed:
        top = "".join(f'<th scope="col" class="name">{name}</th>' for name in ("photo", "method", "why"))
        parts.append(f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{failed}</tbody></table></div>')
    if evaluation.unavailable:
        items = "".join(f"<dt>{text(id)}</dt><dd>{text(why)}</dd>" for id, why in evaluation.unavailable.items())
        parts.append(f'<h3>Metrics that were not available</h3><dl class="list">{items}</dl>')
    return "".join(parts)


def definitions(evaluation: Evaluation) -> str:
    """What each column is, so that another program can compute the same number."""
    items = []
    for metric in evaluation.metrics:
        weights = f" Weights: <code>sha256 {text(metric.weights_sha256)}</code>." if metric.weights_sha256 else ""
        better = "Smaller" if metric.lower_better else "Larger"
        items.append(f"<dt>{text(metric.id)}</dt><dd>{text(defined(metric))} {better} is better.{weights}</dd>")
    versions = "".join(f"<dt>{text(k)}</dt><dd><code>{text(v)}</code></dd>" for k, v in evaluation.versions.items())
    return f'<dl class="list">{"".join(items)}</dl><h3>Made with</h3><dl class="list">{versions}</dl>'
