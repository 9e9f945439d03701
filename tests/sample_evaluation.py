"""A small evaluation whose photos exist, for the tests of reports: four photos, three plain methods, awkward names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dreamsr_cli.evaluation.results import (
    Evaluation,
    Failure,
    MetricId,
    PairedDifference,
    PaperRow,
    PhotoRow,
    Summary,
)

CHELSEA = Path(__file__).resolve().parents[1] / "examples" / "chelsea.jpg"
HOSTILE = "cat <script>alert(\"x\")</script> & 'co'"
NAMES = ("b10", "b9", HOSTILE, "a_%$#1")
METHODS = ("mini <1>", "bicubic", "nearest")
_FILTERS = (Image.Resampling.HAMMING, Image.Resampling.BICUBIC, Image.Resampling.NEAREST)
PSNR = MetricId("psnr-y", "Y of BT.601", "10 log10(255^2 / MSE), 4 pixels cropped", None, False, "dB")
LPIPS = MetricId("lpips", "SqueezeNet", "LPIPS v0.1", "ab" * 32, True, "")
NIQE = MetricId("niqe", "permissive parts", "NIQE", "cd" * 32, True, "")


def make_evaluation(folder: Path, reference: bool = True, methods: tuple[str, ...] = METHODS) -> Evaluation:
    """Photos are quarters of the cat at 96 x 64, enlarged from a quarter of that; figures are computed from them."""
    rows = []
    with Image.open(CHELSEA) as cat:
        for number, name in enumerate(NAMES):
            left, top = 96 * (number % 2), 64 * (number // 2)
            hq = cat.crop((left, top, left + 96, top + 64))
            lq = hq.resize((24, 16), Image.Resampling.BICUBIC)
            paths = {kind: folder / f"{number}-{kind}.png" for kind in ("hq", "lq")}
            hq.save(paths["hq"])
            lq.save(paths["lq"])
            for method, filter in zip(methods, _FILTERS, strict=False):
                sr = lq.resize(hq.size, filter)
                path = folder / f"{number}-{_FILTERS.index(filter)}.png"
                sr.save(path)
                error = float(np.square(np.asarray(sr, float) - np.asarray(hq, float)).mean())
                lacking = number == 1 and method == methods[0]
                values = {"psnr-y": 10 * np.log10(255**2 / error), "lpips": None if lacking else error / 1000}
                rows.append(
                    PhotoRow(
                        name=name,
                        method=method,
                        values={**values, "niqe": None},
                        reasons={"lpips": "too small & odd", "niqe": "weights are not there"},
                        lq=paths["lq"],
                        sr=path,
                        hq=paths["hq"] if reference else None,
                        seconds=0.5 * number if method == methods[0] else None,
                        peak_bytes=number * 2**20 if method == methods[0] else None,
                    )
                )
    rows.sort(key=lambda row: (methods.index(row.method), row.name))
    return Evaluation(
        dataset="RealSR",
        label="RealSR partial 4/100",
        metrics=(PSNR, LPIPS, NIQE),
        methods=methods,
        rows=tuple(rows),
        summaries={method: _summaries([row for row in rows if row.method == method]) for method in methods},
        paper=(
            PaperRow("Table 1", "DreamSR", "PSNR", 23.11, "psnr-y", False, "4 of 100 photos"),
            PaperRow("Table 1", "SeeSR", "PSNR", 24.3, "psnr-y", False, "4 of 100 photos"),
            PaperRow("Table 1", "SeeSR", "MANIQA", 0.6437, None, False, "no such column"),
        ),
        failures=(Failure("broken <b>", "bicubic", "damaged or cut short & more"),),
        notes=("4 of 100 photos: the paper's figures are not comparable",),
        versions={"dreamsr": "0.1.0"},
        differences=(PairedDifference("psnr-y", methods[0], methods[-1], 1.25, 0.5, 2.0, 4, 4),),
        unavailable={"niqe": "weights are not there"},
    )


def _summaries(rows: list[PhotoRow]) -> dict[str, Summary]:
    summaries = {}
    for metric in (PSNR, LPIPS):
        values = np.array([value for row in rows if (value := row.values[metric.id]) is not None])
        low, high = values.min(), values.max()
        summaries[metric.id] = Summary(values.mean(), float(np.median(values)), low, high, len(values))
    return summaries
