"""What a bundle's config files say about the sizes of its networks; no weights are opened, and no torch is imported."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamsr_cli import counting, counting_bytes
from dreamsr_cli.config import BundleConfig
from dreamsr_cli.counting import BlockSizes, ContextSizes, TextSizes
from dreamsr_cli.counting_pixels import AutoencoderSizes, CleanerSizes, GrainSizes
from dreamsr_cli.errors import WeightsError
from dreamsr_cli.text_buckets import BYTE_BUCKETS, T5_BUCKETS, asked_bucket
from dreamsr_cli.weights import weights_folder


@dataclass(frozen=True)
class BundleSizes:
    """The networks of one bundle. L image tokens, T global and S local text tokens of one tile."""

    name: str
    """The bundle's, for people."""
    transformer: BlockSizes
    controlnet: BlockSizes
    context: ContextSizes | None
    """None for a bundle without a text branch."""
    lora_rank: int
    """0 for a bundle without the restoration LoRA."""
    autoencoder: AutoencoderSizes
    text: TextSizes
    max_text_tokens: int
    grain: GrainSizes | None
    """None for a bundle without grain."""
    cleaner: CleanerSizes | None
    """None for a bundle without one."""
    control_is_clean: bool
    """Control features don't depend on the step, so they may be kept."""

    def text_lengths(self, text_bucket: int | None) -> tuple[int, tuple[int, ...]]:
        """(tokens at which prompts are cut, lengths they may be padded to) for `--text-bucket`; None: automatic."""
        buckets = T5_BUCKETS if self.text.bytes_per_token is None else BYTE_BUCKETS
        return asked_bucket(text_bucket, self.max_text_tokens, buckets)

    def control_flops(self, batch: int, image_tokens: int, local_tokens: int) -> int:
        """One call of the ControlNet, with the keys and values made from its text."""
        flops = counting.transformer_flops(self.controlnet, batch, image_tokens, local_tokens, modulations=batch)
        return flops + (counting.keys_values_flops(self.context, batch, local_tokens) if self.context else 0)

    def transformer_flops(
        self, batch: int, image_tokens: int, text_tokens: int, local_tokens: int, lora: bool = False
    ) -> int:
        """One call of the transformer with its injections, in the removal step with the LoRA."""
        rank = self.lora_rank if lora else 0
        flops = counting.transformer_flops(self.transformer, batch, image_tokens, text_tokens, rank)
        return flops + (counting.context_flops(self.context, batch, text_tokens, local_tokens) if self.context else 0)

    def control_bytes(self, batch: int, image_tokens: int, local_tokens: int, itemsize: int) -> int:
        """What one call of the ControlNet reads and writes: its weights, and the activations of its products."""
        values = counting_bytes.transformer_values(self.controlnet, batch, image_tokens, local_tokens, 0, batch)
        weights = counting.transformer_parameters(self.controlnet)
        if self.context:
            values += counting_bytes.keys_values_values(self.context, batch, local_tokens)
            weights += self.context.injections * 2 * counting.linear_parameters(self.context.width, self.context.width)
        return (values + weights) * itemsize

    def transformer_bytes(
        self,
        batch: int,
        image_tokens: int,
        text_tokens: int,
        local_tokens: int,
        itemsize: int,
        weight_bytes: float | None = None,
        lora: bool = False,
    ) -> int:
        """What one call of the transformer reads and writes. `weight_bytes`: of a weight in its blocks, where they are
        quantized."""
        rank = self.lora_rank if lora else 0
        values = counting_bytes.transformer_values(self.transformer, batch, image_tokens, text_tokens, rank)
        weights = counting.transformer_parameters(self.transformer, rank)
        if self.context:
            values += counting_bytes.context_values(self.context, batch, text_tokens, local_tokens)
            linears = 1 + (2 if self.context.mlp else 1)
            linear = counting.linear_parameters(self.context.width, self.context.width)
            weights += self.context.injections * linears * linear
        double, single = counting.block_parameters(self.transformer)
        inside = self.transformer.double * double + self.transformer.single * single
        each = itemsize if weight_bytes is None else weight_bytes
        return (values + weights - inside) * itemsize + int(inside * each)

    def feature_values(self, batch: int, image_tokens: int, local_tokens: int) -> int:
        """Numbers in one batch's control features (`conditioned_dit.Injections`)."""
        values = self.controlnet.double * image_tokens * self.controlnet.width
        if self.context:
            values += self.context.injections * 2 * local_tokens * self.context.width
        return batch * values

    def restorer_parameters(self) -> int:
        """Transformer, LoRA, ControlNet and cross-attention: what is loaded for both stages."""
        parameters = counting.transformer_parameters(self.transformer, self.lora_rank)
        parameters += counting.transformer_parameters(self.controlnet)
        return parameters + (counting.context_parameters(self.context) if self.context else 0)


