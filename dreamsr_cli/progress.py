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
