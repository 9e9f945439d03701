"""How long work reports itself: a small protocol, so that nothing below `cli/` prints."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """What an engine says while it works. Implementations must be cheap: `advance` is called per batch of tiles."""

    def phase(self, name: str, total: int) -> None:
        """A phase named `name` begins; it will advance `total` units (tiles, strips, steps)."""
        ...

    def at(self, place: str) -> None:
        """Where inside the present phase the work is ("step 3 of 16"); ends with the phase."""
        ...

    def advance(self, count: int = 1) -> None:
        """`count` units of the present phase are done."""
        ...

    def note(self, text: str) -> None:
        """One line a person should read (a warning, a decision made), shown once."""
        ...


class SilentProgress:
    """Says nothing; the default of the library and of `--quiet`."""

    def phase(self, name: str, total: int) -> None:
        pass

    def at(self, place: str) -> None:
        pass

    def advance(self, count: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class NotedProgress(SilentProgress):
    """Keeps the notes of work in the background until its turn to be told comes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def tell(self, progress: Progress) -> None:
        """Hand the notes on, once."""
        while self.notes:
            progress.note(self.notes.pop(0))
