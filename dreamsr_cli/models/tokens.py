"""Latents <-> image tokens, position ids and attention masks, as FLUX lays them out.

Axes: B batch, C channels, H W latent rows and columns, L image tokens (L = H/2 * W/2), T text tokens, D width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import Tensor

PACK = 2
"""Latent pixels per token side."""


def pack(z_BCHW: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H/2 * W/2, 4C), rows first; H and W must be even, else `ValueError`."""
    batch, channels, height, width = z_BCHW.shape
    if height % PACK or width % PACK:
        raise ValueError(f"latent sides must be even, got {height}x{width}")
    x = z_BCHW.view(batch, channels, height // PACK, PACK, width // PACK, PACK)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // PACK) * (width // PACK), channels * PACK * PACK)


def unpack(tokens_BLD: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack` for a latent of `height` x `width`."""
    batch, _, depth = tokens_BLD.shape
    x = tokens_BLD.view(batch, height // PACK, width // PACK, depth // PACK**2, PACK, PACK)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, depth // PACK**2, height, width)


def position_ids(text_tokens: int, height: int, width: int, device: torch.device) -> Tensor:
    """(T + L, 3) float32: zeros for text, (0, row, column) for image tokens. bfloat16 ids would collapse above 256."""
    ids = torch.zeros(text_tokens + (height // PACK) * (width // PACK), 3, device=device)
    grid = ids[text_tokens:].view(height // PACK, width // PACK, 3)
    grid[..., 1] = torch.arange(height // PACK, device=device)[:, None]
    grid[..., 2] = torch.arange(width // PACK, device=device)[None, :]
    return ids


@lru_cache(maxsize=16)
def _rotary(
    theta: int, axes: tuple[int, ...], text: int, height: int, width: int, device: str
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():
        return FluxPosEmbed(theta, list(axes))(position_ids(text, height, width, torch.device(device)))


def rotary(
    pos_embed: FluxPosEmbed, text_tokens: int, height: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The (cosine, sine) pair of `pos_embed` for this layout, float32, computed once per layout."""
    return _rotary(pos_embed.theta, tuple(pos_embed.axes_dim), text_tokens, height, width, str(device))


def joint_mask(mask_BT: Tensor | None, image_tokens: int) -> dict[str, Tensor] | None:
    """`joint_attention_kwargs` that hide padded text from text and image; None where no mask is given."""
    if mask_BT is None:
        return None
    image = mask_BT.new_ones(mask_BT.shape[0], image_tokens)
    return {"attention_mask": torch.cat([mask_BT, image], 1)[:, None, None, :]}
