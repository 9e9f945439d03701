"""Every setting as a frozen dataclass: the only home of a default, one docstring per field.

Precedence (docs/decisions.md): flag > `DREAMSR_*` environment > `./dreamsr.toml` > the bundle's `defaults` and
`sampling` > this file. A field whose default is None is decided by the bundle. TOML and JSON with an unknown key or
a wrong type are errors.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dreamsr_cli.errors import ConfigError

T = TypeVar("T")

GRAIN = 16
"""Output pixels per token side (8 px per latent pixel, packed 2x2): tiles, overlaps and strips are multiples of it."""
MAX_INPUT_PIXELS = 1_000_000_000
"""Larger photos are not decoded unless `--max-pixels` says so."""
MAX_OUTPUT_PIXELS = 2_500_000_000
"""Larger canvases are not begun unless `--max-pixels` says so."""


# ---------------------------------------------------------------- bundle.json


@dataclass(frozen=True)
class LatentConfig:
    """How photos become latents."""

    channels: int = 32
    """C, channels per latent pixel; a token holds 4*C values."""
    stride: int = 8
    """Output pixels per latent pixel side."""
    pack: int = 2
    """Latent pixels per token side."""


@dataclass(frozen=True)
class SamplingConfig:
    """The two stages' constants (method.md, Inference)."""

    t_r: float = 1.0
    """Step length of the removal step: z_dr = z_lq - t_r * v."""
    t_start: float = 0.8
    """t of eq. 3, where texture steps start; the default of `--strength`."""
    steps: int = 16
    """Texture steps; the default of `--steps`."""
    guidance: float | None = None
    """FLUX's guidance embedding in texture steps; None for a bundle without that embedding (removal always uses
    1.0)."""
    prediction: str = "velocity"
    """What the transformer's output is: "velocity" (FLUX), or "correction", what to subtract from the condition
    latent to get the clean one (the built-in model: untrained, it returns the condition instead of noise)."""


@dataclass(frozen=True)
class ControlConfig:
    """How the MM-ControlNet's features reach the transformer."""

    map: tuple[int | None, ...] = ()
    """For each double block of the transformer the feature it receives, or null."""
    input: str = "condition"
    """"condition" (MM-ControlNet), or "noisy+condition" (FLUX ControlNets such as Jasper's)."""
    timestep: str = "clean"
    """"clean": it sees t = 0 and runs once per tile; "sampled": it sees t and runs every step."""
    text: bool = True
    """Whether text features are injected through context cross-attention."""
    scale: float = 1.0
    """Factor on the injected image features."""
    mlp: bool = False
    """M_img and M_txt as two layers with the last at zero, instead of one zero-initialised linear each."""


@dataclass(frozen=True)
class BundleDefaults:
    """What this bundle's users get when they type no flag."""

    tile: int = 512
    """Tile side in output pixels; 0 = the whole photo."""
    overlap: int = 64
    """Overlap of neighbouring tiles in output pixels."""
    captioner: str = "describe"
    """"describe" or "none"."""
    max_text_tokens: int = 128
    """Longer prompts are cut, with a warning."""
    color_fix: str = "wavelet"
    """"wavelet", "adain" or "none"."""


@dataclass(frozen=True)
class TrainingRecord:
    """How a bundle came to be."""

    recipe: str = ""
    """Recipe file it was trained with."""
    steps: int = 0
    """Optimizer steps in all."""
    data_sha256: str = ""
    """sha256 over the sorted sha256 of the training photos."""
    dreamsr: str = ""
    """Version that trained it."""


@dataclass(frozen=True)
class PartConfig:
    """Where one part of a bundle lies."""

    path: str | None = None
    """Folder inside the bundle."""
    lock: str | None = None
    """Instead of `path`: an entry of weights.lock."""
    bundle: str | None = None
    """Instead of `path`: a bundle that holds this part (what a training run writes for parts it didn't touch)."""
    subfolder: str | None = None
    """Folder inside the lock entry or the other bundle."""


@dataclass(frozen=True)
class BundleConfig:
    """bundle.json, as decisions.md lays it out."""

    format: int
    """Layout version; 1."""
    name: str
    """Name shown to people and written into results."""
    licence: str
    """SPDX id, or the licence's name."""
    parts: dict[str, PartConfig]
    """transformer, vae, text_encoder, controlnet, context_attention, lora."""
    scale: int = 4
    """The factor it was trained for; the default of `--scale`."""
    latent: LatentConfig = field(default_factory=LatentConfig)
    """Latent layout."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Constants of the two stages."""
    control: ControlConfig = field(default_factory=ControlConfig)
    """Injection of control features."""
    defaults: BundleDefaults = field(default_factory=BundleDefaults)
    """Defaults of flags."""
    training: TrainingRecord = field(default_factory=TrainingRecord)
    """Provenance."""


