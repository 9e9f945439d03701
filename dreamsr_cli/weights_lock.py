"""weights.lock: which weights may be loaded.

TOML: `format = 1` and one `[entries.NAME]` per source, with one row (path, size, sha256, licence, status) per file. It
lies at the top of a checkout and inside an installed package. A row says how sure its figures are; where nobody has
published one, it stands there as "not found".
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from dreamsr_cli.errors import ConfigError, WeightsError
from dreamsr_cli.plain_data import from_dict

PACKAGE = Path(__file__).resolve().parent
NOT_FOUND = "not found"
"""Stands in the file for a size or sha256 that is not known."""
STATUSES = ("two sources", "one source", "derived", "assumed")
"""How sure a row is: independent sources that agree, one, worked out, or expected to be so."""
IN_DOUBT = ("derived", "assumed")
"""A mismatch in such a row speaks against the row before it speaks against the file."""


@dataclass(frozen=True)
class LockRow:
    """One file of an entry."""

    path: str
    """Path inside the folder, with forward slashes."""
    size: int | None
    """Bytes; None: not known."""
    sha256: str | None
    """64 hexadecimal digits; None: not known."""
    licence: str
    """SPDX id."""
    status: str = STATUSES[0]
    """One of `STATUSES`."""
    url: str | None = None
    """Where the file lies, if it isn't in the entry's repository on the hub."""

    @property
    def sure(self) -> bool:
        """A mismatch speaks against the file, not against the row."""
        return self.status not in IN_DOUBT

    @property
    def may_be_pickle(self) -> bool:
        """Metric and loss weights that exist only as a pickle or an archive of arrays are allowed by their hash;
        whoever opens them asks for tensors only."""
        return self.sure and self.sha256 is not None


@dataclass(frozen=True)
class LockEntry:
    """One source of weights."""

    name: str
    """Name in weights.lock."""
    files: tuple[LockRow, ...]
    """Every file, sorted by path."""
    bundled: bool = False
    """The files are inside this package."""
    repository: str | None = None
    """Where the files are fetched from, if they aren't bundled."""
    revision: str | None = None
    """Commit of the repository."""
    licence: str | None = None
    """SPDX id of the whole, or the licence's name."""
    gated: bool = False
    """Fetching needs an account that has accepted the licence."""
    note: str = ""
    """What a person should know before fetching."""


@dataclass(frozen=True)
class _LockFile:
    format: int
    entries: dict[str, dict]


def lock_path() -> Path:
    """`DREAMSR_LOCK`, else weights.lock inside an installed package, else at the top of the checkout.

    `WeightsError` if there is none.
    """
    if own := os.environ.get("DREAMSR_LOCK"):
        return Path(own)
    for path in (PACKAGE / "weights.lock", PACKAGE.parent / "weights.lock"):
        if path.is_file():
            return path
    raise WeightsError(
        f"weights.lock is missing beside {PACKAGE}", "install dreamsr again: pip install --force dreamsr"
    )


def load_lock(path: Path | None = None) -> dict[str, LockEntry]:
    """Entries of weights.lock by name. `WeightsError` names what is wrong with the file."""
    path = path or lock_path()
    try:
        data = from_dict(_LockFile, tomllib.loads(path.read_text(encoding="utf-8")), str(path))
        if data.format != 1:
            raise WeightsError(f"{path}: format {data.format} is not known", "update dreamsr")
        return {name: _entry(name, table, path) for name, table in data.entries.items()}
    except OSError as error:
        raise WeightsError(f"can't read {path}: {error.strerror or error}", "check the file's permissions") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: not valid TOML: {error}", "restore weights.lock from the repository") from error
    except ConfigError as error:
        raise WeightsError(error.message, error.hint) from error


def lock_entry(name: str, path: Path | None = None) -> LockEntry:
    """The entry `name` of weights.lock; `WeightsError` lists the known ones."""
    path = path or lock_path()
    try:
        state = path.stat()
    except OSError as error:
        raise WeightsError(f"can't read {path}: {error.strerror or error}", "check the file's permissions") from error
    entries = _read_once(path, (state.st_ino, state.st_size, state.st_mtime_ns))
    if name not in entries:
        raise WeightsError(f"weights.lock has no entry {name!r}", f"known entries: {', '.join(sorted(entries))}")
    return entries[name]


