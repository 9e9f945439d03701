"""How much memory each phase of an upscale needs on its device, from sizes alone; and which memory mode fits a card.

Networks follow one another (text encoders, autoencoder, restorer, autoencoder), so the largest phase decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from dreamsr_cli import counting
from dreamsr_cli.bundle_sizes import BundleSizes
from dreamsr_cli.config import OFFLOADS
from dreamsr_cli.counting_pixels import STRIDE
from dreamsr_cli.models.quantization import MemoryMode, cannot_run

ACTIVATIONS = 20
"""Arrays of a batch's tokens that live inside a transformer block at the same time, about."""
RESERVED = 800 * 10**6
"""Bytes of a card that its driver, its libraries' workspaces and gaps between tensors take, about."""
CARDS = (12, 16, 24, 48, 80)
"""Cards of which a dry run says what fits, in GB."""
TILE_BATCHES = (8, 4, 2, 1)
ORDER = (
    MemoryMode("none", "none"),
    MemoryMode("int8", "none"),
    MemoryMode("nf4", "none"),
    MemoryMode("int8", "model"),
    MemoryMode("none", "block"),
    MemoryMode("int8", "block"),
)
"""Modes in the order in which they are tried: what changes the picture least and waits least comes first. int8 is
preferred to fp8, whose weights are as large and err four times as much."""
WEIGHT_BYTES = {"int8": 1.0, "fp8": 1.0, "nf4": 0.5625}
"""Bytes of a quantized weight with its scales; NF4 keeps a float32 for each 64 weights."""


@dataclass(frozen=True)
class PhaseWork:
    """What the networks work on."""

    batch: int
    """Tiles per call."""
    image_tokens: int
    """Of a tile."""
    text_tokens: int
    """Of the longest prompt."""
    prompts: int
    """Distinct prompts, whose embeddings wait."""
    features: int
    """Bytes of control features kept between steps."""
    strip_rows: int
    """Pixel rows that are decoded at once, with their halo."""
    width: int
    """Pixels of the canvas."""


@dataclass(frozen=True)
class Phase:
    """One phase's needs."""

    parameters: int
    weights: int
    """Bytes of all its weights, wherever they are."""
    resident: int
    """Bytes of the weights that are on the device at once."""
    working: int
    """Bytes of activations, features and prompts on the device."""

    @property
    def device(self) -> int:
        """Peak on the device."""
        return self.resident + self.working

    def to_json(self) -> dict[str, int]:
        """Plain data."""
        return {**asdict(self), "device": self.device}


def phases(sizes: BundleSizes, mode: MemoryMode, itemsize: int, work: PhaseWork) -> dict[str, Phase]:
    """The phases "text", "restore" and "decode" (which encoding resembles), with values of `itemsize` bytes."""
    waiting = work.prompts * work.text_tokens * sizes.text.width * itemsize
    tokens = work.batch * (work.image_tokens + work.text_tokens)
    restore = _restorer(sizes, mode, itemsize)
    coder = sizes.autoencoder
    coder_weights = coder.parameters() * itemsize
    return {
        "text": _text(sizes, mode, itemsize, work, waiting),
        "restore": Phase(
            sizes.restorer_parameters(),
            *restore,
            working=tokens * sizes.transformer.width * itemsize * ACTIVATIONS + work.features + waiting,
        ),
        "decode": Phase(
            coder.parameters(),
            coder_weights,
            coder_weights,
            coder.working_bytes(work.strip_rows, work.width, itemsize),
        ),
    }


def _text(sizes: BundleSizes, mode: MemoryMode, itemsize: int, work: PhaseWork, waiting: int) -> Phase:
    text = sizes.text
    if text.bytes_per_token:
        weights = text.parameters * 4
        return Phase(text.parameters, weights, weights, waiting)
    each = WEIGHT_BYTES.get(mode.quantize, itemsize)
    outside = (text.parameters - text.blocks) * itemsize
    weights = outside + int(text.blocks * each)
    resident = outside + int(text.largest_block * each) if mode.offload == "block" else weights
    return Phase(text.parameters, weights, resident, waiting + work.text_tokens * text.width * itemsize * ACTIVATIONS)


