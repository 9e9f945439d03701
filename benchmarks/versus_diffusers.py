"""Our texture steps against a plain loop over diffusers, each saving switched on in turn.

    python benchmarks/versus_diffusers.py

The same networks, tiles, steps, noise and blend on both sides, in one process; all ways run in turn, again and again,
and the median over the rounds of way / plain loop counts. The plain loop pads prompts to the bundle's longest, as the
pipelines of FLUX do, runs its ControlNet at every step, and computes 4 tiles at a time (`--plain-batch`); a second
plain loop with our text lengths and batch is timed too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

    from dreamsr_cli.models.bundle import Bundle
    from dreamsr_cli.sampler import Texts
    from dreamsr_cli.settings import Settings
    from dreamsr_cli.tiling import TileGrid

TARGET = 0.70
PLAIN, PLAIN_TRIMMED = "diffusers, plain loop", "diffusers, our text lengths and batch"


@dataclass(frozen=True)
class Way:
    """One way of doing the texture steps; the fields after the name are the savings."""

    name: str
    once: bool = False
    """Control features once per tile."""
    short: bool = False
    """Texts of their bucket's length instead of the bundle's longest."""
    fitting: bool = False
    """The batch that `upscale` chooses by itself."""
    joint: bool = False
    """`JointAttention` instead of diffusers' processor."""
    compiled: bool = False


WAYS = (
    Way("ours, no saving"),
    Way("+ control once per tile", True),
    Way("+ text length", True, True),
    Way("+ batch that fits", True, True, True),
    Way("+ rotary as one product", True, True, True, True),
    Way("+ compile", True, True, True, True, True),
)
"""Each with one saving more than the one before."""


@dataclass
class Row:
    """What was measured of one way."""

    name: str
    seconds: list[float] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    batch: int = 0
    difference: float | None = None
    """Largest difference of its canvas from the first of our ways, over that canvas' standard deviation."""
    first: float = 0.0
    """Seconds of the first step, translation included."""


