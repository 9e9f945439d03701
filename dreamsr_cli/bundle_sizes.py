"""What a bundle's config files say about the sizes of its networks; no weights are opened, and no torch is imported."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamsr_cli import counting
from dreamsr_cli.config import BundleConfig
from dreamsr_cli.counting import BlockSizes, ContextSizes, TextSizes
from dreamsr_cli.counting_pixels import AutoencoderSizes
from dreamsr_cli.errors import WeightsError


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
    control_is_clean: bool
    """Control features don't depend on the step, so they may be kept."""

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


def read_sizes(config: BundleConfig, part_folder: Callable[[str], Path]) -> BundleSizes:
    """The sizes of the bundle with this bundle.json; `part_folder(name)` says where a part lies.

    Only JSON files are opened. Raises `WeightsError` where one is missing or belongs to another kind of network.
    """
    parts, control = config.parts, config.control
    text_folder = part_folder("text_encoder")
    is_flux_text = not (text_folder / "config.json").is_file()
    try:
        return BundleSizes(
            name=config.name,
            transformer=BlockSizes.from_config(_read(part_folder("transformer"))),
            controlnet=BlockSizes.from_config(_read(part_folder("controlnet"))),
            context=ContextSizes.from_config(_read(part_folder("context_attention")))
            if control.text and "context_attention" in parts
            else None,
            lora_rank=int(_read(part_folder("lora"), "adapter_config.json")["r"]) if "lora" in parts else 0,
            autoencoder=AutoencoderSizes(_read(part_folder("vae"))),
            text=TextSizes.from_configs(
                {} if is_flux_text else _read(text_folder),
                _read(text_folder / "text_encoder") if is_flux_text else {},
                _read(text_folder / "text_encoder_2") if is_flux_text else {},
            ),
            max_text_tokens=config.defaults.max_text_tokens,
            control_is_clean=control.timestep == "clean",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"bundle {config.name}: a part's config doesn't fit: {error!r}", "fetch or train the bundle again"
        ) from error


def _read(folder: Path, name: str = "config.json") -> dict[str, Any]:
    try:
        data = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder / name}: can't be read: {error}", "fetch or train the bundle again") from error
    if not isinstance(data, dict):
        raise WeightsError(f"{folder / name}: not a table", "fetch or train the bundle again")
    return data
