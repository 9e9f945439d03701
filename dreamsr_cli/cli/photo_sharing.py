"""Photos of a run, one after another; with several processes whole photos are shared out where every process sees the
same files, and the rest is shared by batches of tiles.

Whole photos: files, journal and result of a photo belong to the process that takes it; process 0 hands photos out and
tells their outcomes in order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dreamsr_cli.cli.console import Display, QuietDisplay, stop_if_asked
from dreamsr_cli.cli.photos import Found, Job
from dreamsr_cli.errors import DreamSRError, UsageError

if TYPE_CHECKING:
    from dreamsr_cli.progress import Progress
    from dreamsr_cli.work_sharing import Crew

Outcome = dict[str, Any] | DreamSRError | None


class PhotoWork(Protocol):
    """A command's work on photos, in process 0 and in its helpers."""

    display: Display

    def photo(self, job: Job, crew: Crew | None) -> dict[str, Any] | DreamSRError:
        """Do one photo, with the `crew` if there is one. `DreamSRError` is raised only for what concerns every
        photo."""
        ...


class Noting:
    """A display that keeps notes until the photo's turn, and passes everything else on."""

    def __init__(self, display: Display) -> None:
        self._display, self.notes = display, list[str]()

    def photo(self, label: str) -> AbstractContextManager[None]:
        return self._display.photo(label)

    def aside(self) -> AbstractContextManager[None]:
        return self._display.aside()

    def phase(self, name: str, total: int) -> None:
        self._display.phase(name, total)

    def at(self, place: str) -> None:
        self._display.at(place)

    def advance(self, count: int = 1) -> None:
        self._display.advance(count)

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclass(frozen=True)
class Done:
    """What became of a photo, as it travels between processes."""

    notes: tuple[str, ...]
    outcome: dict[str, Any] | None = None
    error: tuple[str, str, int] | None = None
    """(message, hint, exit code)"""
    for_all: bool = False
    """A usage error: it concerns every photo."""

    @classmethod
    def of(cls, work: PhotoWork, job: Job) -> Done:
        """Do the photo alone."""
        display, work.display = work.display, (noting := Noting(work.display))
        try:
            found = work.photo(job, None)
        except UsageError as error:
            return cls(tuple(noting.notes), error=(error.message, error.hint, error.exit_code), for_all=True)
        finally:
            work.display = display
        notes = tuple(noting.notes)
        if isinstance(found, DreamSRError):
            return cls(notes, error=(found.message, found.hint, found.exit_code))
        return cls(notes, found)

    def told(self) -> Outcome:
        """The outcome; raises `UsageError` if it concerns every photo."""
        if self.error is None:
            return self.outcome
        message, hint, code = self.error
        if self.for_all:
            raise UsageError(message, hint)
        error = DreamSRError(message, hint)
        error.exit_code = code
        return error


@dataclass(frozen=True)
class Look:
    """Asks whether a process sees the files that process 0 sees."""

    files: tuple[tuple[str, int, int], ...]
    """(path, bytes, time of change) of photos and prompts."""
    marks: tuple[str, ...]
    """Files that process 0 has just made where results go."""

    def seen(self) -> bool:
        """Whether all of it is here."""
        try:
            same = all((stat := os.stat(p)).st_size == size and stat.st_mtime_ns == t for p, size, t in self.files)
        except (OSError, ValueError):
            return False
        return same and all(os.path.exists(mark) for mark in self.marks)


@dataclass(frozen=True)
class PhotoSetup:
    """A command's work in a helper. Payloads are a `Look`, then `Job`s; results are `bool` and `Done`."""

    make: Callable[[Display], PhotoWork]
    """Picklable; makes the work, and opens what every photo needs."""

    def open(self, progress: Progress) -> _PhotoService:
        """Nothing is opened before the first photo."""
        return _PhotoService(self.make)


