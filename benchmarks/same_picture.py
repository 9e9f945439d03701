"""How far each speed option moves the picture from the plain path: every saving off, 4 tiles at a time, float32.

    python benchmarks/same_picture.py

Each row is one `engine.upscale` to a PNG of 8 bits, compared with the plain path's, in levels of 0 to 255. What should
change no byte is marked; a difference there is an error (exit code 1).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import typing
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from dreamsr_cli.config import UpscaleConfig
    from dreamsr_cli.models.bundle import Bundle

SAVINGS = ("kept", "joint", "channels_last")
"""Savings that are no setting: control features kept, rotary as one product, channels-last convolutions."""


@dataclass(frozen=True)
class Option:
    """One way of running, beside the plain one."""

    name: str
    settings: dict[str, Any]
    """Fields of `UpscaleConfig` other than the plain path's."""
    savings: tuple[str, ...] = ()
    """Of `SAVINGS`, switched on."""
    same_bytes: bool = False
    """Whether no byte may change."""


def options_of() -> Iterator[Option | tuple[str, str]]:
    """What is compared; (name, reason) for what this installation can't run."""
    from dreamsr_cli.config import UpscaleConfig
    from dreamsr_cli.models.quantization import installed

    kinds = typing.get_type_hints(UpscaleConfig)
    yield Option("control features kept", {}, ("kept",), same_bytes=True)
    yield Option("rotary as one product", {}, ("joint",), same_bytes=True)
    yield Option("channels-last convolutions", {}, ("channels_last",))
    yield Option("text bucket", {"text_bucket": None})
    yield Option("tile batch 1", {"tile_batch": 1})
    yield Option("tile batch automatic", {"tile_batch": None})
    yield Option("as upscale does it", {"text_bucket": None, "tile_batch": None}, SAVINGS)
    yield Option("compile", {"compile": True}, SAVINGS)
    yield Option("precision bf16", {"precision": "bf16"})
    for kind in ("int8", "fp8"):
        name = f"quantize {kind}"
        yield Option(name, {"quantize": kind}) if installed(kind) else (name, "torchao is not installed")
    if "tiling" in kinds:
        yield Option("tiling shifted", {"tiling": "shifted"})
    else:
        yield "tiling shifted", "there is no such setting"
    if "auto" in str(kinds["tile"]):
        yield Option("tile auto", {"tile": "auto"})
    else:
        yield "tile auto", "there is no such setting"


@contextmanager
def without(bundle: Bundle, savings: tuple[str, ...]) -> Generator[None]:
    """Inside, what `bundle` opens has only these of `SAVINGS`, by the libraries' own switches."""
    import torch
    from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor

    from dreamsr_cli import control_room

    limits: Any = control_room
    diffusers_own: Any = FluxAttnProcessor()

    def restorer(*args: Any, **kwargs: Any) -> Any:
        made = type(bundle).open_restorer(bundle, *args, **kwargs)
        if "joint" not in savings:
            for module in (m for network in (made.dit, made.controlnet) for m in network.modules()):
                if isinstance(module, FluxAttention):
                    module.set_processor(diffusers_own)
        return made

    def autoencoder(*args: Any, **kwargs: Any) -> Any:
        made: Any = type(bundle).open_autoencoder(bundle, *args, **kwargs)
        if "channels_last" not in savings:
            network: Any = vars(made).get("vae", made)
            network.to(memory_format=torch.contiguous_format)
        return made

    most = limits.CPU_MOST
    changed: dict[str, Callable[..., Any]] = {"open_restorer": restorer, "open_autoencoder": autoencoder}
    for name, method in changed.items():
        setattr(bundle, name, method)
    limits.CPU_MOST = most if "kept" in savings else 0
    try:
        yield
    finally:
        limits.CPU_MOST = most
        for name in changed:
            delattr(bundle, name)


def run(bundle: Bundle, photo: Path, out: Path, config: UpscaleConfig, savings: tuple[str, ...]) -> np.ndarray:
    """Levels (height, width, 3) of one upscale."""
    from dreamsr_cli.config import OutputConfig
    from dreamsr_cli.engine import upscale
    from dreamsr_cli.progress import SilentProgress

    with without(bundle, savings):
        upscale(photo, out, bundle, config, OutputConfig(overwrite=True), SilentProgress())
    return levels(out)


def levels(path: Path) -> np.ndarray:
    """A PNG's levels, (height, width, 3), as int16."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(np.int16)


def compare(plain: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Largest and mean difference in levels, and the share of values within one level."""
    import numpy as np

    apart = np.abs(other - plain)
    return {
        "max": int(apart.max()),
        "mean": round(float(apart.mean()), 5),
        "within_one": round(float((apart <= 1).mean()), 6),
    }


