"""results.jsonl and results.csv: one row per photo and method, each with the full definition of its figures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dreamsr_cli.evaluation.results import MetricId, PhotoRow

RESULTS, TABLE = "results.jsonl", "results.csv"


@dataclass(frozen=True)
class Scored:
    """A row, with what it was computed from."""

    row: PhotoRow
    label: str
    """The set's, "RealSR partial 20/100"."""
    metrics: tuple[MetricId, ...]
    hashes: Mapping[str, str | None]
    """sha256 of the files: "lq", "sr", "hq"."""

    def to_json(self) -> dict[str, Any]:
        """The line of results.jsonl."""
        row = self.row
        return {
            "dataset": self.label,
            "name": row.name,
            "method": row.method,
            "values": dict(row.values),
            "reasons": dict(row.reasons),
            "seconds": row.seconds,
            "peak_bytes": row.peak_bytes,
            "lq": str(row.lq),
            "sr": str(row.sr),
            "hq": None if row.hq is None else str(row.hq),
            "sha256": dict(self.hashes),
            "metrics": {
                metric.id: {key: value for key, value in asdict(metric).items() if key != "id"}
                for metric in self.metrics
            },
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Scored:
        """The inverse of `to_json`. KeyError, TypeError for anything else."""
        row = PhotoRow(
            name=data["name"],
            method=data["method"],
            values=dict(data["values"]),
            reasons=dict(data["reasons"]),
            lq=Path(data["lq"]),
            sr=Path(data["sr"]),
            hq=None if data["hq"] is None else Path(data["hq"]),
            seconds=data["seconds"],
            peak_bytes=data["peak_bytes"],
        )
        metrics = tuple(MetricId(id=name, **entry) for name, entry in data["metrics"].items())
        return Scored(row, data["dataset"], metrics, dict(data["sha256"]))


def read_rows(path: Path) -> list[Scored]:
    """Rows of results.jsonl, the last one for each photo and method; a line that a kill tore is passed over."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found: dict[tuple[str, str], Scored] = {}
    for line in lines:
        try:
            scored = Scored.from_json(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        found[scored.row.method, scored.row.name] = scored
    return list(found.values())


def jsonl(rows: Iterable[Scored]) -> str:
    """The text of results.jsonl."""
    return "".join(json.dumps(scored.to_json(), ensure_ascii=False, allow_nan=False) + "\n" for scored in rows)


def csv_text(rows: Iterable[Scored], metrics: Sequence[MetricId]) -> str:
    """The text of results.csv: a line per photo and method, an empty cell where there is no figure."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["dataset", "name", "method", *(m.id for m in metrics), "seconds", "peak_bytes", "lq", "sr", "hq"])
    for scored in rows:
        row = scored.row
        figures = [row.values.get(metric.id) for metric in metrics]
        writer.writerow(
            [scored.label, row.name, row.method, *figures, row.seconds, row.peak_bytes, row.lq, row.sr, row.hq]
        )
    return stream.getvalue()
