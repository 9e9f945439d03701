"""Every setting as a frozen dataclass: the only home of a default, one docstring per field.

Precedence (docs/decisions.md): flag > `DREAMSR_*` environment > `./dreamsr.toml` > the bundle's `defaults` and
`sampling` > this file. A field whose default is None is decided by the bundle. TOML and JSON with an unknown key or
a wrong type are errors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

TOKEN_SIDE = 16
"""Output pixels per token side (8 px per latent pixel, packed 2x2): tiles, overlaps and strips are multiples of it."""
CAPTIONERS = ("describe", "none", "llava-1.5-7b", "llava-onevision-0.5b")
"""Captioners by name; a folder with the weights of one of the LLaVA family is another."""
QUANTIZATIONS = ("none", "fp8", "int8", "nf4")
"""How weights may be kept: as they are, or in 8 bits (torchao) or 4 (bitsandbytes)."""
OFFLOADS = ("none", "model", "block")
"""What may wait in RAM: nothing, the network that isn't running, or every block that isn't running."""
TILINGS = ("overlap", "shifted")
"""Where tiles of the texture steps lie; see `UpscaleConfig.tiling`."""
AUTO: Literal["auto"] = "auto"
"""`--tile auto`: the side is chosen by photo."""
TILE_BATCH = 4
"""Tiles per network call where nobody says otherwise, at most."""
CONTROL_BYTES = 512 * 2**20
"""Control features that may be kept between steps where nobody knows how much memory is free; beyond it they are
computed again, with the same result."""
PROMPT_MODES = ("both", "global", "local")
"""Which texts the two networks get; see `UpscaleConfig.prompt_mode`."""
Looks = Literal["clean", "compressed", "damaged"]
"""What a small photo looks like: its good version shrunk, and no more than a JPEG of high quality; then saved as a fair
JPEG; or worse."""
LOOKS: tuple[Looks, ...] = ("clean", "compressed", "damaged")
MAX_INPUT_PIXELS = 1_000_000_000
"""Larger photos are not decoded unless `--max-pixels` says so."""
MAX_OUTPUT_PIXELS = 2_500_000_000
"""Larger canvases are not begun unless `--max-pixels` says so."""


def is_captioner(name: str) -> bool:
    """Whether a setting may name this captioner: one of `CAPTIONERS`, or a folder that may hold one."""
    return name in CAPTIONERS or bool(name) and (Path(name) / "config.json").is_file()


def parse_memory(text: str) -> int | None:
    """Bytes of an amount such as "24GB" or "16 GiB" (a bare number counts GB); None if it isn't one."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB|G|MB|MiB)?\s*", text, re.IGNORECASE)
    units = {"gb": 10**9, "g": 10**9, "gib": 2**30, "mb": 10**6, "mib": 2**20}
    found = None if match is None else int(float(match[1]) * units[(match[2] or "gb").lower()])
    return found or None


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
    tile_auto: tuple[int, int] | None = None
    """Least and largest tile that `--tile auto` may choose: sides that the model was trained on; None: from half of
    `tile` to `tile`."""
    captioner: str = "describe"
    """One of `CAPTIONERS`."""
    max_text_tokens: int = 128
    """Longer prompts are cut, with a warning."""
    color_fix: str = "wavelet"
    """"wavelet", "adain" or "none"."""
    grain: float = 1.0
    """With texture, for bundles that have the part: 1 is what its network says."""
    texture: float = 1.0
    """How much of what stage 2 changes is kept, 0 to 1, of photos that it begins from a picture of (the cleaner's or
    the enlarger's)."""


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

    # In plain data, keys without a value are not there.
    LEAVE_OUT_NONE = True
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
    tile: int | Literal["auto"] | None = None
    """Tile side in output pixels, multiple of 16; 0: the whole photo as one tile, local text = global text; "auto": the
    side with the fewest operations that fits the memory."""
    overlap: int | None = None
    """Overlap in output pixels, multiple of 16, at most half of the tile."""
    tiling: str = "overlap"
    """"overlap": texture steps blend overlapping tiles; "shifted": tiles don't overlap, and their grid moves by
    `overlap` from step to step. The removal step always blends."""
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
    tile_prompt: tuple[str, ...] = ()
    """Local prompts typed by the user, each "X,Y=TEXT": for the tiles that contain this output pixel."""
    prompt_mode: str = "both"
    """"both": the global prompt goes to the transformer, a tile's own to the ControlNet; "global" or "local": that
    text goes to both (the paper's ablation)."""
    captioner: str | None = None
    """What describes photo and tiles: one of `CAPTIONERS`, or a folder with weights."""
    color_fix: str | None = None
    """"wavelet", "adain" or "none"."""
    looks: str = AUTO
    """What the photos look like, one of `LOOKS`; "auto": what they look like to the bundle, damaged where it can't
    tell."""
    consistency: float | None = None
    """How far the result, shrunk to the photo's size, is made to agree with it: 0 not, 1 as far as one step can. None:
    as surely as the photo looks clean; 1 for a compressed one, with what the enlarger made of it; 0 for others."""
    texture: float | None = None
    """How much of what stage 2 changes of the picture that it begins from is kept, 0 to 1: 0 leaves stage 2 out. None:
    the bundle's; 1 for photos that begin from a latent (stage 1's, or with `removal` False)."""
    grain: float | None = None
    """Finest texture, drawn from the seed and added to the result: 0 none, 1 as much as the bundle's network says, up
    to 2; None: the bundle's where there is such a network and texture is asked for, else 0."""
    removal: bool | None = None
    """Run stage 1; False starts texture from z_lq (ablation); None: the bundle's cleaner instead, for photos that don't
    look damaged its enlarger, and stage 1 where it has neither and a Restoration LoRA."""
    precision: str = "auto"
    """"auto", "fp32", "bf16" or "fp16": dtype of the networks. auto: bf16 where the device computes it natively,
    else fp32."""
    device: str = "auto"
    """"auto", "cpu", "cuda", "cuda:N", "mps" or "xpu"."""
    tile_batch: int | None = None
    """Tiles per network call, 1 to 64; None: at most what `memory` says, else `TILE_BATCH`, and what leaves the last
    batch fullest; one on a CPU of few threads."""
    text_bucket: int | None = None
    """Tokens that prompts are padded to, and cut at; None: the smallest of a few lengths that holds the longest."""
    compile: bool = False
    """Translate the networks' blocks with torch.compile before they are used."""
    quantize: str | None = None
    """Weights of transformer and T5, one of `QUANTIZATIONS`; None: what `memory` says, else "none"."""
    offload: str | None = None
    """What waits in RAM, one of `OFFLOADS`; None: what `memory` says, else "none"."""
    memory: str | None = None
    """Memory to stay within ("24GB": the card's, on a CPU RAM): decides what of the three above nobody gave."""


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
    save_prompts: bool = False
    """Write the prompts that were used beside the result, as a prompts file."""
    report: bool = False
    """Also write RESULT.report.html: where the result differs from its photo, and which tiles to look at."""
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


