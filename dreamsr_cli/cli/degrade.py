"""`dreamsr degrade`: good photos in, pairs of good and bad pictures out, for training and for evaluation."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dreamsr_cli.cli.console import make_display
from dreamsr_cli.cli.degrading import Degrading
from dreamsr_cli.cli.options import parse_setting, toml_table
from dreamsr_cli.errors import ConfigError

EPILOG = """
Examples:

dreamsr degrade photos/ -o pairs/ --crops 8  →  pairs/lq, pairs/hq (512 px), pairs/params.jsonl

dreamsr degrade photos/ -o mild/ --preset seesr-mild --captioner describe  →  captions.jsonl too

dreamsr degrade kodak/ -o kodak_x4/ --size 0 --preset bicubic  →  whole photos, names kept, the field's downscale

dreamsr degrade photos/ -o again/ --replay pairs/params.jsonl  →  the same bytes

dreamsr degrade photos/ -o erased/ --kind texture --crops 4  →  texture erased by the networks
"""

_PIXEL, _TEXTURE, _CROPS = "Kind pixel", "Kind texture", "Crops"


_NUMBERS = ("scale", "seed", "size", "crops", "batch", "workers")


def command(
    inputs: Annotated[list[str], typer.Argument(metavar="HQ", help="Good photos: files, folders, quoted patterns.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for lq/, hq/, params.jsonl, captions.jsonl.")],
    kind: Annotated[
        str | None, typer.Option(help="pixel (blur, noise, JPEG) or texture (erased by networks) (default pixel).")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of crops and degradations (default 42).")] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="realesrgan, seesr-pairs, seesr-mild, camera, soft, jpeg or bicubic (default seesr-pairs).",
            rich_help_panel=_PIXEL,
        ),
    ] = None,
    scale: Annotated[
        int | None, typer.Option(help="Sides of hq over those of lq, 1 to 8 (default 4).", rich_help_panel=_PIXEL)
    ] = None,
    usm: Annotated[
        str | None,
        typer.Option(help="Sharpen the good picture: on or off (default: the preset's).", rich_help_panel=_PIXEL),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, max=256, help="Processes (default: one per core); no byte depends on it.", rich_help_panel=_PIXEL
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=0, help="Side of a good crop in pixels; 0: the whole photo (default 512).", rich_help_panel=_CROPS
        ),
    ] = None,
    crops: Annotated[
        int | None, typer.Option(help="Pairs per photo, each cut at its own place (default 1).", rich_help_panel=_CROPS)
    ] = None,
    small: Annotated[
        str | None,
        typer.Option(
            help="Photos smaller than --size: skip, or shrink the crop to what there is (default skip).",
            rich_help_panel=_CROPS,
        ),
    ] = None,
    captioner: Annotated[
        str | None,
        typer.Option(
            help="none or describe: also write captions.jsonl (default none; texture: describe).",
            rich_help_panel=_CROPS,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Name or folder of the bundle that erases (default mini).", rich_help_panel=_TEXTURE),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, cuda:N, mps or xpu (default auto).", rich_help_panel=_TEXTURE)
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="auto, fp32, bf16 or fp16 (default auto).", rich_help_panel=_TEXTURE)
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, max=256, help="Crops per call of the networks (default 4).", rich_help_panel=_TEXTURE),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option("--replay", help="Make the pairs of this params.jsonl again; photos are found by their content."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the pairs that the folder holds.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per photo, and one for the set, on stdout.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no notes on stderr.")] = False,
) -> int:
    """Make training pairs from good photos, reproducible to the byte, or degraded copies for evaluation.

    The same photos, settings and versions give the same bytes, whatever the order, the interruptions and --workers. An
    interrupted command goes on when it is typed again.
    """
    flags = {
        "kind": kind,
        "preset": preset,
        "scale": scale,
        "seed": seed,
        "size": size,
        "crops": crops,
        "usm": usm,
        "small": small,
        "captioner": captioner,
        "model": model,
        "device": device,
        "precision": precision,
        "batch": batch,
        "workers": workers,
    }
    given = degrade_settings(flags, os.environ, Path.cwd())
    return Degrading(inputs, out.expanduser(), given, replay, overwrite, as_json, make_display(quiet)).run()


_SHARED = ("seed", "model", "device", "precision")
"""Settings that have a `DREAMSR_*` variable, those of `upscale`; the others mean something else there."""


def degrade_settings(flags: Mapping[str, Any], environ: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """What was given: flag > `DREAMSR_*` > table `[degrade]` of ./dreamsr.toml. `flags` holds None for what wasn't
    typed and names every setting. Raises `UsageError` naming the key or variable."""
    path = folder / "dreamsr.toml"
    given = toml_table(path, "degrade")
    for key, value in given.items():
        kind = int if key in _NUMBERS else str
        if key not in flags:
            near = difflib.get_close_matches(key, flags, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(flags))}"
            raise ConfigError(f"{path}: [degrade] has an unknown key {key!r}", hint)
        if type(value) is not kind:
            raise ConfigError(f"{path}: [degrade] {key} = {value!r} is no {kind.__name__}", "correct the value")
    for name in _SHARED:
        variable = f"DREAMSR_{name.upper()}"
        if text := environ.get(variable, "").strip():
            given[name] = parse_setting(int if name in _NUMBERS else str, text, variable)
    return given | {name: value for name, value in flags.items() if value is not None}
