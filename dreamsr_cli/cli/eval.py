"""`dreamsr eval`: score this program's results, baselines and anybody's, on public sets or your own photos."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from dreamsr_cli.cli.console import make_display
from dreamsr_cli.cli.eval_options import eval_options

EPILOG = """
Examples:

dreamsr eval --dataset RealSR --data-root sets/ --perceptual-weights weights/ -o runs/realsr

dreamsr eval --dataset RealSR --sr-dir OSEDiff=results/osediff --metrics psnr,ssim --channel y  →  score others' results

dreamsr eval --dataset pairs/ --model mini --steps 8 --limit 5  →  a folder with lq/ and hq/

dreamsr eval --dataset RealDeg --subset social.txt --metrics paper

dreamsr eval --compare runs/a runs/b  →  paired differences with intervals, nothing is upscaled

The data root can also be given as DREAMSR_DATA_ROOT, or data_root in table eval of ./dreamsr.toml.

The same command goes on after an interruption.
"""

_DATA, _SCORES, _METHOD, _FILES = "Photos", "Scores", "Restoration", "Results"


def command(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", help="More folders to --compare with.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="RealSR, DRealSR, RealLQ250, RealLR200, RealDeg, or a folder: lq/ and hq/, or photos alone.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    data_root: Annotated[
        str | None, typer.Option(help="Folder that holds the public sets.", rich_help_panel=_DATA)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first photos by name.", rich_help_panel=_DATA)] = None,
    subset: Annotated[
        str | None, typer.Option(help="Only the photos whose stems FILE lists.", rich_help_panel=_DATA, metavar="FILE")
    ] = None,
    strict_dataset: Annotated[
        bool | None,
        typer.Option("--strict-dataset", help="An incomplete public set is an error.", rich_help_panel=_DATA),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Name or folder of a model (default mini; none with --sr-dir); none: upscale nothing.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Folder of a training run laid over the model.", rich_help_panel=_METHOD)
    ] = None,
    sr_dir: Annotated[
        list[str] | None,
        typer.Option(help="Results to score, paired by name. Repeatable.", metavar="NAME=DIR", rich_help_panel=_DATA),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="bicubic (default), lanczos or none. Repeatable.", rich_help_panel=_SCORES),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="psnr, ssim, lpips, lpips-vgg, lpips-squeeze, niqe, delta-e, seam; with pyiqa: musiq, maniqa, "
            "maniqa-pipal, clipiqa+, clipiqa+_vitL14_512, dists. Or: default, paper, all.",
            rich_help_panel=_SCORES,
        ),
    ] = None,
    perceptual_weights: Annotated[
        str | None,
        typer.Option(help="Folder with the weights of LPIPS and NIQE.", metavar="DIR", rich_help_panel=_SCORES),
    ] = None,
    crop_border: Annotated[
        int | None,
        typer.Option(help="Pixels cut from each side for PSNR and SSIM (default 0).", rich_help_panel=_SCORES),
    ] = None,
    channel: Annotated[
        list[str] | None,
        typer.Option(help="rgb or y, of PSNR and SSIM (default: a column each). Repeatable.", rich_help_panel=_SCORES),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(help="Folders of earlier runs: paired differences.", metavar="RUN...", rich_help_panel=_SCORES),
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="Factor, for a folder of your own (default 4).", rich_help_panel=_METHOD)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Texture steps, 1 to 100 (default: the model's).", rich_help_panel=_METHOD)
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="Start of texture steps, 0 to 1 (default: the model's).", rich_help_panel=_METHOD),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance of models that have it (FLUX).", rich_help_panel=_METHOD)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise (default 42).", rich_help_panel=_METHOD)] = None,
    captioner: Annotated[
        str | None, typer.Option(help="As in dreamsr upscale (default describe).", rich_help_panel=_METHOD)
    ] = None,
    prompt_mode: Annotated[
        str | None, typer.Option(help="both (default), global or local text.", rich_help_panel=_METHOD)
    ] = None,
    color_fix: Annotated[
        str | None, typer.Option(help="wavelet, adain or none (default wavelet).", rich_help_panel=_METHOD)
    ] = None,
    looks: Annotated[
        str | None,
        typer.Option(help="auto (default), clean, compressed or damaged.", rich_help_panel=_METHOD),
    ] = None,
    consistency: Annotated[
        float | None, typer.Option(help="As in dreamsr upscale, 0 to 1.", rich_help_panel=_METHOD)
    ] = None,
    texture: Annotated[
        float | None, typer.Option(help="As in dreamsr upscale, 0 to 1.", rich_help_panel=_METHOD)
    ] = None,
    grain: Annotated[float | None, typer.Option(help="As in dreamsr upscale, 0 to 2.", rich_help_panel=_METHOD)] = None,
    removal: Annotated[
        bool | None,
        typer.Option(
            "--removal/--no-removal",
            help="Stage 1, remove degradations (default: where the model has no cleaner or enlarger for the photo).",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    tile: Annotated[
        int | None, typer.Option(help="Tile side in output pixels; 0: one tile.", rich_help_panel=_METHOD)
    ] = None,
    overlap: Annotated[
        int | None, typer.Option(help="Overlap of tiles in output pixels.", rich_help_panel=_METHOD)
    ] = None,
    tiling: Annotated[
        str | None, typer.Option(help="Tiles of texture steps: overlap or shifted.", rich_help_panel=_METHOD)
    ] = None,
    tile_batch: Annotated[int | None, typer.Option(help="Tiles computed together.", rich_help_panel=_METHOD)] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, cuda:N, mps or xpu (default auto).", rich_help_panel=_METHOD)
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="auto, fp32, bf16 or fp16 (default auto).", rich_help_panel=_METHOD)
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("-o", "--out", help="Folder of the run (default eval-DATASET).", rich_help_panel=_FILES),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Drop what -o holds; begin anew.", rich_help_panel=_FILES)
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="A JSON object per photo on stdout, and one summary.", rich_help_panel=_FILES),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="No progress and no notes on stderr.", rich_help_panel=_FILES)
    ] = False,
) -> int:
    """Score results: PSNR, SSIM, LPIPS, NIQE and more, with every definition said, beside the paper's figures."""
    given = dict(locals())
    others = ("runs", "compare", "restart", "as_json", "quiet")
    settings, shared = eval_options({k: v for k, v in given.items() if k not in others}, os.environ, Path.cwd())
    from dreamsr_cli.cli.evaluating import Evaluating

    compared = [Path(text).expanduser() for text in (*(compare or ()), *(runs or ()))]
    if runs and not compare:
        from dreamsr_cli.errors import UsageError

        raise UsageError(f"unexpected argument {runs[0]}", "write --compare before runs, --dataset before a set's name")
    return Evaluating(settings, shared, compared, restart, as_json, make_display(quiet)).run()
