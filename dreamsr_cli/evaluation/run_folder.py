"""The folder of an evaluation: whose it is, that one process works in it, and rows that a kill can't spoil."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreamsr_cli.errors import JournalError, OutputError
from dreamsr_cli.evaluation.datasets import Dataset
from dreamsr_cli.evaluation.methods import Method, write_text
from dreamsr_cli.evaluation.rows import RESULTS, Scored, jsonl

RUN_FILE = "run.json"


def claim(out: Path, dataset: Dataset, methods: Sequence[Method], restart: bool) -> None:
    """Check that OUT holds nothing of another job, and say whose it is from now on."""
    path = out / RUN_FILE
    mine: dict[str, Any] = {
        "dataset": dataset.name,
        "folder": str(dataset.folder.resolve()),
        "methods": {method.name: dict(method.fingerprint) for method in methods},
    }
    mine = json.loads(json.dumps(mine))
    there = _read_run(path)
    if there is not None and not restart:
        for key in ("dataset", "folder"):
            if there.get(key) != mine[key]:
                raise JournalError(
                    f"{out} holds an evaluation of {there.get(key)}, this one is of {mine[key]}",
                    "choose another -o, or add --restart to drop it",
                )
        for name, wanted in mine["methods"].items():
            if (before := there.get("methods", {}).get(name)) not in (None, wanted):
                differing = [key for key in wanted if before.get(key) != wanted[key]]
                key = differing[0] if differing else "settings"
                raise JournalError(
                    f"{out} holds results of {name} with another {key} ({before.get(key)}, now {wanted.get(key)})",
                    "choose another -o, or add --restart to make them again",
                )
        mine["methods"] = {**there.get("methods", {}), **mine["methods"]}
    elif restart:
        _drop(out, methods)
    replace_file(path, json.dumps(mine, indent=1) + "\n")


def _read_run(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise JournalError(
            f"{path} can't be read: {error}", "choose another -o, or add --restart to begin anew"
        ) from error
    return data if isinstance(data, dict) else {}


def _drop(out: Path, methods: Sequence[Method]) -> None:
    """Forget rows and records of this job's methods: their results are made again."""
    (out / RESULTS).unlink(missing_ok=True)
    for method in methods:
        for record in (out / "sr" / method.name).glob("*.json"):
            record.unlink()


def replace_file(path: Path, text: str) -> None:
    """Replace the file at `path` by `text` at once; `OutputError` if that fails."""
    try:
        write_text(path, text)
    except OSError as error:
        raise OutputError(f"can't write {path}: {error.strerror}", "check the disk's space and permissions") from error


class RowAppender:
    """Adds lines to results.jsonl, each in one write; first ends a line that a kill tore."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> RowAppender:
        self._file = self._path.open("ab")
        if self._file.tell():
            with self._path.open("rb") as reader:
                reader.seek(-1, os.SEEK_END)
                if reader.read() != b"\n":
                    self._file.write(b"\n")
                    self._file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, scored: Scored) -> None:
        self._file.write(jsonl([scored]).encode())
        self._file.flush()
