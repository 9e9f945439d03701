"""Jobs shared out by process 0 to whoever is free, itself among them, and their results taken in order.

A job's result doesn't depend on who does it, nor on the order: so the bytes are those of one process. Jobs that are
announced early (a next step's) are done once they are ready, so nobody waits at the end of a step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch

from dreamsr_cli import __version__
from dreamsr_cli.errors import DeviceError, DreamSRError, ProcessError
from dreamsr_cli.processes import Processes
from dreamsr_cli.progress import Progress
from dreamsr_cli.ranks import again

Service = Callable[[Any], Any]
"""What a helper does with a job's payload; returns the result."""


class Setup(Protocol):
    """What helpers need to know before the first job; picklable."""

    def open(self, progress: Progress) -> Service:
        """In the helper: load the networks. What it notes is shown by process 0."""
        ...


def always() -> bool:
    """Ready at any time."""
    return True


@dataclass(frozen=True)
class Job:
    """One piece of work, for a helper or for process 0 itself."""

    key: Hashable
    """Its name within the work."""
    pack: Callable[[], Any]
    """The payload to send; called when a helper gets the job, in any thread."""
    here: Callable[[], Any]
    """Do it in process 0; the result."""
    place: Hashable = None
    """Jobs of one place go to who did that place before (what a helper keeps between steps); None: anybody."""
    ready: Callable[[], bool] = always
    """Whether it can be begun already; may be asked in any thread."""


class Crew:
    """Process 0's view of the other processes, its helpers."""

    def __init__(self, processes: Processes) -> None:
        """Wait until every helper has reported. Raises `ProcessError` for one that runs other versions."""
        self.processes = processes
        self.size = processes.place.world
        self.changed = threading.Condition()
        self.lost: ProcessError | None = None
        self.notes: list[str] = []
        self._hosts: dict[int, dict[str, Any]] = {}
        self._session = 0
        self._work: SharedWork | None = None
        for helper in self.helpers:
            processes.send(helper, ("welcome", torch.get_num_threads()))
        processes.listen(self._take, self._lose)
        with self.changed:
            while len(self._hosts) < len(self.helpers):
                self.raise_if_lost()
                self.changed.wait(0.5)
        self._compare()

    @property
    def helpers(self) -> Sequence[int]:
        """Ranks of the other processes."""
        return self.processes.peers

    def name(self, helper: int) -> str:
        """A helper for people."""
        host = self._hosts.get(helper, {}).get("host")
        return f"process {helper} of {self.size}" + (f" on {host}" if host and host != self.processes.host else "")

    @contextmanager
    def share(
        self, setup: Setup, progress: Progress, window: int | None = None, ahead: bool = True
    ) -> Generator[SharedWork]:
        """Inside, helpers hold what `setup` opens and do jobs. `window`: results that may wait for their turn, and jobs
        in work, at most; `ahead`: helpers get their next job before they have finished one."""
        assert self._work is None, "one piece of work is shared at a time"
        self._session += 1
        work = SharedWork(self, self._session, progress, window or 4 * self.size, ahead)
        self._work = work
        try:
            self._tell(("open", self._session, setup))
            yield work
        finally:
            self._work = None
            self._tell(("close", self._session))

    def leave(self) -> None:
        """Send the helpers home."""
        self.processes.close()
        self._tell(("end",))

    def raise_if_lost(self) -> None:
        """Raise the `ProcessError` of a helper that is gone."""
        if self.lost is not None:
            raise self.lost

    def _tell(self, message: Any) -> None:
        if self.lost is None:
            for helper in self.helpers:
                self.processes.send(helper, message)

    def _take(self, helper: int, message: Any) -> None:
        match message:
            case ("hello", facts):
                with self.changed:
                    self._hosts[helper] = facts
                    self.changed.notify_all()
            case (str(kind), int(session), *rest):
                work = self._work
                if work is not None and work.session == session:
                    work.hear(helper, kind, *rest)

    def _lose(self, helper: int, reason: str) -> None:
        with self.changed:
            if self.lost is None:
                self.lost = ProcessError(f"{self.name(helper)} {reason}; what is finished is kept", again())
            self.changed.notify_all()

    def _compare(self) -> None:
        ours = facts_here(self.processes.host)
        for helper, facts in self._hosts.items():
            for name in ("torch", "dreamsr"):
                if facts[name] != ours[name]:
                    raise ProcessError(
                        f"{self.name(helper)} has {name} {facts[name]}, process 0 has {ours[name]}",
                        "install the same versions on every machine",
                    )
            if facts["processor"] != ours["processor"]:
                self.notes.append(
                    f"{self.name(helper)} computes with {facts['processor']}, process 0 with {ours['processor']}: "
                    "the result may differ in its last bits from that of one machine"
                )


