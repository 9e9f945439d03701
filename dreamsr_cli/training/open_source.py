"""One way in for every kind of training set."""

from __future__ import annotations

from pathlib import Path

from dreamsr_cli.errors import TrainingError
from dreamsr_cli.progress import Progress
from dreamsr_cli.training.pair_data import PairSource, is_pair_folder
from dreamsr_cli.training.photos import PhotoSource
from dreamsr_cli.training.shards import ShardSource, has_shards
from dreamsr_cli.training.sources import MAX_BAD, Source


def open_source(
    data: Path,
    *,
    cache: Path,
    hold_out: int,
    smallest: int = 256,
    max_bad: float = MAX_BAD,
    progress: Progress | None = None,
) -> Source:
    """The training set at `data`: pairs where it is laid out as `dreamsr degrade` does, shards where it is or holds
    .tar files, else photos.

    `cache`: folder for decoded photos and indexes of shards. `hold_out`: photos kept for validation. `smallest`: items
    with a shorter side are left out. What is left out is in `.skipped`, one `SkippedPhoto` each. `TrainingError` when
    nothing is left, or more than the share `max_bad` can't be read.
    """
    if not data.exists():
        raise TrainingError(f"{data}: no such folder", "give a folder of photos, of pairs or of .tar shards")
    if is_pair_folder(data):
        return PairSource(data, hold_out, smallest, max_bad, progress)
    if has_shards(data):
        return ShardSource(data, cache, hold_out, smallest, max_bad, progress)
    if data.is_file():
        raise TrainingError(f"{data} is a file", "give a folder of photos, a folder of pairs, or a .tar shard")
    return PhotoSource(data, cache, hold_out, smallest, max_bad, progress)
