"""`dreamsr doctor`: what this machine has, what dreamsr would use, and whether its weights are as shipped."""

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
from dreamsr_cli.weights import BUILTIN, BUILTIN_FOLDER, lock_entry, verify

EPILOG = "Example: dreamsr doctor --json > report.json"

PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "pillow", "pyvips", "tifffile")


def command(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> int:
    """Check versions, device, precision, the built-in model and write access; exit 1 if something is wrong."""
    silence_libraries()
    checks: dict[str, Callable[[], Any]] = {
        "dreamsr": lambda: __version__,
        "python": lambda: f"{platform.python_version()} on {platform.platform()}",
        "packages": _packages,
        "images": _images,
        "devices": _devices,
        "auto": _auto,
        "model": _model,
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
        print(f"{name:<9} WRONG: {one_line(problem['error'])}\n{'':<9}   try: {one_line(problem['hint'])}", flush=True)
        return
    text = ", ".join(f"{key} {value}" for key, value in answer.items()) if isinstance(answer, dict) else str(answer)
    print(f"{name:<9} {one_line(text)}", flush=True)


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
    size = sum(row.size for row in entry.files)
    return f"{BUILTIN}: {len(entry.files)} files, {size:,} bytes, as listed in weights.lock"


def _write() -> str:
    here = Path.cwd()
    with tempfile.NamedTemporaryFile(dir=here, prefix=".dreamsr-"):
        pass
    free = shutil.disk_usage(here).free / 2**30
    return f"{here} can be written, {free:.1f} GiB free"
