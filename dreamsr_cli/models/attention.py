"""FLUX's joint attention with fewer passes over memory, and the fastest attention kernels that a card has.

Rotary embeddings are one complex product instead of five real passes; the numbers are the same. Axes: B batch, S
tokens, N heads, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

HOPPER = (9, 0)
"""Compute capability from which cuDNN's attention is ahead of PyTorch's own flash kernels."""


class JointAttention:
    """A processor for diffusers' `FluxAttention`: queries, keys and values of text and image are normed, joined, turned
    by their positions and attended to, as FLUX defines it."""

    def __init__(self) -> None:
        self._cosine: Tensor | None = None
        self._turns: Tensor | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Image and text streams of a double block, (image, text); of a single block the joint stream."""
        heads = (-1, attn.head_dim)
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, heads))
        key = attn.norm_k(attn.to_k(hidden_states).unflatten(-1, heads))
        value = attn.to_v(hidden_states).unflatten(-1, heads)
        words = 0
        if encoder_hidden_states is not None:
            words = encoder_hidden_states.shape[1]
            text_query = attn.norm_added_q(attn.add_q_proj(encoder_hidden_states).unflatten(-1, heads))
            text_key = attn.norm_added_k(attn.add_k_proj(encoder_hidden_states).unflatten(-1, heads))
            text_value = attn.add_v_proj(encoder_hidden_states).unflatten(-1, heads)
            query, key = torch.cat([text_query, query], 1), torch.cat([text_key, key], 1)
            value = torch.cat([text_value, value], 1)
        if image_rotary_emb is not None:
            query, key = self._turned(query, image_rotary_emb), self._turned(key, image_rotary_emb)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=attention_mask
        )
        mixed = mixed.transpose(1, 2).flatten(2).to(query.dtype)
        if encoder_hidden_states is None:
            return mixed
        image = attn.to_out[1](attn.to_out[0](mixed[:, words:].contiguous()))
        return image, attn.to_add_out(mixed[:, :words].contiguous())

    def _turned(self, x_BSND: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        if torch.compiler.is_compiling():  # inductor fuses the real form, and leaves complex numbers alone
            return cast(Any, apply_rotary_emb)(x_BSND, rotary, sequence_dim=1)
        pairs = torch.view_as_complex(x_BSND.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self._factors(*rotary)).flatten(-2).to(x_BSND.dtype)

    def _factors(self, cosine_SD: Tensor, sine_SD: Tensor) -> Tensor:
        """cos + i sin, (S, 1, D/2); made once per layout, since `tokens.rotary` gives the same tensors again."""
        if self._turns is None or self._cosine is not cosine_SD:
            self._turns = torch.complex(cosine_SD[:, ::2].contiguous(), sine_SD[:, ::2].contiguous())[:, None]
            self._cosine = cosine_SD
        return self._turns


def join_attention(networks: Iterable[nn.Module]) -> None:
    """Let every FLUX attention below `networks` use one `JointAttention`. For inference: fused projections and other
    processors are replaced."""
    processor: Any = JointAttention()
    for network in networks:
        for module in network.modules():
            if isinstance(module, FluxAttention):
                module.set_processor(processor)


def attention_kernels(device: torch.device) -> AbstractContextManager[None]:
    """A context in which `scaled_dot_product_attention` tries the fastest kernels of the device first.

    On a CUDA card: cuDNN's from Hopper on, then flash; masks go to the memory-efficient kernel, what none can to plain
    products. Elsewhere PyTorch chooses.
    """
    if device.type != "cuda":
        return nullcontext()
    flash = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    if torch.cuda.get_device_capability(device) >= HOPPER:
        order = [SDPBackend.CUDNN_ATTENTION, *flash, SDPBackend.MATH]
    else:
        order = [*flash, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)
