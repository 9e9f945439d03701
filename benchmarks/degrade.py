"""How many training crops per second `degrade` makes: on one core, on two, and where the time goes.

Run it with:  python benchmarks/degrade.py            (about a minute on a free machine)
              python benchmarks/degrade.py --quick    (seconds, a smoke test)

Each figure is the best of some repeats. "pixels alone" is sharpening and degradation in memory, as training does it;
"files" is the whole command's work: photos decoded, crops cut, degraded, two PNGs written, hashed and recorded. Workers
are started before the clock: their start is told by itself. Cores are pinned where the system allows it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dreamsr_cli.degradations import pixel
from dreamsr_cli.degradations.pair_making import PairMaker
from dreamsr_cli.degradations.pair_records import PairSettings, read_source
from dreamsr_cli.degradations.pairs import plan_set
from dreamsr_cli.degradations.presets import PRESETS
from dreamsr_cli.training.dead_leaves import dead_leaves
from dreamsr_cli.worker_pool import run_in_order, usable_cores

SEED = 42


def write_photo(path: Path, side: int) -> None:
    """A synthetic square photo: overlapping shapes with natural colours and textures, as JPEG."""
    rgb_CPQ = dead_leaves(side, np.random.default_rng(SEED)).numpy()
    Image.fromarray((rgb_CPQ.transpose(1, 2, 0) * 255).round().astype(np.uint8)).save(path, quality=92)


def pixels_alone(preset: str, size: int, crops: int) -> float:
    """Crops per second in memory, in this process with one thread."""
    hq_CPQ = dead_leaves(size, np.random.default_rng(SEED))
    began = time.perf_counter()
    for index in range(crops):
        params = pixel.draw(preset, SEED, "benchmark", index)
        pixel.degrade(pixel.sharpen(hq_CPQ) if params.sharpen else hq_CPQ, params)
    return crops / (time.perf_counter() - began)


def files(photo: Path, out: Path, preset: str, size: int, crops: int, workers: int) -> tuple[float, float]:
    """(crops per second, seconds until all workers are ready), files and all."""
    chosen = PRESETS[preset]
    settings = PairSettings("pixel", preset, 4, SEED, size, chosen.sharpen, "skip", "none")
    plans = plan_set([read_source(photo)], settings, crops + workers)
    (out / "lq").mkdir(parents=True, exist_ok=True)
    (out / "hq").mkdir(exist_ok=True)
    # one crop for each worker first: the clock starts when all of them work
    tasks = [(plan,) for plan in plans[:workers]] + [tuple(plans[i : i + 4]) for i in range(workers, len(plans), 4)]
    ends: list[float] = []
    began = time.perf_counter()
    run_in_order(tasks, workers, partial(_maker, out), lambda _: ends.append(time.perf_counter()))
    return crops / (ends[-1] - ends[workers - 1]), ends[workers - 1] - began


def _maker(out: Path) -> Any:
    return PairMaker(out).make


def measure(preset: str, size: int, crops: int, repeat: int) -> dict[str, Any]:
    """All figures of one preset."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    found: dict[str, Any] = {"preset": preset, "size": size, "crops": crops, "cores": usable_cores(), "files": {}}
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder) / "photo.jpg"
        write_photo(photo, 2 * size)
        torch.set_num_threads(1)
        try:
            for workers in (1, 2):
                if len(cores) > workers:
                    os.sched_setaffinity(0, cores[:workers])
                if workers == 1:
                    found["pixels_alone"] = max(pixels_alone(preset, size, crops) for _ in range(repeat))
                out = Path(folder) / "out"
                spent = time.process_time()
                runs = [files(photo, out, preset, size, crops, workers) for _ in range(repeat)]
                if workers == 1:
                    found["crops_per_cpu_second"] = repeat * (crops + 1) / (time.process_time() - spent)
                speed, start = max(runs)
                found["files"][str(workers)] = {"crops_per_second": speed, "start": start}
                if cores:
                    os.sched_setaffinity(0, cores)
        finally:
            if cores:
                os.sched_setaffinity(0, cores)
    found["ratio"] = found["files"]["2"]["crops_per_second"] / found["files"]["1"]["crops_per_second"]
    return found


def main(words: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--preset", choices=list(PRESETS), help="one preset (default: all but realesrgan)")
    parser.add_argument("--size", type=int, default=512, help="side of a crop (default 512)")
    parser.add_argument("--crops", type=int, default=96, help="crops per measurement (default 96)")
    parser.add_argument("--repeat", type=int, default=2, help="measurements, of which the best counts (default 2)")
    parser.add_argument("--quick", action="store_true", help="64 px, 8 crops, once")
    parser.add_argument("--json", action="store_true", help="one JSON object per preset")
    given = parser.parse_args(words)
    if given.quick:
        given.size, given.crops, given.repeat = 64, 8, 1
    presets = [given.preset] if given.preset else [name for name in PRESETS if name != "realesrgan"]
    for preset in presets:
        found = measure(preset, given.size, given.crops, given.repeat)
        if given.json:
            print(json.dumps(found), flush=True)
            continue
        print(f"{preset}: crops of {found['size']} px per second ({found['crops']} crops, {found['cores']} cores)")
        print(f"  pixels alone, one core {found['pixels_alone']:7.1f}")
        for workers, figures in found["files"].items():
            speed, start = figures["crops_per_second"], figures["start"]
            print(f"  files, {workers} worker{'s' if workers != '1' else ' '}    {speed:9.1f}   (start {start:.1f} s)")
        print(f"  two workers / one      {found['ratio']:7.2f}")
        print(f"  files, per CPU second  {found['crops_per_cpu_second']:7.1f}   (whatever else runs)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
