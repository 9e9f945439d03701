"""What the journal costs: time inside its calls / wall, summed within one run.

python benchmarks/journal_share.py
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT = 0.03


class Watch:
    """Seconds inside the outermost call of wrapped methods, by name."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._depth = 0

    def wrap(self, cls: type, name: str) -> None:
        """Time every call of `cls.name` from now on."""
        inner: Callable[..., Any] = getattr(cls, name)

        @functools.wraps(inner)
        def timed(*given: Any, **named: Any) -> Any:
            self._depth += 1
            began = time.perf_counter()
            try:
                return inner(*given, **named)
            finally:
                self._depth -= 1
                if not self._depth:
                    label = f"{cls.__name__}.{name}"
                    self.seconds[label] += time.perf_counter() - began
                    self.calls[label] += 1

        setattr(cls, name, timed)


def measure(size: int, steps: int, tile_batch: int, model: str) -> dict[str, Any]:
    """One upscale to size x size: wall, and seconds inside the journal's methods."""
    import numpy as np
    from PIL import Image

    from dreamsr_cli.config import OutputConfig, UpscaleConfig
    from dreamsr_cli.engine import upscale
    from dreamsr_cli.journal import Journal, Piece
    from dreamsr_cli.journal_files import RowFile, Slots
    from dreamsr_cli.models.bundle import open_bundle
    from dreamsr_cli.progress import SilentProgress

    watch = Watch()
    methods = {
        RowFile: ("rows", "crop", "write_rows", "sync"),
        Slots: ("put", "holds", "__getitem__"),
        Piece: ("append", "finish", "drop"),
        Journal: ("__init__", "__exit__", "_once", "piece", "slots", "has", "progress", "set_progress"),
    }
    for cls, names in methods.items():
        for name in names:
            watch.wrap(cls, name)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        source = Path(folder) / "photo.png"
        pixels = np.random.default_rng(0).integers(0, 255, (size // 4, size // 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(source)
        began = time.perf_counter()
        config = UpscaleConfig(scale=4.0, steps=steps, tile_batch=tile_batch)
        upscale(source, Path(folder) / "out.png", open_bundle(model), config, OutputConfig(), SilentProgress())
        wall = time.perf_counter() - began
    inside = sum(watch.seconds.values())
    return {
        "size": size,
        "steps": steps,
        "wall": wall,
        "journal": inside,
        "share": inside / wall,
        "limit": LIMIT,
        "seconds": dict(sorted(watch.seconds.items(), key=lambda item: -item[1])),
        "calls": dict(watch.calls),
    }


def main(words: list[str] | None = None) -> int:
    """Measure once and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--size", type=int, default=2048, help="output pixels per side (default 2048)")
    parser.add_argument("--steps", type=int, default=4, help="texture steps (default 4)")
    parser.add_argument("--tile-batch", type=int, default=4, help="tiles computed together (default 4)")
    parser.add_argument("--model", default="mini", help="mini, or the folder of a bundle")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    given = parser.parse_args(words)
    found = measure(given.size, given.steps, given.tile_batch, given.model)
    if given.json:
        print(json.dumps(found))
        return 0
    print(f"{found['size']}x{found['size']}, {found['steps']} steps: wall {found['wall']:.1f} s")
    for name, seconds in found["seconds"].items():
        print(f"  {name:24} {found['calls'][name]:7} calls {seconds:8.3f} s")
    print(f"journal / wall: {found['share']:.4f} (limit {LIMIT})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
