"""MM-ControlNet: a trimmed copy of the DiT's MM-DiT blocks that reads a tile's condition latent and its local text.

Source: DreamSR, section 3.1 and eq. 1. Axes: B batch, C channels, H W latent, L image tokens, T text tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dreamsr_cli.models.text_encoder import TextEmbedding
from dreamsr_cli.models.tokens import joint_mask, pack, rotary


@dataclass(frozen=True)
class ControlFeatures:
    """What the ControlNet says about a batch of tiles; entry l belongs to feature l of `control.map`."""

    image: list[Tensor]
    """M_img(f_c,img), each (B, L, D): ready to be added to the DiT's image stream."""
    text: list[Tensor] | None
    """f_c,txt, each (B, T, D); None for ControlNets without a text branch."""
    text_mask_BT: Tensor | None
    """True where the local text is text; None where nothing is padded."""

    def rows(self, start: int, stop: int) -> ControlFeatures:
        """The features of tiles [start, stop) of the batch."""
        return ControlFeatures(
            [f[start:stop] for f in self.image],
            None if self.text is None else [f[start:stop] for f in self.text],
            None if self.text_mask_BT is None else self.text_mask_BT[start:stop],
        )


class MMControlNet(ModelMixin, ConfigMixin):
    """MM-DiT blocks only (architecture of `FluxTransformer2DModel`), one zero-initialised projection per image feature.

    `mlp` makes each projection two layers with the last at zero. Sizes come from the config alone: 2 blocks of width
    256 for the built-in model, 9 of width 3072 for FLUX.
    """

    _no_split_modules = ["FluxTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 64,
        num_layers: int = 9,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        mlp: bool = False,
    ) -> None:
        super().__init__()
        # The trunk is diffusers' own class with no single blocks; its output head is dropped.
        trunk = FluxTransformer2DModel(
            in_channels=in_channels,
            num_layers=num_layers,
            num_single_layers=0,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            pooled_projection_dim=pooled_projection_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=axes_dims_rope,
        )
        self.pos_embed = trunk.pos_embed
        self.time_text_embed = trunk.time_text_embed
        self.context_embedder = trunk.context_embedder
        self.x_embedder = trunk.x_embedder
        self.transformer_blocks = trunk.transformer_blocks
        width = num_attention_heads * attention_head_dim
        self.image_projections = nn.ModuleList(zero_projection(width, mlp) for _ in range(num_layers))
        self.checkpoint_blocks = False

    @classmethod
    def from_transformer(
        cls, transformer: FluxTransformer2DModel, control_map: tuple[int | None, ...], mlp: bool = False
    ) -> MMControlNet:
        """Block l is a copy of the first DiT block that receives feature l; embeddings are copied too, projections
        are zero."""
        c: Any = transformer.config
        sources = [control_map.index(feature) for feature in sorted({f for f in control_map if f is not None})]
        control = cls(
            in_channels=c.in_channels,
            num_layers=len(sources),
            attention_head_dim=c.attention_head_dim,
            num_attention_heads=c.num_attention_heads,
            joint_attention_dim=c.joint_attention_dim,
            pooled_projection_dim=c.pooled_projection_dim,
            guidance_embeds=c.guidance_embeds,
            axes_dims_rope=tuple(c.axes_dims_rope),
            mlp=mlp,
        )
        for name in ("time_text_embed", "context_embedder", "x_embedder"):
            getattr(control, name).load_state_dict(getattr(transformer, name).state_dict())
        for block, source in zip(control.transformer_blocks, sources, strict=True):
            block.load_state_dict(transformer.transformer_blocks[source].state_dict())
        # nn.Module's own: diffusers' `to` warns about float32 modules even where there are none.
        return nn.Module.to(control, transformer.device, transformer.dtype)

    def forward(
        self, condition_BCHW: Tensor, t_B: Tensor, text: TextEmbedding, mask_pads: bool, guidance: float | None = None
    ) -> ControlFeatures:
        """Features of a batch of tiles.

        `condition_BCHW`: z_lq in stage 1, z_dr in stage 2; `t_B`: the timestep in [0, 1] it is told; `text`: the
        tiles' local prompts, batch B; `mask_pads`: hide padded text from self-attention (the built-in model; FLUX
        sees its padding).
        """
        _, _, height, width = condition_BCHW.shape
        hidden = self.x_embedder(pack(condition_BCHW).to(self.x_embedder.weight.dtype))
        temb = embed_time(self.time_text_embed, t_B, text.pooled_BD, guidance)
        encoder = self.context_embedder(text.tokens_BTD)
        rope = rotary(self.pos_embed, encoder.shape[1], height, width, hidden.device)
        kwargs = joint_mask(text.mask_BT if mask_pads else None, hidden.shape[1])
        image, texts = [], []
        for block, projection in zip(self.transformer_blocks, self.image_projections, strict=True):
            if self.checkpoint_blocks and torch.is_grad_enabled():
                encoder, hidden = checkpoint(block, hidden, encoder, temb, rope, kwargs, use_reentrant=False)
            else:
                encoder, hidden = block(
                    hidden_states=hidden,
                    encoder_hidden_states=encoder,
                    temb=temb,
                    image_rotary_emb=rope,
                    joint_attention_kwargs=kwargs,
                )
            image.append(projection(hidden))
            texts.append(encoder)
        return ControlFeatures(image, texts, text.mask_BT)


def zero_projection(width: int, mlp: bool = False) -> nn.Module:
    """M of eq. 1 and 2: a zero-initialised linear D -> D, or two layers of which the last is zero."""
    last = nn.Linear(width, width)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), last) if mlp else last


def embed_time(time_text_embed: nn.Module, t_B: Tensor, pooled_BD: Tensor, guidance: float | None) -> Tensor:
    """FLUX's modulation vector (B, D). t is scaled in float32: in bfloat16, 0.803 would become 804 thousandths."""
    timestep = t_B.float() * 1000
    if guidance is None:
        return time_text_embed(timestep, pooled_BD)
    scaled = torch.full_like(timestep, guidance * 1000)
    return time_text_embed(timestep, scaled, pooled_BD)
