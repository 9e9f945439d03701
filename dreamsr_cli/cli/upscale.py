"""`dreamsr upscale`: photos in, larger restored photos out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dreamsr_cli.cli.console import Display, explain, make_display, report, stop_if_asked
from dreamsr_cli.cli.options import RunConfig, UpscaleOptions, upscale_options
from dreamsr_cli.cli.photos import (
    EXTENSIONS,
    Found,
    Job,
    Naming,
    find_photos,
    format_of,
    out_is_file,
    plan_jobs,
    prepare_target,
    refuse_depth,
)
from dreamsr_cli.cli.plan import Planner, plan_table
from dreamsr_cli.config import OutputConfig
from dreamsr_cli.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_SOME_FAILED,
    DreamSRError,
    UsageError,
)
from dreamsr_cli.weights import BUILTIN, BUILTIN_FOLDER, lock_entry, verify

if TYPE_CHECKING:
    from dreamsr_cli.models.bundle import Bundle

EPILOG = """
Examples:

dreamsr upscale cat.jpg  →  cat_x4.jpg beside it

dreamsr upscale cat.jpg -o big.png --scale 2.5

dreamsr upscale holiday/ -o restored/ --long-side 7680 --skip-existing

dreamsr upscale 'scans/*.tif' -o out/ --strength 0  →  restored, no texture added

dreamsr upscale a.jpg b.jpg -o out/ --json | jq .output

dreamsr upscale scan.tif --dry-run  →  tiles, memory, disk and time, nothing written

A setting can also be given in the environment (DREAMSR_TILE=512) or in table upscale of ./dreamsr.toml (tile = 512).

