"""How much one canvas asks of the networks and of memory: calls, operations and bytes, by phase, from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from dreamsr_cli.bundle_sizes import BundleSizes
from dreamsr_cli.counting_pixels import STRIDE
from dreamsr_cli.images import PhotoInfo
from dreamsr_cli.machine import Machine
from dreamsr_cli.memory_plan import Phase, PhaseWork, phases
from dreamsr_cli.models.quantization import MemoryMode
from dreamsr_cli.photo_pixels import IN_MEMORY
from dreamsr_cli.tiling import TileGrid

DESCRIBED_BYTES = 88
"""About the length of a describer's sentence, in UTF-8 bytes."""
LIBRARIES = 450 * 2**20
"""Bytes of the interpreter with all libraries loaded [measured]."""
STRIPS_AT_ONCE = 12
"""Decoded or enlarged float strips that live at the same time, with the resampler's temporaries and the strip that
waits for the thread that writes, about."""
STRIPS_KEPT = 4
"""Decoded strips that aren't decoded again when they are read twice (`DecodedCanvas.KEPT`)."""
SPILLED_BLOCK = 64 * 2**20
"""Bytes of a spilled photo that are in memory at a time."""


class Settings(Protocol):
    """The resolved settings that a plan depends on (the engine's `Settings`)."""

    @property
    def scale(self) -> float | None: ...
    @property
    def long_side(self) -> int | None: ...
    @property
    def short_side(self) -> int | None: ...
    @property
    def tile(self) -> int: ...
    @property
    def overlap(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def strength(self) -> float: ...
    @property
    def removal(self) -> bool: ...
    @property
    def tile_batch(self) -> int: ...
    @property
    def prompt(self) -> str | None: ...
    @property
    def captioner(self) -> str: ...
    @property
    def color_fix(self) -> str: ...
    @property
    def quantize(self) -> str: ...
    @property
    def offload(self) -> str: ...


@dataclass(frozen=True)
class Limits:
    """What else decides how the work is laid out."""

    strip_rows: int
    """Pixel rows encoded or decoded at a time (`canvas.STRIP`)."""
    control_bytes: int
    """Control features kept between steps, at most (`sampler.CONTROL_BYTES`)."""


def photo_bytes(info: PhotoInfo) -> int:
    """The decoded photo, as it is kept while it is read from."""
    return info.width * info.height * bands(info) * (info.bit_depth // 8)


def bands(info: PhotoInfo) -> int:
    """Channels: grey or RGB, and alpha."""
    return (1 if info.grey else 3) + info.alpha


def is_spilled(info: PhotoInfo) -> bool:
    """Whether the decoded photo waits on disk (`photo_pixels.PixelStore`)."""
    return info.width * info.height >= IN_MEMORY


@dataclass(frozen=True)
class Workload:
    """The work of one photo. L image tokens of a tile, T and S tokens of the global and of the longest local prompt."""

    grid: TileGrid
    settings: Settings
    sizes: BundleSizes
    machine: Machine
    limits: Limits

    @property
    def batch(self) -> int:
        """Tiles per network call."""
        return min(self.settings.tile_batch, len(self.grid.tiles))

    @property
    def batches(self) -> int:
        """Network calls for all tiles; the last batch is padded to full size."""
        return -(-len(self.grid.tiles) // self.batch)

    @property
    def steps(self) -> int:
        """Texture steps that are run."""
        return self.settings.steps if self.settings.strength > 0 else 0

    @property
    def image_tokens(self) -> int:
        """L."""
        return (self.grid.tile_height // (2 * STRIDE)) * (self.grid.tile_width // (2 * STRIDE))

    @cached_property
    def prompts(self) -> tuple[int, int, int]:
        """(distinct prompts at most, T, S); a describer's words are estimated, since they aren't written yet."""
        described = DESCRIBED_BYTES if self.settings.captioner != "none" else 0
        typed = None if self.settings.prompt is None else len(self.settings.prompt.encode("utf-8", "surrogateescape"))
        glob = described if typed is None else typed
        tiles = len(self.grid.tiles)
        local = glob if tiles == 1 else described
        distinct = 1 if tiles == 1 else tiles + 1 if described else 1 + bool(typed)
        text, longest = self.sizes.text, self.sizes.max_text_tokens
        return distinct, text.tokens(glob, longest), text.tokens(local, longest)

    @property
    def padded_local(self) -> int:
        """Tokens of a local prompt as the ControlNet sees it: with several tiles all are padded to the most that one
        may have (`sampler.Texts.length`)."""
        return self.prompts[2] if len(self.grid.tiles) == 1 else self.sizes.max_text_tokens

    @cached_property
    def kept_features(self) -> tuple[int, int]:
        """(batches whose control features are kept between steps, their bytes)."""
        if not self.sizes.control_is_clean or not self.steps:
            return 0, 0
        local = self.padded_local
        each = self.sizes.feature_values(self.batch, self.image_tokens, local) * self.machine.itemsize
        kept = min(self.batches, self.limits.control_bytes // each)
        return kept, kept * each

    def calls(self) -> dict[str, int]:
        """Calls by phase: prompts ("text"), strips ("encode", "decode"), batches of tiles (all others)."""
        kept, _ = self.kept_features
        strips = -(-self.grid.canvas_height // self.limits.strip_rows)
        removals = self.batches if self.settings.removal else 0
        return {
            "text": self.prompts[0],
            "encode": strips,
            # One full batch is tried first where memory of a card may run out.
            "trial": 0 if self.machine.device == "cpu" else 1,
            "remove_control": removals,
            "remove": removals,
            "texture_control": kept + (self.batches - kept) * self.steps,
            "texture": self.batches * self.steps,
            "decode": strips * self._decoding_passes(strips),
        }

    def flops(self) -> dict[str, int]:
        """Operations by phase."""
        _, glob, local = self.prompts
        batch, tokens, sizes, coder = self.batch, self.image_tokens, self.sizes, self.sizes.autoencoder
        padded = self.padded_local
        control = sizes.control_flops(batch, tokens, padded)
        removal = sizes.transformer_flops(batch, tokens, glob, padded, lora=True)
        each = {
            "text": sizes.text.flops(local),
            "trial": control + removal,
            "remove_control": control,
            "remove": removal,
            "texture_control": control,
            "texture": sizes.transformer_flops(batch, tokens, glob, padded),
        }
        width, encoding = self.grid.canvas_width, self._extents(0 if coder.exact else coder.halo)
        decoding = sum(coder.decode_flops(rows, width) for rows in self._extents(coder.halo))
        return {phase: count * each[phase] for phase, count in self.calls().items() if phase in each} | {
            "encode": sum(coder.encode_flops(rows, width) for rows in encoding),
            "decode": decoding * self._decoding_passes(len(encoding)),
        }

    def memory(self, info: PhotoInfo, width: int) -> dict[str, int]:
        """Estimated bytes: the peaks "host" (RAM) and "device" (the card's; 0 on a CPU), and what they consist of.

        Networks follow one another, so parts don't add up to a peak.
        """
        coder = self.sizes.autoencoder
        strip_rows = min(self.limits.strip_rows + 2 * coder.halo, self.grid.canvas_height)
        phases = self.phases()
        text, restore, decode = (phases[name] for name in ("text", "restore", "decode"))
        parts = {
            "libraries": LIBRARIES,
            "photo": min(photo_bytes(info), SPILLED_BLOCK) if is_spilled(info) else photo_bytes(info),
            "weights": max(phase.weights for phase in phases.values()),
            "features": self.kept_features[1],
            "activations": restore.working,
            # A band of the canvas: float64 sums, and float32 source, velocity and result.
            "rows": coder.channels * self.grid.tile_height * self.grid.canvas_width // STRIDE**2 * (8 + 3 * 4),
            "strips": STRIPS_AT_ONCE * strip_rows * width * 3 * 4,
            "decoding": decode.working,
        }
        if self.machine.device == "cpu":
            # What waits in RAM waits beside itself.
            host = max(
                text.weights + text.working,
                restore.weights + restore.working + parts["rows"],
                decode.weights + decode.working + parts["strips"],
            )
            device = 0
        else:
            host = max(parts["weights"], parts["rows"], parts["strips"])
            device = max(phase.device for phase in phases.values())
        return {"host": LIBRARIES + parts["photo"] + host, "device": device, **parts}

    def phases(self) -> dict[str, Phase]:
        """What the phases "text", "restore" and "decode" need on the device."""
        texts, glob, _ = self.prompts
        coder = self.sizes.autoencoder
        strip_rows = min(self.limits.strip_rows + 2 * coder.halo, self.grid.canvas_height)
        work = PhaseWork(
            self.batch,
            self.image_tokens,
            max(glob, self.padded_local),
            texts,
            self.kept_features[1],
            strip_rows,
            self.grid.canvas_width,
        )
        return phases(
            self.sizes, MemoryMode(self.settings.quantize, self.settings.offload), self.machine.itemsize, work
        )

    def _decoding_passes(self, strips: int) -> int:
        """AdaIN reads the decoded photo twice: for its sums, and to be fixed."""
        return 2 if self.settings.color_fix == "adain" and strips > STRIPS_KEPT else 1

    def _extents(self, halo: int) -> list[int]:
        """Rows of each strip with its halo."""
        height, strip = self.grid.canvas_height, self.limits.strip_rows
        return [min(height, top + strip + halo) - max(0, top - halo) for top in range(0, height, strip)]
