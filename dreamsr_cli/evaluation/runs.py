"""One evaluation: get each method's result for each photo, score it, and keep a row of it at once.

A killed run goes on photo by photo: a row is kept in results.jsonl as soon as it is there, and taken over if photo,
result, reference and the metric's definition are what they were. What can't be scored is listed and stops nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dreamsr_cli import __version__
from dreamsr_cli.errors import DreamSRError, InputError, UsageError
from dreamsr_cli.evaluation.datasets import Dataset, Pair
from dreamsr_cli.evaluation.methods import Method
from dreamsr_cli.evaluation.metric import Metric, Sample
from dreamsr_cli.evaluation.metrics import Columns
from dreamsr_cli.evaluation.paper_tables import paper_rows
from dreamsr_cli.evaluation.results import Evaluation, Failure, MetricId, PairedDifference, PhotoRow, Summary
from dreamsr_cli.evaluation.rows import RESULTS, TABLE, Scored, csv_text, jsonl, read_rows
from dreamsr_cli.evaluation.run_folder import RowAppender, claim, replace_file
from dreamsr_cli.evaluation.statistics import paired_difference, summarise
from dreamsr_cli.folder_lock import FolderLock
from dreamsr_cli.images import open_photo
from dreamsr_cli.progress import Progress, SilentProgress
from dreamsr_cli.weights import file_sha256


def _plain(error: Exception, doing: str) -> DreamSRError:
    if isinstance(error, DreamSRError):
        return error
    raise error


@dataclass(frozen=True, eq=False)
class EvalJob:
    """What is scored, how, and where the rows go."""

    dataset: Dataset
    methods: tuple[Method, ...]
    columns: Columns
    out: Path
    crop_border: int = 0
    scale: float = 4.0
    seed: int = 42
    """Of the bootstrap."""
    restart: bool = False
    """Drop what an earlier run with other settings left in `out`."""
    explain: Callable[[Exception, str], DreamSRError] = _plain
    """Turns any exception at one photo into the reason that is listed; may raise it."""
    watch: Callable[[str], AbstractContextManager[None]] = nullcontext
    """Called with a label ("[3/40] mini Canon_003"); the work on that photo runs inside it."""
    tell: Callable[[Scored | Failure], None] = field(default=lambda outcome: None)
    """Called with each row and each failure as it comes."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """An evaluation and its rows with their hashes, for comparisons."""

    evaluation: Evaluation
    rows: tuple[Scored, ...]


def evaluate(job: EvalJob, progress: Progress | None = None) -> Outcome:
    """Run `job`; writes OUT/results.jsonl, results.csv and sr/METHOD/.

    Raises `JournalError` if `out` belongs to another job or process, `OutputError` if it can't be written, `UsageError`
    for settings that make no sense. Everything else that concerns one photo becomes a `Failure`.
    """
    progress = SilentProgress() if progress is None else progress
    with FolderLock(job.out):
        claim(job.out, job.dataset, job.methods, job.restart)
        known = {(s.row.method, s.row.name): s for s in read_rows(job.out / RESULTS)}
        rows, failures = _score_all(job, known, progress)
        order = {method.name: number for number, method in enumerate(job.methods)}
        rows.sort(key=lambda s: (order[s.row.method], s.row.name))
        idents = [metric.ident for metric in job.columns.metrics]
        replace_file(job.out / RESULTS, jsonl(rows))
        replace_file(job.out / TABLE, csv_text(rows, idents))
    return Outcome(_conclude(job, rows, failures), tuple(rows))


def _score_all(
    job: EvalJob, known: Mapping[tuple[str, str], Scored], progress: Progress
) -> tuple[list[Scored], list[Failure]]:
    rows: list[Scored] = []
    failures: list[Failure] = list(job.dataset.failures)
    for failure in failures:
        job.tell(failure)
    total = len(job.methods) * len(job.dataset.pairs)
    number = 0
    with RowAppender(job.out / RESULTS) as appender:
        for method in job.methods:
            folder = job.out / "sr" / method.name
            folder.mkdir(parents=True, exist_ok=True)
            with method.opened(len(job.dataset.pairs)):
                for pair in job.dataset.pairs:
                    number += 1
                    before = known.get((method.name, pair.name))
                    with job.watch(f"[{number}/{total}] {method.name} {pair.name}"):
                        scored = _scored(job, method, pair, folder, before, progress)
                    if isinstance(scored, Failure):
                        failures.append(scored)
                    else:
                        if scored != before:
                            appender.append(scored)
                        rows.append(scored)
                    job.tell(scored)
    return rows, failures


def _scored(
    job: EvalJob, method: Method, pair: Pair, folder: Path, before: Scored | None, progress: Progress
) -> Scored | Failure:
    try:
        return _score(job, method, pair, folder, before, progress)
    except UsageError:
        raise  # it would be wrong for every photo
    except Exception as error:
        reason = job.explain(error, f"scoring {pair.name} of {method.name}")
        return Failure(pair.name, method.name, reason.message)


def _score(job: EvalJob, method: Method, pair: Pair, folder: Path, before: Scored | None, progress: Progress) -> Scored:
    size = _expected_size(pair, job.scale)
    made = method.result(pair, folder, progress)
    hashes = {
        "lq": file_sha256(pair.lq),
        "sr": file_sha256(made.path),
        "hq": None if pair.hq is None else file_sha256(pair.hq),
    }
    same = before is not None and dict(before.hashes) == hashes
    old = {metric.id: metric for metric in before.metrics} if before is not None and same else {}
    values: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    missing = []
    for metric in job.columns.metrics:
        name = metric.ident.id
        if before is not None and old.get(name) == metric.ident and name in before.row.values:
            values[name] = before.row.values[name]
            if name in before.row.reasons:
                reasons[name] = before.row.reasons[name]
        else:
            missing.append(metric)
    if missing:
        progress.phase("score", len(missing))
        sample = _sample(method, pair, made.path, size)
        for metric in missing:
            value, reason = _figure(metric, sample)
            values[metric.ident.id] = value
            if reason is not None:
                reasons[metric.ident.id] = reason
            progress.advance()
    idents = tuple(metric.ident for metric in job.columns.metrics)
    row = PhotoRow(
        name=pair.name,
        method=method.name,
        values={ident.id: values[ident.id] for ident in idents},
        reasons={ident.id: reasons[ident.id] for ident in idents if ident.id in reasons},
        lq=pair.lq,
        sr=made.path,
        hq=pair.hq,
        seconds=made.seconds,
        peak_bytes=made.peak_bytes,
    )
    return Scored(row, job.dataset.label, idents, hashes)


def _expected_size(pair: Pair, scale: float) -> tuple[int, int]:
    """(width, height) of a result. `InputError` where the two halves of a pair don't fit."""
    from dreamsr_cli.images import read_info
    from dreamsr_cli.tiling import canvas_size

    low = read_info(pair.lq)
    wanted = canvas_size(low.width, low.height, scale=scale)
    if pair.hq is not None:
        high = read_info(pair.hq)
        if (high.width, high.height) != wanted:
            raise InputError(
                f"{pair.name}: sizes don't match: {pair.lq.name} has {low.width}x{low.height} pixels, its reference "
                f"{high.width}x{high.height}, x{scale:g} would be {wanted[0]}x{wanted[1]}",
                "replace one of the two, or leave the photo out",
            )
    return wanted


