"""FLUX.1-dev's sizes with random weights on a GPU: seconds, share of the peak and memory of both stages.

    python benchmarks/flux_full.py

Our sampler (1 + 16 steps, MM-ControlNet of 9 blocks once per tile, context cross-attention, LoRA of rank 256 in the
first step) and, with the same tiles and steps, the loop as one writes it over diffusers with its ControlNet in every
step. Diffusion only: no text encoders and no VAE, as in the paper's table 2. Where there is no GPU the same code runs
at reduced size (--reduced) and says so; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from random_flux import FluxSize

    from dreamsr_cli.models.text_encoder import TextEmbedding
    from dreamsr_cli.tiling import TileGrid

STRENGTH, GUIDANCE, SEED = 0.8, 3.5, 42
KEPT = 64 * 2**30
"""Bytes of control features that may be kept: all of them."""


def canvas(text: str) -> str:
    """ "WxH" in pixels, as argparse checks it."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 2560x1440")
    return f"{int(width)}x{int(height)}"


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--sizes", type=canvas, nargs="+", default=None, metavar="WxH", help="canvases (default 2560x1440 3840x2160)")
    add("--tiles", type=int, nargs="+", default=None, help="tile sides (default 512 1024); the loop has the first")
    add("--overlap", type=int, default=None, help="overlap in output pixels (default 64)")
    add("--steps", type=int, default=None, help="texture steps after the one of removal (default 16)")
    add("--tile-batch", type=int, default=4, help="tiles computed together (default 4)")
    add("--text", type=int, default=None, help="text tokens of every prompt (default 128)")
    add(
        "--plain-text",
        type=int,
        nargs="*",
        default=None,
        help="text tokens of the loop (default 128 512); none: no loop",
    )
    add("--precision", nargs="+", choices=("bf16", "fp8"), default=["bf16", "fp8"], help="of ours (default both)")
    add("--tiling", choices=("overlap", "shifted"), default="overlap", help="as in dreamsr upscale")
    add("--compile", action="store_true", help="torch.compile of our transformer blocks")
    add("--repeat", type=int, default=1, help="runs of each case after the one to warm up; the fastest counts")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    add("--reduced", action="store_true", help="small networks and canvases; what runs where there is no GPU")
    add("--json", action="store_true", help="one JSON object instead of text")
    return parser.parse_args(words)


def settle_defaults(options: argparse.Namespace, reduced: bool) -> None:
    """Fill in what wasn't typed."""
    small = {"sizes": ["160x96"], "tiles": [64, 96], "overlap": 16, "steps": 2, "text": 8, "plain_text": [8, 16]}
    full = {
        "sizes": ["2560x1440", "3840x2160"],
        "tiles": [512, 1024],
        "overlap": 64,
        "steps": 16,
        "text": 128,
        "plain_text": [128, 512],
    }
    for name, value in (small if reduced else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)


class Meter:
    """Seconds and peak memory on one device."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._cuda = torch.cuda if device.type == "cuda" else None
        self._device = device

    def start(self) -> None:
        """From here on."""
        gc.collect()
        if self._cuda:
            self._cuda.empty_cache()
            self._cuda.reset_peak_memory_stats(self._device)
            self._cuda.synchronize(self._device)
        self._began = time.perf_counter()

    def stop(self) -> tuple[float, int]:
        """(seconds, bytes at the peak: of the card, on a CPU of the process so far)."""
        if self._cuda:
            self._cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._began
        if self._cuda:
            return seconds, self._cuda.max_memory_allocated(self._device)
        return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Counts:
    """Operations of the cases, tile by tile: padding of a last batch is no use and isn't counted."""

    def __init__(self, size: FluxSize) -> None:
        from dreamsr_cli.counting import BlockSizes, ContextSizes

        self.transformer = BlockSizes.from_config(size.transformer)
        self.controlnet = BlockSizes.from_config(size.control)
        self.context = ContextSizes(size.features, size.heads * size.head_dim, size.head_dim, False)
        self.rank = size.lora_rank

    def ours(self, grid: TileGrid, tiling: str, text: int, steps: int) -> int:
        """Both stages: the ControlNet once per tile and stage (and per place of a moving grid)."""
        from dreamsr_cli.shifted_tiling import texture_layouts

        layouts = texture_layouts(grid, tiling)
        moving = layouts[0].grid
        removal = self._control(grid, text) + self._step(grid, text, self.rank)
        texture = min(len(layouts), steps) * self._control(moving, text) + steps * self._step(moving, text, 0)
        return removal + texture

    def plain(self, grid: TileGrid, text: int, steps: int) -> int:
        """Both networks in each of 1 + `steps` steps; no cross-attention, no LoRA."""
        from dreamsr_cli import counting

        tokens = _tokens(grid)
        each = sum(
            counting.transformer_flops(network, 1, tokens, text) for network in (self.transformer, self.controlnet)
        )
        return len(grid.tiles) * (1 + steps) * each

    def _control(self, grid: TileGrid, text: int) -> int:
        from dreamsr_cli import counting

        each = counting.transformer_flops(self.controlnet, 1, _tokens(grid), text)
        return len(grid.tiles) * (each + counting.keys_values_flops(self.context, 1, text))

    def _step(self, grid: TileGrid, text: int, rank: int) -> int:
        from dreamsr_cli import counting

        each = counting.transformer_flops(self.transformer, 1, _tokens(grid), text, rank)
        return len(grid.tiles) * (each + counting.context_flops(self.context, 1, text, text))


