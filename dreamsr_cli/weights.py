"""weights.lock: which weights may be loaded, and whether a folder holds exactly them.

weights.lock is TOML: `format = 1` and one `[entries.NAME]` per source, with one row (path, size, sha256, licence) per
file. It lies at the top of a checkout and inside an installed package. Only safetensors, JSON and text are ever loaded:
pickles can run code when opened, so a folder that holds one is refused.

Maintainers: `python -m dreamsr_cli.weights --lock-builtin` rewrites the rows of the built-in model after it changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dreamsr_cli.config import from_dict
from dreamsr_cli.errors import ConfigError, WeightsError

PACKAGE = Path(__file__).resolve().parent
BUILTIN = "mini"
BUILTIN_FOLDER = PACKAGE / "bundles" / BUILTIN
BUILTIN_LICENCE = "Apache-2.0"

PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
UNLISTED_REFUSED = frozenset({".safetensors", ".json"})
"""Files of these kinds change what a library loads even when nobody asks for them by name (shard indexes, configs)."""

_SETTLED_SECONDS = 2.0
"""A file younger than this may change again within one tick of its mtime, so its hash isn't cached."""


@dataclass(frozen=True)
class LockRow:
    """One file of an entry."""

    path: str
    """Path inside the folder, with forward slashes."""
    size: int
    """Bytes."""
    sha256: str
    """64 hexadecimal digits."""
    licence: str
    """SPDX id."""


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


@dataclass(frozen=True)
class _LockFile:
    format: int
    entries: dict[str, dict]


# ---------------------------------------------------------------- weights.lock


def lock_path() -> Path:
    """weights.lock inside an installed package, else at the top of the checkout; `WeightsError` if there is neither."""
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
    entries = load_lock(path)
    if name not in entries:
        raise WeightsError(f"weights.lock has no entry {name!r}", f"known entries: {', '.join(sorted(entries))}")
    return entries[name]


def _entry(name: str, table: dict[str, Any], path: Path) -> LockEntry:
    entry = from_dict(LockEntry, {**table, "name": name}, f"{path}: {name}")
    for row in entry.files:
        pure = PurePosixPath(row.path)
        if pure.is_absolute() or ".." in pure.parts or "\\" in row.path or str(pure) != row.path or row.path == ".":
            raise WeightsError(f"{path}: {name}: {row.path!r} leaves its folder", "use plain relative paths")
        if not re.fullmatch(r"[0-9a-f]{64}", row.sha256) or row.size < 0:
            raise WeightsError(f"{path}: {name}: {row.path}: bad size or sha256", "restore weights.lock")
    if len({row.path for row in entry.files}) != len(entry.files):
        raise WeightsError(f"{path}: {name}: a path is listed twice", "restore weights.lock from the repository")
    return entry


# ---------------------------------------------------------------- folders


