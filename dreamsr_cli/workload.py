"""How much one canvas asks of the networks and of memory: calls, operations and bytes, by phase, from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from dreamsr_cli import counting
from dreamsr_cli.batch_choice import automatic_batch
from dreamsr_cli.bundle_sizes import BundleSizes
from dreamsr_cli.counting_pixels import FOLD, STRIDE, CleanerSizes, GrainSizes, kept_cleaned
from dreamsr_cli.images import PhotoInfo
from dreamsr_cli.machine import Machine
from dreamsr_cli.memory_plan import WEIGHT_BYTES, Phase, PhaseWork, phases
from dreamsr_cli.models.quantization import MemoryMode
from dreamsr_cli.photo_pixels import IN_MEMORY
from dreamsr_cli.planned_settings import Settings
from dreamsr_cli.shifted_tiling import Layout, texture_layouts
from dreamsr_cli.text_buckets import bucket_of
from dreamsr_cli.tiling import TileGrid

DESCRIBED_BYTES = 88
"""About the length of a describer's sentence, in UTF-8 bytes."""
BYTES_PER_T5_TOKEN = 3
"""Of English, cautiously."""
LIBRARIES = 450 * 2**20
"""Bytes of the interpreter with all libraries loaded [measured]."""
STRIPS_AT_ONCE = 12
"""Decoded or enlarged float strips that live at the same time, with the resampler's temporaries and the strip that
waits for the thread that writes, about."""
CONSISTENT_STRIPS = 4
"""More of them where the result may have to agree with its photo [measured: 3.5]."""
GRAINED_STRIPS = 4
"""More of them where grain is added: the strips of `GrainedRows`, and one's features."""
STRIPS_KEPT = 4
"""Decoded strips that aren't decoded again when they are read twice (`DecodedCanvas.KEPT`)."""
SPILLED_BLOCK = 64 * 2**20
"""Bytes of a spilled photo that are in memory at a time."""


@dataclass(frozen=True)
class Limits:
    """What else decides how the work is laid out."""

    strip_rows: int
    """Pixel rows encoded or decoded at a time (`canvas.STRIP`)."""
    control_bytes: int | None = None
    """Control features kept on the device between steps, at most; None: as memory allows (`control_room`)."""
    control_host: int = 0
    """Control features kept in RAM beside a device, at most."""


