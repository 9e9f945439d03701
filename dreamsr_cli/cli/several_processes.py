"""Several processes of one command, started by torchrun or accelerate launch: process 0 is the command, the others help
it and say nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from dreamsr_cli.cli.console import report
from dreamsr_cli.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, DreamSRError, ProcessError
from dreamsr_cli.ranks import Place, again, this_place

if TYPE_CHECKING:
    from dreamsr_cli.helping import Helper
    from dreamsr_cli.work_sharing import Crew

SHARED = ("upscale", "caption")
"""Commands whose work is shared out. `train` has its own way; the others run in process 0 alone."""
ALONE = ("--help", "--version", "--dry-run")
"""Words that leave nothing to share."""
NOTICE_SECONDS = 1.0
"""How long after a signal to look for a process that died: launchers then signal all others."""


def is_shared(arguments: list[str]) -> bool:
    """Whether the processes of `dreamsr ARGUMENTS` work together here."""
    return _command(arguments) in SHARED and not set(ALONE) & set(arguments)


def _command(arguments: list[str]) -> str:
    return next((word for word in arguments if not word.startswith("-")), "")


def role(arguments: list[str], place: Place) -> str:
    """What this process is in `dreamsr ARGUMENTS`: "command" (it runs it), "helper", or "nobody" (it ends at once)."""
    if place.rank == 0 or _command(arguments) == "train":
        return "command"
    return "helper" if is_shared(arguments) else "nobody"


@contextmanager
def joined() -> Generator[Crew | None]:
    """Inside, the other processes help; None where this process is the only one. Raises `ProcessError` where one of
    them is lost."""
    place = this_place()
    if place.world == 1:
        yield None
        return
    from dreamsr_cli.processes import Processes
    from dreamsr_cli.work_sharing import Crew

    crew = Crew(Processes(place))
    try:
        yield crew
    except KeyboardInterrupt:
        with crew.changed:
            crew.changed.wait_for(lambda: crew.lost is not None, NOTICE_SECONDS)
        crew.raise_if_lost()
        raise
    finally:
        crew.leave()


def help_out(place: Place, arguments: list[str]) -> NoReturn:
    """Be a helper of process 0 in `dreamsr ARGUMENTS` until it ends the job; ends this process."""
    screen = _hush()
    try:
        from dreamsr_cli.helping import Helper
        from dreamsr_cli.processes import Processes

        processes = Processes(place)

        def orphaned(reason: str) -> None:
            if place.rank == 1:  # one of them speaks
                os.dup2(screen, 2)
                report(ProcessError(f"process 0 of {place.world} {reason}; what is finished is kept", again()))

        helper = Helper(processes, orphaned, _import_networks if _command(arguments) == "upscale" else lambda: None)
        _leave_signals_to_process_0(helper)
        helper.serve()
    except KeyboardInterrupt:
        os._exit(EXIT_INTERRUPTED)
    except DreamSRError:
        os._exit(EXIT_FAILED)  # process 0 meets the same and tells it
    os._exit(EXIT_DONE)


def _import_networks() -> None:
    """The libraries of the networks take seconds: process 0 would wait for them when it has the first tiles ready."""
    import dreamsr_cli.phase_sharing  # noqa: F401


def end(code: int) -> NoReturn:
    """End a process that has joined others: their connections' threads must not be waited for."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _leave_signals_to_process_0(helper: Helper) -> None:
    def ask(signum: int, frame: FrameType | None) -> None:
        if helper.leaving:
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)


def _hush() -> int:
    """Send this process' output nowhere (unless DREAMSR_DEBUG is set); the descriptor of what was the screen."""
    screen = os.dup(2)
    if os.environ.get("DREAMSR_DEBUG", "") in ("", "0"):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    return screen
