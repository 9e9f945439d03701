"""Whether this processor multiplies bfloat16 matrices faster than float32 ones: measured once, then remembered, so that
`--precision auto` gives every later run the same answer."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
import time
from typing import Any

import torch

from dreamsr_cli.weights import cache_folder

SIDE = 768
"""Of the square matrices."""
ROUNDS = 5
WORTH = 1.2
"""bfloat16 is chosen where it is at least so many times as fast: native units are 1.5 to 7 times, emulation 0.2."""
FILE = "cpu_precision.json"


def bf16_gain() -> float:
    """Speed of bfloat16 products over that of float32 ones, the remembered one where there is one."""
    key = "|".join((platform.node(), platform.machine(), torch.__version__, str(torch.get_num_threads())))
    known = _remembered()
    found = known.get(key)
    if isinstance(found, (int, float)) and found > 0:
        return float(found)
    gain = measure_bf16_gain()
    _remember({**known, key: round(gain, 3)})
    return gain


def measure_bf16_gain() -> float:
    """The same, measured now: the best of `ROUNDS` products each, in turn."""
    pairs = {dtype: torch.full((SIDE, SIDE), 0.5, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(pairs, float("inf"))
    for number in range(ROUNDS + 1):
        for dtype, matrix in pairs.items():
            began = time.perf_counter()
            matrix @ matrix
            if number:  # the first product loads its kernel
                best[dtype] = min(best[dtype], time.perf_counter() - began)
    return best[torch.float32] / best[torch.bfloat16]


def _remembered() -> dict[str, Any]:
    try:
        known = json.loads((cache_folder() / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(known: dict[str, Any]) -> None:
    # Without a cache it is measured again, nothing else: the margin of `WORTH` is wide.
    with contextlib.suppress(OSError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix="cpu-precision-")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(known, stream, indent=1)
        os.replace(name, folder / FILE)
