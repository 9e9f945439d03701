"""Settings from flags, environment and ./dreamsr.toml, merged into the config dataclasses.

Precedence: flag > `DREAMSR_*` environment > the `[upscale]` table of ./dreamsr.toml > the bundle > config.py. The last
two aren't known here: a setting that nobody gave keeps the dataclass's default; None there means "the bundle decides".
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dreamsr_cli.config import (
    AUTO,
    CAPTIONERS,
    LOOKS,
    OFFLOADS,
    PROMPT_MODES,
    QUANTIZATIONS,
    TILINGS,
    OutputConfig,
    UpscaleConfig,
    is_captioner,
    parse_memory,
)
from dreamsr_cli.errors import ConfigError, UsageError
from dreamsr_cli.plain_data import from_dict, load_toml, words_of

TABLES = ("upscale", "caption", "degrade", "train", "eval")
"""Tables that dreamsr.toml may have: one per command that reads it."""

FORMAT_ALIASES = {"jpeg": "jpg", "tif": "tiff"}

_RANGES: dict[str, tuple[float, float]] = {
    "scale": (1, 8),
    "long_side": (1, 1_000_000),
    "short_side": (1, 1_000_000),
    "tile": (0, 1_000_000),
    "overlap": (0, 1_000_000),
    "steps": (1, 100),
    "strength": (0, 1),
    "consistency": (0, 1),
    "texture": (0, 1),
    "grain": (0, 2),
    "guidance": (0, 100),
    "seed": (0, 2**63 - 1),
    "tile_batch": (1, 64),
    "text_bucket": (1, 4096),
    "quality": (1, 100),
    "max_pixels": (1, 10**12),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "prompt_mode": PROMPT_MODES,
    "tiling": TILINGS,
    "looks": (AUTO, *LOOKS),
    "color_fix": ("wavelet", "adain", "none"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "quantize": QUANTIZATIONS,
    "offload": OFFLOADS,
    "format": ("auto", "png", "jpg", "webp", "tiff", "avif"),
    "bit_depth": ("auto", "8", "16"),
}
_DEVICE = re.compile(r"auto|cpu|mps|(cuda|xpu)(:\d+)?")
_BOOLEANS = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)
_EXCLUSIVE = (("scale", "long_side", "short_side"), ("overwrite", "skip_existing"), ("prompts", "prompt_dir"))
"""A setting of one layer drops its rivals of lower layers; two rivals in one layer are a mistake."""


@dataclass(frozen=True)
class RunConfig:
    """What is run and where results go; the rest of the `[upscale]` table."""

    model: str | None = None
    """Name or folder of a bundle; None: the built-in one."""
    weights: str | None = None
    """Trained parts laid over the model."""
    out: str | None = None
    """A file name (for one photo) or a folder; None: beside each photo."""
    prompts: str | None = None
    """The prompts file of one photo, or a folder that holds one for each photo."""
    prompt_dir: str | None = None
    """A folder with texts for some of the photos; the captioner describes the others."""


@dataclass(frozen=True)
class UpscaleOptions:
    """Everything `dreamsr upscale` was asked for."""

    config: UpscaleConfig
    output: OutputConfig
    run: RunConfig
    origin: Mapping[str, str]
    """For each setting that somebody gave, where: "--tile", "DREAMSR_TILE" or "dreamsr.toml: tile"."""

    def typed(self, name: str) -> bool:
        """Whether the setting `name` was typed as a flag."""
        return self.origin.get(name) == flag(name)


_CLASSES = (UpscaleConfig, OutputConfig, RunConfig)
_KINDS: dict[str, Any] = {name: kind for cls in _CLASSES for name, kind in typing.get_type_hints(cls).items()}


def flag(name: str) -> str:
    """The flag of a setting, as it is typed."""
    return "--" + name.replace("_", "-")


def upscale_options(flags: Mapping[str, Any], environ: Mapping[str, str], folder: Path) -> UpscaleOptions:
    """Merge the layers and check every value.

    `flags` holds None for what wasn't typed; `folder` is where dreamsr.toml is looked for. Raises `UsageError` (or its
    child `ConfigError`) naming the flag, variable or key, and what it may be.
    """
    layers = (_from_toml(folder / "dreamsr.toml"), _from_environ(environ), from_flags(flags))
    values, origin = merge_layers(layers, _EXCLUSIVE)
    if "format" in values:
        values["format"] = FORMAT_ALIASES.get(values["format"].lower(), values["format"].lower())
    if values.get("prompts") and origin.get("captioner") == flag("captioner"):
        raise UsageError(
            f"{origin['prompts']} and --captioner contradict each other: the texts are those of the file",
            "leave out --captioner; or use --prompt-dir, where it describes the photos without a file",
        )
    for name, value in values.items():
        check_setting(name, value, origin[name])
    config, output, run = (_pick(values, cls) for cls in _CLASSES)
    return UpscaleOptions(UpscaleConfig(**config), OutputConfig(**output), RunConfig(**run), origin)


Layer = tuple[dict[str, Any], dict[str, str]]
"""Settings that one source gave, and how each was named there."""


def merge_layers(layers: Iterable[Layer], exclusive: Iterable[tuple[str, ...]]) -> Layer:
    """The layers merged, later ones winning. A setting drops its rivals (the tuples of `exclusive`) of lower layers.

    Two rivals in one layer raise `UsageError`.
    """
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for layer, names in layers:
        for rivals in exclusive:
            check_exclusive([name for name in rivals if layer.get(name) not in (None, False)], names)
            if any(name in layer for name in rivals):
                for name in rivals:
                    values.pop(name, None)
                    origin.pop(name, None)
        values |= layer
        origin |= names
    return values, origin


def toml_table(path: Path, table: str) -> dict[str, Any]:
    """The table of one command in dreamsr.toml, {} if there is no such file or table.

    Raises `ConfigError` for a table that belongs to no command. Dashes in keys may be typed as underscores.
    """
    if not path.is_file():
        return {}
    data = load_toml(path)
    for name, content in data.items():
        if name not in TABLES or not isinstance(content, dict):
            known = ", ".join(f"[{t}]" for t in TABLES)
            raise ConfigError(f"{path}: {name!r} is not a table of this file", f"known tables: {known}")
    return {key.replace("-", "_"): value for key, value in data.get(table, {}).items()}


def _from_toml(path: Path) -> Layer:
    table = toml_table(path, "upscale")
    if type(table.get("bit_depth")) is int:
        table["bit_depth"] = str(table["bit_depth"])
    for key in table:
        if key not in _KINDS:
            near = difflib.get_close_matches(key, _KINDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(_KINDS))}"
            raise ConfigError(f"{path}: [upscale] has an unknown key {key!r}", hint)
    values: dict[str, Any] = {}
    for cls in _CLASSES:
        part = _pick(table, cls)
        checked = from_dict(cls, part, f"{path}: [upscale]")
        values |= {key: getattr(checked, key) for key in part}
    return values, {name: f"{path.name}: {name}" for name in values}


def _from_environ(environ: Mapping[str, str]) -> Layer:
    values, names = from_environ({name: kind for name, kind in _KINDS.items() if name != "tile_prompt"}, environ)
    lines = tuple(line for line in environ.get("DREAMSR_TILE_PROMPT", "").strip().splitlines() if line.strip())
    return (
        (values | {"tile_prompt": lines}, names | {"tile_prompt": "DREAMSR_TILE_PROMPT"}) if lines else (values, names)
    )


def from_environ(kinds: Mapping[str, Any], environ: Mapping[str, str]) -> Layer:
    """The settings `kinds` (name -> type) that a `DREAMSR_*` variable gives. `UsageError` names one that can't be
    read."""
    names = {name: f"DREAMSR_{name.upper()}" for name in kinds}
    texts = {name: environ.get(variable, "").strip() for name, variable in names.items()}
    values = {name: parse_setting(kinds[name], text, names[name]) for name, text in texts.items() if text}
    return values, {name: names[name] for name in values}


def from_flags(flags: Mapping[str, Any]) -> Layer:
    """The settings that were typed; None stands for what wasn't."""
    values = {name: value for name, value in flags.items() if value is not None}
    return values, {name: flag(name) for name in values}