A flag wins over the environment, and that over the file.
"""

_SIZE, _METHOD, _TILES, _FILES = "Size", "Restoration", "Tiles and machine", "Results"


def command(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT", help="Photos, folders, or quoted patterns.")],
    out: Annotated[
        str | None,
        typer.Option("-o", "--out", help="A folder, or the file for one photo.", rich_help_panel=_FILES),
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="Factor of both sides, 1 to 8 (default 4).", rich_help_panel=_SIZE)
    ] = None,
    long_side: Annotated[
        int | None, typer.Option(help="Longer side in output pixels, instead of --scale.", rich_help_panel=_SIZE)
    ] = None,
    short_side: Annotated[
        int | None, typer.Option(help="Shorter side in output pixels, instead of --scale.", rich_help_panel=_SIZE)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Texture steps, 1 to 100 (default 16).", rich_help_panel=_METHOD)
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="Start of texture steps, 0 (no new texture) to 1 (default 0.8).", rich_help_panel=_METHOD),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance of models that have it (FLUX).", rich_help_panel=_METHOD)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise (default 42).", rich_help_panel=_METHOD)] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What the whole photo shows, instead of the captioner.", rich_help_panel=_METHOD)
    ] = None,
    captioner: Annotated[
        str | None, typer.Option(help="describe or none (default describe).", rich_help_panel=_METHOD)
    ] = None,
    color_fix: Annotated[
        str | None, typer.Option(help="wavelet, adain or none (default wavelet).", rich_help_panel=_METHOD)
    ] = None,
    removal: Annotated[
        bool | None,
        typer.Option("--removal/--no-removal", help="Stage 1, remove degradations.", rich_help_panel=_METHOD),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Name or folder of a model (default mini).", rich_help_panel=_METHOD)
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Folder of a training run laid over the model.", rich_help_panel=_METHOD)
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(
            help="Tile side in output pixels, a multiple of 16; 0: one tile (default 512).", rich_help_panel=_TILES
        ),
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option(help="Overlap of tiles in output pixels, a multiple of 16 (default 64).", rich_help_panel=_TILES),
    ] = None,
    tile_batch: Annotated[
        int | None, typer.Option(help="Tiles computed together, 1 to 64 (default 4).", rich_help_panel=_TILES)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, cuda:N, mps or xpu (default auto).", rich_help_panel=_TILES)
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="auto, fp32, bf16 or fp16 (default auto).", rich_help_panel=_TILES)
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="auto (as the name or the input), png, jpg, webp, tiff or avif.", rich_help_panel=_FILES),
    ] = None,
    quality: Annotated[
        int | None, typer.Option(help="JPEG, WebP and AVIF quality, 1 to 100 (default 95).", rich_help_panel=_FILES)
    ] = None,
    bit_depth: Annotated[
        str | None,
        typer.Option(
            help="auto (16 for 16-bit photos as PNG or TIFF, else 8), 8 or 16 per channel.", rich_help_panel=_FILES
        ),
    ] = None,
    strip_metadata: Annotated[
        bool | None,
        typer.Option(
            "--strip-metadata/--keep-metadata",
            help="Write no EXIF (GPS), XMP, DPI and record of how it was made; the colour profile stays.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            help="Most pixels of a result, and of a photo that is opened (default 2.5 and 1 billion).",
            rich_help_panel=_SIZE,
        ),
    ] = None,
    suffix: Annotated[
        str | None,
        typer.Option(help="Added to names; {scale} is the factor (default _x{scale}).", rich_help_panel=_FILES),
    ] = None,
    overwrite: Annotated[
        bool | None,
        typer.Option("--overwrite/--no-overwrite", help="Replace existing results.", rich_help_panel=_FILES),
    ] = None,
    skip_existing: Annotated[
        bool | None,
        typer.Option("--skip-existing/--no-skip-existing", help="Keep existing results.", rich_help_panel=_FILES),
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="Keep a journal beside the result, so that an interrupted run goes on [default: resume].",
            rich_help_panel=_FILES,
        ),
    ] = None,
    restart: Annotated[
        bool | None,
        typer.Option("--restart", help="Drop what an interrupted run left; begin anew.", rich_help_panel=_FILES),
    ] = None,
    backoff: Annotated[
        bool | None,
        typer.Option(
            "--backoff/--no-backoff",
            help="Out of GPU memory: go on with smaller batches, then offload [default: backoff].",
            rich_help_panel=_TILES,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say what it would take (tiles, memory, disk, time); write nothing.",
            rich_help_panel=_FILES,
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per photo on stdout.", rich_help_panel=_FILES)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="No progress and no notes on stderr.", rich_help_panel=_FILES)
    ] = False,
) -> int:
    """Restore and enlarge photos with the DreamSR method, on any machine, without a network."""
    given = dict(locals())
    flags = {name: value for name, value in given.items() if name not in ("inputs", "dry_run", "as_json", "quiet")}
    options = upscale_options(flags, os.environ, Path.cwd())
    return Upscaling(inputs, options, as_json, make_display(quiet), dry_run).run()


class Upscaling:
    """One run of the command: finds, plans, calls the engine photo by photo, tells and counts."""

    def __init__(
        self, inputs: list[str], options: UpscaleOptions, as_json: bool, display: Display, dry_run: bool = False
    ) -> None:
        self.inputs, self.options, self.as_json, self.display = inputs, options, as_json, display
        self.dry_run = dry_run
        self.out = os.path.expanduser(options.run.out) if options.run.out else None
        self.done = self.failed = self.total = 0

    def run(self) -> int:
        """Upscale everything; the exit code. Raises `DreamSRError` only for what concerns every photo."""
        try:
            self._run()
        except KeyboardInterrupt:
            print(f"interrupted: {self.done} of {self.total} photos done; the same command goes on", file=sys.stderr)
            return EXIT_INTERRUPTED
        if not self.failed:
            return EXIT_DONE
        if self.total > 1:
            self.display.note(f"{self.done} of {self.total} photos done, {self.failed} failed")
        return EXIT_SOME_FAILED if self.done else EXIT_FAILED

    def _run(self) -> None:
        from dreamsr_cli.images import is_photo_name

        found = find_photos(self.inputs, Path(self.out) if self.out else None, is_photo_name)
        is_file = out_is_file(self.out, found, is_photo_name)
        output = self._output(is_file)
        self.total = len(found)
        if all(item.problem for item in found):
            for item in found:
                self._tell(item, item.problem)
            return
        silence_libraries()
        from dreamsr_cli.engine import check_settings

        bundle = open_verified_bundle(self.options.run, check=not self.dry_run)
        check_settings(self.options.config, bundle)
        planner = Planner(bundle, self.options.config, output) if self.dry_run else None
        out = Path(self.out) if self.out else None
        naming = Naming(out, is_file, output.format, output.suffix, self._factor(bundle.config.scale))
        plan = plan_jobs(found, naming)
        refuse_depth(plan, output.bit_depth)
        self.total = len(plan)
        for number, entry in enumerate(plan, start=1):
            stop_if_asked()
            if isinstance(entry, Found):
                self._tell(entry, entry.problem)
                continue
            with self.display.photo(f"[{number}/{self.total}] {entry.source.name}"):
                outcome = self._plan(entry, planner) if planner else self._upscale(entry, bundle, output)
            self._tell(entry, outcome)

    def _output(self, is_file: bool) -> OutputConfig:
        """The output settings; with `-o FILE` its extension decides the format."""
        output = self.options.output
        if not is_file or self.out is None:
            return output
        if self.options.typed("suffix"):
            raise UsageError("--suffix has no meaning with -o FILE", "leave out --suffix, or name a folder after -o")
        if self.options.typed("format") and output.format not in ("auto", format_of(Path(self.out))):
            hint = f"end the name in {EXTENSIONS[output.format][0]}, or leave out --format"
            raise UsageError(f"--format {output.format} contradicts -o {self.out}", hint)
        return replace(output, format="auto")

    def _factor(self, bundle_scale: int) -> Callable[[Path], float]:
        config = self.options.config

        def factor(photo: Path) -> float:
            if config.long_side is None and config.short_side is None:
                return config.scale or bundle_scale
            sides = header_size(photo)
            if config.long_side is not None:
                return config.long_side / max(sides)
            return (config.short_side or 0) / min(sides)

        return factor

    def _upscale(self, job: Job, bundle: Bundle, output: OutputConfig) -> dict[str, Any] | DreamSRError:
        from dreamsr_cli.engine import upscale

        try:
            if not prepare_target(job, output.overwrite, output.skip_existing):
                return {"input": str(job.source), "output": str(job.target), "skipped": True}
            return upscale(job.source, job.target, bundle, self.options.config, output, self.display).to_json()
        except UsageError:
            raise  # it would be wrong for every photo
        except Exception as error:
            return explain(error, f"upscaling {job.source}")

    def _plan(self, job: Job, planner: Planner) -> dict[str, Any] | DreamSRError:
        try:
            return planner.plan(job)
        except UsageError:
            raise  # it would be wrong for every photo
        except Exception as error:
            return explain(error, f"planning {job.source}")

    def _tell(self, entry: Job | Found, outcome: dict[str, Any] | DreamSRError | None) -> None:
        """Result on stdout, or error on stderr (and, with --json, on stdout as well); counts it."""
        if isinstance(outcome, dict):
            self.done += 1
            text = plan_table(outcome) if self.dry_run else outcome["output"]
            print(json.dumps(outcome) if self.as_json else text, flush=True)
        elif outcome is not None:
            self.failed += 1
            report(outcome)
            if self.as_json:
                failure = {"input": str(entry.source), "error": outcome.message, "hint": outcome.hint}
                print(json.dumps({**failure, "exit_code": outcome.exit_code}), flush=True)


def header_size(photo: Path) -> tuple[int, int]:
    """Width and height, without decoding the pixels. Raises `InputError`."""
    from dreamsr_cli.images import read_info

    info = read_info(photo)
    return info.width, info.height


def open_verified_bundle(run: RunConfig, check: bool = True) -> Bundle:
    """The bundle that `--model` and `--weights` name; the built-in one is checked against weights.lock first, unless
    its weights are not to be read at all."""
    from dreamsr_cli.models.bundle import open_bundle

    model = run.model or BUILTIN
    if model == BUILTIN and check:
        verify(BUILTIN_FOLDER, lock_entry(BUILTIN))
    return open_bundle(model, run.weights)


def silence_libraries() -> None:
    """Keep diffusers' and transformers' import-time remarks off stderr; what the user has set stays."""
    for variable in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
