"""Photos one after another through one engine: while one is computed, the next is read and the one before is written.

Outcomes are told in the photos' order, by the main thread. What goes wrong in the background belongs to its own photo.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from dreamsr_cli.cli.console import Display, explain, stop_if_asked
from dreamsr_cli.cli.photos import Found, Job
from dreamsr_cli.errors import DreamSRError, UsageError
from dreamsr_cli.overlap import Background, overlap_wanted
from dreamsr_cli.progress import NotedProgress, Progress

if TYPE_CHECKING:
    from dreamsr_cli.engine import Engine, Order, UpscaleResult
    from dreamsr_cli.photo_job import PhotoJob

Outcome = dict[str, Any] | DreamSRError | None
PATIENCE = 2.0
"""Seconds that an interruption waits for what is being read or written; its journal goes on where it stopped."""


class PhotoLine:
    """One run over a list of photos."""

    def __init__(
        self,
        engine: Engine,
        entries: Sequence[Job | Found],
        order_of: Callable[[Job, Progress], Order | dict[str, Any]],
        finish: Callable[[UpscaleResult, Progress], dict[str, Any]],
        display: Display,
        tell: Callable[[Job | Found, Outcome], None],
    ) -> None:
        """`order_of(job, progress)`: what to ask the engine for, or the outcome of a photo that needs no work; raises
        what is wrong with it. `finish(result, progress)` makes a result's outcome. Both may run in another thread."""
        self._engine, self._entries = engine, entries
        self._order_of, self._finish = order_of, finish
        self._display, self._tell = display, tell
        self._overlap = overlap_wanted() and sum(isinstance(entry, Job) for entry in entries) > 1
        self._threads = {name: Background() for name in ("reader", "writer")} if self._overlap else {}
        self._next: tuple[Job, Future[Any], NotedProgress] | None = None
        self._told: deque[tuple[Job | Found, Future[Outcome], NotedProgress]] = deque()
        self._prepared = 0

    def run(self) -> None:
        """Everything. Raises `UsageError` for what would be wrong for every photo."""
        try:
            for number, entry in enumerate(self._entries):
                stop_if_asked()
                if isinstance(entry, Found):
                    self._put(entry, entry.problem)
                    continue
                label = f"[{number + 1}/{len(self._entries)}] {entry.source.name}"
                self._prepare(number)
                with self._display.photo(label):
                    outcome = self._photo(entry, number)
                self._put(entry, outcome)
            self._tell_finished(wait=True)
        except KeyboardInterrupt:
            self._close(PATIENCE)
            raise
        except BaseException:
            with suppress(UsageError):  # the first one counts
                self._tell_finished(wait=True)
            self._close(None)
            raise
        self._close(None)

    # ---------------------------------------------------------------- one photo

    def _photo(self, entry: Job, number: int) -> Outcome | Future[Outcome]:
        progress = _Telling(self._display, self._tell_finished)
        try:
            job = self._read(entry, progress)
            if isinstance(job, dict):
                return job
            # Its job leaves its journal to the next run, whatever goes wrong.
            with job:
                self._read_next(number + 1, job)
                self._engine.compute(job, progress)
                if self._may_write_behind(job, number):
                    return self._write_behind(job)
                self._tell_finished(wait=True)
                return self._finish(job.write(), progress)
        except UsageError:
            raise  # it would be wrong for every photo
        except Exception as error:
            return explain(error, f"upscaling {entry.source}")

    def _read(self, entry: Job, progress: Progress) -> PhotoJob | dict[str, Any]:
        """The photo's job: read ahead, or now."""
        if self._next is not None and self._next[0] is entry:
            _, future, notes = self._next
            job = future.result()
            self._next = None
            if job is not None:
                notes.tell(progress)
                return job
        order = self._order_of(entry, progress)
        return order if isinstance(order, dict) else self._engine.read(order, progress)

    def _read_next(self, number: int, present: PhotoJob) -> None:
        """Begin to read the next photo, if there is one that may be read now."""
        coming = next((entry for entry in self._entries[number:] if isinstance(entry, Job)), None)
        if not self._overlap or coming is None or not self._may_read_ahead(coming):
            return
        engine, order_of, notes = self._engine, self._order_of, NotedProgress()

        def read() -> PhotoJob | dict[str, Any] | None:
            order = order_of(coming, notes)
            return order if isinstance(order, dict) else engine.read_ahead(order, present.work, notes)

        self._next = (coming, self._threads["reader"].submit(read), notes)

    def _may_read_ahead(self, coming: Job) -> bool:
        """Texts that are made for many photos together come first."""
        return not self._engine.wants_preparing or self._entries.index(coming) < self._prepared

    def _may_write_behind(self, job: PhotoJob, number: int) -> bool:
        from dreamsr_cli.residency import may_write_behind

        more = any(isinstance(entry, Job) for entry in self._entries[number + 1 :])
        return self._overlap and more and may_write_behind(job.work)

    def _write_behind(self, job: PhotoJob) -> Future[Outcome]:
        self._tell_finished(wait=True)  # one result at a time waits
        notes, finish, source = NotedProgress(), self._finish, job.order.photo
        job = job.handed_on()

        def write() -> Outcome:
            try:
                with job:
                    return finish(job.write(), notes)
            except Exception as error:
                return explain(error, f"upscaling {source}")

        self._notes = notes
        return self._threads["writer"].submit(write)

    def _prepare(self, number: int) -> None:
        """Texts of this and the next photos, where they are made together."""
        engine = self._engine
        if not engine.wants_preparing or number < self._prepared:
            return
        places, orders = [], []
        for place, entry in enumerate(self._entries[number:], start=number):
            if isinstance(entry, Job):
                with suppress(Exception):  # told in its own turn
                    order = self._order_of(entry, NotedProgress())
                    if not isinstance(order, dict):
                        places.append(place)
                        orders.append(order)
        self._prepared = len(self._entries)
        if len(orders) > 1:
            with self._display.photo(f"texts of {len(orders)} photos"):
                looked_at = engine.prepare(orders, self._display)
            if looked_at < len(orders):
                self._prepared = places[looked_at]

    # ---------------------------------------------------------------- telling

    def _put(self, entry: Job | Found, outcome: Outcome | Future[Outcome]) -> None:
        """Tell an outcome after those before it."""
        if not isinstance(outcome, Future):
            known: Future[Outcome] = Future()
            known.set_result(outcome)
            self._told.append((entry, known, NotedProgress()))
        else:
            self._told.append((entry, outcome, self._notes))
        self._tell_finished()

    def _tell_finished(self, wait: bool = False) -> None:
        """Tell what is finished, in order; with `wait`, everything."""
        while self._told and (wait or self._told[0][1].done()):
            entry, future, notes = self._told[0]
            outcome = future.result()
            self._told.popleft()
            with self._display.aside():
                notes.tell(self._display)
                self._tell(entry, outcome)

    def _close(self, seconds: float | None) -> None:
        """End both threads; a photo that was read ahead keeps what its journal holds."""
        for thread in self._threads.values():
            thread.close(seconds)
        if self._next is not None and self._next[1].done() and self._next[1].exception() is None:
            job = self._next[1].result()
            if job is not None and not isinstance(job, dict):
                job.leave()
        self._tell_finished()


class _Telling:
    """The display, which at every sign of progress also tells of photos that were finished meanwhile."""

    def __init__(self, display: Display, tell_finished: Callable[[], None]) -> None:
        self._display, self._tell_finished = display, tell_finished

    def phase(self, name: str, total: int) -> None:
        self._tell_finished()
        self._display.phase(name, total)

    def at(self, place: str) -> None:
        self._display.at(place)

    def advance(self, count: int = 1) -> None:
        self._tell_finished()
        self._display.advance(count)

    def note(self, text: str) -> None:
        self._display.note(text)