def _restorer(sizes: BundleSizes, mode: MemoryMode, itemsize: int) -> tuple[int, int]:
    """(bytes of all weights, bytes on the device at once). LoRA and ControlNet are never quantized."""
    transformer, each = sizes.transformer, WEIGHT_BYTES.get(mode.quantize, itemsize)
    double, single = (
        int(block * each) + lora * itemsize
        for block, lora in zip(
            counting.block_parameters(transformer),
            counting.lora_parameters(transformer, sizes.lora_rank),
            strict=True,
        )
    )
    inside = sum(
        n * p
        for n, p in zip((transformer.double, transformer.single), counting.block_parameters(transformer), strict=True)
    )
    around = (counting.transformer_parameters(transformer) - inside) * itemsize
    dit = transformer.double * double + transformer.single * single + around
    control = counting.transformer_parameters(sizes.controlnet) * itemsize
    control_block = counting.block_parameters(sizes.controlnet)[0] * itemsize
    context = counting.context_parameters(sizes.context) * itemsize if sizes.context else 0
    whole = dit + control + context
    if mode.offload == "model":
        return whole, max(dit, control) + context
    if mode.offload == "block":
        around_control = control - sizes.controlnet.double * control_block
        return whole, max(double, single, control_block) + around + around_control + context
    return whole, whole


# ---------------------------------------------------------------- choosing


@dataclass(frozen=True)
class Given:
    """What a person fixed; None: free to choose."""

    quantize: str | None = None
    offload: str | None = None
    tile_batch: int | None = None


FREE = Given()
"""Nothing is fixed."""


@dataclass(frozen=True)
class Choice:
    """A memory mode with its batch, and what it needs."""

    mode: MemoryMode
    tile_batch: int
    device: int
    """Bytes on the device at the peak, with what its driver takes."""
    host: int
    """Bytes of weights in RAM at most."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self.mode), "tile_batch": self.tile_batch, "device": self.device, "host": self.host}

    def flags(self) -> str:
        """What to type for it."""
        return f"--quantize {self.mode.quantize} --offload {self.mode.offload} --tile-batch {self.tile_batch}"


def modes(given: Given) -> list[MemoryMode]:
    """Modes to try, in order, that agree with what a person fixed."""
    if given.quantize is not None and given.offload is not None:
        return [MemoryMode(given.quantize, given.offload)]
    if given.quantize is not None:
        return [MemoryMode(given.quantize, offload) for offload in OFFLOADS]
    if given.offload is not None:
        return [MemoryMode(kind, given.offload) for kind in ("none", "int8", "nf4")]
    return list(ORDER)


def runnable(given: Given, kind: str, usable: Callable[[MemoryMode], bool]) -> list[MemoryMode]:
    """The modes of `modes` that can run on a device of this kind, on this machine."""

    def tried(mode: MemoryMode) -> bool:
        moves_for_nothing = kind == "cpu" and mode.offload != "none" and given.offload is None
        return not moves_for_nothing and not cannot_run(mode, kind) and usable(mode)

    return [mode for mode in modes(given) if tried(mode)]


def need(sizes: BundleSizes, mode: MemoryMode, itemsize: int, work: PhaseWork) -> tuple[int, int]:
    """(bytes on the device at the peak, bytes of weights in RAM at most)."""
    found = phases(sizes, mode, itemsize, work).values()
    return max(phase.device for phase in found) + RESERVED, max(phase.weights for phase in found)


def choose(
    budget: int,
    sizes: BundleSizes,
    itemsize: int,
    work_of: Callable[[int], PhaseWork],
    kind: str,
    given: Given = FREE,
    usable: Callable[[MemoryMode], bool] = lambda mode: True,
    host: int | None = None,
) -> Choice | None:
    """The first mode of `modes` that stays within `budget` bytes on a device of this kind, with the largest batch that
    fits; None where none does.

    `work_of(tile_batch)` says what the networks work on; `usable` leaves out modes whose backend isn't there; `host`:
    bytes of RAM that weights may take. On a CPU nothing is gained by moving weights, so only quantization is tried.
    """
    for mode in runnable(given, kind, usable):
        for batch in (given.tile_batch,) if given.tile_batch else TILE_BATCHES:
            device, weights = need(sizes, mode, itemsize, work_of(batch))
            if device <= budget and (host is None or kind == "cpu" or weights <= host):
                return Choice(mode, batch, device, weights)
    return None


def typical_work(sizes: BundleSizes, tile: int, strip_rows: int, control_bytes: int) -> Callable[[int], PhaseWork]:
    """Work on square tiles of a large canvas, before any photo is known."""
    tokens = (tile // (2 * STRIDE)) ** 2
    longest = sizes.max_text_tokens if sizes.text.bytes_per_token is None else min(sizes.max_text_tokens, 128)
    features = control_bytes if sizes.control_is_clean else 0
    rows = strip_rows + 2 * sizes.autoencoder.halo

    def work(batch: int) -> PhaseWork:
        return PhaseWork(batch, tokens, longest, 64, features, rows, 8192)

    return work
