"""`--compile`: the repeated blocks of transformer and ControlNet translated by torch.compile.

Each kind of block is translated once and used for all blocks of that kind, with symbolic shapes: what a photo of a
folder was computed with must not depend on the photos before it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dreamsr_cli.errors import DeviceError, UsageError
from dreamsr_cli.models.quantization import MemoryMode
from dreamsr_cli.models.restorer import Restorer, blocks_of
from dreamsr_cli.weights import cache_folder

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
VARIANTS = 64
"""Versions of one block that may live side by side: LoRA on or off, masked or not, one tile or several."""


def compiled_code() -> Path:
    """Where translated code is kept for the next run: inductor's own variable, else below our cache."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Inductor writes its default, a folder in /tmp, into the variable when it is imported.
    named = os.environ.get(CACHE_VARIABLE, "")
    return Path(named) if named not in ("", default_cache_dir()) else cache_folder() / "inductor"


def check_compile(device: torch.device, mode: MemoryMode) -> None:
    """Raise `UsageError` where `--compile` doesn't go with `mode`, `DeviceError` where there is no compiler."""
    if mode.quantize != "none":
        raise UsageError(
            f"--compile doesn't go with --quantize {mode.quantize}", "leave out one of the two: weights as they are"
        )
    if mode.offload == "block":
        raise UsageError("--compile doesn't go with --offload block", "leave out one of the two")
    if device.type == "mps":
        raise UsageError("--compile is for CPUs and for CUDA and XPU cards", "leave out --compile")
    if device.type != "cpu" and find_spec("triton") is None:
        raise DeviceError(f"--compile on {device} needs Triton, which is not installed", "pip install triton")
    if _compiler() is None:
        hint = "install g++ (apt install g++) or set CXX to one, or leave out --compile"
        raise DeviceError("--compile needs a C++ compiler, and there is none", hint)


def compile_blocks(restorer: Restorer) -> bool:
    """Let every block of `restorer` be translated at its first call; False where that was said before."""
    os.environ[CACHE_VARIABLE] = str(compiled_code())
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, VARIANTS)
    blocks = [block for net in (restorer.dit.transformer, restorer.controlnet) for block in blocks_of(net)]
    fresh = [block for block in blocks if block._compiled_call_impl is None]
    for block in fresh:
        block.compile(dynamic=True)
    return bool(fresh)


@contextmanager
def compile_errors() -> Generator[None]:
    """Inside, what torch.compile can't do becomes a `DeviceError`."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DeviceError(f"--compile: torch.compile failed: {reason}", "leave out --compile") from error


def _compiler() -> str | None:
    """The C++ compiler that inductor will find."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, ("g++", "clang++", "cl"))), None)
