"""How much slower two processes of one thread are than one process with two threads, on one photo.

    python benchmarks/processes.py

Both have the same cores, so what is measured is the sharing: messages, waiting for each other, work that process 0 does
alone. Pairs are interleaved and each is the whole command, `dreamsr upscale` of a photo of noise and edges; the ratio
is taken of the seconds that the command reports (from opening the photo to the result), and of the whole processes'
time beside it. Another number of threads may round differently, so the difference of the results is told too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGET = 1.05


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--model", default="mini", help="mini, or the folder of a bundle")
    add("--width", type=int, default=2560, help="output pixels (default 2560)")
    add("--height", type=int, default=1440, help="output pixels (default 1440)")
    add("--steps", type=int, default=None, help="texture steps (default: the model's)")
    add("--tile", type=int, default=None, help="tile side in output pixels (default: the model's)")
    add("--tile-batch", type=int, default=None, help="tiles computed together (default: upscale's)")
    add("--processes", type=int, default=2, help="processes of one thread, and threads of the one process (default 2)")
    add("--pairs", type=int, default=5, help="interleaved pairs of runs (default 5); the median is printed")
    add("--quick", action="store_true", help="a smoke run of seconds: 256 x 192 pixels, tiles of 64, 2 steps, one pair")
    add("--json", action="store_true", help="one JSON object instead of text")
    parsed = parser.parse_args(words)
    if parsed.pairs < 1 or parsed.processes < 2:
        parser.error("--pairs must be at least 1, --processes at least 2")
    if parsed.quick:
        vars(parsed).update({"width": 256, "height": 192, "tile": 64, "steps": 2, "pairs": 1})
    return parsed


def write_photo(path: Path, width: int, height: int) -> None:
    """A photo of edges and noise, so that no tile is like another."""
    import numpy as np
    from PIL import Image

    rows, columns = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(rows / 9), np.sin(columns / 7), np.sin((rows + columns) / 11)], 2)
    noise = np.random.default_rng(0).normal(0, 12, (height, width, 3))
    Image.fromarray((128 + 70 * np.sign(waves) + noise).clip(0, 255).astype(np.uint8)).save(path)


def run(options: argparse.Namespace, photo: Path, out: Path, processes: int) -> tuple[float, float, dict[str, Any]]:
    """(seconds that the command reports, of the whole command, what it says)."""
    threads = options.processes if processes == 1 else 1
    words = ["-m", "dreamsr_cli", "upscale", str(photo), "-o", str(out), "--overwrite", "--json", "--quiet"]
    words += ["--model", options.model, "--long-side", str(max(options.width, options.height)), "--device", "cpu"]
    for name in ("steps", "tile", "tile_batch"):
        if getattr(options, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    if processes > 1:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *words]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(paths)}
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    whole = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"exit code {done.returncode}")
    found = json.loads(done.stdout)
    return found["seconds"], whole, found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every figure. Raises `RuntimeError` where a run fails."""
    import numpy as np
    import torch
    from PIL import Image

    pairs: list[dict[str, float]] = []
    found: dict[str, Any] = {}
    load = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory() as folder:
        photo, one, several = (Path(folder) / name for name in ("photo.png", "one.png", "several.png"))
        write_photo(photo, -(-options.width // 4), -(-options.height // 4))
        for number in range(options.pairs):
            order = (1, options.processes) if number % 2 == 0 else (options.processes, 1)
            timed = {count: run(options, photo, one if count == 1 else several, count) for count in order}
            found = timed[1][2]
            (ours, ours_whole, _), (alone, alone_whole, _) = timed[options.processes], timed[1]
            pairs.append({"one": alone, "several": ours, "one_whole": alone_whole, "several_whole": ours_whole})
        a, b = (np.asarray(Image.open(path).convert("RGB"), np.int16) for path in (one, several))
        levels = np.abs(a - b)
    return {
        "model": found["model"],
        "processes": options.processes,
        "width": found["width"],
        "height": found["height"],
        "tiles": found["tiles"],
        "tile_batch": found["tile_batch"],
        "steps": found["steps"],
        "cores": os.cpu_count(),
        "load": load,
        "torch": torch.__version__,
        "pairs": pairs,
        "ratio": statistics.median(pair["several"] / pair["one"] for pair in pairs),
        "ratio_whole": statistics.median(pair["several_whole"] / pair["one_whole"] for pair in pairs),
        "target": TARGET,
        "levels": {"max": int(levels.max()), "mean": float(levels.mean()), "equal": float((levels == 0).mean())},
    }


def text(found: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [
        f"model {found['model']}, {found['width']}x{found['height']}, {found['tiles']} tiles in batches of "
        f"{found['tile_batch']}, {found['steps']} texture steps; {found['cores']} cores, load {found['load']} before"
    ]
    name = f"{found['processes']} processes of 1 thread"
    for pair in found["pairs"]:
        lines.append(
            f"   1 process of {found['processes']} threads {pair['one']:.2f} s, {name} {pair['several']:.2f} s   "
            f"ratio {pair['several'] / pair['one']:.3f}"
        )
    met = "met" if found["ratio"] <= found["target"] else "missed"
    lines.append(f"{name} / 1 process: {found['ratio']:.3f}   (target <= {found['target']:.2f}: {met})")
    lines.append(f"whole commands, with imports and the launcher: {found['ratio_whole']:.3f}")
    levels = found["levels"]
    lines.append(
        f"results differ by at most {levels['max']} levels, {levels['mean']:.5f} on average; "
        f"{100 * levels['equal']:.3f} % of the values are equal"
    )
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """Exit code 0 once measured, whatever the figures; 1 where a run fails."""
    options = arguments(words)
    try:
        found = measure(options)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(found) if options.json else text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
