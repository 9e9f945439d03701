"""A run folder: `run.json` (settings, provenance), `log.jsonl`, `checkpoint-N/` (safetensors), `bundle/` (the result),
`lock` (held while a process trains here).

A checkpoint is written beside the last one and becomes the last by one atomic rename of `latest`; a kill at any
instant, or a full disk, leaves a run that resumes. No generator state is kept: every draw is a function of (seed, step,
index).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreamsr_cli.errors import OutputError, TrainingError

LATEST = "latest"
RUN_FILE = "run.json"
LOG_FILE = "log.jsonl"
DEFAULT_KEEP = 2


def check_run(
    folder: Path,
    settings: dict[str, Any],
    resume: bool,
    normal: Callable[[dict[str, Any]], dict[str, Any]] = lambda settings: settings,
) -> None:
    """See that `folder` is free for a new run, or holds one of the same settings to go on with. Raises `TrainingError`
    otherwise.

    `settings` decide a run's result. `normal` brings those of an older run.json into today's form.
    """
    if (folder / RUN_FILE).is_file():
        if not resume:
            raise TrainingError(f"{folder} holds a run already", "add --resume to go on, or give another -o")
        before = normal(read_run(folder))
        # Both as JSON has them: lists for tuples.
        before, now = (json.loads(json.dumps(s)) for s in (before, settings))
        changed = sorted(k for k in now if before.get(k) != now[k])
        if changed:
            raise TrainingError(
                f"{folder} was started with other settings ({', '.join(changed)})",
                "resume with the same ones, or warm-start a new run with --init-from " + str(folder / "bundle"),
            )
    elif resume:
        raise TrainingError(f"{folder} holds no run to resume", "leave out --resume to start one, or correct -o")


def start_run(folder: Path, settings: dict[str, Any], facts: dict[str, Any] | None = None) -> None:
    """Create the run folder with its run.json, unless it is there. `facts` are written beside the settings and not
    compared. Raises `OutputError`."""
    path = folder / RUN_FILE
    if path.is_file():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_text(path, json.dumps({**settings, **(facts or {})}, indent=1) + "\n")
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror or error}", "give another folder with -o") from error


def read_run(folder: Path) -> dict[str, Any]:
    """run.json of a run folder. Raises `TrainingError` where there is none, or it can't be read."""
    path = folder / RUN_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: not readable: {error}", "give the folder of a dreamsr train run") from error
    if not isinstance(found, dict):
        raise TrainingError(f"{path}: not a run's settings", "give the folder of a dreamsr train run")
    return found


def note_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Lay `facts` over run.json."""
    _write_text(folder / RUN_FILE, json.dumps({**read_run(folder), **facts}, indent=1) + "\n")


def save(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int = DEFAULT_KEEP
) -> None:
    """Write `checkpoint-step/` with one safetensors file per entry of `tensors`, make it the latest, and drop all but
    the `keep` newest. Does nothing if it is the latest already: a step has one state.

    Raises `OutputError` where it can't be written (a full disk): the one before is then still the latest, and whole.
    """
    target = folder / f"checkpoint-{step}"
    if target.is_dir() and _latest(folder) == target:
        return
    part = folder / f".checkpoint-{step}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for name, group in tensors.items():
            path = part / f"{name}.safetensors"
            save_file({k: v.detach().contiguous().cpu() for k, v in group.items()}, path)
            _flush(path)
        _write_text(part / "state.json", json.dumps({**state, "step": step}) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(part, target)
        _flush(folder)
        _write_text(folder / LATEST, target.name + "\n")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OutputError(
            f"checkpoint of step {step}: {error}; last good: {describe_latest(folder)}",
            "make room, then the same command with --resume",
        ) from error
    prune(folder, keep)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints, and leftovers; the latest always stays."""
    latest = _latest(folder)
    known = sorted((p for p in folder.glob("checkpoint-*") if step_of(p) is not None), key=lambda p: step_of(p) or 0)
    # After a resume from an older one, newer ones are of a past that didn't happen.
    stale = [p for p in known if latest is not None and (step_of(p) or 0) > (step_of(latest) or 0)]
    known = [p for p in known if p not in stale]
    for old in [*stale, *known[: max(0, len(known) - keep)], *folder.glob(".checkpoint-*.part")]:
        if old != latest:
            shutil.rmtree(old, ignore_errors=True)


def step_of(checkpoint: Path) -> int | None:
    """The step in a checkpoint's name, None for another folder."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else None


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """The latest checkpoint's tensors by file name and its state, or None where the run has none yet."""
    source = _latest(folder)
    if source is None:
        return None
    try:
        state = json.loads((source / "state.json").read_text(encoding="utf-8"))
        return {p.stem: load_file(p) for p in source.glob("*.safetensors")}, state
    except (OSError, ValueError, SafetensorError) as error:
        others = [p.name for p in sorted(folder.glob("checkpoint-*")) if p != source and (p / "state.json").is_file()]
        hint = f"go back to an older one: echo {others[-1]} > {folder / LATEST}" if others else ""
        raise TrainingError(
            f"{source}: not a readable checkpoint: {error}", hint or "warm-start with --init-from"
        ) from error


def describe_latest(folder: Path) -> str:
    """The path of the last good checkpoint, or words that there is none."""
    latest = _latest(folder)
    return "none yet" if latest is None else str(latest)


def _latest(folder: Path) -> Path | None:
    pointer = folder / LATEST
    return folder / pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None


def append_log(folder: Path, line: dict[str, Any]) -> None:
    """One JSON object per line in `log.jsonl`."""
    with (folder / LOG_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def trim_log(folder: Path, step: int) -> dict[str, float]:
    """Drop the log's lines after `step`: a killed run may have logged steps that its checkpoint doesn't hold. Returns
    the figures of the last validation that is left."""
    path, figures = folder / LOG_FILE, {}
    if not path.is_file():
        return figures
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut in two by a kill
        if isinstance(line, dict) and line.get("step", 0) <= step:
            kept.append(text + "\n")
            figures = line.get("validation", figures)
    _write_text(path, "".join(kept))
    return figures


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        _flush(part)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _flush(path: Path) -> None:
    """Have the disk hold a file, or a folder's names, before a rename says so."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle for folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
