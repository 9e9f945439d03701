"""`dreamsr caption`: a prompts file for each photo, with a text for the whole and one for every tile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from dreamsr_cli.cli.caption_options import caption_options
from dreamsr_cli.cli.captioning_run import CaptioningRun
from dreamsr_cli.cli.console import make_display

EPILOG = """
Examples:

dreamsr caption cat.jpg  →  cat.jpg.prompts.json beside it; edit it, then:

dreamsr upscale cat.jpg --prompts cat.jpg.prompts.json

dreamsr caption holiday/ -o texts/ --captioner llava-onevision-0.5b --skip-existing

dreamsr caption cat.jpg -o cat.json --captioner llava-1.5-7b --quantize nf4 --device cuda

dreamsr caption scan.tif --scale 2 --tile 1024 --captioner /models/my-llava --batch 4

dreamsr caption cat.jpg --tile-instruction 'Name the fabrics in this part of a photo.' --tile-max-words 12

LLaVA weights are fetched once: dreamsr fetch-weights llava-onevision-0.5b. The describer (describe) needs none.

A setting can also be given in the environment (DREAMSR_TILE=512) or in table caption of ./dreamsr.toml (tile = 512).
"""

_TEXT, _GRID, _FILES = "Texts", "Size and tiles, as for upscale", "Machine and files"


def command(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT", help="Photos, folders, or quoted patterns.")],
    out: Annotated[
        str | None,
        typer.Option("-o", "--out", help="A folder, or the .json file for one photo.", rich_help_panel=_FILES),
    ] = None,
    captioner: Annotated[
        str | None,
        typer.Option(
            help="describe, none, llava-1.5-7b, llava-onevision-0.5b, or a LLaVA folder (default: the model's).",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    instruction: Annotated[
        str | None, typer.Option(help="What a LLaVA is asked about the whole photo.", rich_help_panel=_TEXT)
    ] = None,
    tile_instruction: Annotated[
        str | None, typer.Option(help="What a LLaVA is asked about a tile.", rich_help_panel=_TEXT)
    ] = None,
    max_words: Annotated[
        int | None, typer.Option(help="Most words about the photo, 1 to 300 (default 60).", rich_help_panel=_TEXT)
    ] = None,
    tile_max_words: Annotated[
        int | None, typer.Option(help="Most words about a tile, 1 to 300 (default 30).", rich_help_panel=_TEXT)
    ] = None,
    tile_context: Annotated[
        int | None,
        typer.Option(
            help="Output pixels around a tile that a LLaVA sees too, 0 to 1024 (default 64).", rich_help_panel=_TEXT
        ),
    ] = None,
    share: Annotated[
        bool | None,
        typer.Option(
            "--share/--no-share",
            help="Caption flat tiles, and tiles that look alike, once (the default).",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="What the whole photo shows, instead of the captioner.", rich_help_panel=_TEXT
        ),
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="Factor of both sides, 1 to 8 (default 4).", rich_help_panel=_GRID)
    ] = None,
    long_side: Annotated[
        int | None, typer.Option(help="Longer side in output pixels, instead of --scale.", rich_help_panel=_GRID)
    ] = None,
    short_side: Annotated[
        int | None, typer.Option(help="Shorter side in output pixels, instead of --scale.", rich_help_panel=_GRID)
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(
            help="Tile side in output pixels, a multiple of 16; 0: one tile (default 512).", rich_help_panel=_GRID
        ),
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option(help="Overlap of tiles in output pixels, a multiple of 16 (default 64).", rich_help_panel=_GRID),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model whose defaults these are, by name or folder (default mini).", rich_help_panel=_GRID),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(help="Tiles that a LLaVA sees together, 1 to 64 (default 8).", rich_help_panel=_FILES),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(help="none, int8 or nf4: a LLaVA in 8 or 4 bits, with bitsandbytes.", rich_help_panel=_FILES),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, cuda:N, mps or xpu (default auto).", rich_help_panel=_FILES)
    ] = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            help="Most pixels of a result, and of a photo that is opened (default 2.5 and 1 billion).",
            rich_help_panel=_FILES,
        ),
    ] = None,
    overwrite: Annotated[
        bool | None, typer.Option("--overwrite/--no-overwrite", help="Replace existing files.", rich_help_panel=_FILES)
    ] = None,
    skip_existing: Annotated[
        bool | None,
        typer.Option("--skip-existing/--no-skip-existing", help="Keep existing files.", rich_help_panel=_FILES),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per photo on stdout.", rich_help_panel=_FILES)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="No progress and no notes on stderr.", rich_help_panel=_FILES)
    ] = False,
) -> int:
    """Describe photos and every tile of their results, into files that people can read and edit.

    An interrupted run goes on at the batch of tiles where it stopped when the same command is typed again.
    """
    given = dict(locals())
    flags = {name: value for name, value in given.items() if name not in ("inputs", "as_json", "quiet")}
    config, run = caption_options(flags, os.environ, Path.cwd())
    return CaptioningRun(inputs, config, run, as_json, make_display(quiet)).run()
