"""What an evaluation is made of: figures with their full definition, one row per photo and method, and their summary.

Plain data between the runs (`runs.py`), the statistics and the reports. Nothing here computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

REPORT_FORMAT = 1
"""Layout version of evaluation.json."""


@dataclass(frozen=True)
class MetricId:
    """What a column of figures is, in full: two columns with different definitions are never one."""

    id: str
    """Column name, unique within an evaluation: "psnr-y", "psnr-rgb", "lpips-alex", "maniqa-koniq"."""
    variant: str
    """What tells it apart from its namesakes, in words: "Y of BT.601", "koniq10k weights"."""
    definition: str
    """One line that lets another program compute the same number."""
    weights_sha256: str | None
    """sha256 of the weights it was computed with (several files: of their hashes, sorted); None: no weights."""
    lower_better: bool
    """Whether smaller is better."""
    unit: str
    """"dB", or "" for a number without a unit."""


@dataclass(frozen=True)
class PhotoRow:
    """Figures of one photo for one method."""

    name: str
    """Stem of the photo."""
    method: str
    """Name of the method: "mini", "bicubic", or what --sr-dir NAME=DIR says."""
    values: Mapping[str, float | None]
    """Figure by metric id; None where it is not available."""
    reasons: Mapping[str, str]
    """For each None of `values`: why, in one line."""
    lq: Path
    """The low-quality photo."""
    sr: Path
    """The result that was scored."""
    hq: Path | None
    """The reference; None for sets without."""
    seconds: float | None
    """Time to make the result; None for results of somebody else."""
    peak_bytes: int | None
    """Peak of anonymous and shared memory while it was made (on a GPU: of the GPU's memory); None where not made
    here."""


@dataclass(frozen=True)
class Summary:
    """One metric of one method over the photos that have it."""

    mean: float
    median: float
    low: float
    """Lower end of the 95 % bootstrap interval of the mean."""
    high: float
    """Upper end."""
    count: int
    """Photos that have a figure."""


@dataclass(frozen=True)
class PaperRow:
    """A published figure to show beside ours."""

    table: str
    """"Table 1"."""
    method: str
    """As the paper spells it."""
    metric: str
    """As the paper spells it: "PSNR", "MANIQA"."""
    value: float
    metric_id: str | None
    """Our column it would be compared with; None: we have none."""
    comparable: bool
    reason: str
    """Why it is not comparable, or on what assumption it is; never empty."""


@dataclass(frozen=True)
class PairedDifference:
    """Mean of (first - second) over the photos both have, with its 95 % bootstrap interval."""

    metric: str
    first: str
    second: str
    mean: float
    low: float
    high: float
    count: int
    better: int
    """Photos on which `first` is strictly better (in the metric's own direction)."""


@dataclass(frozen=True)
class Failure:
    """A photo that could not be scored for one method."""

    name: str
    method: str
    reason: str


@dataclass(frozen=True)
class Evaluation:
    """Everything a report shows."""

    dataset: str
    label: str
    """"RealSR partial 20/100": goes into the head of every table and row."""
    metrics: tuple[MetricId, ...]
    methods: tuple[str, ...]
    rows: tuple[PhotoRow, ...]
    """By method, then by photo's name."""
    summaries: Mapping[str, Mapping[str, Summary]]
    """Method -> metric id -> summary; a metric no photo has is absent."""
    paper: tuple[PaperRow, ...]
    failures: tuple[Failure, ...]
    notes: tuple[str, ...]
    """Warnings that concern the whole evaluation."""
    versions: Mapping[str, str]
    """Versions of dreamsr, torch, numpy; hashes of bundles by method ("bundle:mini")."""
    differences: tuple[PairedDifference, ...] = ()
    """Between methods of this run, and with the runs of --compare."""
    unavailable: Mapping[str, str] = field(default_factory=dict)
    """Metric id asked for -> why no photo has it."""
