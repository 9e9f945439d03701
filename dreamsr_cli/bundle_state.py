"""Which weights a bundle still lacks on this machine, and the command that brings them. Files are looked at by name and
size; nothing is hashed."""

from __future__ import annotations

from dataclasses import dataclass

from dreamsr_cli.config import BundleConfig
from dreamsr_cli.errors import WeightsError
from dreamsr_cli.hub import part_of
from dreamsr_cli.weights import weights_folder
from dreamsr_cli.weights_lock import LockEntry, lock_entry

TRAINED_HINT = "train them (dreamsr train --config flux) and pass --weights RUN"
UNPUBLISHED_HINT = f"{TRAINED_HINT}, or use --model flux-upscaler"


@dataclass(frozen=True)
class Lack:
    """Weights of one entry of weights.lock that aren't here."""

    lock: str
    """The entry's name."""
    parts: tuple[str, ...]
    """Parts of the bundle that need it."""
    files: int
    """Files that are missing or have another size; 0: nobody has published them."""
    bytes: int
    """Of the missing files, as far as sizes are known."""
    hint: str
    """What to type."""

    @property
    def what(self) -> str:
        """What is missing, in words."""
        if not self.files:
            return f"{', '.join(self.parts)}: not published by anybody"
        size = f" ({self.bytes / 1e9:.2f} GB)" if self.bytes > 10**7 else ""
        return f"{self.lock}: {self.files} files{size} are not on this machine"

    def __str__(self) -> str:
        return f"{self.what}; {self.hint}"


def lacking(config: BundleConfig) -> list[Lack]:
    """What this bundle can't be opened without, in the order of its parts."""
    parts: dict[str, list[str]] = {}
    for name, part in config.parts.items():
        if part.lock is not None:
            parts.setdefault(part.lock, []).append(name)
    return [lack for lock, names in parts.items() if (lack := _lack(lock_entry(lock), tuple(names))) is not None]


def refuse_lacking(config: BundleConfig) -> None:
    """Raise `WeightsError`, with one command for everything, if the bundle lacks weights."""
    lacks = lacking(config)
    if not lacks:
        return
    entries = [lack.lock for lack in lacks if lack.files]
    hints = [f"dreamsr fetch-weights {' '.join(entries)}"] if entries else []
    if len(entries) < len(lacks):
        hints.append(UNPUBLISHED_HINT)
    told = "; ".join(lack.what for lack in lacks)
    raise WeightsError(f"model {config.name} lacks weights: {told}", "; ".join(hints) + "; or use --model mini")


def entry_lack(name: str) -> Lack | None:
    """What an entry of weights.lock lacks, on its own."""
    return _lack(lock_entry(name), ())


def _lack(entry: LockEntry, parts: tuple[str, ...]) -> Lack | None:
    if entry.repository is None and not entry.bundled:
        return Lack(entry.name, parts, 0, 0, UNPUBLISHED_HINT)
    folder = weights_folder(entry.name)
    missing = []
    for row in entry.files:
        path = folder / row.path
        wrong_size = path.is_file() and row.sure and row.size not in (None, path.stat().st_size)
        if not path.is_file() or wrong_size:
            part = part_of(path)
            missing.append((row.size or 0) - (part.stat().st_size if part.is_file() else 0))
    if not missing:
        return None
    return Lack(entry.name, parts, len(missing), max(0, sum(missing)), f"dreamsr fetch-weights {entry.name}")
