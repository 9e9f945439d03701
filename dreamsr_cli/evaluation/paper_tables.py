"""The paper's Tables 1 to 5 as data, and whether a figure of ours may be held against one of them."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dreamsr_cli.evaluation.datasets import SCALE, Dataset
from dreamsr_cli.evaluation.results import MetricId, PaperRow

TABLES = Path(__file__).with_name("paper_tables.toml")
COLUMNS = {
    "PSNR": "psnr-rgb",
    "SSIM": "ssim-rgb",
    "LPIPS": "lpips-alex",
    "MUSIQ": "musiq-koniq",
    "MANIQA": "maniqa-koniq",
    "CLIPQA+": "clipiqa+-rn50",
}
"""The paper's column -> the column of ours that it most likely is."""
_ASSUMED = {
    "PSNR": "the paper doesn't define its PSNR; RGB, no border cut, is the likely one (its OSEDiff row lies 1.8 dB "
    "below OSEDiff's own Y figure)",
    "SSIM": "the paper doesn't define its SSIM; RGB, no border cut, is the likely one (its OSEDiff row lies below "
    "OSEDiff's own Y figure)",
    "LPIPS": "the paper doesn't name the network of its LPIPS; AlexNet is the usual one",
    "MUSIQ": "the KonIQ-10k variant matches the level of the paper's figures",
    "MANIQA": "the KonIQ-10k variant matches the level of the paper's figures, PIPAL's doesn't",
    "CLIPQA+": "the RN50 variant matches the level of the paper's figures, ViT-L/14's doesn't",
}


@dataclass(frozen=True)
class PaperFigure:
    """One published number."""

    table: str
    """"Table 1"."""
    dataset: str | None
    method: str
    metric: str
    value: float


@cache
def _data() -> dict[str, Any]:
    return tomllib.loads(TABLES.read_text(encoding="utf-8"))


def source() -> str:
    """Where the figures come from."""
    return _data()["source"]


def paper_figures() -> tuple[PaperFigure, ...]:
    """Every figure of Tables 1 to 5 (231 of them in Table 1)."""
    return tuple(_all_figures(_data()))


def _all_figures(data: Mapping[str, Any]) -> Iterator[PaperFigure]:
    first = data["table1"]
    for dataset, columns in first["figures"].items():
        for metric, values in columns.items():
            for method, value in zip(first["methods"], values, strict=True):
                yield PaperFigure("Table 1", dataset, method, metric, float(value))
    for number in (2, 3, 4, 5):
        table = data[f"table{number}"]
        for metric, values in table.items():
            if metric in ("title", "dataset", "methods", "steps"):
                continue
            for method, value in zip(table["methods"], values, strict=True):
                yield PaperFigure(f"Table {number}", table.get("dataset"), method, metric, float(value))


def paper_rows(
    dataset: Dataset, metrics: Sequence[MetricId], crop_border: int, scale: float = SCALE
) -> tuple[PaperRow, ...]:
    """The published figures that belong beside a run on `dataset`, each with the verdict whether it may be compared.

    () for folders of the user's: the paper says nothing about them.
    """
    if dataset.public is None:
        return ()
    columns = {metric.id for metric in metrics}
    rows = []
    for figure in paper_figures():
        if figure.dataset not in (None, dataset.public.name):
            continue
        column = COLUMNS.get(figure.metric)
        reason = _obstacle(figure, dataset, columns, column, crop_border, scale)
        rows.append(
            PaperRow(
                table=figure.table,
                method=figure.method,
                metric=figure.metric,
                value=figure.value,
                metric_id=column if column in columns else None,
                comparable=reason is None,
                reason=reason or _assumption(figure, dataset),
            )
        )
    return tuple(rows)


def _obstacle(
    figure: PaperFigure, dataset: Dataset, columns: set[str], column: str | None, crop: int, scale: float
) -> str | None:
    assert dataset.public is not None
    if figure.dataset is None:
        return "seconds for 2560x1440 pixels on one H20 GPU, the diffusion process alone"
    if scale != SCALE:
        return f"the paper scores x{SCALE}, this run x{scale:g}"
    if dataset.public.name == "RealDeg" and dataset.subset is None:
        return "not the same photos: the paper scores a subset from social media"
    if not dataset.complete and dataset.public.name != "RealDeg":
        return f"not the same photos: {dataset.label}, the paper scores all {dataset.public.count}"
    if dataset.failures:
        return f"not the same photos: {len(dataset.failures)} could not be paired"
    if crop and figure.metric in ("PSNR", "SSIM"):
        return f"a border of {crop} px is cut here"
    if column not in columns:
        return f"{column or figure.metric} was not measured in this run"
    return None


def _assumption(figure: PaperFigure, dataset: Dataset) -> str:
    text = _ASSUMED[figure.metric]
    if dataset.subset is not None:
        text += "; and if --subset lists the paper's photos (its list isn't published)"
    return text
