"""Time against pixels: is a result of 64 megapixels 16 times the work of one of 4?

    python benchmarks/scaling.py

Each size is one `engine.upscale` in this process, file to file, of a synthetic photo with sides a quarter of the
result's, after a small one to warm up. The figure is seconds per tile, all of the run's seconds over its tiles: what
grows faster than the pixels shows as a ratio above 1. Fixed costs (loading weights) weigh most at the smallest size.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RATIO_TARGET = 1.10
SMALL, LARGE = 4.0, 64.0
"""Megapixels that the target compares."""
GRAIN = 64
"""Sides are multiples of it, so that the photo's are whole."""


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--megapixels", type=float, nargs="+", default=[1, 4, 16, 64], help="sizes of results (default 1 4 16 64)")
    add("--steps", type=int, default=2, help="texture steps (default 2)")
    add("--model", default="mini", help="mini, or the folder of a bundle")
    add("--tile", type=int, default=None, help="tile side in output pixels (default: the model's)")
    add("--overlap", type=int, default=None, help="overlap in output pixels (default: the model's)")
    add("--tiling", choices=("overlap", "shifted"), default="overlap", help="as in dreamsr upscale")
    add("--tile-batch", type=int, default=None, help="tiles computed together (default: upscale's)")
    add("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    add("--repeat", type=int, default=1, help="runs of each size; the fastest counts")
    add("--precision", default="auto", help="auto, fp32, bf16 or fp16")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    add("--quick", action="store_true", help="a smoke run of seconds: tiny sizes and tiles; its ratio means nothing")
    add("--json", action="store_true", help="one JSON object instead of text")
    parsed = parser.parse_args(words)
    if parsed.repeat < 1 or min(parsed.megapixels) <= 0:
        parser.error("--repeat and --megapixels must be positive")
    if parsed.quick:
        vars(parsed).update(megapixels=[0.01, 0.04], steps=1, tile=64, overlap=16, repeat=1)
    return parsed


def measure(options: argparse.Namespace, tell: Any) -> dict[str, Any]:
    """Run every size, the smallest first; `tell` gets each row when it is done. Raises `DreamSRError`."""
    import torch
    from floors import planned, this_machine
    from forward_times import write_photo

    from dreamsr_cli.config import OutputConfig, UpscaleConfig
    from dreamsr_cli.engine import check_settings, upscale
    from dreamsr_cli.models.bundle import open_bundle
    from dreamsr_cli.progress import SilentProgress

    if options.threads:
        torch.set_num_threads(options.threads)
    bundle = open_bundle(options.model)
    names = ("steps", "tile", "overlap", "tiling", "tile_batch", "precision", "device")
    config = UpscaleConfig(scale=4.0, **{name: getattr(options, name) for name in names})
    machine = this_machine(config)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        source, target = Path(folder) / "photo.jpg", Path(folder) / "result.png"
        for number, megapixels in enumerate([min(options.megapixels), *sorted(options.megapixels)]):
            side = max(GRAIN, round(math.sqrt(megapixels * 1e6) / GRAIN) * GRAIN)
            write_photo(source, side // 4)
            made = planned(bundle, source, config, machine)
            seconds = []
            for _ in range(options.repeat if number else 1):
                began = time.perf_counter()
                result = upscale(source, target, bundle, config, OutputConfig(overwrite=True), SilentProgress())
                seconds.append(time.perf_counter() - began)
            if not number:
                continue  # warm now
            rows.append(
                {
                    "megapixels": megapixels,
                    "side": side,
                    "tiles": result.tiles,
                    "seconds": min(seconds),
                    "seconds_per_tile": min(seconds) / result.tiles,
                    "flops": made.total_flops,
                    "floor": None if made.floor is None else made.floor.total,
                    "fraction": None if made.floor is None else made.floor.total / min(seconds),
                }
            )
            tell(rows[-1])
    at = {row["megapixels"]: row["seconds_per_tile"] for row in rows}
    return {
        "model": bundle.config.name,
        "machine": machine.name,
        "precision": machine.precision,
        "threads": torch.get_num_threads(),
        **{name: getattr(check_settings(config, bundle), name) for name in ("tile", "overlap", "tile_batch", "steps")},
        "tiling": options.tiling,
        "rows": rows,
        "ratio": at[LARGE] / at[SMALL] if {SMALL, LARGE} <= set(at) else None,
        "target": RATIO_TARGET,
    }


def line(row: dict[str, Any]) -> str:
    """One size for people."""
    text = f"{row['megapixels']:g} MP, {row['side']}x{row['side']}: {row['tiles']} tiles, {row['seconds']:.2f} s, "
    text += f"{row['seconds_per_tile']:.3f} s per tile"
    return text if row["fraction"] is None else f"{text}, {row['fraction']:.0%} of the floor's speed"


def text(found: dict[str, Any]) -> Iterator[str]:
    """What it was measured on, and the ratio; the rows were told as they came."""
    yield (
        f"model {found['model']}, {found['machine']}, {found['precision']}, {found['threads']} threads, tile "
        f"{found['tile']}, overlap {found['overlap']}, {found['tile_batch']} per batch, {found['steps']} texture "
        f"steps, tiling {found['tiling']}"
    )
    if found["ratio"] is not None:
        verdict = "met" if found["ratio"] <= found["target"] else "missed"
        told = f"{found['ratio']:.3f}   (target <= {found['target']:.2f}: {verdict})"
        yield f"seconds per tile, {LARGE:g} MP / {SMALL:g} MP: {told}"


def main(words: list[str] | None = None) -> int:
    """Exit code 0 once measured, whatever the figures; a `DreamSRError`'s own else."""
    from command import report

    options = arguments(words)

    def tell(row: dict[str, Any]) -> None:
        if not options.json:
            print(line(row), flush=True)

    return report(lambda: measure(options, tell), text, options.json)


if __name__ == "__main__":
    sys.exit(main())