def _tokens(grid: TileGrid) -> int:
    return grid.tile_height // 16 * (grid.tile_width // 16)


def measure(options: argparse.Namespace, tell: Any) -> dict[str, Any]:
    """Run every case; `tell` gets each row when it is done. Raises `DreamSRError` for a device that isn't there."""
    import torch
    from random_flux import FULL, REDUCED, make_restorer, make_transformer, to_float8

    from dreamsr_cli.device import choose_device, choose_dtype, dtype_name
    from dreamsr_cli.machine import describe_machine
    from dreamsr_cli.models.restorer import blocks_of

    device = choose_device(options.device)
    reduced = options.reduced or device.type == "cpu"
    settle_defaults(options, reduced)
    size = REDUCED if reduced else FULL
    dtype = choose_dtype("auto", device)
    plain_name = dtype_name(dtype)
    machine = describe_machine(device, plain_name)
    counts, meter, rows = Counts(size), Meter(device), []

    def run(what: dict[str, Any], flops: int, precision: str, work: Any) -> None:
        row = {**what, "precision": precision, **_timed(work, options.repeat, meter)}
        rows.append(row | _fractions(row, flops, machine, precision))
        tell(rows[-1])

    transformer = make_transformer(size, device, dtype)
    canvases = [(name, *map(int, name.split("x"))) for name in options.sizes]
    if options.plain_text:
        from diffusers_loop import Peer
        from random_flux import make_peer_control

        missing = size.double - len(size.control_map)
        peer = Peer(transformer, make_peer_control(size, device, dtype), size.control_map + (None,) * missing)
        for name, width, height in canvases:
            for text in options.plain_text:
                grid = _grid(height, width, options.tiles[0], options.overlap)
                work = _plain(peer, grid, size, text, options, device, dtype)
                what = {"what": "diffusers", "size": name, "text": text, **_shape(grid), "steps": options.steps}
                run(what, counts.plain(grid, text, options.steps), plain_name, work)
        del peer, work
    restorer = make_restorer(transformer, size, device, dtype)
    for precision in (p for p in ("bf16", "fp8") if p in options.precision):
        if precision == "fp8":
            to_float8(restorer.dit.transformer)
            to_float8(restorer.controlnet)
        if options.compile:
            torch._dynamo.reset()
            for block in (*blocks_of(restorer.dit), *blocks_of(restorer.controlnet)):
                block.compile()
        for name, width, height in canvases:
            for tile in options.tiles:
                grid = _grid(height, width, tile, options.overlap)
                work = _ours(restorer, grid, size, options, device, dtype)
                what = {"what": "ours", "size": name, "text": options.text, **_shape(grid), "steps": options.steps}
                flops = counts.ours(grid, options.tiling, options.text, options.steps)
                run(what, flops, plain_name if precision == "bf16" else precision, work)
    return {
        "reduced": reduced,
        "machine": {"device": machine.name, "torch": torch.__version__, "threads": torch.get_num_threads()},
        "tile_batch": options.tile_batch,
        "tiling": options.tiling,
        "compile": options.compile,
        "parameters": sum(p.numel() for m in (restorer.dit, restorer.controlnet) for p in m.parameters()),
        "rows": rows,
    }


def _grid(height: int, width: int, tile: int, overlap: int) -> TileGrid:
    from dreamsr_cli.tiling import make_grid

    return make_grid(height, width, tile, overlap)


def _shape(grid: TileGrid) -> dict[str, int]:
    return {"tile": max(grid.tile_height, grid.tile_width), "overlap": grid.overlap, "tiles": len(grid.tiles)}