class Race:
    """Both sides on one canvas, made ready once."""

    def __init__(
        self, bundle: Bundle, grid: TileGrid, settings: Settings, device: torch.device, dtype: torch.dtype, batch: int
    ) -> None:
        import numpy as np
        import torch
        from diffusers_loop import SEED, Peer

        from dreamsr_cli.batch_choice import automatic_batch

        self.bundle, self.grid, self.settings, self.device, self.dtype = bundle, grid, settings, device, dtype
        self.plain_batch = min(batch, len(grid.tiles))
        self.our_batch = min(settings.tile_batch, len(grid.tiles))
        if settings.fit_batch:
            tokens = (grid.tile_height // 16) * (grid.tile_width // 16)
            self.our_batch = automatic_batch(
                len(grid.tiles), settings.tile_batch, tokens, device.type, torch.get_num_threads()
            )
        self.restorer: Any = None
        self.peer = Peer.of(bundle, device, dtype)
        shape = (bundle.config.latent.channels, grid.canvas_height // 8, grid.canvas_width // 8)
        self.z_dr_CHW: np.ndarray = np.random.default_rng(SEED).standard_normal(shape, dtype=np.float32)
        self.guidance = settings.guidance if self.peer.transformer.config["guidance_embeds"] else None

    def prepare(self, photo: Path, side: int) -> None:
        """Texts at both lengths, and the restorer."""
        from dreamsr_cli.images import open_photo
        from dreamsr_cli.prompts import make_plan

        plan = make_plan(open_photo(photo), self.grid, side, side, self.settings.captioner)
        encoder = self.bundle.open_text_encoder(self.device, self.dtype)
        words = [plan.global_text, *(tile.text for tile in plan.tiles)]
        self.texts = {short: self._texts(encoder, words, short) for short in (False, True)}
        self.restorer = self.bundle.open_restorer(self.device, self.dtype, mask_pads=not encoder.pads_are_seen)

    def _texts(self, encoder: Any, words: list[str], short: bool) -> Texts:
        from dreamsr_cli.bundle_sizes import read_sizes
        from dreamsr_cli.models.text_encoder import stack
        from dreamsr_cli.sampler import Texts

        most, buckets = read_sizes(self.bundle.config, self.bundle.part_folder).text_lengths(None)
        (glob, *local), _ = encoder.encode(words, most, buckets if short else ())
        if short:
            return Texts(glob, local, False, most, buckets)
        return Texts(stack([glob], most), [stack([e], most) for e in local])

    def plain(self, steps: int, trimmed: bool) -> np.ndarray:
        """The loop over diffusers."""
        from diffusers_loop import plain_texture

        batch = self.our_batch if trimmed else self.plain_batch
        return plain_texture(
            self.peer,
            self.grid,
            self.texts[trimmed],
            batch,
            self.z_dr_CHW,
            self.settings.strength,
            steps,
            self.guidance,
        )

    def ours(self, way: Way, steps: int) -> np.ndarray:
        """`Sampler.texture`, journal included."""
        from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
        from diffusers_loop import SEED

        from dreamsr_cli.journal import Journal
        from dreamsr_cli.models.attention import join_attention
        from dreamsr_cli.models.compiling import compile_blocks
        from dreamsr_cli.models.restorer import blocks_of
        from dreamsr_cli.progress import SilentProgress
        from dreamsr_cli.sampler import REMOVE, Sampler

        networks = (self.restorer.dit.transformer, self.restorer.controlnet)
        join_attention(networks)
        if not way.joint:
            for module in (m for network in networks for m in network.modules()):
                if type(module).__name__ == "FluxAttention":
                    module.set_processor(FluxAttnProcessor())
        if way.compiled:
            compile_blocks(self.restorer)
        config = self.bundle.config
        batch = self.our_batch if way.fitting else self.plain_batch
        room = 2**62 if way.once else 0
        try:
            with tempfile.TemporaryDirectory() as folder, Journal(Path(folder) / "race.dreamsr", {}, 0) as journal:
                z_dr = journal.piece("z_dr", REMOVE, self.z_dr_CHW.shape)
                z_dr.append(self.z_dr_CHW)
                sampler = Sampler(
                    self.restorer,
                    self.grid,
                    self.texts[way.short],
                    config.sampling,
                    config.control,
                    batch,
                    journal,
                    SilentProgress(),
                    room,
                )
                done = sampler.texture(z_dr.finish(), self.settings.strength, steps, SEED, self.settings.guidance)
                return done.rows(0, self.z_dr_CHW.shape[1]).copy()
        finally:
            if way.compiled:
                for network in networks:
                    for block in blocks_of(network):
                        block._compiled_call_impl = None

    def run(self, way: Way | None, steps: int, trimmed: bool = False) -> np.ndarray:
        """One way, or with None the plain loop."""
        return self.plain(steps, trimmed) if way is None else self.ours(way, steps)


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--model", default="mini", help="mini, or the folder of a bundle")
    add("--size", type=int, default=1856, help="canvas pixels per side (default 1856: 16 tiles of 512)")
    add("--steps", type=int, default=16, help="texture steps (default 16)")
    add("--tile", type=int, default=None, help="tile side in output pixels (default: the model's)")
    add("--overlap", type=int, default=None, help="overlap in output pixels (default: the model's)")
    add("--tile-batch", type=int, default=None, help="tiles computed together in the last rows (default: upscale's)")
    add("--plain-batch", type=int, default=4, help="tiles computed together by the plain loop (default 4)")
    add("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    add("--repeat", type=int, default=3, help="rounds of all ways (default 3); medians are printed")
    add("--precision", default="auto", help="auto, fp32, bf16 or fp16")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="time --compile too (default: if it can)",
    )
    add("--quick", action="store_true", help="a smoke run of seconds: 96 pixels, tiles of 64, 2 steps, no compile")
    add("--json", action="store_true", help="one JSON object instead of text")
    parsed = parser.parse_args(words)
    if parsed.repeat < 1 or parsed.plain_batch < 1:
        parser.error("--repeat and --plain-batch must be at least 1")
    if parsed.quick:
        vars(parsed).update({"size": 96, "steps": 2, "tile": 64, "overlap": 16, "repeat": 1})
        parsed.compile = bool(parsed.compile)
    return parsed


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything; plain data. Raises `DreamSRError`."""
    from collections import Counter

    import numpy as np
    import torch
    from engine_overhead import machine
    from forward_times import settle_on, write_photo

    from dreamsr_cli.config import UpscaleConfig
    from dreamsr_cli.device import choose_device, choose_dtype, dtype_name
    from dreamsr_cli.models.bundle import open_bundle
    from dreamsr_cli.settings import check_settings
    from dreamsr_cli.tiling import make_grid

    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    dtype = choose_dtype(options.precision, device)
    bundle = open_bundle(options.model)
    shared: dict[str, Any] = {name: getattr(options, name) for name in ("tile", "overlap", "device", "precision")}
    config = UpscaleConfig(long_side=options.size, steps=options.steps, tile_batch=options.tile_batch, **shared)
    settings = check_settings(config, bundle)
    grid = make_grid(options.size, options.size, settings.tile, settings.overlap)
    race = Race(bundle, grid, settings, device, dtype, options.plain_batch)
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder) / "tiles.jpg"
        write_photo(photo, -(-options.size // bundle.config.scale))
        race.prepare(photo, options.size)
    skipped = None if options.compile else _no_compile(options.compile, device)
    runs: list[tuple[Row, Way | None, bool]] = [(Row(PLAIN), None, False), (Row(PLAIN_TRIMMED), None, True)]
    runs += [(Row(way.name), way, False) for way in WAYS if not (way.compiled and skipped)]
    counts: Counter[str] = Counter()
    networks = {"dit": race.restorer.dit, "controlnet": race.restorer.controlnet}
    for name, network in (*networks.items(), ("dit", race.peer.transformer), ("controlnet", race.peer.controlnet)):
        network.register_forward_hook(lambda *_, n=name: counts.update([n]))
    settle, reference = settle_on(device), None
    for row, way, trimmed in runs:  # one step each to warm up
        began = time.perf_counter()
        race.run(way, 1, trimmed)
        settle()
        row.first = time.perf_counter() - began
        row.batch = race.our_batch if trimmed or (way is not None and way.fitting) else race.plain_batch
    for _ in range(options.repeat):
        for row, way, trimmed in runs:
            counts.clear()
            settle()
            began = time.perf_counter()
            canvas = race.run(way, options.steps, trimmed)
            settle()
            row.seconds.append(time.perf_counter() - began)
            row.calls = dict(counts)
            if way is not None:
                reference = canvas if reference is None else reference
                row.difference = float(np.abs(canvas - reference).max() / reference.std())
    return {
        "model": bundle.config.name,
        "machine": machine(device, dtype_name(dtype)),
        "size": options.size,
        "tiles": len(grid.tiles),
        "tile": settings.tile,
        "overlap": settings.overlap,
        "steps": options.steps,
        "text_tokens": {"plain": race.texts[False].length, "ours": race.texts[True].length},
        "rows": [_row(row, runs[0][0]) for row, _, _ in runs],
        "ratio": _ratio(next(row for row, way, _ in runs if way == WAYS[4]), runs[0][0]),
        "compile_skipped": skipped,
        "target": TARGET,
    }


def _no_compile(asked: bool | None, device: torch.device) -> str | None:
    """Why --compile isn't timed, None if it is."""
    from dreamsr_cli.errors import DreamSRError
    from dreamsr_cli.models.compiling import check_compile
    from dreamsr_cli.models.quantization import PLAIN as AS_IT_IS

    if asked is False:
        return "not asked for"
    try:
        check_compile(device, AS_IT_IS)
    except DreamSRError as error:
        return error.message
    return None


def _ratio(row: Row, plain: Row) -> float:
    return statistics.median(a / b for a, b in zip(row.seconds, plain.seconds, strict=True))


def _row(row: Row, plain: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "seconds": row.seconds,
        "ratio": _ratio(row, plain),
        "tile_batch": row.batch,
        "calls": row.calls,
        "first_step": row.first,
        "difference": row.difference,
    }


def text(found: dict[str, Any]) -> Iterator[str]:
    """The figures as lines for people."""
    yield f"model {found['model']}, " + ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    tokens = found["text_tokens"]
    yield (
        f"{found['size']}x{found['size']}, {found['tiles']} tiles of {found['tile']}, overlap {found['overlap']}, "
        f"{found['steps']} texture steps, local texts of {tokens['plain']} tokens, ours {tokens['ours']}"
    )
    for row in found["rows"]:
        seconds = statistics.median(row["seconds"])
        calls = " ".join(f"{count} {name}" for name, count in row["calls"].items())
        differs = "" if row["difference"] is None else f", differs by {row['difference']:.1e}"
        yield f"   {row['name']:<38} {seconds:8.2f} s   ratio {row['ratio']:.3f}   ({calls}{differs})"
    if found["compile_skipped"]:
        yield f"   --compile: {found['compile_skipped']}"
    else:
        yield f"   --compile: the first step took {found['rows'][-1]['first_step']:.1f} s"
    met = "met" if found["ratio"] <= found["target"] else "missed"
    yield f"   as upscale does it / plain loop: {found['ratio']:.3f}   (target <= {found['target']:.2f}: {met})"


def main(words: list[str] | None = None) -> int:
    """Exit code 0 once measured, whatever the figures; a `DreamSRError`'s own else."""
    from command import report

    options = arguments(words)
    return report(lambda: measure(options), text, options.json)


if __name__ == "__main__":
    sys.exit(main())
