"""One process at a time works in a folder of results: an evaluation's, or a training run's."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from dreamsr_cli.errors import JournalError, OutputError

LOCK_FILE = "lock"


class FolderLock:
    """Holds `out` for this process inside a `with`; makes it. Raises `JournalError` where another process holds it,
    `OutputError` where it can't be written."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __enter__(self) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.out / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OutputError(f"can't write {self.out}: {error.strerror}", "choose another -o") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._file)
            raise JournalError(
                f"another process is working in {self.out}", "wait for it to end, or choose another -o"
            ) from error
        except OSError as error:
            os.close(self._file)
            raise OutputError(f"can't lock {self.out / LOCK_FILE}: {error.strerror}", "choose another -o") from error

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
