"""What a folder gains: N photos in one command, against N commands, and against the same folder with overlap off.

    python benchmarks/folder.py

Each way is `dreamsr upscale` in processes of its own, from the start of the interpreter to the exit; the ways take
turns, and the medians of the ratios inside one round are printed. All ways must give the same bytes, else there is no
figure.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WAYS = ("folder", "in turn", "commands")
"""One command; one command with overlap off; a command for each photo."""


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--photos", type=int, default=6, help="how many (default 6)")
    add("--size", type=int, default=1024, help="output pixels of the longer side (default 1024)")
    add("--steps", type=int, default=2, help="texture steps (default 2)")
    add("--format", default="png", help="of the results: png, jpg, webp, tiff or avif (default png)")
    add("--model", default="mini", help="mini, or the folder of a bundle")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    add("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    add("--repeat", type=int, default=3, help="rounds (default 3)")
    add("--quick", action="store_true", help="a smoke run: 2 photos, 96 pixels, one round; its ratios mean nothing")
    add("--json", action="store_true", help="one JSON object instead of text")
    parsed = parser.parse_args(words)
    if parsed.quick:
        vars(parsed).update({"photos": 2, "size": 96, "steps": 1, "repeat": 1})
    if parsed.photos < 2 or parsed.repeat < 1:
        parser.error("--photos must be at least 2 and --repeat at least 1")
    return parsed


def write_photos(folder: Path, count: int, side: int) -> list[Path]:
    """Synthetic photos of natural colours and textures, all different; side and three quarters of it."""
    import numpy as np
    from PIL import Image

    from dreamsr_cli.training.dead_leaves import dead_leaves

    folder.mkdir()
    made = []
    for number in range(count):
        rgb_CPQ = dead_leaves(side, np.random.default_rng(number)).numpy()[:, : side * 3 // 4]
        path = folder / f"photo{number}.png"
        Image.fromarray((rgb_CPQ.transpose(1, 2, 0) * 255).round().astype(np.uint8)).save(path)
        made.append(path)
    return made


def upscale(inputs: list[Path], out: Path, options: argparse.Namespace, overlap: bool) -> None:
    """One command; raises `subprocess.CalledProcessError` with its messages."""
    command = [sys.executable, "-m", "dreamsr_cli", "upscale", *map(str, inputs), "-o", str(out), "-q"]
    command += ["--long-side", str(options.size), "--steps", str(options.steps), "--format", options.format]
    command += ["--model", options.model, "--device", options.device, "--suffix", ""]
    environment = {**os.environ, "DREAMSR_NO_OVERLAP": "0" if overlap else "1"}
    if options.threads:
        environment["OMP_NUM_THREADS"] = str(options.threads)
    subprocess.run(command, check=True, capture_output=True, text=True, env=environment)


def seconds_of(way: str, photos: list[Path], out: Path, options: argparse.Namespace) -> float:
    """Wall time of all photos, one way."""
    out.mkdir()
    began = time.perf_counter()
    if way == "commands":
        for photo in photos:
            upscale([photo], out, options, overlap=True)
    else:
        upscale(photos, out, options, overlap=way == "folder")
    return time.perf_counter() - began


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds; plain data. RuntimeError where the ways' results differ."""
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = write_photos(folder / "photos", options.photos, -(-options.size // 4))
        for number in range(options.repeat):
            found: dict[str, float] = {}
            digests = set()
            # Another order each time: what a first run warms up must not always help the same way.
            for way in WAYS[number % 3 :] + WAYS[: number % 3]:
                out = folder / f"{way} {number}"
                found[way] = seconds_of(way, photos, out, options)
                parts = [path.name.encode() + path.read_bytes() for path in sorted(out.iterdir())]
                digests.add(hashlib.sha256(b"".join(parts)).hexdigest())
            if len(digests) > 1:
                raise RuntimeError("the ways' results differ")
            rounds.append(found)
    ratios = {way: statistics.median(row["folder"] / row[way] for row in rounds) for way in WAYS[1:]}
    shown = ("photos", "size", "steps", "format", "model", "device", "threads")
    return {
        **{name: getattr(options, name) for name in shown},
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "rounds": rounds,
        "ratios": ratios,
    }


def main(words: list[str] | None = None) -> int:
    """Measure and print."""
    options = arguments(words)
    try:
        found = measure(options)
    except subprocess.CalledProcessError as error:
        print(error.stderr.strip() or error, file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(found))
        return 0
    print(f"{found['photos']} photos to {found['size']} px, {found['steps']} texture steps, {found['format']}")
    for row in found["rounds"]:
        print("  " + ", ".join(f"{way} {row[way]:.1f} s" for way in WAYS))
    print(f"one command / a command for each photo: {found['ratios']['commands']:.3f}")
    print(f"one command / the same with overlap off: {found['ratios']['in turn']:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
