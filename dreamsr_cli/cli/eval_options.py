"""Settings of `dreamsr eval` from flags, environment and the `[eval]` table of ./dreamsr.toml.

Those that it shares with `upscale` (tile, steps, ...) go through `options.py`, with the same ranges and messages.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamsr_cli.cli.options import UpscaleOptions, toml_table, upscale_options
from dreamsr_cli.config import AUTO
from dreamsr_cli.errors import ConfigError, UsageError
from dreamsr_cli.plain_data import from_dict

SHARED = (
    "model",
    "weights",
    "out",
    "scale",
    "tile",
    "overlap",
    "tiling",
    "tile_batch",
    "steps",
    "strength",
    "guidance",
    "seed",
    "captioner",
    "prompt_mode",
    "color_fix",
    "looks",
    "consistency",
    "texture",
    "grain",
    "removal",
    "precision",
    "device",
)
"""Settings that mean the same as in `upscale`."""
NO_MODEL = "none"
"""`--model none`: nothing is upscaled."""
_NAME = re.compile(r"[\w .+@()=-]+")


@dataclass(frozen=True)
class EvalSettings:
    """What is scored, and by what."""

    dataset: str | None = None
    """A public set's name, or a folder."""
    data_root: str | None = None
    """Folder that holds the public sets."""
    perceptual_weights: str | None = None
    """Folder with weights of LPIPS and NIQE."""
    metrics: str = "default"
    """Names, separated by commas."""
    channel: tuple[str, ...] = ("rgb", "y")
    """Of PSNR and SSIM."""
    crop_border: int = 0
    """Pixels cut from each side before PSNR and SSIM."""
    baseline: tuple[str, ...] = ("bicubic",)
    """"bicubic", "lanczos", or "none" alone."""
    sr_dir: tuple[str, ...] = ()
    """NAME=DIR, or DIR."""
    limit: int | None = None
    """Score the first photos only."""
    subset: str | None = None
    """File of stems to score."""
    strict_dataset: bool = False
    """An incomplete public set is an error."""


_VARIABLES = {"data_root": "DREAMSR_DATA_ROOT", "perceptual_weights": "DREAMSR_PERCEPTUAL_WEIGHTS"}


def eval_options(
    flags: Mapping[str, Any], environ: Mapping[str, str], folder: Path
) -> tuple[EvalSettings, UpscaleOptions]:
    """Merge the layers: flag > environment > the `[eval]` table of `folder`/dreamsr.toml > the defaults above.

    `flags` holds None (or an empty list) for what wasn't typed. Raises `UsageError` naming flag, variable or key.
    """
    path = folder / "dreamsr.toml"
    table = toml_table(path, "eval")
    known = {f.name for f in dataclasses.fields(EvalSettings)} | set(SHARED)
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            raise ConfigError(f"{path}: [eval] has an unknown key {key!r}", hint)
    typed = {name: value for name, value in flags.items() if value not in (None, [], ())}
    own = {key: value for key, value in table.items() if key not in SHARED}
    if isinstance(own.get("metrics"), list):
        own["metrics"] = ",".join(map(str, own["metrics"]))
    for key in ("data_root", "perceptual_weights"):
        if isinstance(own.get(key), str):
            own[key] = str(folder / Path(own[key]).expanduser())
    own |= {key: environ[variable].strip() for key, variable in _VARIABLES.items() if environ.get(variable, "").strip()}
    own |= {key: value for key, value in typed.items() if key not in SHARED}
    settings = from_dict(EvalSettings, own, f"{path}: [eval]")
    _check(settings)
    return settings, _shared(table, typed, environ)


def _shared(table: Mapping[str, Any], typed: Mapping[str, Any], environ: Mapping[str, str]) -> UpscaleOptions:
    variables = {f"DREAMSR_{name.upper()}": name for name in SHARED}
    texts = {variable: environ[variable] for variable in variables if environ.get(variable, "").strip()}
    covered = {variables[variable] for variable in texts}
    filed = {key: value for key, value in table.items() if key in SHARED and key not in covered}
    # The [upscale] table belongs to another command, so no file is read here.
    values = {**filed, **{key: value for key, value in typed.items() if key in SHARED}}
    options = upscale_options(values, texts, Path(os.devnull))
    if options.config.tile == AUTO:
        what = "chooses by photo, and a comparison wants one size"
        raise UsageError(f"{options.origin['tile']} auto {what}", "give a number of pixels")
    return options


def _check(settings: EvalSettings) -> None:
    for name in settings.channel:
        if name not in ("rgb", "y"):
            raise UsageError(f"--channel {name} is not known", "use rgb or y, or both: --channel rgb --channel y")
    for name in settings.baseline:
        if name not in ("bicubic", "lanczos", "none"):
            raise UsageError(f"--baseline {name} is not known", "use bicubic, lanczos or none")
    if "none" in settings.baseline and len(set(settings.baseline)) > 1:
        raise UsageError("--baseline none contradicts the other baselines", "leave one of them out")
    if settings.crop_border < 0:
        raise UsageError(f"--crop-border {settings.crop_border} is below 0", "use 0 or more")
    if settings.limit is not None and settings.limit < 1:
        raise UsageError(f"--limit {settings.limit} leaves no photo", "use 1 or more")


def split_sr_dir(text: str) -> tuple[str, Path]:
    """(name, folder) of "NAME=DIR" or "DIR". `UsageError` for a name that can't head a column, or no such folder."""
    name, equals, rest = text.partition("=")
    if not equals or Path(text).is_dir():
        name, rest = "", text
    folder = Path(rest).expanduser()
    if not folder.is_dir():
        raise UsageError(f"--sr-dir {text}: {folder} is not a folder", "give NAME=DIR, DIR holding the results")
    name = name or folder.resolve().name
    if not _NAME.fullmatch(name) or name.strip(" .") == "":
        raise UsageError(f"--sr-dir: {name!r} can't name a method", "use letters, digits, spaces and .+-_@()")
    return name, folder
