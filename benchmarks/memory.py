"""How peak memory grows with the canvas.

    python benchmarks/memory.py

Each size is one `engine.upscale` of a synthetic photo in a process of its own; a thread there reads
/proc/self/status (Linux) every 20 ms. The figure is the peak of anonymous + shared memory (RssAnon + RssShmem), what
the work itself holds. Pages of files that the kernel keeps at its own leisure are in VmHWM beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SIZES = (2048, 4096, 8192, 16384)
GROWTH_LIMIT, TOTAL_LIMIT = 2 * 2**30, 5 * 2**30
"""Of 16384 against 4096 pixels per side, and of 16384 in all."""
GIB = 2**30


def status() -> dict[str, int]:
    """Memory lines of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines if line.startswith(("Rss", "VmHWM")))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


class Peak:
    """The largest RssAnon + RssShmem seen while the `with` lasts."""

    def __init__(self) -> None:
        self.value, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            now = status()
            self.value = max(self.value, now["RssAnon"] + now["RssShmem"])
            time.sleep(0.02)


def child(size: int, steps: int, tile_batch: int, model: str, format: str) -> dict[str, float]:
    """One upscale to size x size, measured."""
    import numpy as np
    from PIL import Image

    from dreamsr_cli.config import OutputConfig, UpscaleConfig
    from dreamsr_cli.engine import upscale
    from dreamsr_cli.models.bundle import open_bundle
    from dreamsr_cli.progress import SilentProgress

    with tempfile.TemporaryDirectory(dir=".") as folder:
        source = Path(folder) / "photo.jpg"
        y, x = np.mgrid[0 : size // 4, 0 : size // 4].astype(np.uint16)
        Image.fromarray(np.stack([x & 255, y & 255, (x ^ y) & 255], 2).astype(np.uint8)).save(source)
        del x, y
        strength = None if steps else 0.0
        config = UpscaleConfig(scale=4.0, steps=steps or None, strength=strength, tile_batch=tile_batch)
        began, before = time.monotonic(), status()
        with Peak() as peak:
            out = Path(folder) / f"result.{format}"
            result = upscale(source, out, open_bundle(model), config, OutputConfig(), SilentProgress())
        return {
            "size": size,
            "tiles": result.tiles,
            "steps": steps,
            "peak": peak.value,
            "before": before["RssAnon"] + before["RssShmem"],
            "VmHWM": status()["VmHWM"],
            "file": out.stat().st_size,
            "seconds": round(time.monotonic() - began, 1),
        }


def main(words: list[str] | None = None) -> int:
    """Measure every size in a process of its own; print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="output pixels per side")
    parser.add_argument("--steps", type=int, default=1, help="texture steps (default 1; 0 leaves them out)")
    parser.add_argument("--tile-batch", type=int, default=1, help="tiles computed together (default 1)")
    parser.add_argument("--model", default="mini", help="mini, or the folder of a bundle")
    parser.add_argument("--format", default="png", help="png, jpg, webp or tiff")
    parser.add_argument("--json", action="store_true", help="one JSON object per size")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if not Path("/proc/self/status").is_file():
        parser.error("needs Linux's /proc")
    if given.child:
        print(json.dumps(child(given.child, given.steps, given.tile_batch, given.model, given.format)))
        return 0
    rows = []
    for size in given.sizes:
        options = ["--steps", str(given.steps), "--tile-batch", str(given.tile_batch), "--model", given.model]
        command = [sys.executable, __file__, "--child", str(size), "--format", given.format, *options]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        if given.json:
            print(json.dumps(row), flush=True)
        else:
            print(
                f"{size}x{size}: {row['tiles']} tiles, peak {row['peak'] / GIB:.2f} GiB"
                f" (VmHWM {row['VmHWM'] / GIB:.2f}), {row['seconds']} s",
                flush=True,
            )
    peaks = {row["size"]: row["peak"] for row in rows}
    if not given.json and {4096, 16384} <= set(peaks):
        growth = peaks[16384] - peaks[4096]
        print(f"growth from 4096 to 16384: {growth / GIB:.2f} GiB (limit {GROWTH_LIMIT / GIB:.0f})")
        print(f"16384 in all: {peaks[16384] / GIB:.2f} GiB (limit {TOTAL_LIMIT / GIB:.0f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
