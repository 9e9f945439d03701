"""What commands over many photos share: one bad photo stops no other, results and errors are told and counted."""

from __future__ import annotations

import json
import os
import sys
from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from dreamsr_cli.cli.console import Display, report
from dreamsr_cli.cli.photos import Found, Job
from dreamsr_cli.cli.several_processes import joined
from dreamsr_cli.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_SOME_FAILED, DreamSRError

if TYPE_CHECKING:
    from dreamsr_cli.work_sharing import Crew


class PhotoBatch(ABC):
    """One run of a command: photos done, failed and in all, and the exit code that follows from them."""

    crew: Crew | None = None
    """The other processes, where there are any."""

    def __init__(self, out: str | None, as_json: bool, display: Display) -> None:
        self.as_json, self.display = as_json, display
        self.out = os.path.expanduser(out) if out else None
        self.done = self.failed = self.total = 0

    def run(self) -> int:
        """Do everything; the exit code. Raises `DreamSRError` only for what concerns every photo."""
        try:
            with nullcontext() if self._writes_nothing() else joined() as self.crew:
                self._run()
        except KeyboardInterrupt:
            print(f"interrupted: {self.done} of {self.total} photos done; {self._how_to_go_on()}", file=sys.stderr)
            return EXIT_INTERRUPTED
        if not self.failed:
            return EXIT_DONE
        if self.total > 1:
            self.display.note(f"{self.done} of {self.total} photos done, {self.failed} failed")
        return EXIT_SOME_FAILED if self.done else EXIT_FAILED

    @abstractmethod
    def _run(self) -> None:
        """Find the photos, set `total`, and hand each outcome to `_tell`."""

    def _writes_nothing(self) -> bool:
        """Whether there is no work to share."""
        return False

    def _how_to_go_on(self) -> str:
        return "the same command goes on"

    def _text(self, outcome: dict[str, Any]) -> str:
        """One result for people."""
        return outcome["output"]

    def _tell(self, entry: Job | Found, outcome: dict[str, Any] | DreamSRError | None) -> None:
        """Result on stdout, or error on stderr (and, with --json, on stdout as well); counts it."""
        if isinstance(outcome, dict):
            self.done += 1
            print(json.dumps(outcome) if self.as_json else self._text(outcome), flush=True)
        elif outcome is not None:
            self.failed += 1
            report(outcome)
            if self.as_json:
                failure = {"input": str(entry.source), "error": outcome.message, "hint": outcome.hint}
                print(json.dumps({**failure, "exit_code": outcome.exit_code}), flush=True)
