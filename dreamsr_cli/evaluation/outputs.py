"""What an evaluation leaves in its folder beside the rows: evaluation.json, tables, the page, and per-tile fidelity."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dreamsr_cli.evaluation.methods import Method
from dreamsr_cli.evaluation.paper_tables import source
from dreamsr_cli.evaluation.results import REPORT_FORMAT, Evaluation
from dreamsr_cli.evaluation.run_folder import replace_file
from dreamsr_cli.images import read_info
from dreamsr_cli.progress import Progress

SUMMARY, MARKDOWN, LATEX = "evaluation.json", "table.md", "table.tex"


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """Everything but the rows, JSON-able: those are in results.jsonl."""
    plain = asdict(replace(evaluation, rows=()))
    plain.pop("rows")
    return {"format": REPORT_FORMAT, **plain, "paper_source": source(), "photos": len(evaluation.rows)}


def write_outputs(
    evaluation: Evaluation, folder: Path, methods: Sequence[Method], progress: Progress
) -> tuple[Path, Evaluation]:
    """Write evaluation.json, table.md, table.tex, fidelity/METHOD/NAME.json and report.html; the report's path, and
    the evaluation with notes on suspicious tiles.

    `OutputError` if the folder can't be written.
    """
    from dreamsr_cli.evaluation.report import write_report
    from dreamsr_cli.evaluation.tables import latex, markdown

    found = _write_fidelity(evaluation, folder, methods, progress)
    for note in found:
        progress.note(note)
    evaluation = replace(evaluation, notes=(*evaluation.notes, *found))
    replace_file(folder / SUMMARY, json.dumps(to_json(evaluation), indent=1, ensure_ascii=False) + "\n")
    replace_file(folder / MARKDOWN, markdown(evaluation))
    replace_file(folder / LATEX, latex(evaluation))
    return write_report(evaluation, folder, progress=progress), evaluation


def _write_fidelity(
    evaluation: Evaluation, folder: Path, methods: Sequence[Method], progress: Progress
) -> tuple[str, ...]:
    """Per-tile scores of every result made in more than one tile; a note for each photo with suspicious tiles."""
    from dreamsr_cli.evaluation.fidelity import fidelity_report

    by_name = {method.name: method for method in methods}
    notes = []
    for row in evaluation.rows:
        info = read_info(row.sr)
        grid = by_name[row.method].grid(info.width, info.height)
        if grid is None or len(grid.tiles) < 2:
            continue
        found = fidelity_report(row.lq, row.sr, grid, (info.width, info.height), progress)
        path = folder / "fidelity" / row.method / f"{row.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(found.to_json(), indent=1) + "\n")
        if found.suspicious:
            tiles = ", ".join(f"{tile.index} ({'; '.join(tile.suspicious)})" for tile in found.suspicious[:5])
            more = f" and {len(found.suspicious) - 5} more" if len(found.suspicious) > 5 else ""
            notes.append(f"{row.method} {row.name}: tiles that stand out: {tiles}{more}")
    return tuple(notes)