def _texts(
    grid: TileGrid, size: FluxSize, tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[TextEmbedding, list[TextEmbedding]]:
    """Random embeddings: the global one, and one for each tile."""
    import torch

    from dreamsr_cli.models.text_encoder import TextEmbedding

    generator = torch.Generator(device).manual_seed(SEED)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    def one() -> TextEmbedding:
        return TextEmbedding(drawn(1, tokens, size.text_width), drawn(1, size.pooled_width), None)

    return one(), [one() for _ in grid.tiles]


def _canvas(grid: TileGrid, size: FluxSize) -> Any:
    import numpy as np

    shape = (size.channels, grid.canvas_height // 8, grid.canvas_width // 8)
    return np.random.default_rng(SEED).standard_normal(shape, dtype=np.float32)


def _ours(
    restorer: Any,
    grid: TileGrid,
    size: FluxSize,
    options: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
) -> Any:
    """Both stages by our sampler, with its journal in a temporary folder as a run has it beside its result."""
    from dreamsr_cli.config import ControlConfig, SamplingConfig
    from dreamsr_cli.journal import Journal
    from dreamsr_cli.progress import SilentProgress
    from dreamsr_cli.sampler import ENCODE, Sampler, Texts

    texts, z_lq_CHW = Texts(*_texts(grid, size, options.text, device, dtype)), _canvas(grid, size)
    sampling = SamplingConfig(t_start=STRENGTH, guidance=GUIDANCE)
    control = ControlConfig(map=size.control_map, timestep="clean")

    def work(steps: int) -> None:
        with tempfile.TemporaryDirectory() as folder, Journal(Path(folder) / "flux.dreamsr", {}, 0) as journal:
            z_lq = journal.piece("z_lq", ENCODE, z_lq_CHW.shape)
            z_lq.append(z_lq_CHW)
            sampler = Sampler(
                restorer,
                grid,
                texts,
                sampling,
                control,
                options.tile_batch,
                journal,
                SilentProgress(),
                control_bytes=KEPT,
                tiling=options.tiling,
            )
            z_dr = sampler.remove(z_lq.finish())
            sampler.texture(z_dr, STRENGTH, steps, SEED, GUIDANCE)

    return work, options.steps


def _plain(
    peer: Any,
    grid: TileGrid,
    size: FluxSize,
    tokens: int,
    options: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
) -> Any:
    """The same over diffusers: one step for removal, then the texture steps."""
    from diffusers_loop import plain_texture

    from dreamsr_cli.sampler import Texts

    texts, z_CHW = Texts(*_texts(grid, size, tokens, device, dtype)), _canvas(grid, size)

    def work(steps: int) -> None:
        for count in (1, steps):
            plain_texture(peer, grid, texts, options.tile_batch, z_CHW, STRENGTH, count, GUIDANCE)

    return work, options.steps


def _timed(case: Any, repeat: int, meter: Meter) -> dict[str, Any]:
    """One run of few steps to warm up, then the fastest of `repeat`; or what made it impossible."""
    import torch

    work, steps = case
    try:
        work(min(steps, 2))
        measured = []
        for _ in range(repeat):
            meter.start()
            work(steps)
            measured.append(meter.stop())
    except torch.OutOfMemoryError:
        return {"seconds": None, "peak_memory": None, "failed": "out of memory"}
    return {"seconds": min(s for s, _ in measured), "peak_memory": max(m for _, m in measured)}


def _fractions(row: dict[str, Any], flops: int, machine: Any, precision: str) -> dict[str, Any]:
    """Operations, the floor at the device's peak and the share of it that was reached; None where no peak is known."""
    from dreamsr_cli.roofline import card_peak, peak

    at = peak(machine) if machine.device == "cpu" else card_peak(machine.name, precision)
    if precision == "fp8" and machine.device == "cpu":
        at = None
    seconds = row["seconds"]
    return {
        "flops": flops,
        "flops_per_second": None if seconds is None else flops / seconds,
        "peak": None if at is None else at.flops_per_second,
        "floor": None if at is None else flops / at.flops_per_second,
        "fraction": None if at is None or seconds is None else flops / seconds / at.flops_per_second,
    }


def main(words: list[str] | None = None) -> int:
    """Exit code 0 once measured, whatever the figures; a `DreamSRError`'s own else."""
    from command import report
    from flux_report import line, text

    options = arguments(words)

    def tell(row: dict[str, Any]) -> None:
        if not options.json:
            print(line(row, _card()), flush=True)

    return report(lambda: measure(options, tell), text, options.json)


def _card() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


if __name__ == "__main__":
    sys.exit(main())
