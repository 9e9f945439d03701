"""`dreamsr doctor`: what this machine has, what dreamsr would use, whether its weights are as shipped, and which of the
models that are fetched are ready."""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from dreamsr_cli import __version__
from dreamsr_cli.cli.console import explain, one_line
from dreamsr_cli.cli.upscaling import silence_libraries
from dreamsr_cli.errors import EXIT_DONE, EXIT_FAILED
from dreamsr_cli.fetching import free_bytes
from dreamsr_cli.weights import BUILTIN, BUILTIN_FOLDER, lock_entry, verify, weights_base

EPILOG = "Example: dreamsr doctor --json > report.json"

EXTRAS = {
    "torchao": ("quantize", "--quantize int8 and fp8"),
    "bitsandbytes": ("quantize", "--quantize nf4"),
    "pyiqa": ("eval", "MUSIQ, MANIQA and CLIP-IQA in dreamsr eval"),
    "tensorboard": ("train", "curves of dreamsr train in TensorBoard"),
}
"""Packages that dreamsr works without: name, extra that brings it, and what it is for."""
PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "pillow", "pyvips", "tifffile")


def command(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> int:
    """Check versions, device, memory, disk, models and write access; exit 1 if something is wrong.

    A model or an extra that isn't installed is no fault: it is listed with the command that gets it.
    """
    silence_libraries()
    checks: dict[str, Callable[[], Any]] = {
        "dreamsr": lambda: __version__,
        "python": lambda: f"{platform.python_version()} on {platform.platform()}",
        "packages": _packages,
        "images": _images,
        "devices": _devices,
        "auto": _auto,
        "memory": _memory,
        "model": _model,
        "bundles": _bundles,
        "captioners": _captioners,
        "extras": _extras,
        "write": _write,
    }
    answers: dict[str, Any] = {}
    problems: dict[str, dict[str, str]] = {}
    for name, check in checks.items():
        try:
            answers[name] = check()
        except Exception as error:
            known = explain(error, f"checking {name}")
            problems[name] = {"error": known.message, "hint": known.hint}
        if not as_json:
            _show(name, answers.get(name), problems.get(name))
    if as_json:
        print(json.dumps({**answers, "ok": not problems, "problems": problems}))
    return EXIT_FAILED if problems else EXIT_DONE


def _show(name: str, answer: Any, problem: dict[str, str] | None) -> None:
    if problem is not None:
        print(
            f"{name:<10} WRONG: {one_line(problem['error'])}\n{'':<10}   try: {one_line(problem['hint'])}", flush=True
        )
        return
    if isinstance(answer, dict) and any(isinstance(value, dict) for value in answer.values()):
        for key, state in answer.items():
            print(f"{name:<10} {one_line(f'{key}: {_state_line(state)}')}", flush=True)
        return
    text = ", ".join(f"{key} {value}" for key, value in answer.items()) if isinstance(answer, dict) else str(answer)
    print(f"{name:<10} {one_line(text)}", flush=True)


def _state_line(state: dict[str, Any]) -> str:
    if state["ready"]:
        return "ready"
    return f"{'; '.join(state['missing'])} -> {state['command']}"


def _packages() -> dict[str, str]:
    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "missing"

    found = {name: installed(name) for name in PACKAGES}
    missing = [name for name, number in found.items() if number == "missing"]
    if missing:
        raise RuntimeError(f"not installed: {', '.join(missing)}")
    return found


def _images() -> str:
    import pyvips

    return f"libvips {pyvips.version(0)}.{pyvips.version(1)}.{pyvips.version(2)}"


def _devices() -> dict[str, str]:
    import torch

    names = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        names[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, {memory:.0f} GiB"
    for index in range(torch.xpu.device_count()):
        names[f"xpu:{index}"] = torch.xpu.get_device_name(index)
    if torch.backends.mps.is_available():
        names["mps"] = "Metal"
    return names


def _auto() -> dict[str, str]:
    from dreamsr_cli.device import choose_device, choose_dtype, dtype_name

    device = choose_device("auto")
    return {"device": str(device), "precision": dtype_name(choose_dtype("auto", device))}


def _model() -> str:
    entry = lock_entry(BUILTIN)
    verify(BUILTIN_FOLDER, entry)
    size = sum(row.size or 0 for row in entry.files)
    return f"{BUILTIN}: {len(entry.files)} files, {size:,} bytes, as listed in weights.lock"


def _memory() -> dict[str, str]:
    import torch

    from dreamsr_cli.machine import free_memory

    ram = free_memory()
    found = {"ram": "unknown" if ram is None else f"{ram / 2**30:.1f} GiB free"}
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found[f"cuda:{index}"] = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return found


def _bundles() -> dict[str, dict[str, Any]]:
    """Readiness of every model by name; files are looked at by name and size."""
    from dreamsr_cli.bundle_state import TRAINED_HINT, lacking
    from dreamsr_cli.models.bundle import BUILT_IN, open_bundle

    states = {}
    for name in BUILT_IN:
        lacks = lacking(open_bundle(name).config)
        fetched = [lack for lack in lacks if lack.files]
        command = f"dreamsr fetch-weights {name}" if fetched else ""
        if len(fetched) < len(lacks):
            command = f"{command}, then {TRAINED_HINT}" if command else TRAINED_HINT
        states[name] = {"ready": not lacks, "missing": [lack.what for lack in lacks], "command": command}
    return states


def _captioners() -> dict[str, dict[str, Any]]:
    from dreamsr_cli.bundle_state import entry_lack
    from dreamsr_cli.config import CAPTIONERS
    from dreamsr_cli.weights_lock import load_lock

    states: dict[str, dict[str, Any]] = {}
    known = load_lock()
    for name in CAPTIONERS:
        lack = entry_lack(name) if name in known else None
        missing = [] if lack is None else [lack.what]
        states[name] = {"ready": lack is None, "missing": missing, "command": "" if lack is None else lack.hint}
    return states


def _extras() -> dict[str, dict[str, Any]]:
    states = {}
    for name, (extra, purpose) in EXTRAS.items():
        try:
            version(name)
            states[name] = {"ready": True, "missing": [], "command": ""}
        except PackageNotFoundError:
            command = f"pip install 'dreamsr[{extra}]'"
            states[name] = {"ready": False, "missing": [f"not installed ({purpose})"], "command": command}
    return states


def _write() -> dict[str, str]:
    here = Path.cwd()
    with tempfile.NamedTemporaryFile(dir=here, prefix=".dreamsr-"):
        pass
    found = {str(here): f"can be written, {shutil.disk_usage(here).free / 2**30:.1f} GiB free"}
    weights = weights_base()
    return {**found, f"weights in {weights}": f"{free_bytes(weights) / 2**30:.1f} GiB free"}
