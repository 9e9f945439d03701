"""What a run is made of beside its settings: versions, the state of the source tree, the machine, the command."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dreamsr_cli import __version__

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "safetensors")


def facts(device: str, precision: str, world: int) -> dict[str, Any]:
    """For run.json: everything a person needs to run it again; none of it is compared on resume."""
    return {
        "versions": {"dreamsr": __version__, "python": platform.python_version(), **_libraries()},
        "git": git_state(Path(__file__).resolve().parent),
        "machine": {"system": platform.platform(), "device": device, "precision": precision, "processes": world},
        "command": command(),
    }


def command() -> str:
    """The command line, as it can be typed again."""
    return shlex.join(["dreamsr", *sys.argv[1:]])


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the source tree that `folder` lies in and whether files differ from it; None outside of one."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        # A package installed below somebody else's repository isn't part of it.
        git("ls-files", "--error-unmatch", str(folder / "__init__.py"))
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--", str(folder)))}
    except (OSError, subprocess.SubprocessError):
        return None


def _libraries() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
