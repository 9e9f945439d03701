"""Finished captions on disk, so that a killed captioning goes on: JSON Lines, a header and then one line per answer.

The unit is the batch: what was asked together is answered together again, so the texts are those of a whole run.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from dreamsr_cli.errors import JournalError, OutputError


class CaptionJournal:
    """Answers by key ("photo", "tiles 8"), kept in a file as they come. A context manager; the file stays.

    A file with another header, or none, is begun anew; lines from the first torn or strange one on are forgotten.
    """

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        """`path` None keeps nothing. `header` is what decides the texts. Raises `JournalError` if another process has
        the file, `OutputError` if it can't be written."""
        self._answers: dict[str, list[str]] = {}
        self._path = path
        self._file: IO[bytes] | None = None
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
                self._begin(self._file, json.loads(json.dumps(header)))
            except OSError as error:
                self.close()
                reason = f"can't write {path}: {error.strerror or error}"
                raise OutputError(reason, "choose another -o, or check the permissions and free disk space") from error
            except BaseException:
                self.close()
                raise

    def _begin(self, file: IO[bytes], header: dict[str, Any]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            reason = f"another process is writing {self._path}"
            raise JournalError(reason, "wait until it is done, or stop it") from error
        kept = 0
        for number, line in enumerate(file):
            entry = _parse(line)
            if entry is None or (number == 0 and entry != {"header": header}):
                break
            if number:
                if not _is_answer(entry):
                    break
                self._answers[entry["key"]] = entry["texts"]
            kept += len(line)
        file.truncate(kept)
        file.seek(kept)
        if not kept:
            self._write({"header": header})

    @property
    def resumed(self) -> bool:
        """Whether an earlier run left answers."""
        return bool(self._answers)

    def get(self, key: str, count: int) -> list[str] | None:
        """The `count` texts kept under `key`, None if they aren't there."""
        found = self._answers.get(key)
        return found if found is not None and len(found) == count else None

    def put(self, key: str, texts: list[str]) -> None:
        """Keep the texts of `key`. Raises `OutputError` if the file can't be written."""
        self._answers[key] = texts
        try:
            self._write({"key": key, "texts": texts})
        except OSError as error:
            reason = f"can't write {self._path}: {error.strerror or error}"
            raise OutputError(reason, "free some disk space; the same command goes on") from error

    def _write(self, entry: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file, which ends the lock."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what could not be flushed was told by `put`
                self._file.close()
            self._file = None

    def __enter__(self) -> CaptionJournal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _is_answer(entry: dict[str, Any]) -> bool:
    match entry:
        case {"key": str(), "texts": [*texts]}:
            return all(isinstance(text, str) for text in texts)
    return False
