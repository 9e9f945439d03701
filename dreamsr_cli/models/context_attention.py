"""Context Cross-Attention: the DiT's global text asks, the ControlNet's local text answers.

Source: DreamSR, eq. 2; residual and zero-initialised (ours), because a literal assignment would wipe the frozen
DiT's text stream at the start of training. Axes: B batch, T global text tokens, S local text tokens, N heads, D
width.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from dreamsr_cli.models.mm_controlnet import zero_projection


class ContextCrossAttention(nn.Module):
    """f_txt + M_txt(CrossAttention(P_Q f_txt, P_K f_c,txt, P_V f_c,txt)), heads as in the DiT, RMS norm on Q and K,
    no RoPE."""

    def __init__(self, heads: int, head_dim: int, mlp: bool = False) -> None:
        super().__init__()
        width = heads * head_dim
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.norm_q = nn.RMSNorm(head_dim, eps=1e-6)
        self.norm_k = nn.RMSNorm(head_dim, eps=1e-6)
        self.text_projection = zero_projection(width, mlp)

    def keys_values(self, local_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """P_K and P_V of the local text, each (B, N, S, D/N); the same in every step where the local text is."""
        key = self.norm_k(self.to_k(local_BSD).unflatten(-1, (self.heads, -1))).transpose(1, 2)
        value = self.to_v(local_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return key, value

    def forward(self, text_BTD: Tensor, key: Tensor, value: Tensor, local_mask_BS: Tensor | None) -> Tensor:
        """The DiT's text stream after the block, with the local text mixed in; padding of the local text is not
        attended to."""
        query = self.norm_q(self.to_q(text_BTD).unflatten(-1, (self.heads, -1))).transpose(1, 2)
        mask = None if local_mask_BS is None else local_mask_BS[:, None, None, :]
        mixed = F.scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), value, attn_mask=mask)
        return text_BTD + self.text_projection(mixed.transpose(1, 2).flatten(2))


class ContextAttention(ModelMixin, ConfigMixin):
    """One `ContextCrossAttention` for every injected DiT block, in block order."""

    @register_to_config
    def __init__(self, injections: int, num_attention_heads: int, attention_head_dim: int, mlp: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ContextCrossAttention(num_attention_heads, attention_head_dim, mlp) for _ in range(injections)
        )


@torch.no_grad()
def wake_projections(module: nn.Module, std: float, seed: int) -> None:
    """Draw the zero-initialised last layers of all projections in `module` from N(0, (std / sqrt(D))^2).

    For training a bundle without a prior (decisions.md: control not at zero but small), and for tests that must see
    an effect.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, child in module.named_modules():
        if name.split(".")[-1] == "text_projection" or ".image_projections." in f".{name}" and name.count(".") == 1:
            last = child[-1] if isinstance(child, nn.Sequential) else child
            weight = cast(nn.Linear, last).weight
            noise = torch.randn(weight.shape, generator=generator) * std / weight.shape[1] ** 0.5
            weight.copy_(noise.to(weight))