def two_processes(photo: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The command with one process and with two, both with one thread; no byte may change."""
    name = "two processes"
    if find_spec("dreamsr_cli.cli.several_processes") is None:
        return {"name": name, "skipped": "this version runs in one process"}
    if options.model != "mini" and not Path(options.model).is_dir():
        return {"name": name, "skipped": f"--model {options.model} is neither mini nor a folder"}
    words = ["upscale", str(photo), "--model", options.model, "--long-side", str(options.size), "--quiet"]
    words += ["--steps", str(options.steps)] + (["--tile", str(options.tile)] if options.tile else [])
    words += ["--overlap", str(options.overlap)] if options.overlap else []
    single = [sys.executable, "-m", "dreamsr_cli"]
    double = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "dreamsr_cli"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    outs = [folder / "one.png", folder / "two.png"]
    for launcher, out in zip((single, double), outs, strict=True):
        done = subprocess.run([*launcher, *words, "-o", str(out)], env=environ, capture_output=True, text=True)
        if done.returncode:
            return {"name": name, "skipped": f"exit code {done.returncode}: {done.stderr.strip()[-200:]}"}
    return {"name": name, "same_bytes": True, **compare(levels(outs[0]), levels(outs[1]))}


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--model", default="mini", help="mini, or the folder of a bundle")
    add("--size", type=int, default=1440, help="output pixels per side (default 1440: 9 tiles of 512)")
    add("--steps", type=int, default=4, help="texture steps (default 4)")
    add("--tile", type=int, default=None, help="tile side in output pixels (default: the model's)")
    add("--overlap", type=int, default=None, help="overlap in output pixels (default: the model's)")
    add("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    add("--only", nargs="*", default=None, metavar="WORD", help="only rows whose name contains one of these words")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="also --compile, which takes minutes")
    add("--quick", action="store_true", help="a smoke run of seconds: 96 pixels, tiles of 64, 2 steps, no compile")
    add("--json", action="store_true", help="one JSON object instead of a table")
    parsed = parser.parse_args(words)
    if parsed.quick:
        vars(parsed).update({"size": 96, "steps": 2, "tile": 64, "overlap": 16, "compile": False})
    return parsed


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything; plain data. Raises `DreamSRError` where the plain path fails."""
    import torch
    from engine_overhead import machine
    from forward_times import write_photo

    from dreamsr_cli.config import UpscaleConfig
    from dreamsr_cli.errors import DreamSRError
    from dreamsr_cli.models.bundle import open_bundle

    if options.threads:
        torch.set_num_threads(options.threads)
    bundle = open_bundle(options.model)
    plain = UpscaleConfig(
        long_side=options.size,
        steps=options.steps,
        tile=options.tile,
        overlap=options.overlap,
        device="cpu",
        precision="fp32",
        tile_batch=4,
        text_bucket=bundle.config.defaults.max_text_tokens,
    )
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photo = folder / "photo.jpg"
        write_photo(photo, -(-options.size // bundle.config.scale))
        reference = run(bundle, photo, folder / "plain.png", plain, ())
        for option in options_of():
            label = option[0] if isinstance(option, tuple) else option.name
            if options.only and not any(word in label for word in options.only):
                continue
            if isinstance(option, tuple):
                rows.append({"name": label, "skipped": option[1]})
                continue
            if option.settings.get("compile") and not options.compile:
                rows.append({"name": label, "skipped": "not asked for"})
                continue
            try:
                config = dataclasses.replace(plain, **option.settings)
                picture = run(bundle, photo, folder / "other.png", config, option.savings)
            except DreamSRError as error:
                rows.append({"name": label, "skipped": error.message})
                continue
            rows.append({"name": label, "same_bytes": option.same_bytes, **compare(reference, picture)})
        if not options.only or any(word in "two processes" for word in options.only):
            rows.append(two_processes(photo, folder, options))
    return {
        "model": bundle.config.name,
        "machine": machine(torch.device("cpu"), "fp32"),
        "size": options.size,
        "steps": options.steps,
        "rows": rows,
    }


def broken(found: dict[str, Any]) -> list[str]:
    """Names of rows that changed bytes where none may change."""
    return [row["name"] for row in found["rows"] if row.get("same_bytes") and row["max"]]


def text(found: dict[str, Any]) -> Iterator[str]:
    """The figures as a table for people."""
    yield f"model {found['model']}, " + ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    yield f"{found['size']}x{found['size']}, {found['steps']} texture steps; differences in levels of 0 to 255"
    yield f"   {'option':<28} {'largest':>7} {'mean':>8} {'within 1':>9}"
    for row in found["rows"]:
        if "skipped" in row:
            yield f"   {row['name']:<28} left out: {row['skipped']}"
            continue
        mark = "   must be 0" if row["same_bytes"] else ""
        yield f"   {row['name']:<28} {row['max']:>7} {row['mean']:>8.4f} {100 * row['within_one']:>7.3f} %{mark}"


def main(words: list[str] | None = None) -> int:
    """Exit code 0 once measured, 1 where bytes changed that may not; a `DreamSRError`'s own else."""
    from command import report

    options = arguments(words)
    wrong: list[str] = []

    def checked() -> dict[str, Any]:
        found = measure(options)
        wrong.extend(broken(found))
        return found

    code = report(checked, text, options.json)
    if wrong:
        print(f"bytes changed: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else code


if __name__ == "__main__":
    sys.exit(main())