def photo_bytes(info: PhotoInfo) -> int:
    """The decoded photo, as it is kept while it is read from."""
    return info.width * info.height * bands(info) * (info.bit_depth // 8)


def _tokens(grid: TileGrid) -> int:
    return (grid.tile_height // (2 * STRIDE)) * (grid.tile_width // (2 * STRIDE))


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
        tiles, most = len(self.grid.tiles), self.settings.tile_batch
        if self.settings.fit_batch:
            return automatic_batch(tiles, most, self.image_tokens, self.machine.device, self.machine.threads)
        return min(most, tiles)

    @property
    def batches(self) -> int:
        """Network calls for all tiles; the last batch is padded to full size."""
        return -(-len(self.grid.tiles) // self.batch)

    @property
    def steps(self) -> int:
        """Texture steps that are run."""
        settings = self.settings
        begins_from_picture = settings.enlarger or settings.cleaner
        kept = settings.texture > 0 or not begins_from_picture
        return settings.steps if settings.strength > 0 and kept else 0

    @property
    def image_tokens(self) -> int:
        """L."""
        return _tokens(self.grid)

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """The tiles of texture steps, in turn."""
        return texture_layouts(self.grid, self.settings.tiling)

    @property
    def texture_tokens(self) -> int:
        """L in texture steps."""
        return _tokens(self.layouts[0].grid)

    @property
    def texture_batches(self) -> int:
        """Network calls for all tiles of a texture step."""
        return -(-len(self.layouts[0].grid.tiles) // self.batch)

    @cached_property
    def prompts(self) -> tuple[int, int, int]:
        """(distinct prompts at most, T, S); a describer's words are estimated, since they aren't written yet."""
        described = DESCRIBED_BYTES if self.settings.captioner != "none" else 0
        typed = None if self.settings.prompt is None else len(self.settings.prompt.encode("utf-8", "surrogateescape"))
        glob = described if typed is None else typed
        tiles = len(self.grid.tiles)
        local = glob if tiles == 1 else described
        distinct = 1 if tiles == 1 else tiles + 1 if described else 1 + bool(typed)
        text, (longest, buckets) = self.sizes.text, self.sizes.text_lengths(self.settings.text_bucket)
        if text.bytes_per_token is None:
            length = bucket_of(-(-max(glob, local) // BYTES_PER_T5_TOKEN) + 1, longest, buckets)
            return distinct, length, length
        return distinct, text.tokens(glob, longest), text.tokens(local, longest)

    @property
    def padded_local(self) -> int:
        """Tokens of a local prompt as the ControlNet sees it: with several tiles all are padded to a bucket
        (`sampler.Texts.length`)."""
        longest = self.prompts[2]
        if len(self.grid.tiles) == 1:
            return longest
        return bucket_of(longest, *self.sizes.text_lengths(self.settings.text_bucket))

    @property
    def feature_bytes(self) -> int:
        """Bytes of one batch's control features; 0 where they change with the step."""
        if not self.sizes.control_is_clean or not self.steps:
            return 0
        return self.sizes.feature_values(self.batch, self.texture_tokens, self.padded_local) * self.machine.itemsize

    @property
    def feature_batches(self) -> int:
        """Batches of texture steps whose control features differ: those of every grid that the steps use."""
        return self.texture_batches * min(self.steps, len(self.layouts))

    @cached_property
    def kept_features(self) -> tuple[int, int]:
        """(batches whose control features are kept between steps, bytes of them on the device)."""
        each = self.feature_bytes
        if not each:
            return 0, 0
        batches = self.feature_batches
        near = min(batches, (self.limits.control_bytes or 0) // each)
        far = 0 if self.machine.device == "cpu" else min(batches - near, self.limits.control_host // each)
        return near + far, near * each

    def _texture_controls(self) -> int:
        """Calls of the ControlNet in texture steps: once where its features are kept, else in every step; the first
        steps' are kept first."""
        kept, total = self.kept_features[0], 0
        for number in range(len(self.layouts)):
            steps = len(range(number, self.steps, len(self.layouts)))
            here = min(kept, self.texture_batches) if steps else 0
            total += here + (self.texture_batches - here) * steps
            kept -= here
        return total

    def calls(self) -> dict[str, int]:
        """Calls by phase: prompts ("text"), strips ("encode", "decode"), batches of tiles (all others)."""
        strips = -(-self.grid.canvas_height // self.limits.strip_rows)
        removals = self.batches if self.settings.removal else 0
        return {
            "text": self.prompts[0],
            # One full batch is tried first where memory of a card may run out.
            "trial": 0 if self.machine.device == "cpu" else 1,
            "remove_control": removals,
            "remove": removals,
            "texture_control": self._texture_controls(),
            "texture": self.texture_batches * self.steps,
            **self._strip_phases(strips, strips, -(-self._photo[0] // CleanerSizes.STRIP)),
        }

    def flops(self) -> dict[str, int]:
        """Operations by phase."""
        _, glob, local = self.prompts
        batch, tokens, sizes, coder = self.batch, self.image_tokens, self.sizes, self.sizes.autoencoder
        padded, moving = self.padded_local, self.texture_tokens
        control = sizes.control_flops(batch, tokens, padded)
        removal = sizes.transformer_flops(batch, tokens, glob, padded, lora=not self._folded_bytes)
        each = {
            "text": sizes.text.flops(local),
            "trial": control + removal,
            "remove_control": control,
            "remove": removal,
            "texture_control": sizes.control_flops(batch, moving, padded),
            "texture": sizes.transformer_flops(batch, moving, glob, padded),
        }
        width, encoding = self.grid.canvas_width, self._extents(0 if coder.exact else coder.halo)
        decoding = sum(
            coder.decode_flops(rows, width, spare)
            for rows, spare in zip(self._extents(coder.halo), self._spare(coder.halo), strict=True)
        )
        cleaner = self._cleaner
        cleaning = 0 if cleaner is None else cleaner.flops(*self._photo)
        grain = 0 if self._grain is None else self._grain.flops(self.grid.canvas_height, width)
        return {phase: count * each[phase] for phase, count in self.calls().items() if phase in each} | {
            **self._strip_phases(sum(coder.encode_flops(rows, width) for rows in encoding), decoding, cleaning, grain),
        }

    def moved(self) -> dict[str, int]:
        """Bytes by phase that products read and write, weights once per call; of the text encoders only weights."""
        _, glob, local = self.prompts
        batch, tokens, moving, sizes, coder = (
            self.batch,
            self.image_tokens,
            self.texture_tokens,
            self.sizes,
            self.sizes.autoencoder,
        )
        padded, item, quantized = self.padded_local, self.machine.itemsize, WEIGHT_BYTES.get(self.settings.quantize)
        control = sizes.control_bytes(batch, tokens, padded, item)
        removal = sizes.transformer_bytes(batch, tokens, glob, padded, item, quantized, lora=not self._folded_bytes)
        each = {
            "trial": control + removal,
            "remove_control": control,
            "remove": removal,
            "texture_control": sizes.control_bytes(batch, moving, padded, item),
            "texture": sizes.transformer_bytes(batch, moving, glob, padded, item, quantized),
        }
        width, encoding = self.grid.canvas_width, self._extents(0 if coder.exact else coder.halo)
        weights = coder.parameters() * len(encoding)
        encoded = sum(coder.moved_values(rows, width, encode=True) for rows in encoding) + weights
        decoded = sum(coder.moved_values(rows, width) for rows in self._extents(coder.halo)) + weights
        text = sizes.text
        cleaned = 0 if self._cleaner is None else self._cleaner.moved_values(*self._photo)
        grained = 0 if self._grain is None else self._grain.moved_values(self.grid.canvas_height, width)
        per_weight = item if quantized is None else quantized
        texts = (text.parameters - text.blocks) * item + int(text.blocks * per_weight)
        return {phase: count * each[phase] for phase, count in self.calls().items() if phase in each} | {
            "text": texts,
            **self._strip_phases(encoded * item, decoded * item, cleaned * item, grained * item),
        }

    def tile_step(self) -> dict[str, int]:
        """Operations and bytes of one tile in one texture step, as if alone in its batch, its ControlNet included."""
        _, glob, _ = self.prompts
        sizes, tokens, local, item = self.sizes, self.texture_tokens, self.padded_local, self.machine.itemsize
        quantized = WEIGHT_BYTES.get(self.settings.quantize)
        return {
            "flops": sizes.control_flops(1, tokens, local) + sizes.transformer_flops(1, tokens, glob, local),
            "bytes": sizes.control_bytes(1, tokens, local, item)
            + sizes.transformer_bytes(1, tokens, glob, local, item, quantized),
        }

    def memory(self, info: PhotoInfo, width: int) -> dict[str, int]:
        """Estimated bytes: the peaks "host" (RAM) and "device" (the card's; 0 on a CPU), and what they consist of.

        Networks follow one another, so parts don't add up to a peak.
        """
        coder = self.sizes.autoencoder
        strip_rows = min(self.limits.strip_rows + 2 * coder.halo, self.grid.canvas_height)
        more = CONSISTENT_STRIPS if self.settings.consistency != 0 else 0
        more += GRAINED_STRIPS if self._grain is not None else 0
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
            "strips": (STRIPS_AT_ONCE + more) * strip_rows * width * 3 * 4,
            "decoding": decode.working,
        }
        cleaning = 0
        if self._cleaner is not None:
            # Beside decoding, too: the colour fix asks for it.
            cleaning = parts["cleaning"] = self._cleaner.working(*self._photo, self.machine.itemsize)
            parts["cleaned"] = self._cleaned
        if self.machine.device == "cpu":
            # What waits in RAM waits beside itself.
            host = max(
                text.weights + text.working,
                restore.weights + self._folded_bytes + restore.working + parts["rows"],
                decode.weights + decode.working + parts["strips"] + cleaning,
            )
            device = 0
        else:
            waiting = min(self.limits.control_host, self.feature_batches * self.feature_bytes)
            host = max(parts["weights"], parts["rows"] + waiting, parts["strips"])
            device = max(text.device, restore.device, decode.device + cleaning)
        return {"host": LIBRARIES + parts["photo"] + self._cleaned + host, "device": device, **parts}

    @property
    def _folded_bytes(self) -> int:
        """Of the weights that stage 1 holds a second time."""
        if not self.settings.removal or self.machine.device != "cpu" or self.machine.itemsize != 4:
            return 0
        return counting.folded_weights(self.sizes.transformer, self.sizes.lora_rank) * 4

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

    @property
    def _grain(self) -> GrainSizes | None:
        return self.sizes.grain if self.settings.grain else None

    @property
    def _cleaner(self) -> CleanerSizes | None:
        return self.sizes.cleaner if self.settings.cleaner else None

    @property
    def _cleaned(self) -> int:
        """Bytes of the cleaned photo that are kept until it is read again."""
        if self._cleaner is None or not self.steps:
            return 0
        return kept_cleaned(self.grid.canvas_height, self.grid.canvas_width)

    @property
    def _photo(self) -> tuple[int, int]:
        """Rows and columns that the cleaner sees, as if the photo were enlarged four times."""
        return -(-self.grid.canvas_height // FOLD), -(-self.grid.canvas_width // FOLD)

    def _strip_phases(self, encoding: int, decoding: int, cleaning: int, grain: int = 0) -> dict[str, int]:
        """The phases that go strip by strip, from what encoding, decoding and cleaning all strips once comes to, and
        what grain on the result does."""
        strips = -(-self.grid.canvas_height // self.limits.strip_rows)
        # AdaIN reads the result twice: for its sums, and to be fixed.
        passes = 2 if self.settings.color_fix == "adain" and strips > STRIPS_KEPT else 1
        if self.settings.cleaner:
            if not self.steps:
                return {"clean": (cleaning + grain) * passes, "encode": 0, "decode": 0}
            # Once more for the colours that the result gets, and for what is kept of it beside texture.
            again = int((self.settings.color_fix != "none" or self.settings.texture < 1) and not self._cleaned)
            return {"clean": cleaning * (1 + again), "encode": encoding, "decode": (decoding + grain) * passes}
        if not self.settings.enlarger:
            return {"encode": encoding, "decode": (decoding + grain) * passes}
        # The same network as decoding's; at x4 also the same size.
        if not self.steps:
            return {"enlarge": (decoding + grain) * passes, "encode": 0, "decode": 0}
        # Enlarged again for a result that keeps to the enlarger's photo (`PhotoJob.keeps_to_enlarger`, `BlendedRows`).
        keeps = self.settings.looks == "compressed" and self.settings.consistency != 0
        again = passes if keeps or self.settings.texture < 1 else 0
        return {"enlarge": decoding * (1 + again), "encode": encoding, "decode": (decoding + grain) * passes}

    def _extents(self, halo: int) -> list[int]:
        """Rows of each strip with its halo."""
        height, strip = self.grid.canvas_height, self.limits.strip_rows
        return [min(height, top + strip + halo) - max(0, top - halo) for top in range(0, height, strip)]

    def _spare(self, halo: int) -> list[tuple[int, int]]:
        """Rows of each strip's halo, above and below it."""
        height, strip = self.grid.canvas_height, self.limits.strip_rows
        return [(min(top, halo), max(0, min(height - top - strip, halo))) for top in range(0, height, strip)]