def refuse_pickles(folder: Path) -> None:
    """Raise `WeightsError` if any file below `folder` is a pickle by its name (.bin .pt .pth .ckpt .pkl .pickle)."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PICKLES:
            raise WeightsError(
                f"{path} is a pickle, which can run code when opened",
                "convert it to safetensors, or remove it from the folder",
            )


def verify(folder: Path, entry: LockEntry) -> None:
    """Check that `folder` holds exactly what weights.lock lists under `entry`.

    Every listed file must be there with its size and sha256; a pickle, or an unlisted safetensors or JSON file, is
    refused. Raises `WeightsError` naming the first file that differs.
    """
    fix = _how_to_restore(entry)
    if not entry.files:
        raise WeightsError(f"weights.lock lists no file for {entry.name!r}", fix)
    if not folder.is_dir():
        raise WeightsError(f"the folder of {entry.name!r} is missing: {folder}", fix)
    refuse_pickles(folder)
    listed = {row.path for row in entry.files}
    for path in _files(folder):
        if path.suffix.lower() in UNLISTED_REFUSED and path.relative_to(folder).as_posix() not in listed:
            raise WeightsError(f"{path} is not listed in weights.lock under {entry.name!r}", f"remove it, or {fix}")
    for row in entry.files:
        path = folder / row.path
        if not path.is_file():
            raise WeightsError(f"{path} is missing", fix)
        size = path.stat().st_size
        if size != row.size:
            raise WeightsError(f"{path} has {size} bytes, weights.lock says {row.size}", fix)
        digest = file_sha256(path)
        if digest != row.sha256:
            raise WeightsError(f"{path} was altered: sha256 {digest[:12]}…, expected {row.sha256[:12]}…", fix)


def lock_rows(folder: Path, licence: str = BUILTIN_LICENCE) -> tuple[LockRow, ...]:
    """Rows for every file below `folder`, sorted by path; hidden files and Markdown (the model card) are left out.

    Raises `WeightsError` if the folder is missing or empty, or holds a pickle.
    """
    if not folder.is_dir():
        raise WeightsError(f"there is no folder {folder}", "name a folder that holds a bundle")
    refuse_pickles(folder)
    rows = []
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        rows.append(LockRow(path=name, size=path.stat().st_size, sha256=_hash(path), licence=licence))
    if not rows:
        raise WeightsError(f"{folder} holds no weights", "put the bundle's files there first")
    return tuple(sorted(rows, key=lambda row: row.path))


def _files(folder: Path) -> list[Path]:
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
        if path.is_file() and not hidden and path.suffix.lower() not in (".md", ".py"):
            found.append(path)
    return found


def _how_to_restore(entry: LockEntry) -> str:
    if entry.bundled:
        return "install dreamsr again; after retraining it: python -m dreamsr_cli.weights --lock-builtin"
    return f"fetch {entry.repository} again, at revision {entry.revision}"


# ---------------------------------------------------------------- hashes


def cache_folder() -> Path:
    """Where dreamsr keeps what it can make again: `DREAMSR_CACHE`, else `XDG_CACHE_HOME/dreamsr`, else ~/.cache."""
    if own := os.environ.get("DREAMSR_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dreamsr"


def file_sha256(path: Path) -> str:
    """sha256 of a file as 64 hex digits, remembered by (path, size, mtime) in the cache folder."""
    state = path.stat()
    key, stamp = str(path.resolve()), [state.st_size, state.st_mtime_ns]
    store = cache_folder() / "hashes.json"
    known = _read_hashes(store)
    match known.get(key):
        case [size, mtime, str(digest)] if [size, mtime] == stamp:
            return digest
    digest = _hash(path)
    if time.time() - state.st_mtime > _SETTLED_SECONDS:
        _write_hashes(store, {**known, key: [*stamp, digest]})
    return digest


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_hashes(store: Path) -> dict[str, Any]:
    try:
        known = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_hashes(store: Path, known: dict[str, Any]) -> None:
    # A cache that can't be written costs a second of hashing, nothing else.
    with contextlib.suppress(OSError):
        store.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=store.parent, prefix="hashes-")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(known, stream)
        os.replace(name, store)


# ---------------------------------------------------------------- maintainers


def write_builtin(path: Path, rows: tuple[LockRow, ...]) -> None:
    """Replace the rows of the built-in model in the weights.lock at `path`; every other line stays as it is."""
    text = path.read_text(encoding="utf-8")
    section = "\n".join([f"[entries.{BUILTIN}]", "bundled = true", "files = [", *map(_toml_row, rows), "]"])
    pattern = rf"^\[entries\.{BUILTIN}\]\n.*?^\]$"
    changed, count = re.subn(pattern, lambda _: section, text, count=1, flags=re.MULTILINE | re.DOTALL)
    if count != 1:
        raise WeightsError(f"{path} has no [entries.{BUILTIN}] section", "restore weights.lock from the repository")
    part = path.with_name(path.name + ".part")
    part.write_text(changed, encoding="utf-8")
    os.replace(part, path)


def _toml_row(row: LockRow) -> str:
    fields = f'path = {json.dumps(row.path)}, size = {row.size}, sha256 = "{row.sha256}"'
    return f"  {{ {fields}, licence = {json.dumps(row.licence)} }},"


def _main() -> int:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m dreamsr_cli.weights", description="Maintain weights.lock.")
    parser.add_argument("--lock-builtin", action="store_true", required=True, help="rewrite the built-in model's rows")
    parser.parse_args()
    try:
        rows = lock_rows(BUILTIN_FOLDER)
        write_builtin(lock_path(), rows)
    except WeightsError as error:
        print(f"error: {error.message}\n  try: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(f"{lock_path()}: {len(rows)} files, {sum(row.size for row in rows):,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(_main())
