"""What a machine has, how fast it multiplies matrices, and how much of that a run reached here before."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamsr_cli.weights import cache_folder

if TYPE_CHECKING:
    import torch

NO_PROBE = "DREAMSR_NO_PROBE"
"""Set to 1: the speed is not measured, so plans name no time."""
PROBE_SECONDS = 1.0
COPIED = 128 * 2**20
"""Bytes copied to measure bandwidth: more than caches hold."""
FIRST_EFFICIENCY = 0.5
"""Share of the measured speed that a first run is taken to reach."""
FIRST_SPREAD = 1.5
"""A first estimate is a range of this factor down and up."""
_KEPT = 8
_ITEMSIZES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Machine:
    """The device that a plan is for."""

    device: str
    """"cpu", "cuda", "cuda:1", ..."""
    name: str
    """Of the processor or the card."""
    precision: str
    """"fp32", "bf16" or "fp16"."""
    threads: int
    """Of the CPU."""
    memory: int | None
    """Bytes of RAM that are free now; None where the system doesn't say."""
    device_memory: int | None
    """Bytes free on the card; None on a CPU."""
    flops_per_second: float | None
    """Measured, of large matrix products in that precision; None: not measured."""
    bytes_per_second: float | None = None
    """Measured, of a copy in the device's memory, reading and writing; None: not measured."""
    total_memory: int | None = None
    """Bytes of RAM in all, within the container's limit, or of the card; None where the system doesn't say."""

    @property
    def itemsize(self) -> int:
        """Bytes per value in that precision."""
        return _ITEMSIZES[self.precision]

    def key(self, model: str) -> str:
        """What a remembered efficiency belongs to."""
        return "|".join((self.name, self.precision, str(self.threads), model))


@dataclass(frozen=True)
class Estimate:
    """How long a plan takes."""

    low: float
    """Seconds."""
    high: float
    """Seconds."""
    efficiency: float
    """Share of the measured speed that the estimate counts on."""
    runs: int
    """Earlier runs on this device that it rests on."""


def describe_machine(device: torch.device, precision: str, measure: bool = True) -> Machine:
    """The machine as it is now; with `measure` its speed too, which takes a second (not where `DREAMSR_NO_PROBE=1`)."""
    import torch

    name, device_memory = platform.processor() or platform.machine(), None
    if device.type == "cpu":
        name = _processor() or name
    elif device.type == "cuda":
        # What this process holds on the card already is its own to use again.
        device_memory = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        name = torch.cuda.get_device_name(device)
    else:
        name = device.type
    forbidden = os.environ.get(NO_PROBE, "") not in ("", "0")
    rate = probe(device, precision) if measure and not forbidden else None
    speed = probe_copy(device) if measure and not forbidden else None
    total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else total_memory()
    return Machine(
        str(device), name, precision, torch.get_num_threads(), free_memory(), device_memory, rate, speed, total
    )


def probe(device: torch.device, precision: str) -> float:
    """Operations per second of square matrix products, over about `PROBE_SECONDS`."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    side = 1024 if device.type == "cpu" else 4096
    left, right = (torch.full((side, side), 0.5, dtype=dtype, device=device) for _ in range(2))

    def finished() -> float:
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        return time.perf_counter()

    left @ right  # the first product also compiles or loads its kernel
    begin, count = finished(), 0
    while True:
        left @ right
        count += 1
        if (taken := finished() - begin) >= PROBE_SECONDS:
            return 2 * side**3 * count / taken


def probe_copy(device: torch.device) -> float:
    """Bytes per second that a large copy within the device's memory reads and writes, over a fifth of a second."""
    import torch

    source = torch.ones(COPIED // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)

    def finished() -> float:
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        return time.perf_counter()

    target.copy_(source)  # the first copy also asks for the pages
    begin, count = finished(), 0
    while True:
        target.copy_(source)
        count += 1
        if (taken := finished() - begin) >= PROBE_SECONDS / 5:
            return 2 * COPIED * count / taken


def estimate(flops: int, machine: Machine, model: str) -> Estimate | None:
    """The time of `flops` operations; None where the speed was not measured."""
    now = machine.flops_per_second
    if now is None:
        return None
    seen = [reached / (rate or now) for reached, rate in _history(machine.key(model))]
    efficiency, spread = FIRST_EFFICIENCY, FIRST_SPREAD
    if seen:
        efficiency = statistics.median(seen)
        spread = 1.1 if len(seen) >= 3 else 1.25
        spread = min(FIRST_SPREAD, max(spread, max(seen) / efficiency, efficiency / min(seen)))
    seconds = flops / (now * efficiency)
    return Estimate(seconds / spread, seconds * spread, efficiency, len(seen))


def remember_efficiency(flops: int, seconds: float, machine: Machine, model: str) -> None:
    """Keep what a whole run of `flops` operations reached, with the speed measured beside it if there is one (else the
    next plan compares it with the speed that it measures)."""
    if flops > 0 and seconds > 0:
        key = machine.key(model)
        _keep(key, [*_history(key), (flops / seconds, machine.flops_per_second)][-_KEPT:])


def free_memory() -> int | None:
    """Bytes of RAM that a process could still take, within its container's limit; None where nobody says."""
    found = [value for value in (_available(), _left_in_container()) if value is not None]
    return min(found) if found else None


def total_memory() -> int | None:
    """Bytes of RAM that this machine has, within its container's limit; None where nobody says."""
    found = [value for value in (_installed(), _container_limit()) if value is not None]
    return min(found) if found else None


def _installed() -> int | None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _container_limit() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
    return None


def _available() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return _installed()


def _left_in_container() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        folder = Path("/sys/fs/cgroup")
        names = ("memory.max", "memory.current", "memory.stat")
        limit, used, stat = ((folder / name).read_text(encoding="ascii") for name in names)
        # Pages of files count as used, but are given back when memory is asked for.
        pages = dict(line.split() for line in stat.splitlines()).get("inactive_file", "0")
        return int(limit) - int(used) + int(pages)
    return None


def _processor() -> str | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return None


# ---------------------------------------------------------------- efficiency.json


def _store() -> Path:
    return cache_folder() / "efficiency.json"


def _read() -> dict[str, Any]:
    try:
        known = json.loads(_store().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _history(key: str) -> list[tuple[float, float | None]]:
    """(operations per second reached, speed measured then or None) of earlier runs, oldest first."""
    entries = _read().get(key)
    pairs = [e for e in entries if isinstance(e, list) and len(e) == 2] if isinstance(entries, list) else []
    return [(reached, rate if _positive(rate) else None) for reached, rate in pairs if _positive(reached)]


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 < value < float("inf")


def _keep(key: str, runs: list[tuple[float, float | None]]) -> None:
    # Without a cache the next plan is a wider range, nothing else.
    with contextlib.suppress(OSError):
        path = _store()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix="efficiency-")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump({**_read(), key: runs}, stream, indent=1)
        os.replace(name, path)
