"""Whether a folder holds exactly the weights that weights.lock lists, and where such folders lie.

Only safetensors, JSON and text are ever loaded: pickles can run code when opened, so a folder that holds one is
refused.

Maintainers: `python -m dreamsr_cli.weights --lock-builtin` rewrites the rows of the built-in model after it changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dreamsr_cli.errors import WeightsError
from dreamsr_cli.weights_lock import (
    PACKAGE,
    LockEntry,
    LockRow,
    load_lock,
    lock_entry,
    lock_path,
    write_entry,
)

BUILTIN = "mini"
BUILTIN_FOLDER = PACKAGE / "bundles" / BUILTIN
BUILTIN_LICENCE = "Apache-2.0"

PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
UNLISTED_REFUSED = frozenset({".safetensors", ".json"})
"""Files of these kinds change what a library loads even when nobody asks for them by name (shard indexes, configs)."""

_SETTLED_SECONDS = 2.0
"""A file younger than this may change again within one tick of its mtime, so its hash isn't cached."""


# ---------------------------------------------------------------- folders


def refuse_pickles(folder: Path, allowed: Collection[str] = ()) -> None:
    """Raise `WeightsError` if any file below `folder` is a pickle by its name (.bin .pt .pth .ckpt .pkl .pickle) and
    not `allowed` (paths inside the folder)."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PICKLES and path.relative_to(folder).as_posix() not in allowed:
            raise WeightsError(
                f"{path} is a pickle, which can run code when opened",
                "convert it to safetensors, or remove it from the folder",
            )


def verify(folder: Path, entry: LockEntry) -> None:
    """Check that `folder` holds exactly what weights.lock lists under `entry`.

    Every listed file must be there with its size and sha256; a pickle, or an unlisted safetensors or JSON file, is
    refused. Raises `WeightsError` naming the first file that differs.
    """
    fix = how_to_restore(entry)
    if not entry.files:
        raise WeightsError(f"weights.lock lists no file for {entry.name!r}", fix)
    if not folder.is_dir():
        raise WeightsError(f"the folder of {entry.name!r} is missing: {folder}", fix)
    refuse_pickles(folder, {row.path for row in entry.files if row.may_be_pickle})
    listed = {row.path for row in entry.files}
    for path in _files(folder):
        if path.suffix.lower() in UNLISTED_REFUSED and path.relative_to(folder).as_posix() not in listed:
            raise WeightsError(f"{path} is not listed in weights.lock under {entry.name!r}", f"remove it, or {fix}")
    pins = accepted_pins(folder)
    for row in entry.files:
        path = folder / row.path
        if not path.is_file():
            raise WeightsError(f"{path} is missing", fix)
        size = path.stat().st_size
        if row.sure and row.size is not None and size != row.size:
            raise WeightsError(f"{path} has {size} bytes, weights.lock says {row.size}", fix)
        if row.sha256 is None:
            continue
        digest = file_sha256(path)
        if digest in (row.sha256, pins.get(row.path)):
            continue
        if not row.sure:
            doubt = f"the pin is in doubt: weights.lock ({row.status}) says sha256 {row.sha256}, found {digest}"
            raise WeightsError(f"{path}: {doubt}", f"{fix} --accept-doubtful")
        if digest != row.sha256:
            raise WeightsError(f"{path} was altered: sha256 {digest[:12]}…, expected {row.sha256[:12]}…", fix)


def accepted_path(folder: Path) -> Path:
    """Where the hashes lie that a person accepted although weights.lock says something else (unsure rows only)."""
    return folder / ".accepted.json"


def accepted_pins(folder: Path) -> dict[str, str]:
    """Accepted sha256 by path; {} where there are none."""
    try:
        pins = json.loads(accepted_path(folder).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in pins.items()} if isinstance(pins, dict) else {}


def weights_folder(name: str) -> Path:
    """Where the files of the entry `name` lie, there or not: below `DREAMSR_WEIGHTS_DIR`, else in the cache folder."""
    return BUILTIN_FOLDER if name == BUILTIN else weights_base() / name


def weights_base() -> Path:
    """The folder of fetched weights: `DREAMSR_WEIGHTS_DIR`, else "weights" in the cache folder."""
    base = os.environ.get("DREAMSR_WEIGHTS_DIR")
    return Path(base).expanduser() if base else cache_folder() / "weights"


def locate(name: str, instead: str = "") -> Path:
    """The folder with the files of the entry `name`, checked as `verify` does.

    Raises `WeightsError` saying how to fetch them; `instead` is what else the hint may offer.
    """
    entry, folder = lock_entry(name), weights_folder(name)
    if not entry.bundled and not folder.is_dir():
        hint = how_to_restore(entry) + (f", or {instead}" if instead else "")
        raise WeightsError(f"the weights of {name} are not on this machine ({folder})", hint)
    verify(folder, entry)
    return folder


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


def how_to_restore(entry: LockEntry) -> str:
    """What to type when an entry's files are missing or altered."""
    if entry.bundled:
        return "install dreamsr again; after retraining it: python -m dreamsr_cli.weights --lock-builtin"
    return f"dreamsr fetch-weights {entry.name}"


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
    key, stamp = os.path.realpath(path), [state.st_size, state.st_mtime_ns]
    store = cache_folder() / "hashes.json"
    known = _read_hashes(store)
    match known.get(key):
        case [size, mtime, str(digest)] if [size, mtime] == stamp:
            return digest
    digest = _hash(path)
    if time.time() - state.st_mtime > _SETTLED_SECONDS:
        _write_hashes(store, {**known, key: [*stamp, digest]})
    return digest


def forget_hash(path: Path) -> None:
    """Drop what the cache remembers of a file, so that `file_sha256` reads it again."""
    store = cache_folder() / "hashes.json"
    key, known = os.path.realpath(path), _read_hashes(store)
    if key in known:
        _write_hashes(store, {name: value for name, value in known.items() if name != key})


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


_read: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {}
"""What each hash cache held when it was last read, and its inode, size and mtime then: a bundle asks for tens of hashes
at start-up, and the file rarely changes between them."""


def _read_hashes(store: Path) -> dict[str, Any]:
    try:
        state = store.stat()
        stamp = (state.st_ino, state.st_size, state.st_mtime_ns)
        found = _read.get(str(store))
        if found is not None and found[0] == stamp:
            return found[1]
        known = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    _read[str(store)] = (stamp, known)
    return known


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
    """Replace the rows of the built-in model in the weights.lock at `path`; every other line stays as it is.

    `WeightsError` if the file has no such entry.
    """
    known = load_lock(path)
    if BUILTIN not in known:
        raise WeightsError(f"{path} has no [entries.{BUILTIN}] section", "restore weights.lock from the repository")
    write_entry(path, dataclasses.replace(known[BUILTIN], files=rows))


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
    print(f"{lock_path()}: {len(rows)} files, {sum(row.size or 0 for row in rows):,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(_main())
