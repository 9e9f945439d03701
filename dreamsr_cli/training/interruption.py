"""Ctrl-C and SIGTERM during a run: work that must not be cut in two is finished first, and all processes stop at the
same step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruptions:
    """Turns SIGINT and SIGTERM into `KeyboardInterrupt`, at once or, inside `held()`, at its end.

    With `shared` (several processes) a signal only sets `asked`: the loop agrees with the other processes when to stop,
    since one that left in the middle of a step would leave them waiting. Outside the main thread, signals are left
    alone.
    """

    def __init__(self, shared: bool) -> None:
        self.shared = shared
        self.asked = False
        self._held = 0
        self._put_off = False

    @contextmanager
    def caught(self) -> Generator[None]:
        """Inside, signals are handled as described; after it as before."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.getsignal(s) for s in SIGNALS}
        for number, handler in before.items():
            # A process started with SIGINT ignored (nohup, a shell's &) keeps ignoring it.
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    @contextmanager
    def held(self) -> Generator[None]:
        """What happens inside is not interrupted; a signal that comes meanwhile is answered at the end."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self._put_off and not self._held:
            self._put_off = False
            raise KeyboardInterrupt

    def stop_if_asked(self) -> None:
        """Raise `KeyboardInterrupt` if a signal came and this process may stop by itself: Python swallows what a signal
        raises inside a destructor or an import lock."""
        if self.asked and not self.shared:
            raise KeyboardInterrupt

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self.shared:
            return
        if self._held:
            self._put_off = True
            return
        raise KeyboardInterrupt
