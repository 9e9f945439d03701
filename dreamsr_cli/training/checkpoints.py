"""A run folder: `run.json` (settings), `log.jsonl`, `checkpoint-N/` (safetensors), `bundle/` (the result).

A checkpoint is written beside the last one and becomes the last by one atomic rename of `latest`; a kill at any
instant leaves a run that resumes. No generator state is kept: every draw is a function of (seed, step, index).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreamsr_cli.errors import TrainingError

LATEST = "latest"
RUN_FILE = "run.json"


def start_run(folder: Path, settings: dict[str, Any], resume: bool) -> None:
    """Create the run folder, or check that it belongs to the same settings. Raises `TrainingError` otherwise."""
    path = folder / RUN_FILE
    if path.is_file():
        if not resume:
            raise TrainingError(f"{folder} holds a run already", "add --resume to go on, or give another -o")
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(k for k in settings if before.get(k) != json.loads(json.dumps(settings[k])))
        if changed:
            raise TrainingError(
                f"{folder} was started with other settings ({', '.join(changed)})",
                "resume with the same ones, or warm-start a new run with --init-from " + str(folder / "bundle"),
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    _write_text(path, json.dumps(settings, indent=1) + "\n")


def save(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Write `checkpoint-step/` with one safetensors file per entry of `tensors`, make it the latest, drop the one
    before. Does nothing if it is the latest already: a step has one state."""
    target = folder / f"checkpoint-{step}"
    if target.is_dir() and _latest(folder) == target:
        return
    part = folder / f".checkpoint-{step}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for name, group in tensors.items():
        save_file({k: v.detach().contiguous().cpu() for k, v in group.items()}, part / f"{name}.safetensors")
    _write_text(part / "state.json", json.dumps({**state, "step": step}) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(part, target)
    _write_text(folder / LATEST, target.name + "\n")
    for old in [*folder.glob("checkpoint-*"), *folder.glob(".checkpoint-*.part")]:
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """The latest checkpoint's tensors by file name and its state, or None where the run has none yet."""
    source = _latest(folder)
    if source is None:
        return None
    try:
        state = json.loads((source / "state.json").read_text(encoding="utf-8"))
        return {p.stem: load_file(p) for p in source.glob("*.safetensors")}, state
    except (OSError, ValueError, SafetensorError) as error:
        raise TrainingError(f"{source}: not a readable checkpoint: {error}", "warm-start with --init-from") from error


def _latest(folder: Path) -> Path | None:
    pointer = folder / LATEST
    return folder / pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """AdamW's moments and step counts by parameter name."""
    found: dict[str, Tensor] = {}
    by_id = {id(p): s for p, s in optimizer.state.items()}
    order = [p for group in optimizer.param_groups for p in group["params"]]
    for name, parameter in zip(names, order, strict=True):
        for key, value in by_id.get(id(parameter), {}).items():
            found[f"{name}|{key}"] = value if isinstance(value, Tensor) else torch.tensor(float(value))
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    order = [p for group in optimizer.param_groups for p in group["params"]]
    entries: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, moment = key.split("|")
        entries.setdefault(name, {})[moment] = value
    for name, parameter in zip(names, order, strict=True):
        if name in entries:
            optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in entries[name].items()}


def append_log(folder: Path, line: dict[str, Any]) -> None:
    """One JSON object per line in `log.jsonl`."""
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
