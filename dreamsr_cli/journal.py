"""A job's folder beside its output, `OUT.ext.dreamsr/`: what is finished survives a kill at any instant.

Canvases are flat float32 files (H, W, C) read and written with pread and pwrite, never mapped: mapped pages count as
resident memory. A canvas is written from the top; `progress.bin` says how many rows of it are there; a finished one
is renamed. Tiles' velocities lie in slots until the rows they touch are blended. Axes: C channels, H W latent rows
and columns.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dreamsr_cli.errors import JournalError, OutputError
from dreamsr_cli.journal_files import RowFile, Slots, Syncs, failure, flush, write_all

JOB_FILE, LOCK_FILE, PROGRESS_FILE = "job.json", "lock", "progress.bin"
PROMPTS_FILE, PLAN_FILE, PIXELS_FILE = "prompts.json", "plan.json", "pixels.raw"
SYNC_SECONDS = 30.0
"""A power cut costs at most this much work; a kill costs none (the page cache survives it)."""
_PROGRESS = struct.Struct("<qqI")
_private = itertools.count()
_SYNCED_AT = 32
"""Where `progress.bin` holds the last progress that is surely on the disk, for after a power cut."""


def journal_folder(out_path: Path) -> Path:
    """Where the journal of `out_path` lies; a name too long for the file system is shortened by its hash."""
    name = f"{out_path.name}.dreamsr"
    if len(os.fsencode(name)) > 255:
        digest = hashlib.sha256(os.fsencode(out_path.name)).hexdigest()[:12]
        name = os.fsdecode(os.fsencode(out_path.name)[:200]).encode("utf-8", "ignore").decode() + f".{digest}.dreamsr"
    return out_path.with_name(name)


def fingerprint_of(folder: Path) -> dict[str, Any]:
    """What the unfinished job in that folder is of, as it was given to `Journal`; {} where there is none."""
    try:
        return dict(json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


class Piece:
    """One canvas of the job, written from the top and committed by a rename; goes on where it stopped."""

    def __init__(self, journal: Journal, name: str, step: int, shape_CHW: tuple[int, int, int]) -> None:
        self._journal, self._name, self.step = journal, name, step
        channels, self.rows, width = shape_CHW
        self._final = journal.folder / f"{name}.f32"
        self._part = journal.folder / f"{name}.f32.part"
        self.done = self._final.exists()
        self.file = RowFile(self._final if self.done else self._part, self.rows, width, channels, create=not self.done)
        self.rows_done = self.rows if self.done else journal.progress(step)

    def append(self, values_CHW: np.ndarray) -> None:
        """The next rows; they count as soon as they are written."""
        self.file.write_rows(self.rows_done, values_CHW)
        self.rows_done += values_CHW.shape[1]
        self._journal.set_progress(self.step, self.rows_done)
        self._journal.sync_sometimes(self.file)

    def finish(self) -> RowFile:
        """Commit the canvas; returns its file."""
        if not self.done:
            if self.rows_done != self.rows:
                raise ValueError(f"{self._name}: {self.rows_done} of {self.rows} rows")
            self.file.sync()
            os.replace(self._part, self._final)
            self.done = True
        return self.file

    def drop(self) -> None:
        """The canvas is not needed any more."""
        self.file.close()
        self._final.unlink(missing_ok=True)


class Journal:
    """The folder of one job, locked against a second process; removed on success, kept on failure once it holds
    work."""

    def __init__(
        self, folder: Path, fingerprint: dict[str, Any], needed_bytes: int, *, restart: bool = False, keep: bool = True
    ) -> None:
        """Open or create the journal. `fingerprint` holds, one by one, what decides the result's bytes.

        `restart` drops what another run left; `keep` False makes a journal of this process alone, which no later run
        finds. Raises `JournalError` if another process holds it or it belongs to another job, `OutputError` if the
        disk has no room.
        """
        # Of its own for each result: several may be in work.
        self.folder = folder if keep else folder.with_name(f".{os.getpid()}-{next(_private)}{folder.suffix}")
        self._keep, self._worked, self._last_sync = keep, False, time.monotonic()
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            self._lock = os.open(self.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise failure(self.folder, error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise JournalError(
                f"another process is working on {self.folder.name.removesuffix('.dreamsr')}", "wait for it to end"
            ) from error
        except OSError as error:
            os.close(self._lock)
            raise failure(self.folder / LOCK_FILE, error) from error
        try:
            self._claim(json.loads(json.dumps(fingerprint)), restart, needed_bytes)
            self._progress_fd = os.open(self.folder / PROGRESS_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            os.close(self._lock)
            raise failure(self.folder, error) from error
        except BaseException:
            if not self._worked:
                shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
            raise
        self._files: list[Any] = []

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()
        os.close(self._progress_fd)
        if kind is None or not self._keep or not self._worked:
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise failure(self.folder, error) from error

    @property
    def resumed(self) -> bool:
        """Whether an earlier run left work here."""
        return self._resumed

    def text(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The photo's prompts: those of the earlier run, or made now and kept."""
        return self._once(PROMPTS_FILE, make)

    def work_plan(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The plan in force (batch, control features, offload): that of the earlier run, or made now and kept."""
        return self._once(PLAN_FILE, make)

    def tile_batch(self, asked: int) -> int:
        """Tiles per network call in the plan in force; `asked` where no network had to run."""
        path = self.folder / PLAN_FILE
        return int(json.loads(path.read_text(encoding="utf-8"))["tile_batch"]) if path.exists() else asked

    def _once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.folder / name
        if not path.exists():
            self._write_text(path, make())
        return json.loads(path.read_text(encoding="utf-8"))

    def piece(self, name: str, step: int, shape_CHW: tuple[int, int, int]) -> Piece:
        """The canvas called `name`, (C, H, W); `step` is its number in `progress.bin`, unique within the job."""
        piece = Piece(self, name, step, shape_CHW)
        self._files.append(piece.file)
        return piece

    def slots(self, count: int, shape_CHW: tuple[int, int, int]) -> Slots:
        """The job's slots, for tiles of this shape; what slots of another shape hold counts as empty (their step)."""
        slots = Slots(self.folder, count, shape_CHW)
        self._files.append(slots)
        return slots

    def has(self, name: str) -> bool:
        """Whether the canvas called `name` is committed."""
        return (self.folder / f"{name}.f32").exists()

    def drop(self, names: Iterable[str]) -> None:
        """Remove canvases that an earlier run had no time to remove."""
        for name in names:
            (self.folder / f"{name}.f32").unlink(missing_ok=True)

    @property
    def pixels(self) -> Path:
        """The decoded, colour-fixed result, raw."""
        return self.folder / PIXELS_FILE

    def progress(self, step: int) -> int:
        """Rows of piece `step` that are written; 0 where another piece was in work last."""
        record = os.pread(self._progress_fd, _PROGRESS.size, 0)
        if len(record) < _PROGRESS.size:
            return 0
        found, rows, crc = _PROGRESS.unpack(record)
        whole = zlib.crc32(record[:16]) == crc
        return rows if whole and found == step else 0

    def set_progress(self, step: int, rows: int) -> None:
        """`rows` rows of piece `step` are written."""
        body = struct.pack("<qq", step, rows)
        self._record = np.frombuffer(body + struct.pack("<I", zlib.crc32(body)), np.uint8)
        write_all(self._progress_fd, self._record, 0, self.folder / PROGRESS_FILE)
        self._worked = True

    def worked(self) -> None:
        """Something worth keeping is in the journal."""
        self._worked = True

    def sync_sometimes(self, file: Syncs) -> None:
        """Flush `file`, of which the progress was just set, at most every `SYNC_SECONDS`; then note that it is
        flushed."""
        if time.monotonic() - self._last_sync > SYNC_SECONDS:
            file.sync()
            write_all(self._progress_fd, self._record, _SYNCED_AT, self.folder / PROGRESS_FILE)
            flush(self._progress_fd)
            self._last_sync = time.monotonic()

    def _claim(self, fingerprint: dict[str, Any], restart: bool, needed_bytes: int) -> None:
        path = self.folder / JOB_FILE
        if restart:
            self._empty()
        self._resumed = self._worked = path.exists()
        if self._resumed:
            try:
                job = json.loads(path.read_text(encoding="utf-8"))
                before, booted = job["fingerprint"], job["boot"]
            except (ValueError, KeyError):
                before, booted = {}, None
            changed = sorted(k for k in {*before, *fingerprint} if before.get(k) != fingerprint.get(k))
            if changed:
                told = "; ".join(f"{k} was {before.get(k)!r}, is {fingerprint.get(k)!r}" for k in changed[:3])
                more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
                raise JournalError(
                    f"{self.folder} belongs to an unfinished run with other settings: {told}{more}",
                    "give the same settings to finish it, or add --restart to drop it and begin anew",
                )
            if booted != _boot_id():
                # The machine went down since: only what was flushed is sure to be on the disk.
                progress = self.folder / PROGRESS_FILE
                records = progress.read_bytes() if progress.exists() else b""
                sure = records[_SYNCED_AT : _SYNCED_AT + _PROGRESS.size]
                progress.write_bytes(sure.ljust(_SYNCED_AT, b"\0") + sure)
                self._write_text(path, {"format": 1, "boot": _boot_id(), "fingerprint": fingerprint})
            return
        held = sum(p.stat().st_size for p in self.folder.iterdir())
        free = shutil.disk_usage(self.folder).free + held
        if free < needed_bytes:
            raise OutputError(
                f"{self.folder.parent} has {free / 2**30:.1f} GiB free, the work needs {needed_bytes / 2**30:.1f} GiB",
                "free some space, or write the result to another disk with -o",
            )
        self._empty()
        self._write_text(path, {"format": 1, "boot": _boot_id(), "fingerprint": fingerprint})

    def _empty(self) -> None:
        for path in self.folder.iterdir():
            if path.name != LOCK_FILE:
                path.unlink()

    def _write_text(self, path: Path, data: dict[str, Any]) -> None:
        part = path.with_name(path.name + ".part")
        with part.open("w", encoding="utf-8") as file:
            file.write(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)


def _boot_id() -> str | None:
    """What tells one start of the machine from the next; None where the system doesn't say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
