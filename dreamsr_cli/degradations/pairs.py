"""Training pairs as files: photos are cut, degraded and written with all that is needed to make them again.

A pair is a function of photo, settings and crop index alone: workers, order, kills and other photos don't matter.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamsr_cli.degradations.pair_folder import CAPTIONS, PARAMS, FinishedPair, PairFolder
from dreamsr_cli.degradations.pair_making import MadePair, PairMaker, PairPlan, TaskResult
from dreamsr_cli.degradations.pair_records import (
    PairRecord,
    PairSettings,
    Source,
    SourceId,
    check_crops,
    pair_name,
    pair_stems,
)
from dreamsr_cli.errors import DreamSRError, InputError, OutputError
from dreamsr_cli.plain_data import to_dict
from dreamsr_cli.progress import Progress
from dreamsr_cli.worker_pool import run_in_order

if TYPE_CHECKING:
    from dreamsr_cli.degradations.texture_erasure import Eraser

CHUNK = 16
"""Crops of one photo that a worker makes in one go."""
LARGE_CHUNK = 64
"""Crops that networks erase in one go where each go opens them anew."""


@dataclass(frozen=True)
class PhotoResult:
    """What became of a photo."""

    source: Source
    pairs: tuple[MadePair, ...]
    problem: DreamSRError | None = None


@dataclass
class PairSet:
    """A finished run, for the person who asked for it."""

    params: Path
    captions: Path | None
    made: int = 0
    kept: int = 0
    differing: list[str] = field(default_factory=list)
    """Replayed pairs whose bytes are not the recorded ones."""
    finished: dict[str, FinishedPair] = field(default_factory=dict)
    """By name."""
    seconds: float = 0.0

    def add(self, pair: MadePair) -> None:
        """Count a pair."""
        self.finished[pair.name] = pair.finished
        self.made += pair.new
        self.kept += not pair.new
        self.differing += [pair.name] if pair.differs else []


# ---------------------------------------------------------------- planning


def plan_set(sources: Sequence[Source], settings: PairSettings, crops: int) -> list[PairPlan]:
    """All pairs, photos in order of their pairs' names. `sources`: no two of one sha256, none refused."""
    check_crops(crops)
    stems = pair_stems(source.id for source in sources)
    return [
        PairPlan(pair_name(stems[source.id.sha256], index, settings, crops), source, index, settings)
        for source in sorted(sources, key=lambda source: stems[source.id.sha256])
        for index in range(crops)
    ]


def plan_replay(records: Sequence[PairRecord], sources: Sequence[Source]) -> tuple[list[PairPlan], list[SourceId]]:
    """The recorded pairs whose photos are there, those of one photo side by side, and the photos that are missing."""
    there = {source.id.sha256: source for source in sources}
    by_photo: dict[str, list[PairRecord]] = {}
    for record in sorted(records, key=lambda record: record.pair):
        by_photo.setdefault(record.source.sha256, []).append(record)
    plans = [
        PairPlan(one.pair, there[sha256], one.crop_index, one.settings, one)
        for sha256, group in by_photo.items()
        if sha256 in there
        for one in group
    ]
    return plans, [group[0].source for sha256, group in by_photo.items() if sha256 not in there]


def _tasks(
    plans: Sequence[PairPlan], earlier: dict[str, FinishedPair], eraser: Eraser | None
) -> Iterator[tuple[PairPlan, ...]]:
    """For pixels some crops of one photo, so that it is decoded once; for the networks a call's worth of any photos."""
    photos = [list(group) for _, group in groupby(plans, key=lambda plan: plan.source)]
    if eraser is None:
        groups, chunk = photos, CHUNK
    else:
        groups, chunk = [list(plans)], 2 * eraser.batch if eraser.keep else LARGE_CHUNK
    for group in groups:
        for first in range(0, len(group), chunk):
            yield tuple(replace(one, earlier=earlier.get(one.name)) for one in group[first : first + chunk])


# ---------------------------------------------------------------- the set


def make_pair_set(
    out: Path,
    plans: Sequence[PairPlan],
    shared: dict[str, Any],
    workers: int,
    overwrite: bool,
    eraser: Eraser | None,
    progress: Progress,
    tell: Callable[[PhotoResult], None],
) -> PairSet:
    """Make all pairs of `plans` in the folder `out`; what is there already and right is kept.

    `shared`: settings of the set as plain data. `eraser`: networks of kind texture; they work in this process, and
    `workers` doesn't count. `tell` gets each photo in the plans' order. An interruption leaves finished pairs, and the
    same call goes on. `OutputError` if the folder holds something else, or can't be written.
    """
    began = time.monotonic()
    gathered = _Gathered(plans, tell)
    result = PairSet(out / PARAMS, None)
    with PairFolder(out, shared, [plan.name for plan in plans], overwrite) as folder:

        def take(done: TaskResult) -> None:
            for plan, outcome in done.outcomes:
                if isinstance(outcome, MadePair):
                    if outcome.new:
                        folder.add(outcome.finished)
                    result.add(outcome)
                gathered.add(plan, outcome)
            if done.fatal:
                raise OutputError(*done.fatal)
            progress.advance(len(done.outcomes))

        progress.phase("making pairs", len(plans))
        tasks = _tasks(plans, folder.earlier, eraser)
        if eraser is None:
            run_in_order(tasks, workers, partial(_open_maker, out), take)
        else:
            maker = PairMaker(out, eraser, None if eraser.keep else progress)  # short calls need no report
            for task in tasks:
                take(maker.make(task))
        folder.finish(result.finished)
    result.captions = out / CAPTIONS if any(pair.caption for pair in result.finished.values()) else None
    result.seconds = time.monotonic() - began
    return result


def _open_maker(out: Path) -> Callable[[Sequence[PairPlan]], TaskResult]:
    return PairMaker(out).make


class _Gathered:
    """Tells about a photo as soon as the last of its pairs is there."""

    def __init__(self, plans: Sequence[PairPlan], tell: Callable[[PhotoResult], None]) -> None:
        self._left = Counter(plan.source for plan in plans)
        self._tell = tell
        self._pairs: dict[Source, list[MadePair]] = {}
        self._problems: dict[Source, InputError] = {}

    def add(self, plan: PairPlan, outcome: MadePair | tuple[str, str]) -> None:
        if isinstance(outcome, MadePair):
            self._pairs.setdefault(plan.source, []).append(outcome)
        else:
            self._problems.setdefault(plan.source, InputError(*outcome))
        self._left[plan.source] -= 1
        if self._left[plan.source] == 0:
            pairs, problem = self._pairs.pop(plan.source, []), self._problems.pop(plan.source, None)
            self._tell(PhotoResult(plan.source, tuple(pairs), problem))


def shared_settings(settings: PairSettings) -> dict[str, Any]:
    """`make_pair_set`'s `shared` for a set of these settings."""
    return to_dict(settings)