def _sample(method: Method, pair: Pair, path: Path, size: tuple[int, int]) -> Sample:
    sr_PQC = read_levels(path)
    height, width = sr_PQC.shape[:2]
    if (width, height) != size:
        raise InputError(
            f"{path}: {width}x{height} pixels, expected {size[0]}x{size[1]}", "make it again at the size of the set"
        )
    hq_PQC = None if pair.hq is None else read_levels(pair.hq)
    return Sample(sr_PQC, hq_PQC, pair.lq, path, method.grid(width, height))


def read_levels(path: Path) -> np.ndarray:
    """float64 RGB on [0, 255], (P, Q, 3); `InputError` as in `open_photo`. Transparency is not looked at."""
    with open_photo(path) as photo:
        levels_PQC = photo.read_rows(0, photo.info.height).astype(np.float64) * 255.0
        return np.round(levels_PQC) if photo.info.bit_depth == 8 else levels_PQC


def _figure(metric: Metric, sample: Sample) -> tuple[float | None, str | None]:
    """(value, None), or (None, why there is none)."""
    try:
        value = metric.score(sample)
    except UsageError:
        raise
    except DreamSRError as error:
        return None, error.message
    if math.isinf(value):
        return None, "infinite: the result equals its reference"
    if math.isnan(value):
        return None, "not a number"
    return value, None


# ---------------------------------------------------------------- what it comes to


def _conclude(job: EvalJob, rows: list[Scored], failures: list[Failure]) -> Evaluation:
    names = tuple(method.name for method in job.methods)
    figures = {
        metric.ident.id: {
            name: {
                s.row.name: value
                for s in rows
                if s.row.method == name and (value := s.row.values[metric.ident.id]) is not None
            }
            for name in names
        }
        for metric in job.columns.metrics
    }
    unavailable = dict(job.columns.unavailable)
    shown: list[MetricId] = []
    for metric in job.columns.metrics:
        ident = metric.ident
        if any(figures[ident.id].values()):
            shown.append(ident)
        else:
            reasons = [s.row.reasons[ident.id] for s in rows if ident.id in s.row.reasons]
            unavailable[ident.id] = reasons[0] if reasons else "no photo could be scored"
    summaries: dict[str, dict[str, Summary]] = {name: {} for name in names}
    differences: list[PairedDifference] = []
    for ident in shown:
        for name in names:
            if values := figures[ident.id][name]:
                ordered = [values[photo] for photo in sorted(values)]
                summaries[name][ident.id] = summarise(ordered, job.seed, name, ident.id)
        for other in names[1:]:
            first, second = ((name, figures[ident.id][name]) for name in (names[0], other))
            if found := paired_difference(ident.id, ident.lower_better, first, second, job.seed):
                differences.append(found)
    return Evaluation(
        dataset=job.dataset.name,
        label=job.dataset.label,
        metrics=tuple(shown),
        methods=names,
        rows=tuple(s.row for s in rows),
        summaries=summaries,
        paper=paper_rows(job.dataset, shown, job.crop_border, job.scale),
        failures=tuple(failures),
        notes=(*job.dataset.notes, *job.columns.notes),
        versions=_versions(job),
        differences=tuple(differences),
        unavailable=unavailable,
    )


def _versions(job: EvalJob) -> dict[str, str]:
    found = {"dreamsr": __version__, "torch": str(torch.__version__), "numpy": np.__version__}
    for method in job.methods:
        if digest := method.fingerprint.get("bundle_sha256"):
            found[f"bundle:{method.name}"] = digest
    return found
