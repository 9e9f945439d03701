"""The weights of a lock entry, brought into one folder: from the hub, a folder or the hub's cache, checked to the bit.

Every file is compared with weights.lock before it counts. A wrong hash in a row that we are sure of means a wrong file:
it is thrown away. In a row that we are not sure of the pin may be wrong: the file is kept, both hashes are shown, and
`accept` records the found one beside the files (`.accepted.json`).
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamsr_cli.errors import DreamSRError, WeightsError
from dreamsr_cli.hub import Hub, part_of
from dreamsr_cli.progress import Progress
from dreamsr_cli.weights import accepted_path, accepted_pins, file_sha256, forget_hash
from dreamsr_cli.weights_lock import LockEntry, LockRow

READY, MISSING, PARTIAL, ALTERED, DOUBTFUL = "ready", "missing", "partial", "altered", "pin in doubt"
MIB = 1 << 20
_SPARE_BYTES = 64 * MIB
_WATCH_SECONDS = 0.5
_GRACE_SECONDS = 5.0
"""How long downloads under way may take to end after another one failed."""


@dataclass(frozen=True)
class FileState:
    """One file of an entry, compared with its row."""

    row: LockRow
    path: Path
    """Where it lies or would lie."""
    state: str
    """READY, MISSING, PARTIAL (a download was cut), ALTERED (sure row) or DOUBTFUL (unsure row)."""
    found: str | None = None
    """sha256 of what is there, if that was looked at."""

    @property
    def to_fetch(self) -> int:
        """Bytes that a download still has to bring; 0 where the lock doesn't know the size."""
        if self.state in (READY, DOUBTFUL):
            return 0
        part = part_of(self.path)
        have = part.stat().st_size if self.state == PARTIAL and part.is_file() else 0
        return max(0, (self.row.size or 0) - have)


@dataclass(frozen=True)
class FetchSettings:
    """How files are brought."""

    hub: Hub
    from_folder: Path | None = None
    """Take the files from this folder instead of the network."""
    offline: bool = False
    """Use no network: only what is on this disk."""
    rehash: bool = False
    """Hash every file again instead of trusting the cache of hashes (`--verify`)."""
    accept: bool = False
    """Record the hash that was found where a pin is in doubt."""
    workers: int = 4
    """Files downloaded at once."""


def inspect(entry: LockEntry, folder: Path, rehash: bool = False) -> list[FileState]:
    """Every file of the entry compared with what lies in `folder`; hashes come from the cache unless `rehash`."""
    pins = accepted_pins(folder)
    return [_compare(row, folder / row.path, pins, rehash) for row in entry.files]


def _compare(row: LockRow, path: Path, pins: dict[str, str], rehash: bool) -> FileState:
    if not path.is_file():
        return FileState(row, path, PARTIAL if part_of(path).is_file() else MISSING)
    if row.sure and row.size is not None and path.stat().st_size != row.size:
        return FileState(row, path, ALTERED)
    if rehash:
        forget_hash(path)
    found = file_sha256(path)
    if row.sha256 is None or found in (row.sha256, pins.get(row.path)):
        return FileState(row, path, READY, found)
    return FileState(row, path, ALTERED if row.sure else DOUBTFUL, found)


def fetch(entry: LockEntry, folder: Path, settings: FetchSettings, progress: Progress) -> list[FileState]:
    """Bring every file of `entry` that isn't ready into `folder`; the states afterwards.

    Raises `WeightsError`: the entry isn't published, the disk is too small, a download failed (what arrived is kept and
    the next call goes on), a file is not what weights.lock says, or a pin is in doubt and `accept` is off.
    """
    refuse_unpublished(entry)
    states = inspect(entry, folder, settings.rehash)
    wanted = [state for state in states if state.state not in (READY, DOUBTFUL)]
    if wanted:
        _check_disk(folder, wanted)
        for state in wanted:
            if state.state == ALTERED:
                progress.note(f"{entry.name}: {state.row.path} is not what weights.lock says; it is brought again")
                state.path.unlink()
        left = [state for state in wanted if not _take_from_disk(entry, state, settings)]
        if left and (settings.offline or settings.from_folder):
            where = f"in {settings.from_folder}" if settings.from_folder else "on this disk"
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise WeightsError(
                f"{entry.name}: {left[0].row.path}{more} not found {where}",
                f"dreamsr fetch-weights {entry.name}, where there is a network",
            )
        if left:
            _download(entry, left, settings, progress)
        states = inspect(entry, folder)
        for state in wanted:
            if state.row.sha256 is None:
                progress.note(f"{entry.name}: {state.row.path}: weights.lock knows no hash of it to check")
    doubtful = [state for state in states if state.state == DOUBTFUL]
    if doubtful and settings.accept:
        _accept(folder, doubtful)
        return inspect(entry, folder)
    if doubtful:
        raise _in_doubt(entry, doubtful)
    return states


def refuse_unpublished(entry: LockEntry) -> None:
    """Raise `WeightsError` for an entry that nobody can download."""
    if not entry.files and not entry.bundled:
        raise WeightsError(f"{entry.name} is not published", entry.note or "train it: dreamsr train --help")


def _in_doubt(entry: LockEntry, doubtful: Iterable[FileState]) -> WeightsError:
    lines = "; ".join(
        f"{s.row.path}: weights.lock says {s.row.sha256} ({s.row.status}), found {s.found}" for s in doubtful
    )
    return WeightsError(
        f"{entry.name}: the pin is in doubt: {lines}",
        f"compare with the repository's page, then: dreamsr fetch-weights {entry.name} --accept-doubtful",
    )