PUBLISHED = Path(__file__).resolve().parent / "bundles" / "part_sizes.json"
"""What the config.json of parts that are fetched says about their sizes, so that a plan needs no download."""


def read_sizes(config: BundleConfig, part_folder: Callable[[str], Path]) -> BundleSizes:
    """The sizes of the bundle with this bundle.json; `part_folder(name)` says where a part lies.

    Only JSON files are opened. A part that weights.lock names need not be on this machine: its published sizes are
    known. Raises `WeightsError` where a config is missing or belongs to another kind of network.
    """
    parts, control = config.parts, config.control
    known = _Configs(config, part_folder)
    try:
        return BundleSizes(
            name=config.name,
            transformer=BlockSizes.from_config(known.of("transformer")),
            controlnet=BlockSizes.from_config(known.of("controlnet")),
            context=ContextSizes.from_config(known.of("context_attention"))
            if control.text and "context_attention" in parts
            else None,
            lora_rank=int(known.of("lora", file="adapter_config.json")["r"]) if "lora" in parts else 0,
            autoencoder=AutoencoderSizes(known.of("vae")),
            text=known.text(),
            max_text_tokens=config.defaults.max_text_tokens,
            grain=GrainSizes(known.of("grain")) if "grain" in parts else None,
            cleaner=CleanerSizes(known.of("cleaner")) if "cleaner" in parts else None,
            control_is_clean=control.timestep == "clean",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"bundle {config.name}: a part's config doesn't fit: {error!r}", "fetch or train the bundle again"
        ) from error


class _Configs:
    """The config.json files of a bundle's parts."""

    def __init__(self, config: BundleConfig, part_folder: Callable[[str], Path]) -> None:
        self._parts, self._part_folder = config.parts, part_folder

    def of(self, name: str, within: str = "", file: str = "config.json") -> dict[str, Any]:
        """The config of a part, or of a folder within it."""
        part = self._parts.get(name)
        if part is None or part.lock is None:
            return _read(self._part_folder(name) / within, file)
        inside = "/".join(piece for piece in (part.subfolder, within) if piece)
        # Where the weights lie they are not hashed for a plan: their sizes are all that counts.
        here = weights_folder(part.lock) / inside
        if (here / file).is_file():
            return _read(here, file)
        published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
        for key in (f"{part.lock}/{inside}" if inside else part.lock, f"{part.lock}/{name}"):
            if key in published:
                return published[key]
        raise WeightsError(f"the weights of {part.lock} are not on this machine", f"dreamsr fetch-weights {part.lock}")

    def text(self) -> TextSizes:
        """Of the built-in encoder, or of CLIP and T5, whose part has no config.json of its own."""
        part = self._parts.get("text_encoder")
        if (part is None or part.lock is None) and (self._part_folder("text_encoder") / "config.json").is_file():
            return TextSizes.from_configs(self.of("text_encoder"), {}, {})
        two = (self.of("text_encoder", within) for within in ("text_encoder", "text_encoder_2"))
        return TextSizes.from_configs({}, *two)


def _read(folder: Path, name: str = "config.json") -> dict[str, Any]:
    try:
        data = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder / name}: can't be read: {error}", "fetch or train the bundle again") from error
    if not isinstance(data, dict):
        raise WeightsError(f"{folder / name}: not a table", "fetch or train the bundle again")
    return data