@lru_cache(maxsize=8)
def _read_once(path: Path, stamp: tuple[int, int, int]) -> dict[str, LockEntry]:
    """A bundle asks for an entry once per part; the file is parsed again when its stamp has changed."""
    return load_lock(path)


def _entry(name: str, table: dict[str, Any], path: Path) -> LockEntry:
    entry = from_dict(LockEntry, {**table, "name": name, "files": _known(table.get("files"))}, f"{path}: {name}")
    restore = "restore weights.lock from the repository"
    if PurePosixPath(name).name != name:
        raise WeightsError(f"{path}: {name!r} can't name a folder", restore)
    for row in entry.files:
        pure = PurePosixPath(row.path)
        if pure.is_absolute() or ".." in pure.parts or "\\" in row.path or str(pure) != row.path or row.path == ".":
            raise WeightsError(f"{path}: {name}: {row.path!r} leaves its folder", "use plain relative paths")
        good_hash = row.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", row.sha256)
        if not good_hash or (row.size is not None and row.size < 0):
            raise WeightsError(f"{path}: {name}: {row.path}: bad size or sha256", restore)
        if row.status not in STATUSES:
            raise WeightsError(f"{path}: {name}: {row.path}: status {row.status!r}", f"use {', '.join(STATUSES)}")
    if len({row.path for row in entry.files}) != len(entry.files):
        raise WeightsError(f"{path}: {name}: a path is listed twice", restore)
    for row in entry.files:
        if row.url is not None and not (
            row.url.startswith(("https://", "http://127.0.0.1:")) and row.sha256 and row.sure
        ):
            raise WeightsError(f"{path}: {name}: {row.path}: a url needs https and a sure sha256", restore)
        if row.url is None and not entry.bundled and not (entry.repository and entry.revision):
            raise WeightsError(f"{path}: {name}: no repository and revision", restore)
    return entry


def _known(files: Any) -> Any:
    """Rows with None for what is written as `NOT_FOUND` (TOML has no null)."""
    if not isinstance(files, list):
        return files
    figures = ("size", "sha256")
    return [
        {key: None if key in figures and value == NOT_FOUND else value for key, value in row.items()}
        if isinstance(row, dict)
        else row
        for row in files
    ]


def toml_row(row: LockRow) -> str:
    """The row as a line of weights.lock."""
    size = json.dumps(NOT_FOUND) if row.size is None else row.size
    fields = [
        f"path = {json.dumps(row.path)}",
        f"size = {size}",
        f"sha256 = {json.dumps(row.sha256 or NOT_FOUND)}",
        f"licence = {json.dumps(row.licence)}",
    ]
    if row.status != STATUSES[0]:
        fields.append(f"status = {json.dumps(row.status)}")
    if row.url is not None:
        fields.append(f"url = {json.dumps(row.url)}")
    return f"  {{ {', '.join(fields)} }},"


def write_entry(path: Path, entry: LockEntry) -> None:
    """Replace the entry's section in the weights.lock at `path`, or append it; every other line stays as it is."""
    plain = {key: getattr(entry, key) for key in ("bundled", "repository", "revision", "licence", "gated", "note")}
    heading = f"[entries.{entry.name if re.fullmatch('[A-Za-z0-9_-]+', entry.name) else json.dumps(entry.name)}]"
    fields = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in plain.items() if value]
    section = "\n".join([heading, *fields, "files = [", *map(toml_row, entry.files), "]"])
    text = path.read_text(encoding="utf-8")
    changed, count = re.subn(
        rf"^{re.escape(heading)}\n.*?^\]$", lambda _: section, text, count=1, flags=re.MULTILINE | re.DOTALL
    )
    if not count:
        changed = text.rstrip("\n") + "\n\n" + section + "\n"
    part = path.with_name(path.name + ".part")
    part.write_text(changed, encoding="utf-8")
    os.replace(part, path)
