"""`dreamsr upscale`: photos in, larger restored photos out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from dreamsr_cli.cli.console import make_display
from dreamsr_cli.cli.options import parse_setting, upscale_options
from dreamsr_cli.cli.upscaling import Upscaling

EPILOG = """
Examples:

dreamsr upscale cat.jpg  →  cat_x4.jpg beside it

dreamsr upscale cat.jpg -o big.png --scale 2.5

dreamsr upscale holiday/ -o restored/ --long-side 7680 --skip-existing

dreamsr upscale 'scans/*.tif' -o out/ --strength 0  →  restored, no texture added

dreamsr upscale a.jpg b.jpg -o out/ --json | jq .output

dreamsr upscale cat.jpg --tile-prompt '640,200=a red brick wall'  →  a text for one place

dreamsr upscale cat.jpg --prompts cat.jpg.prompts.json  →  texts from a file, see docs/prompts.md

dreamsr upscale scan.tif --dry-run  →  tiles, memory, disk and time, nothing written

dreamsr upscale scan.tif --tile auto --tiling shifted  →  the fewest operations

A setting can also be given in the environment (DREAMSR_TILE=512) or in table upscale of ./dreamsr.toml (tile = 512).

A flag wins over the environment, and that over the file.
"""

_SIZE, _METHOD, _TEXT, _TILES, _FILES = "Size", "Restoration", "Prompts", "Tiles and machine", "Results"


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
        int | None, typer.Option(help="Texture steps, 1 to 100 (default: the model's).", rich_help_panel=_METHOD)
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="Start of texture steps, 0 (no new texture) to 1 (default: the model's).", rich_help_panel=_METHOD
        ),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance of models that have it (FLUX).", rich_help_panel=_METHOD)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise (default 42).", rich_help_panel=_METHOD)] = None,
    color_fix: Annotated[
        str | None, typer.Option(help="wavelet, adain or none (default wavelet).", rich_help_panel=_METHOD)
    ] = None,
    looks: Annotated[
        str | None,
        typer.Option(
            help="The photos: auto (default), clean, compressed (clean but for a fair JPEG) or damaged.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    consistency: Annotated[
        float | None,
        typer.Option(
            help="Agree with the photo when shrunk again, 0 to 1 (default: by its looks).",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    texture: Annotated[
        float | None,
        typer.Option(
            help="How much of what stage 2 adds is kept: 0 (none, fastest) to 1 (default: the model's).",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    grain: Annotated[
        float | None,
        typer.Option(
            help="Finest texture, from the seed: 0 (none) to 2 (default: the model's; 0 with --strength 0).",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    removal: Annotated[
        bool | None,
        typer.Option(
            "--removal/--no-removal",
            help="Stage 1, remove degradations (default: where the model has no cleaner or enlarger for the photo).",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Name or folder of a model (default mini).", rich_help_panel=_METHOD)
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="RUN|REPO",
            help="A training run's folder, or org/name[@revision] on the hub, laid over the model.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DIR",
            help="The photo's prompts file, or a folder with one for each photo.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    prompt_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="A folder with texts for some photos: NAME.prompts.json, STEM.json or STEM.txt.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What the whole photo shows (global prompt).", rich_help_panel=_TEXT),
    ] = None,
    tile_prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X,Y=TEXT",
            help="What is to be seen in the tiles that contain this output pixel; may be repeated.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    prompt_mode: Annotated[
        str | None,
        typer.Option(
            help="both (global and local), or global or local for both networks (default both).",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    captioner: Annotated[
        str | None,
        typer.Option(
            help="describe, none, llava-1.5-7b, llava-onevision-0.5b or a folder (default describe).",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    save_prompts: Annotated[
        bool | None,
        typer.Option(
            "--save-prompts/--no-save-prompts",
            help="Write the prompts that were used beside the result, to edit and run again.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    report: Annotated[
        bool | None,
        typer.Option(
            "--report/--no-report",
            help="Also write a page beside the result: where it differs from its photo, which tiles to look at.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    tile: Annotated[
        str | None,
        typer.Option(
            metavar="PIXELS|auto",
            help="Tile side in output pixels, a multiple of 16; 0: one tile; auto: fewest operations (default 512).",
            rich_help_panel=_TILES,
        ),
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option(help="Overlap of tiles in output pixels, a multiple of 16 (default 64).", rich_help_panel=_TILES),
    ] = None,
    tiling: Annotated[
        str | None,
        typer.Option(
            help="Tiles of texture steps: overlap, or shifted: side by side, moving by --overlap (default overlap).",
            rich_help_panel=_TILES,
        ),
    ] = None,
    tile_batch: Annotated[
        int | None,
        typer.Option(
            help="Tiles computed together, 1 to 64 (default: up to 4, what fills the last batch; 1 on small CPUs).",
            rich_help_panel=_TILES,
        ),
    ] = None,
    text_bucket: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="Tokens that prompts are padded to, and cut at (default: the smallest bucket that holds the longest).",
            rich_help_panel=_TILES,
        ),
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Translate the networks first (a minute or more, once per machine), then run faster.",
            rich_help_panel=_TILES,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, cuda:N, mps or xpu (default auto).", rich_help_panel=_TILES)
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="auto, fp32, bf16 or fp16 (default auto).", rich_help_panel=_TILES)
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            help="Weights of transformer and T5: none, int8, fp8 (torchao) or nf4 (bitsandbytes, GPU); default none.",
            rich_help_panel=_TILES,
        ),
    ] = None,
    offload: Annotated[
        str | None,
        typer.Option(
            help="What waits in RAM: none, model (networks take turns on the card) or block (default none).",
            rich_help_panel=_TILES,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT",
            help="Memory of the card, such as 24GB: chooses --quantize, --offload and --tile-batch, and says so.",
            rich_help_panel=_TILES,
        ),
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
    flags["tile"] = None if tile is None else parse_setting(int | Literal["auto"] | None, tile.strip(), "--tile")
    flags["tile_prompt"] = tuple(tile_prompt) if tile_prompt else None
    options = upscale_options(flags, os.environ, Path.cwd())
    return Upscaling(inputs, options, as_json, make_display(quiet), dry_run).run()
