"""Restoration Acceleration LoRA: low-rank adapters on the DiT that are on only inside a `with`.

Source: DreamSR, section 3.2. Attention and feed-forward linears of all double and single blocks (1,046 M parameters
at rank 256 and FLUX size), alpha = rank. peft does the arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from peft import LoraConfig, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dreamsr_cli.counting import FOLDABLE
from dreamsr_cli.errors import WeightsError

NAME = "removal"
TARGETS = (
    r"(transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"|ff\.net\.(0\.proj|2)|ff_context\.net\.(0\.proj|2))"
    r"|single_transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v)|proj_mlp|proj_out))"
)
"""Full-match pattern: the top-level `proj_out` and all modulation stay untouched."""
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


class RestorationLoRA:
    """The adapter named "removal" of one transformer; off after construction."""

    def __init__(self, transformer: FluxTransformer2DModel, rank: int) -> None:
        """Adds a fresh adapter: its output is zero until trained. Base weights stop requiring gradients (peft)."""
        self.transformer, self.rank = transformer, rank
        self._kept: tuple[object, list[torch.nn.Parameter]] | None = None
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=True)
        transformer.add_adapter(config, adapter_name=NAME)
        self._switch(False)

    @contextmanager
    def on(self) -> Generator[None]:
        """Inside, the transformer restores; outside, it is exactly the base, also after an exception."""
        self._switch(True)
        try:
            yield
        finally:
            self._switch(False)

    @contextmanager
    def folded(self) -> Generator[None]:
        """As `on`, for inference: where the base is small and in float32 on a CPU, its weights with the adapter's
        change added take the place of both. The thin products of a low rank take a CPU a quarter of a pass [measured].
        """
        layers = self._layers()
        bases: list[Any] = [layer.get_base_layer() for layer in layers]
        if not all(map(_is_plain, bases)) or sum(base.weight.numel() for base in bases) > FOLDABLE:
            with self.on():
                yield
            return
        before = [base.weight for base in bases]
        changed = self._changed(layers)
        try:
            for base, weight in zip(bases, changed, strict=True):
                base.weight = weight
            yield
        finally:
            for base, weight in zip(bases, before, strict=True):
                base.weight = weight

    @torch.no_grad()
    def _changed(self, layers: list[Any]) -> list[torch.nn.Parameter]:
        """The base weights with the adapter's change, kept for as long as none of them is written to."""
        of: list[torch.Tensor] = [*self.parameters(), *(layer.get_base_layer().weight for layer in layers)]
        state = [(weight.data_ptr(), weight._version) for weight in of]
        if self._kept is None or self._kept[0] != state:
            made = [layer.get_base_layer().weight + layer.get_delta_weight(NAME) for layer in layers]
            self._kept = state, [torch.nn.Parameter(weight, requires_grad=False) for weight in made]
        return self._kept[1]

    def as_now(self) -> AbstractContextManager[None]:
        """A context in which the adapter is as it is at this call, whatever it was switched to meanwhile."""
        return self._switched(self.active)

    @contextmanager
    def _switched(self, on: bool) -> Generator[None]:
        before = self.active
        self._switch(on)
        try:
            yield
        finally:
            self._switch(before)

    @property
    def active(self) -> bool:
        """Whether the adapter takes part in the forward pass just now."""
        return any(not layer.disable_adapters for layer in self._layers())

    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapter's own parameters, to be trained."""
        return [p for name, p in self.transformer.named_parameters() if "lora_" in name]

    def save(
        self, folder: Path, dtype: torch.dtype | None = None, weights: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Write peft's usual two files into `folder`; `weights` may replace the transformer's own state dict."""
        folder.mkdir(parents=True, exist_ok=True)
        state = get_peft_model_state_dict(self.transformer, state_dict=weights, adapter_name=NAME)
        save_file(
            {k: v.detach().to(dtype or v.dtype).contiguous().cpu() for k, v in state.items()}, folder / WEIGHTS_FILE
        )
        config = {"peft_type": "LORA", "r": self.rank, "lora_alpha": self.rank, "target_modules": TARGETS}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, transformer: FluxTransformer2DModel, folder: Path, cut: int = 0) -> RestorationLoRA:
        """Add the adapter saved in `folder`; one of a rank above `cut` (0: any) keeps as many of its strongest
        directions. Raises `WeightsError` if a tensor is missing or left over."""
        try:
            config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            state = load_file(folder / WEIGHTS_FILE)
            rank = int(config["r"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise WeightsError(f"{folder}: not a readable LoRA: {error}", "fetch or train it again") from error
        if 0 < cut < rank:
            state, rank = _cut(state, cut), cut
        lora = cls(transformer, rank)
        own = get_peft_model_state_dict(transformer, adapter_name=NAME)
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in state.items()}:
            raise WeightsError(f"{folder}: the LoRA was made for another transformer", "give the bundle it belongs to")
        set_peft_model_state_dict(transformer, state, adapter_name=NAME)
        return lora

    def _layers(self) -> list[BaseTunerLayer]:
        return [m for m in self.transformer.modules() if isinstance(m, BaseTunerLayer)]

    def _switch(self, on: bool) -> None:
        # Not `enable_adapters(False)`: that also clears requires_grad of the adapter's weights, which training needs.
        for layer in self._layers():
            layer._disable_adapters = not on


def _is_plain(base: Any) -> bool:
    """Whether a layer's weights can be added to as they are: neither quantized, nor elsewhere, nor too coarse."""
    weight = base.weight
    return type(weight.data) is torch.Tensor and weight.dtype == torch.float32 and weight.device.type == "cpu"


@torch.no_grad()
def _cut(state: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """An adapter's weights with its changes of rank `rank` at most: the nearest ones (truncated SVD). Scale is kept,
    since alpha is the rank."""
    made = dict(state)
    for name in state:
        other = name.replace(".lora_A.", ".lora_B.")
        if other == name or other not in state:
            continue
        down, up = state[name].float(), state[other].float()
        # Of small factors alone: the product itself may have tens of millions of entries.
        (q_up, r_up), (q_down, r_down) = torch.linalg.qr(up), torch.linalg.qr(down.T)
        u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
        kept = min(rank, len(s))
        root = s[:kept].sqrt()
        made[name], made[other] = state[name].new_zeros(rank, down.shape[1]), state[other].new_zeros(len(up), rank)
        made[name][:kept] = root[:, None] * (vh[:kept] @ q_down.T)
        made[other][:, :kept] = q_up @ u[:, :kept] * root
    return made
