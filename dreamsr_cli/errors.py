"""Errors a user may meet: what happened, what to type next, and the exit code of the process.

Exit codes (docs/architecture.md): 0 done, 1 failed, 2 usage, 3 some inputs failed, 130 interrupted.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_SOME_FAILED = 3
EXIT_INTERRUPTED = 130


class DreamSRError(Exception):
    """Something went wrong that a person can act on.

    `message` is one line that says what happened, `hint` one line that says what to type or do next.
    Both are shown as they are, without a traceback.
    """

    exit_code: int = EXIT_FAILED

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = " ".join(message.split())
        self.hint = " ".join(hint.split())

    def __str__(self) -> str:
        return f"{self.message} — {self.hint}"


class UsageError(DreamSRError):
    """A flag or a combination of flags makes no sense; nothing was started."""

    exit_code = EXIT_USAGE


class ConfigError(UsageError):
    """A TOML or bundle.json has an unknown key, a wrong type or a value out of range."""


class InputError(DreamSRError):
    """A photo can't be read: missing, truncated, mislabelled, empty or not an image."""


class OutputError(DreamSRError):
    """A result can't be written: it exists already, its folder can't be written, or the format can't hold it."""


class WeightsError(DreamSRError):
    """Weights are missing, altered, of another kind than expected, or refused (pickles)."""


class DeviceError(DreamSRError):
    """The asked-for device or precision isn't there, or its memory doesn't suffice."""


class TrainingError(DreamSRError):
    """A training run can't start or go on: no data, a run folder of other settings, a loss that is not finite."""


class JournalError(DreamSRError):
    """A job's journal is in use by another process, or belongs to a job with other settings."""


class ProcessError(DreamSRError):
    """One of several processes died or can't be reached: the job ends, and its journal stays."""