class _PhotoService:
    tidies = True
    """Journals of `--no-resume` and half-made files are removed when this process is sent home."""

    def __init__(self, make: Callable[[Display], PhotoWork]) -> None:
        self._make = make
        self._work: PhotoWork | None = None

    def __call__(self, payload: Look | Job) -> bool | Done:
        if isinstance(payload, Look):
            return payload.seen()
        if self._work is None:
            self._work = self._make(QuietDisplay())
        return Done.of(self._work, payload)


@dataclass
class Photos:
    """The plan of one run, done photo by photo."""

    plan: list[Job | Found]
    work: PhotoWork
    crew: Crew | None = None
    setup: PhotoSetup | None = None
    """How helpers do whole photos; None: they never do."""
    also_read: tuple[Path, ...] = ()
    """Other files and folders that the photos need."""
    _next: int = field(default=0, init=False)

    def outcomes(self) -> Iterator[tuple[Job | Found, Outcome]]:
        """Each entry of the plan with what became of it, in order. One that fails stops no other."""
        yield from self._by_photo()
        for number in range(self._next, len(self.plan)):
            stop_if_asked()
            entry = self.plan[number]
            if isinstance(entry, Found):
                yield entry, entry.problem
                continue
            with self._shown(number):
                outcome = self.work.photo(entry, self.crew)
            yield entry, outcome

    def _by_photo(self) -> Iterator[tuple[Job | Found, Outcome]]:
        """As many photos as can be shared evenly; what is left over is shared by tiles."""
        jobs = {number: entry for number, entry in enumerate(self.plan) if isinstance(entry, Job)}
        if self.crew is None or self.setup is None or len(jobs) < self.crew.size:
            return
        whole = list(jobs)[: len(jobs) // self.crew.size * self.crew.size]
        with self.crew.share(self.setup, self.work.display, window=len(whole), ahead=False) as shared:
            with _marks(jobs.values()) as marks:
                files = [*(job.source for job in jobs.values()), *self.also_read]
                look = _look(files, marks)
                if look is None or not all(shared.everyone(look)):
                    return
            from dreamsr_cli.work_sharing import Job as SharedJob

            shared.announce(
                SharedJob(number, partial(jobs.__getitem__, number), partial(self._here, number)) for number in whole
            )
            for number, entry in enumerate(self.plan[: whole[-1] + 1]):
                stop_if_asked()
                self._next = number + 1
                if isinstance(entry, Found):
                    yield entry, entry.problem
                    continue
                done: Done = shared.take(number)
                for note in done.notes:
                    self.work.display.note(note)
                yield entry, done.told()

    def _here(self, number: int) -> Done:
        entry = self.plan[number]
        assert isinstance(entry, Job)
        with self._shown(number):
            return Done.of(self.work, entry)

    def _shown(self, number: int) -> AbstractContextManager[None]:
        return self.work.display.photo(f"[{number + 1}/{len(self.plan)}] {self.plan[number].source.name}")


def _look(files: Iterable[Path], marks: tuple[str, ...] | None) -> Look | None:
    if marks is None:
        return None
    try:
        stats = [(str(path), path.stat()) for path in files]
    except OSError:
        return None
    return Look(tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats), marks)


@contextmanager
def _marks(jobs: Iterable[Job]) -> Generator[tuple[str, ...] | None]:
    """Inside, a new empty file lies in every folder that results go to (or the nearest one that is there); None where
    one can't be written."""
    folders = {_nearest(job.target.parent) for job in jobs}
    made: list[str] = []
    try:
        for folder in folders:
            mark = os.path.join(folder, f".dreamsr-{os.urandom(8).hex()}")
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            made.append(mark)
        found: tuple[str, ...] | None = tuple(made)
    except OSError:
        found = None
    try:
        yield found
    finally:
        for mark in made:
            os.unlink(mark)


def _nearest(folder: Path) -> Path:
    return next((place for place in (folder, *folder.parents) if place.is_dir()), folder)
