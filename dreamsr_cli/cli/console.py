"""What a person sees on stderr: a bar on a terminal, plain lines elsewhere, errors in two lines."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from dreamsr_cli.errors import DreamSRError
from dreamsr_cli.progress import Progress, SilentProgress


class Display(Progress, Protocol):
    """The progress of one photo after another."""

    def photo(self, label: str) -> AbstractContextManager[None]:
        """Inside the `with`, progress belongs to the photo `label`; no bar is left on the screen after it."""
        ...

    def aside(self) -> AbstractContextManager[None]:
        """Inside the `with`, the screen is free for lines about other photos."""
        ...


def make_display(quiet: bool) -> Display:
    """Nothing with `quiet`; else a bar if stderr is a terminal, plain lines without control codes if it isn't."""
    if quiet:
        return QuietDisplay()
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return BarDisplay(Console(stderr=True))
    return PlainDisplay(sys.stderr)


_asked_to_stop = threading.Event()


def stop_on_signals() -> None:
    """Let Ctrl-C and SIGTERM raise `KeyboardInterrupt` in the main thread, at the latest at the next sign of progress.

    Python swallows an exception that a signal raises inside a destructor or an import lock; the flag outlives that.
    """

    def ask(signum: int, frame: FrameType | None) -> None:
        _asked_to_stop.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, ask)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, ask)


def stop_if_asked() -> None:
    """Raise `KeyboardInterrupt` if a signal asked for it earlier."""
    if _asked_to_stop.is_set():
        raise KeyboardInterrupt


class QuietDisplay(SilentProgress):
    """Says nothing."""

    def phase(self, name: str, total: int) -> None:
        stop_if_asked()

    def advance(self, count: int = 1) -> None:
        stop_if_asked()

    def photo(self, label: str) -> AbstractContextManager[None]:
        return nullcontext()

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()


class PlainDisplay:
    """One line per phase, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._label = self._phase = ""

    @contextmanager
    def photo(self, label: str) -> Generator[None]:
        self._label = f"{label}: "
        try:
            yield
        finally:
            self._label = ""

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def phase(self, name: str, total: int) -> None:
        stop_if_asked()
        self._phase = name
        self._say(f"{self._label}{name} ({total})")

    def at(self, place: str) -> None:
        self._say(f"{self._label}{self._phase}, {place}")

    def advance(self, count: int = 1) -> None:
        stop_if_asked()

    def note(self, text: str) -> None:
        self._say(f"note: {text}")

    def _say(self, text: str) -> None:
        print(one_line(text), file=self._stream, flush=True)


class BarDisplay:
    """A bar with photo, phase, count of tiles and time left; it is gone when the photo is done."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._label = self._phase = ""

    @contextmanager
    def photo(self, label: str) -> Generator[None]:
        # stdout carries results and must not be redirected into the bar's stream.
        bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            redirect_stdout=False,
        )
        self._label = one_line(label)
        with bar:
            self._bar, self._task = bar, None
            try:
                yield
            finally:
                self._bar = self._task = None

    @contextmanager
    def aside(self) -> Generator[None]:
        bar = self._bar
        if bar is not None:
            bar.stop()
        try:
            yield
        finally:
            if bar is not None:
                bar.start()

    def phase(self, name: str, total: int) -> None:
        stop_if_asked()
        if self._bar is None:
            return
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._phase = f"{self._label}  {one_line(name)}"
        self._task = self._bar.add_task(self._phase, total=total)

    def at(self, place: str) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=f"{self._phase}, {one_line(place)}")

    def advance(self, count: int = 1) -> None:
        stop_if_asked()
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, count)

    def note(self, text: str) -> None:
        self._console.print(f"note: {one_line(text)}", markup=False, highlight=False, soft_wrap=True)


def one_line(text: str) -> str:
    """`text` on one line, with what could steer a terminal (a file name may hold anything) shown as �."""
    return "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))


def report(error: DreamSRError) -> None:
    """Print what happened and what to type, one line each, on stderr; `DREAMSR_DEBUG=1` adds the traceback."""
    if os.environ.get("DREAMSR_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error)
    print(f"error: {one_line(error.message)}\n  try: {one_line(error.hint)}", file=sys.stderr, flush=True)


def explain(error: Exception, doing: str) -> DreamSRError:
    """Any exception as one a person can act on; `doing` says what was going on ("upscaling a.jpg")."""
    if isinstance(error, DreamSRError):
        return error
    if isinstance(error, MemoryError):
        known = DreamSRError(f"out of memory while {doing}", "use a smaller --tile or --tile-batch 1")
    elif isinstance(error, UnicodeEncodeError):
        known = DreamSRError(f"a file name is not valid text (while {doing})", "rename the file")
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror or error} (while {doing})"
        known = DreamSRError(text, "check the path, its permissions and the free disk space")
    else:
        text = f"unexpected {type(error).__name__} while {doing}: {error}"
        known = DreamSRError(text, "this is a bug: run it again with DREAMSR_DEBUG=1 and report what it prints")
    known.__cause__ = error
    return known
