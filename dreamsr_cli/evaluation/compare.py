"""Paired differences between finished runs: the same photos, the same definition, or no comparison at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dreamsr_cli.errors import InputError
from dreamsr_cli.evaluation.results import MetricId, PairedDifference
from dreamsr_cli.evaluation.rows import RESULTS, Scored, read_rows
from dreamsr_cli.evaluation.statistics import paired_difference


@dataclass(frozen=True, eq=False)
class Run:
    """A finished (or interrupted) run's rows."""

    name: str
    """Its folder, as it was typed."""
    rows: tuple[Scored, ...]

    @property
    def methods(self) -> list[str]:
        """In the order of the rows."""
        return list(dict.fromkeys(scored.row.method for scored in self.rows))


def load_run(folder: Path) -> Run:
    """The rows below `folder`; `InputError` if it is no run's folder, or has no row yet."""
    path = folder / RESULTS
    if not path.is_file():
        raise InputError(f"{folder} is not the folder of an evaluation: no {RESULTS}", "name the -o of a dreamsr eval")
    rows = read_rows(path)
    if not rows:
        raise InputError(f"{path} holds no row", "run that evaluation to its end first")
    return Run(str(folder), tuple(rows))


@dataclass(frozen=True)
class Comparison:
    """What came of it."""

    metrics: tuple[MetricId, ...]
    differences: tuple[PairedDifference, ...]
    notes: tuple[str, ...]
    """What was not compared, and why."""


def compare_runs(base: Run, others: Sequence[Run], seed: int = 42) -> Comparison:
    """Differences (base - other) of each method that both runs have by name; where they share none, of the first method
    of `base` and every method of the other.

    Photos count as the same if name and sha256 of photo and reference agree; a metric only if its definition and
    weights do. What is left out is noted.
    """
    metrics: dict[str, MetricId] = {}
    differences: list[PairedDifference] = []
    notes: list[str] = []
    for other in others:
        shared = [name for name in base.methods if name in other.methods]
        pairs = [(name, name) for name in shared] or [(base.methods[0], name) for name in other.methods]
        for mine, theirs in pairs:
            found, remarks = _compare(base, mine, other, theirs, seed)
            for metric, difference in found:
                metrics[metric.id] = metric
                differences.append(difference)
            notes += [note for note in remarks if note not in notes]
    return Comparison(tuple(metrics.values()), tuple(differences), tuple(notes))


def _compare(
    base: Run, mine: str, other: Run, theirs: str, seed: int
) -> tuple[list[tuple[MetricId, PairedDifference]], list[str]]:
    left, right = _by_name(base, mine), _by_name(other, theirs)
    common = [name for name in left if name in right and _same_photo(left[name], right[name])]
    titles = f"{base.name}: {mine}", f"{other.name}: {theirs}"
    if not common:
        return [], [f"{titles[0]} and {titles[1]} have no photo in common"]
    notes = []
    left_out = max(len(left), len(right)) - len(common)
    if left_out:
        notes.append(f"{titles[0]} and {titles[1]}: {len(common)} photos compared, {left_out} are not in both")
    found = []
    for metric in left[common[0]].metrics:
        twin = next((m for m in right[common[0]].metrics if m.id == metric.id), None)
        if twin != metric:
            if twin is not None:
                notes.append(f"{metric.id} is defined differently in {other.name}: not compared")
            continue
        figures = [
            {name: value for name in common if (value := side[name].row.values.get(metric.id)) is not None}
            for side in (left, right)
        ]
        first, second = zip(titles, figures, strict=True)
        difference = paired_difference(metric.id, metric.lower_better, first, second, seed)
        if difference is not None:
            found.append((metric, difference))
    return found, notes


def _by_name(run: Run, method: str) -> dict[str, Scored]:
    return {scored.row.name: scored for scored in run.rows if scored.row.method == method}


def _same_photo(a: Scored, b: Scored) -> bool:
    return all(a.hashes.get(half) == b.hashes.get(half) for half in ("lq", "hq"))