# ---------------------------------------------------------------- caption


@dataclass(frozen=True)
class CaptionConfig:
    """Everything but the captioner and the grid that changes the texts of one photo."""

    instruction: str = (
        "Describe what this photo shows in two or three plain sentences: the main objects, what they are made of, "
        "and where they are. Name only what is clearly visible. Do not mention the image itself, and say nothing "
        "about focus, blur, sharpness, noise or quality."
    )
    """What a LLaVA is asked about the whole photo."""
    tile_instruction: str = (
        "This is a small part of a larger photo. Name the materials, surfaces and objects that are clearly visible "
        "in it, in one plain sentence. Do not guess what lies outside of it, do not mention the image itself, and say "
        "nothing about focus, blur, sharpness, noise or quality."
    )
    """What a LLaVA is asked about a tile."""
    max_words: int = 60
    """Most words of the global text, 1 to 300."""
    tile_max_words: int = 30
    """Most words of a tile's text, 1 to 300."""
    batch: int = 8
    """Tiles that a LLaVA looks at together, 1 to 64."""
    quantize: str = "none"
    """"none", "int8" or "nf4" (bitsandbytes): weights of the LLaVA's language model in 8 or 4 bits."""
    tile_context: int = 64
    """Output pixels around a tile that the LLaVA sees as well, 0 to 1024."""
    share: bool = True
    """Flat tiles of one colour, and tiles that look alike, are captioned once."""
    flat: float = 0.02
    """A tile is flat if its levels (0 to 1) spread by at most this much, between its cells and within them."""
    flat_colour: float = 0.05
    """Flat tiles share a text if their mean colours (0 to 1) differ by at most this much in every channel."""
    alike: float = 0.03
    """Tiles share a text if their cells' colours and their fine detail (0 to 1) differ by at most this much (RMS)."""
