"""For maintainers: rewrite the rows of one entry of weights.lock from what the hub says now."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from pathlib import Path

from dreamsr_cli.errors import WeightsError
from dreamsr_cli.hub import Hub
from dreamsr_cli.progress import Progress
from dreamsr_cli.weights_lock import LockEntry, LockRow, write_entry

CONFIRMED = "two sources"
"""Status of a row that the hub itself confirmed."""


def repin(entry: LockEntry, hub: Hub, lock: Path, progress: Progress) -> list[str]:
    """Ask the hub for sizes and hashes of the entry's files at its revision, write them, and say what changed.

    Large files: the hub's own sha256. Small ones are downloaded and hashed. Raises `WeightsError` if a listed file is
    gone; nothing is written then.
    """
    if entry.repository is None:
        raise WeightsError(f"{entry.name} has no repository", "only entries that are fetched can be pinned again")
    commit, listed = hub.list_files(entry, entry.revision)
    there = {file.path: file for file in listed}
    rows, changes = [], []
    progress.phase(f"pin {entry.name}", len(entry.files))
    for row in entry.files:
        if row.path not in there:
            raise WeightsError(f"{entry.repository}: {row.path} is not there at {commit}", "correct the entry by hand")
        file = there[row.path]
        sha256 = file.sha256 or _hash_small(entry, row, hub)
        fresh = dataclasses.replace(row, size=file.size, sha256=sha256, status=CONFIRMED)
        if (fresh.size, fresh.sha256) != (row.size, row.sha256):
            changes.append(f"{entry.name}: {row.path}: {row.size} {row.sha256} -> {fresh.size} {fresh.sha256}")
        rows.append(fresh)
        progress.advance()
    pinned = dataclasses.replace(entry, files=tuple(rows), revision=commit)
    if pinned != entry:
        write_entry(lock, pinned)
    return changes


def _hash_small(entry: LockEntry, row: LockRow, hub: Hub) -> str:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "file"
        hub.download(entry, dataclasses.replace(row, size=None), target)
        return hashlib.sha256(target.read_bytes()).hexdigest()
