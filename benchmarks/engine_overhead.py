"""How much the engine costs beside its networks.

    python benchmarks/engine_overhead.py

Runs `engine.upscale` on a synthetic photo and prints (wall - loading - networks) / networks, where "networks" is the
time inside the forward passes of that same run. A shared machine changes seconds far more than ratios. How the sampler
compares with a plain loop over diffusers: versus_diffusers.py.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Torch and the package are imported where they are used: `measure` times their first import.
if TYPE_CHECKING:
    import torch

    from dreamsr_cli.engine import Settings

OVERHEAD_TARGET = 0.08


def machine(device: torch.device, precision: str) -> dict[str, Any]:
    """What the figures belong to."""
    import diffusers
    import torch

    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "precision": precision,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--model", default="mini", help="mini, or the folder of a bundle")
    add("--size", type=int, default=4096, help="output pixels per side (default 4096)")
    add("--steps", type=int, default=4, help="texture steps (default 4; more lower the ratio)")
    add("--tile", type=int, default=None, help="tile side in output pixels (default: the model's)")
    add("--overlap", type=int, default=None, help="overlap in output pixels (default: the model's)")
    add("--tile-batch", type=int, default=None, help="tiles computed together (default: upscale's)")
    add("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    add("--repeat", type=int, default=3, help="runs (default 3); the median is printed")
    add("--precision", default="auto", help="auto, fp32, bf16 or fp16")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    add("--quick", action="store_true", help="a smoke run of seconds: 96 pixels, tiles of 64, 2 steps, one run")
    add("--json", action="store_true", help="one JSON object instead of text")
    parsed = parser.parse_args(words)
    if parsed.repeat < 1:
        parser.error("--repeat must be at least 1")
    if parsed.quick:
        vars(parsed).update({"size": 96, "steps": 2, "tile": 64, "overlap": 16, "repeat": 1})
    return parsed


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run it; plain data with every figure and what it belongs to. Raises `DreamSRError`."""
    began = time.perf_counter()
    import torch
    from floors import planned, this_machine
    from forward_times import measure_overhead, write_photo

    from dreamsr_cli.config import UpscaleConfig
    from dreamsr_cli.device import choose_device, choose_dtype, dtype_name
    from dreamsr_cli.engine import check_settings
    from dreamsr_cli.models.bundle import open_bundle

    imports = time.perf_counter() - began
    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    dtype = choose_dtype(options.precision, device)
    bundle = open_bundle(options.model)
    shared: dict[str, Any] = {name: getattr(options, name) for name in ("tile", "overlap", "device", "precision")}
    if options.tile_batch is not None:
        shared["tile_batch"] = options.tile_batch
    found: dict[str, Any] = {
        "model": bundle.config.name,
        "machine": machine(device, dtype_name(dtype)),
        "imports": imports,
    }
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder) / "photo.jpg"
        write_photo(photo, -(-options.size // bundle.config.scale))
        config = UpscaleConfig(long_side=options.size, steps=options.steps, **shared)
        runs = [measure_overhead(bundle, photo, config, device) for _ in range(options.repeat)]
        floor = planned(bundle, photo, config, this_machine(config)).floor
        inside = [sum(run.networks.values()) for run in runs]
        found["overhead"] = {
            "size": options.size,
            **_what(check_settings(config, bundle)),
            "tile_batch": runs[0].tile_batch,
            "runs": [{**asdict(run), "rest": run.rest, "ratio": run.ratio} for run in runs],
            "ratio": statistics.median(run.ratio for run in runs),
            "floor": None if floor is None else floor.to_json(),
            "fraction": None if floor is None else statistics.median(floor.total / spent for spent in inside),
            "target": OVERHEAD_TARGET,
        }
    return found


def _what(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("tile", "overlap", "steps")}


def text(found: dict[str, Any]) -> Iterator[str]:
    """The figures as lines for people."""

    def verdict(part: dict[str, Any]) -> str:
        return f"{part['ratio']:.3f}   (target <= {part['target']:.2f}: {_met(part)})"

    yield f"model {found['model']}, " + ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    yield f"imports {found['imports']:.1f} s (not counted)"
    if part := found["overhead"]:
        yield f"\nupscale to {_size(part)}, {part['runs'][0]['tiles']} tiles, {_steps(part)}, file to file"
        for run in part["runs"]:
            networks = ", ".join(f"{name} {seconds:.2f}" for name, seconds in run["networks"].items())
            inside = sum(run["networks"].values())
            yield (
                f"   {run['wall']:.2f} s = loading {run['loading']:.2f} (not counted) + networks {inside:.2f} "
                f"({networks}) + the rest {run['rest']:.2f}   ratio {run['ratio']:.3f}"
            )
        if part["fraction"] is not None:
            peak = f"{part['floor']['flops_per_second'] / 1e12:.3g} TFLOP/s, {part['floor']['source']}"
            floor = f"{part['floor']['seconds']:.2f} s at the device's peak ({peak})"
            yield f"   floor of the networks {floor}: {part['fraction']:.0%} of its speed reached"
        yield f"   overhead, the rest / networks: {verdict(part)}"


def _size(part: dict[str, Any]) -> str:
    return f"{part['size']}x{part['size']}"


def _steps(part: dict[str, Any]) -> str:
    shape = f"tile {part['tile']}, overlap {part['overlap']}, {part['tile_batch']} per batch"
    return f"{shape}, {part['steps']} texture steps"


def _met(part: dict[str, Any]) -> str:
    return "met" if part["ratio"] <= part["target"] else "missed"


def main(words: list[str] | None = None) -> int:
    """Exit code 0 once measured, whatever the figures; a `DreamSRError`'s own else."""
    from command import report

    options = arguments(words)
    return report(lambda: measure(options), text, options.json)


if __name__ == "__main__":
    sys.exit(main())