class SharedWork:
    """The jobs of one `Crew.share`."""

    def __init__(self, crew: Crew, session: int, progress: Progress, window: int, ahead: bool) -> None:
        self.crew, self.session = crew, session
        self._progress, self._window, self._ahead = progress, window, ahead
        self._changed = crew.changed
        self._open: set[int] = set()
        self._busy = dict.fromkeys(crew.helpers, 0)
        self._waiting: dict[Hashable, Job] = {}
        self._taken: set[Hashable] = set()
        self._results: dict[Hashable, Any] = {}
        self._at: dict[Hashable, set[int]] = {}
        self._error: BaseException | None = None
        self._answers: dict[int, Any] = {}
        self._awaits = False

    def announce(self, jobs: Iterable[Job]) -> None:
        """Jobs to be done, in this order; those that are known already are left as they are."""
        with self._changed:
            for job in jobs:
                if job.key not in self._taken and job.key not in self._results:
                    self._waiting.setdefault(job.key, job)
        self.hand_out()

    def forget(self) -> None:
        """Drop all jobs and results."""
        with self._changed:
            self._waiting.clear()
            self._taken.clear()
            self._results.clear()

    def take(self, key: Hashable) -> Any:
        """The result of the job `key`, in whatever time it takes; meanwhile this process does jobs as well.

        Raises what the job raised; of another process `DreamSRError`, or torch's `OutOfMemoryError`. `ProcessError`
        where one is gone.
        """
        while True:
            with self._changed:
                self._check()
                if key in self._results:
                    result = self._results.pop(key)
                    break
                job = self._choose(0, key)
                if job is None:
                    if key not in self._taken and key not in self._waiting:
                        raise KeyError(key)
                    self._changed.wait(0.2)
            if job is None:
                self.hand_out()  # some may have become ready without a message
                continue
            made = job.here()
            with self._changed:
                if job.key in self._taken:
                    self._taken.discard(job.key)
                    self._results[job.key] = made
            self.hand_out()
        self.hand_out()
        return result

    def everyone(self, payload: Any, wait: bool = True) -> list[Any]:
        """What every helper answers to `payload`, in the order of their ranks; raises as `take` does. Without `wait`
        nothing is returned, and a later `take` raises what went wrong."""
        with self._changed:
            self._answers.clear()
            self._awaits = wait
        for helper in self.crew.helpers:
            self.crew.processes.send(helper, ("ask", self.session, payload))
        if not wait:
            return []
        with self._changed:
            self._check()
            while len(self._answers) < len(self.crew.helpers):
                self._changed.wait(0.5)
                self._check()
            found = [self._answers[helper] for helper in self.crew.helpers]
        for answer in found:
            if isinstance(answer, BaseException):
                raise answer
        return found

    def hear(self, helper: int, kind: str, *rest: Any) -> None:
        """A helper's message; called in its receiving thread."""
        with self._changed:
            if kind == "opened":
                self._open.add(helper)
            elif kind == "done":
                key, result = rest
                self._busy[helper] -= 1
                if key in self._taken:
                    self._taken.discard(key)
                    self._results[key] = result
            elif kind == "answer":
                self._answers[helper] = rest[0]
            elif kind == "note":
                self.crew.notes.append(rest[0])
            elif kind == "failed":
                what, *told = rest
                error = self._unpacked(helper, *told)
                if what == "answer" and self._awaits:
                    self._answers[helper] = error
                else:
                    self._error = self._error or error
            self._changed.notify_all()
        self.hand_out()

    def hand_out(self) -> None:
        """Give jobs to helpers that can take one."""
        while True:
            with self._changed:
                helper, job = self._next()
            if job is None:
                return
            try:
                payload = job.pack()
            except Exception as error:  # told to the main thread, whichever this is
                with self._changed:
                    self._error = self._error or error
                    self._changed.notify_all()
                return
            self.crew.processes.send(helper, ("job", self.session, job.key, payload))

    def _next(self) -> tuple[int, Job | None]:
        if self._error is not None or self.crew.lost is not None:
            return 0, None
        for helper in sorted(self._open, key=lambda h: self._busy[h]):
            # A second job waits at the helper only while there are enough for all.
            enough = self._ahead and len(self._waiting) >= self.crew.size
            if self._busy[helper] < (2 if enough else 1) and (job := self._choose(helper)) is not None:
                self._busy[helper] += 1
                return helper, job
        return 0, None

    def _choose(self, rank: int, wanted: Hashable = None) -> Job | None:
        """The next job for `rank`, marked as taken: one whose place it had before, else one that nobody had, else
        any."""
        full = len(self._taken) + len(self._results) >= self._window
        if full and wanted not in self._waiting:
            return None
        ready = [job for job in islice(self._waiting.values(), self._window) if job.ready()]
        if full:
            ready = [job for job in ready if job.key == wanted]
        if not ready:
            return None
        mine = (job for job in ready if rank in self._at.get(job.place, ()))
        fresh = (job for job in ready if not self._at.get(job.place))
        job = next(mine, None) or next(fresh, ready[0])
        del self._waiting[job.key]
        self._taken.add(job.key)
        if job.place is not None:
            self._at.setdefault(job.place, set()).add(rank)
        return job

    def _check(self) -> None:
        while self.crew.notes:
            self._progress.note(self.crew.notes.pop(0))
        self.crew.raise_if_lost()
        if self._error is not None:
            raise self._error

    def _unpacked(self, helper: int, kind: str, message: str, hint: str, code: int) -> BaseException:
        who = self.crew.name(helper)
        if kind == "memory":
            self.crew.notes.append(f"{who}: {message}")  # the engine's own words name the photo
            return torch.OutOfMemoryError(f"{who}: {message}")
        error = DreamSRError(f"{who}: {message}", hint)
        error.exit_code = code
        return error


def facts_here(host: str) -> dict[str, Any]:
    """What must be the same in every process, and where this one runs."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    processor = card or torch.backends.cpu.get_cpu_capability()
    return {"host": host, "torch": torch.__version__, "dreamsr": __version__, "processor": processor}


def packed(error: BaseException) -> tuple[str, str, str, int]:
    """(kind, message, hint, exit code) of what a helper met, for `SharedWork`."""
    if isinstance(error, DeviceError) and isinstance(error.__cause__, torch.OutOfMemoryError):
        error = error.__cause__
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "memory", "out of memory", "", 1
    if isinstance(error, DreamSRError):
        return "told", error.message, error.hint, error.exit_code
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return "told", f"{where}{error.strerror or error}", "check the path and its permissions on that machine", 1
    hint = "this is a bug: run it with DREAMSR_DEBUG=1 in one process and report what it prints"
    return "told", f"unexpected {type(error).__name__}: {error}", hint, 1
