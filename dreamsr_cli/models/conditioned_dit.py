"""The DiT walked block by block, with the MM-ControlNet's two injections where `control.map` says.

Source: DreamSR, eq. 1 and 2. The transformer is diffusers' own `FluxTransformer2DModel`; only the walk is ours,
because diffusers' ControlNet rule drops features (19 blocks and 9 features) and has no way into the text stream.
Axes: B batch, C channels, H W latent, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dreamsr_cli.errors import ConfigError
from dreamsr_cli.models.context_attention import ContextAttention, ContextCrossAttention
from dreamsr_cli.models.mm_controlnet import ControlFeatures, embed_time
from dreamsr_cli.models.text_encoder import TextEmbedding
from dreamsr_cli.models.tokens import joint_mask, pack, rotary, unpack


@dataclass(frozen=True)
class Injections:
    """Control features made ready for the DiT: what doesn't depend on the step is computed here, once per tile."""

    image: list[Tensor]
    """For each feature (B, L, D), already projected by M_img and scaled."""
    keys_values: list[tuple[Tensor, Tensor]] | None
    """For each injected DiT block, keys and values of the local text, (B, N, S, D/N)."""
    local_mask_BS: Tensor | None
    """True where the local text is text; None where nothing is padded."""

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        tensors = [*self.image, *(t for pair in self.keys_values or [] for t in pair)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def to(self, device: torch.device) -> Injections:
        """The same on another device; from pinned memory without waiting."""
        return self._each(lambda t: t.to(device, non_blocking=t.is_pinned()))

    def in_ram(self) -> Injections:
        """The same in RAM; from a CUDA card into pinned memory, without waiting: only work on the card's present stream
        may use it."""

        def copied(t: Tensor) -> Tensor:
            if t.device.type != "cuda":
                return t.cpu()
            return torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)

        return self._each(copied)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Injections:
        keys_values = self.keys_values and [(change(key), change(value)) for key, value in self.keys_values]
        mask = None if self.local_mask_BS is None else change(self.local_mask_BS)
        return Injections([change(t) for t in self.image], keys_values, mask)


class ConditionedDiT(nn.Module):
    """`FluxTransformer2DModel` with image features and local text injected after chosen double blocks.

    `control_map[i]` is the feature that double block i receives, or None; blocks beyond the map's end receive
    nothing. Raises `ConfigError` if the map is longer than the transformer or asks for more cross-attentions than
    there are.
    """

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        context_attention: ContextAttention | None,
        control_map: tuple[int | None, ...],
        mask_pads: bool,
    ) -> None:
        super().__init__()
        blocks = len(transformer.transformer_blocks)
        injected = [i for i, feature in enumerate(control_map) if feature is not None]
        if len(control_map) > blocks:
            raise ConfigError(
                f"control.map has {len(control_map)} entries for {blocks} double blocks", "correct bundle.json"
            )
        used = {feature for feature in control_map if feature is not None}
        if used != set(range(len(used))):
            raise ConfigError(f"control.map uses features {sorted(used)}, not 0, 1, ...", "correct bundle.json")
        if context_attention is not None and len(context_attention.blocks) != len(injected):
            raise ConfigError(
                f"{len(context_attention.blocks)} context cross-attentions for {len(injected)} injected blocks",
                "correct control.map in bundle.json",
            )
        self.transformer = transformer
        self.context_attention = context_attention
        self.control_map = tuple(control_map) + (None,) * (blocks - len(control_map))
        self.mask_pads = mask_pads
        self.checkpoint_blocks = False
        self.adapters_as_now: Callable[[], AbstractContextManager[None]] = nullcontext
        """Makes the context in which a checkpointed block is computed again: its adapters as they are now."""

    @property
    def features_needed(self) -> int:
        """Number of distinct control features that the map uses."""
        return len({f for f in self.control_map if f is not None})

    def prepare(self, features: ControlFeatures, scale: float = 1.0) -> Injections:
        """Project what doesn't depend on the step. Raises `ValueError` unless every feature is used by the map and
        none is missing."""
        used = {f for f in self.control_map if f is not None}
        if used != set(range(len(features.image))):
            raise ValueError(f"the map uses features {sorted(used)}, the ControlNet made {len(features.image)}")
        keys_values = None
        if self.context_attention is not None and features.text is not None:
            mapped = [f for f in self.control_map if f is not None]
            keys_values = [
                cast(ContextCrossAttention, attention).keys_values(features.text[feature])
                for attention, feature in zip(self.context_attention.blocks, mapped, strict=True)
            ]
        image = features.image if scale == 1.0 else [f * scale for f in features.image]
        return Injections(image, keys_values, features.text_mask_BT)

    def forward(
        self,
        z_BCHW: Tensor,
        t_B: Tensor,
        text: TextEmbedding,
        injections: Injections | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """Velocity v_BCHW in float32 of the latents `z_BCHW` (z_t, or z_lq in stage 1) at times `t_B` in [0, 1].

        `text` is the global prompt: batch B, or batch 1 for all tiles, in which case modulation and text projections
        are computed once at batch 1 if `t_B` has one entry too (small matrix products differ between batch sizes;
        decisions.md, Sameness).
        """
        dit = self.transformer
        batch, _, height, width = z_BCHW.shape
        hidden = dit.x_embedder(pack(z_BCHW).to(dit.x_embedder.weight.dtype))
        temb = embed_time(dit.time_text_embed, t_B, text.pooled_BD, guidance)
        encoder = dit.context_embedder(text.tokens_BTD).expand(batch, -1, -1)
        rope = rotary(dit.pos_embed, encoder.shape[1], height, width, hidden.device)
        kwargs = joint_mask(text.mask_BT if self.mask_pads else None, hidden.shape[1])

        attention = 0
        for block, feature in zip(dit.transformer_blocks, self.control_map, strict=True):
            encoder, hidden = self._run(block, hidden, encoder, temb, rope, kwargs)
            if feature is None or injections is None:
                continue
            hidden = hidden + injections.image[feature]
            if injections.keys_values is not None:
                assert self.context_attention is not None
                key, value = injections.keys_values[attention]
                encoder = self.context_attention.blocks[attention](encoder, key, value, injections.local_mask_BS)
            attention += 1
        for block in dit.single_transformer_blocks:
            encoder, hidden = self._run(block, hidden, encoder, temb, rope, kwargs)
        tokens = dit.proj_out(dit.norm_out(hidden, temb))
        return unpack(tokens, height, width).float()

    def _run(self, block, hidden, encoder, temb, rope, kwargs):  # noqa: ANN001, ANN202
        if self.checkpoint_blocks and torch.is_grad_enabled():
            # The backward pass comes when the LoRA has been switched off again.
            again = self.adapters_as_now()
            return checkpoint(
                block,
                hidden,
                encoder,
                temb,
                rope,
                kwargs,
                use_reentrant=False,
                context_fn=lambda: (nullcontext(), again),
            )
        return block(
            hidden_states=hidden,
            encoder_hidden_states=encoder,
            temb=temb,
            image_rotary_emb=rope,
            joint_attention_kwargs=kwargs,
        )
