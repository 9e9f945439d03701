"""Public FLUX ControlNets (diffusers' `FluxControlNetModel`) behind the MM-ControlNet's contract.

They differ from the paper's: the condition is added to the embedded noisy latent, so they run in every step, and there
is no text branch. Axes: B batch, C channels, H W latent.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel
from torch import Tensor, nn

from dreamsr_cli.errors import ConfigError
from dreamsr_cli.models.mm_controlnet import ControlFeatures, embed_time
from dreamsr_cli.models.text_encoder import TextEmbedding
from dreamsr_cli.models.tokens import pack, rotary


class FluxControl(nn.Module):
    """`FluxControlNetModel` with the call of `MMControlNet`, plus the noisy latent.

    Raises `ConfigError` for ControlNets that this engine has no inputs for: union models (they ask for a mode), hint
    images in pixels, and injections into single blocks.
    """

    def __init__(self, model: FluxControlNetModel) -> None:
        super().__init__()
        c: Any = model.config
        for wrong, what in (
            (c.num_mode is not None, "is a union of several modes"),
            (c.conditioning_embedding_channels is not None, "reads its hint as pixels"),
            (c.num_single_layers > 0, "feeds single blocks"),
        ):
            if wrong:
                raise ConfigError(f"this FLUX ControlNet {what}", "use one for upscaling, such as jasperai's")
        self.model = model

    @property
    def transformer_blocks(self) -> nn.ModuleList:
        """Its double blocks: one feature each."""
        return self.model.transformer_blocks

    def forward(
        self,
        condition_BCHW: Tensor,
        t_B: Tensor,
        text: TextEmbedding,
        mask_pads: bool,
        guidance: float | None = None,
        noisy_BCHW: Tensor | None = None,
    ) -> ControlFeatures:
        """Image features of a batch of tiles at the sampled time `t_B` in [0, 1]; no text features.

        `noisy_BCHW`: z_t; None: the condition itself. FLUX sees padded text, so `mask_pads` must be false.
        """
        assert not mask_pads, "FLUX ControlNets see the padding of their prompts"
        _, _, height, width = condition_BCHW.shape
        model, dtype = self.model, self.model.x_embedder.weight.dtype
        noisy_BCHW = condition_BCHW if noisy_BCHW is None else noisy_BCHW
        hidden = model.x_embedder(pack(noisy_BCHW).to(dtype)) + model.controlnet_x_embedder(
            pack(condition_BCHW).to(dtype)
        )
        # Our own walk: diffusers' rounds t to the weights' dtype before it is scaled by 1000.
        temb = embed_time(model.time_text_embed, t_B, text.pooled_BD, guidance)
        encoder = model.context_embedder(text.tokens_BTD)
        pos_embed: Any = model.pos_embed
        rope = rotary(pos_embed, encoder.shape[1], height, width, hidden.device)
        image = []
        for block, projection in zip(model.transformer_blocks, model.controlnet_blocks, strict=True):
            encoder, hidden = block(
                hidden_states=hidden, encoder_hidden_states=encoder, temb=temb, image_rotary_emb=rope
            )
            image.append(projection(hidden))
        return ControlFeatures(image, None, None)