def _accept(folder: Path, doubtful: Iterable[FileState]) -> None:
    pins = {**accepted_pins(folder), **{s.row.path: str(s.found) for s in doubtful}}
    path = accepted_path(folder)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(pins, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(part, path)


def _check_disk(folder: Path, wanted: list[FileState]) -> None:
    needed = sum(state.to_fetch for state in wanted)
    free = free_bytes(folder)
    if needed and free < needed + _SPARE_BYTES:
        raise WeightsError(
            f"{folder}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free",
            "make room, or choose another disk with --dest",
        )


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that `folder` lies on or will lie on."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


# ---------------------------------------------------------------- from this disk


def _take_from_disk(entry: LockEntry, state: FileState, settings: FetchSettings) -> bool:
    """Link or copy the file from the given folder or from the hub's own cache, if it is there and is the right one."""
    for source in _sources(entry, state.row, settings):
        if not source.is_file() or state.row.size not in (None, source.stat().st_size):
            continue
        if state.row.sha256 is None or file_sha256(source.resolve()) == state.row.sha256 or not state.row.sure:
            _place(source.resolve(), state.path)
            return True
        if settings.from_folder:
            found = file_sha256(source.resolve())
            raise WeightsError(
                f"{source} is not what weights.lock says: sha256 {found}, expected {state.row.sha256}",
                "another folder, or fetch it from the hub",
            )
    return False


def _sources(entry: LockEntry, row: LockRow, settings: FetchSettings) -> Iterable[Path]:
    if settings.from_folder:
        yield settings.from_folder / row.path
        yield settings.from_folder / entry.name / row.path
        return
    if row.url is not None:
        return
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(str(entry.repository), row.path, revision=entry.revision)
    if isinstance(cached, str):
        yield Path(cached)


def _place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(target)
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:
        try:
            shutil.copyfile(source, part)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise WeightsError(f"{target}: {error.strerror or error}", "make room, or choose --dest") from error
    os.replace(part, target)


# ---------------------------------------------------------------- from the hub


def _download(entry: LockEntry, wanted: list[FileState], settings: FetchSettings, progress: Progress) -> None:
    """Several files at once. The threads are daemons: Ctrl-C ends the process at once, what arrived stays. After an
    error what is under way has `_GRACE_SECONDS` to end; a longer download goes on where it was next time."""
    progress.phase(f"fetch {entry.name} (MiB)", max(1, sum(state.row.size or 0 for state in wanted) // MIB))
    todo: queue.SimpleQueue[FileState] = queue.SimpleQueue()
    done: queue.SimpleQueue[DreamSRError | Exception | None] = queue.SimpleQueue()
    for state in sorted(wanted, key=lambda s: s.row.size or 0):
        todo.put(state)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                state = todo.get_nowait()
            except queue.Empty:
                return
            try:
                _bring(entry, state, settings.hub)
                done.put(None)
            except Exception as error:
                done.put(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(settings.workers, len(wanted)))]
    for thread in threads:
        thread.start()
    meter = _Meter(wanted, progress)
    errors: list[Exception] = []
    finished = 0
    while finished < len(wanted) and not errors:
        try:
            outcome = done.get(timeout=_WATCH_SECONDS)
        except queue.Empty:
            meter.tell()
            continue
        finished += 1
        meter.tell()
        if outcome is not None:
            errors.append(outcome)
            stop.set()
    if errors:
        # The caller may look at the folder or fetch again, so what ends soon doesn't write behind its back.
        latest = time.monotonic() + _GRACE_SECONDS
        for thread in threads:
            thread.join(max(0.0, latest - time.monotonic()))
        raise errors[0]


def _bring(entry: LockEntry, state: FileState, hub: Hub) -> None:
    """Download one file and check it. A wrong hash after a continued download is tried once more from zero."""
    row, path = state.row, state.path
    continued = part_of(path).is_file()
    hub.download(entry, row, path)
    if not row.sure or row.sha256 is None:
        return
    found = file_sha256(path)
    if found != row.sha256 and continued:
        path.unlink()
        hub.download(entry, row, path)
        found = file_sha256(path)
    if found != row.sha256:
        path.unlink()
        raise WeightsError(
            f"{entry.name}: {row.path} is not the file that weights.lock names: sha256 {found}, expected {row.sha256}",
            f"another mirror, or later again: dreamsr fetch-weights {entry.name}",
        )


class _Meter:
    """Turns the growth of the files into progress; the hub's own bars know nothing of each other."""

    def __init__(self, wanted: list[FileState], progress: Progress) -> None:
        self._paths, self._progress, self._told = [state.path for state in wanted], progress, 0

    def tell(self) -> None:
        arrived = sum(_size(path) or _size(part_of(path)) for path in self._paths) // MIB
        self._progress.advance(max(0, arrived - self._told))
        self._told = max(self._told, arrived)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def summary(entry: LockEntry, states: list[FileState]) -> dict[str, Any]:
    """One entry as plain data, for `--list` and `--json`. Sizes in bytes."""
    count: Callable[[str], int] = lambda kind: sum(state.state == kind for state in states)  # noqa: E731
    if not entry.files and not entry.bundled:
        state = "not published"
    elif states and count(READY) == len(states):
        state = "ready"
    elif count(ALTERED):
        state = ALTERED
    elif count(DOUBTFUL):
        state = DOUBTFUL
    else:
        state = "missing" if count(MISSING) == len(states) else "incomplete"
    return {
        "name": entry.name,
        "state": state,
        "licence": entry.licence,
        "gated": entry.gated,
        "repository": entry.repository,
        "revision": entry.revision,
        "files": len(states),
        "bytes": sum(state.row.size or 0 for state in states),
        "to_fetch": sum(state.to_fetch for state in states),
        "note": entry.note,
    }