# ---------------------------------------------------------------- upscale


@dataclass(frozen=True)
class UpscaleConfig:
    """Everything that changes the pixels of one upscaled photo."""

    scale: float | None = None
    """Factor of both sides, 1 to 8; None: the bundle's, unless long_side or short_side is given."""
    long_side: int | None = None
    """Output pixels of the longer side, instead of scale."""
    short_side: int | None = None
    """Output pixels of the shorter side, instead of scale."""
    tile: int | None = None
    """Tile side in output pixels, multiple of 16; 0: the whole photo as one tile, local text = global text."""
    overlap: int | None = None
    """Overlap in output pixels, multiple of 16, at most half of the tile."""
    steps: int | None = None
    """Texture steps, 1 to 100."""
    strength: float | None = None
    """t of eq. 3, 0 to 1; 0 returns the restored photo without texture steps."""
    guidance: float | None = None
    """Guidance embedding of texture steps, for bundles that have it."""
    seed: int = 42
    """Seed of the canvas noise; each photo draws from it alone, whatever the order of a folder."""
    prompt: str | None = None
    """Global prompt typed by the user; None: the captioner's."""
    captioner: str | None = None
    """"describe" or "none"."""
    color_fix: str | None = None
    """"wavelet", "adain" or "none"."""
    removal: bool = True
    """Run stage 1; False starts texture from z_lq (ablation)."""
    precision: str = "auto"
    """"auto", "fp32", "bf16" or "fp16": dtype of the networks. auto: bf16 where the device computes it natively,
    else fp32."""
    device: str = "auto"
    """"auto", "cpu", "cuda", "cuda:N", "mps" or "xpu"."""
    tile_batch: int = 4
    """Tiles per network call, 1 to 64."""


@dataclass(frozen=True)
class OutputConfig:
    """How results are named and written; none of it changes the upscaled pixels before encoding."""

    format: str = "auto"
    """"auto" (that of the output name, else of the input, else PNG), "png", "jpg", "webp", "tiff" or "avif"."""
    quality: int = 95
    """JPEG, WebP and AVIF quality, 1 to 100."""
    bit_depth: str = "auto"
    """Bits per channel: "8", "16" (PNG and TIFF only) or "auto": 16 for 16-bit photos where the format can, else 8."""
    strip_metadata: bool = False
    """Write nothing but pixels and colour profile: no EXIF, XMP and DPI, and no record of how the photo was made."""
    max_pixels: int | None = None
    """Most pixels of the canvas, and of a photo that is opened; None: MAX_OUTPUT_PIXELS and MAX_INPUT_PIXELS."""
    suffix: str = "_x{scale}"
    """Appended to the stem when `--out` is a folder or missing; {scale} is the factor."""
    overwrite: bool = False
    """Replace an existing result."""
    skip_existing: bool = False
    """Leave an existing result as it is and go on."""
    resume: bool = True
    """Keep a journal beside the output, so that an interrupted run goes on; False: an interrupted run leaves
    nothing."""
    restart: bool = False
    """Drop what an interrupted run left and begin anew."""
    backoff: bool = True
    """Out of memory on a GPU: go on with smaller batches, recomputed features, offload; False: fail."""


# ---------------------------------------------------------------- reading dictionaries into dataclasses


def from_dict(cls: type[T], data: dict[str, Any], where: str) -> T:
    """Build the frozen dataclass `cls` from plain data, recursively.

    `where` names the file for messages. Unknown keys, missing keys and wrong types raise `ConfigError` naming the key
    and the nearest known one.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a table, found {type(data).__name__}", "check the file against the docs")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            raise ConfigError(f"{where}: unknown key {key!r}", hint)
    values = {}
    for name, spec in known.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], f"{where}: {name}")
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: key {name!r} is missing", f"add {name!r}")
    return cls(**values)


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (kind,) = [a for a in args if a is not type(None)]
        return _convert(kind, value, where)
    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], v, where) for v in value)
        if len(args) == len(value):
            return tuple(_convert(a, v, where) for a, v in zip(args, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {k: _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    name = getattr(kind, "__name__", str(kind))
    raise ConfigError(f"{where}: expected {name}, found {value!r}", "correct the value")


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain JSON-able data; tuples become lists, and None values of parts are left out."""

    def plain(value: Any) -> Any:
        if isinstance(value, PartConfig):
            return {k: v for k, v in vars(value).items() if v is not None}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(config)


def load_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file; `ConfigError` names the line of a syntax error."""
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}", "check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}", "correct that line") from error
