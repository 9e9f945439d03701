"""Settings of `dreamsr caption`: flags, `DREAMSR_*`, the `[caption]` table of ./dreamsr.toml, then the bundle.

What `upscale` has too is called the same in the environment, so both commands see one grid.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamsr_cli.cli.options import Layer, check_setting, flag, from_environ, from_flags, merge_layers, toml_table
from dreamsr_cli.config import CaptionConfig
from dreamsr_cli.errors import UsageError
from dreamsr_cli.plain_data import from_dict


@dataclass(frozen=True)
class CaptionRun:
    """What is captioned on which grid, and where the files go."""

    captioner: str | None = None
    """One of `CAPTIONERS` or a folder; None: the bundle's."""
    model: str | None = None
    """Name or folder of the bundle whose grid and captioner are the defaults; None: the built-in one."""
    scale: float | None = None
    """Factor of both sides; None: the bundle's, unless long_side or short_side is given."""
    long_side: int | None = None
    """Output pixels of the longer side, instead of scale."""
    short_side: int | None = None
    """Output pixels of the shorter side, instead of scale."""
    tile: int | None = None
    """Tile side in output pixels; 0: one tile."""
    overlap: int | None = None
    """Overlap in output pixels."""
    prompt: str | None = None
    """Global prompt typed by the user."""
    device: str = "auto"
    """"auto", "cpu", "cuda", "cuda:N", "mps" or "xpu"."""
    max_pixels: int | None = None
    """Most pixels of a photo that is opened, and of the canvas."""
    out: str | None = None
    """A file name (for one photo) or a folder; None: beside each photo."""
    overwrite: bool = False
    """Replace existing files."""
    skip_existing: bool = False
    """Leave existing files as they are."""


_EXCLUSIVE = (("scale", "long_side", "short_side"), ("overwrite", "skip_existing"))
_RANGES: dict[str, tuple[float, float]] = {
    "max_words": (1, 300),
    "tile_max_words": (1, 300),
    "batch": (1, 64),
    "tile_context": (0, 1024),
    "flat": (0, 1),
    "flat_colour": (0, 1),
    "alike": (0, 1),
}
_CLASSES = (CaptionConfig, CaptionRun)
_KINDS: dict[str, Any] = {name: kind for cls in _CLASSES for name, kind in typing.get_type_hints(cls).items()}


def caption_options(
    flags: Mapping[str, Any], environ: Mapping[str, str], folder: Path
) -> tuple[CaptionConfig, CaptionRun]:
    """Merge the layers and check every value; `flags` holds None for what wasn't typed.

    Raises `UsageError` (or its child `ConfigError`) naming the flag, variable or key, and what it may be.
    """
    layers = (_from_toml(folder / "dreamsr.toml"), from_environ(_KINDS, environ), from_flags(flags))
    values, origin = merge_layers(layers, _EXCLUSIVE)
    for name, value in values.items():
        _check(name, value, origin[name])
    config, run = (_pick(values, cls) for cls in _CLASSES)
    return CaptionConfig(**config), CaptionRun(**run)


def _from_toml(path: Path) -> Layer:
    table = toml_table(path, "caption")
    where = f"{path}: [caption]"
    both = {key: value for key, value in table.items() if key not in _KINDS}
    from_dict(CaptionRun, both, where)  # names the key that nobody knows
    values: dict[str, Any] = {}
    for cls in _CLASSES:
        part = _pick(table, cls)
        checked = from_dict(cls, part, where)
        values |= {key: getattr(checked, key) for key in part}
    return values, {name: f"{path.name}: {name}" for name in values}


def _check(name: str, value: Any, origin: str) -> None:
    if name in _RANGES:
        low, high = _RANGES[name]
        if not low <= value <= high:
            raise UsageError(f"{origin} {value} is out of range", f"use {low} to {high}")
    elif name in ("instruction", "tile_instruction") and not value.strip():
        raise UsageError(f"{origin} is empty", f"say what to describe after {flag(name)}, or leave it out")
    elif name == "quantize" and value not in ("none", "int8", "nf4"):
        raise UsageError(f"{origin} {value!r} is not known", "use one of: none, int8, nf4")
    else:
        check_setting(name, value, origin)


def _pick(values: Mapping[str, Any], cls: type[CaptionConfig | CaptionRun]) -> dict[str, Any]:
    return {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}