def parse_setting(kind: Any, text: str, variable: str) -> Any:
    """The value of type `kind` that the text of an environment variable says. Raises `UsageError`."""
    words = words_of(kind)
    kinds = [
        k for k in (typing.get_args(kind) or (kind,)) if k is not type(None) and typing.get_origin(k) is not Literal
    ]
    if kinds == [bool]:
        words = {
            "1": True,
            "true": True,
            "yes": True,
            "on": True,
            "0": False,
            "false": False,
            "no": False,
            "off": False,
        }
        if text.lower() not in words:
            raise UsageError(f"{variable}: {text!r} is neither true nor false", f"set {variable}=1 or {variable}=0")
        return words[text.lower()]
    if text.lower() in words:
        return text.lower()
    try:
        return kinds[0](text)
    except ValueError as error:
        number = "a whole number" if kinds == [int] else "a number"
        number += "".join(f" or {word}" for word in words)
        drop = f"{'leave out' if variable.startswith('--') else 'unset'} {variable}"
        raise UsageError(f"{variable}: {text!r} is not {number}", f"set it to {number}, or {drop}") from error


def check_exclusive(given: list[str], origin: Mapping[str, str]) -> None:
    """Raise `UsageError` if more than one of rivals is given."""
    if len(given) > 1:
        names = [origin[name] for name in given]
        raise UsageError(f"{' and '.join(names)} contradict each other", f"keep one of {', '.join(names)}")


def check_setting(name: str, value: Any, origin: str) -> None:
    """Raise `UsageError`, naming `origin`, unless `value` is one that the setting may have."""
    if name in _RANGES and value != AUTO:
        low, high = _RANGES[name]
        if not low <= value <= high:
            raise UsageError(f"{origin} {value} is out of range", f"use {low} to {high}")
    elif name in _CHOICES and value not in _CHOICES[name]:
        near = difflib.get_close_matches(value, _CHOICES[name], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"{origin} {value!r} is not known", f"{hint}use one of: {', '.join(_CHOICES[name])}")
    elif name == "captioner" and not is_captioner(value):
        near = difflib.get_close_matches(value, CAPTIONERS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        known = ", ".join(CAPTIONERS)
        raise UsageError(f"{origin} {value!r} is not known", f"{hint}use one of: {known}, or a LLaVA folder")
    elif name == "device" and not _DEVICE.fullmatch(value):
        raise UsageError(f"{origin} {value!r} is not known", "use auto, cpu, cuda, cuda:N, mps, xpu or xpu:N")
    elif name == "memory" and parse_memory(value) is None:
        raise UsageError(f"{origin} {value!r} is not an amount of memory", "use a number with GB or GiB, such as 24GB")
    elif name == "suffix" and ("/" in value or "\\" in value or "\0" in value):
        raise UsageError(f"{origin} {value!r} holds a path separator", "name a folder with -o instead")
    elif name in ("out", "model", "weights", "prompts", "prompt_dir") and not value.strip():
        raise UsageError(f"{origin} is empty", f"name something after {flag(name)}, or leave it out")


def _pick(values: Mapping[str, Any], cls: type[UpscaleConfig | OutputConfig | RunConfig]) -> dict[str, Any]:
    return {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}
