"""The most memory a piece of work takes: anonymous and shared memory of the process, or memory of the GPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import torch

_EVERY = 0.02
_KINDS = ("RssAnon:", "RssShmem:")


@dataclass
class Peak:
    """Filled when the `with` ends."""

    bytes: int | None = None
    """None where the system doesn't say."""


def _used() -> int | None:
    """Anonymous plus shared memory of this process, in bytes (Linux)."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(_KINDS)]
    return sum(found) if found else None


@contextlib.contextmanager
def measure_peak(device: torch.device) -> Generator[Peak]:
    """Watch memory inside the `with`: PyTorch's on a CUDA device, else the process's, sampled 50 times a second."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    done = threading.Event()
    seen = [_used()]

    def watch() -> None:
        while not done.wait(_EVERY):
            seen[0] = max((x for x in (seen[0], _used()) if x is not None), default=None)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak.bytes = max((x for x in (seen[0], _used()) if x is not None), default=None)
