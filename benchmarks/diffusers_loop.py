"""The texture steps as one writes them over diffusers alone.

Axes: B batch, C channels, H W latent rows and columns, L image tokens, T text tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

from dreamsr_cli import flow
from dreamsr_cli.models.bundle import Bundle
from dreamsr_cli.models.text_encoder import stack
from dreamsr_cli.models.tokens import pack, position_ids, unpack
from dreamsr_cli.multidiffusion import blend
from dreamsr_cli.sampler import Texts, renoise
from dreamsr_cli.tiling import Tile, TileGrid

SEED = 42


@dataclass(frozen=True)
class Peer:
    """Diffusers' own classes at the bundle's sizes."""

    transformer: Any
    """FluxTransformer2DModel with the bundle's weights, without LoRA."""
    controlnet: Any
    """FluxControlNetModel with as many double blocks as our ControlNet, no single ones, fresh weights."""
    control_map: tuple[int | None, ...]
    """For each double block of the transformer the residual it receives, or None."""

    @classmethod
    def of(cls, bundle: Bundle, device: torch.device, dtype: torch.dtype) -> Peer:
        """The peer of `bundle`."""
        transformer = FluxTransformer2DModel.from_pretrained(
            bundle.part_folder("transformer"), torch_dtype=dtype, use_safetensors=True, local_files_only=True
        )
        blocks = len({feature for feature in bundle.config.control.map if feature is not None})
        controlnet = FluxControlNetModel.from_transformer(
            transformer,
            num_layers=blocks,
            num_single_layers=0,
            attention_head_dim=transformer.config["attention_head_dim"],
            num_attention_heads=transformer.config["num_attention_heads"],
            load_weights_from_transformer=False,
        )
        controlnet = controlnet.to(device, dtype).eval()
        missing = len(transformer.transformer_blocks) - len(bundle.config.control.map)
        return cls(transformer.to(device).eval(), controlnet, bundle.config.control.map + (None,) * missing)


def plain_texture(
    peer: Peer,
    grid: TileGrid,
    texts: Texts,
    batch: int,
    z_dr_CHW: np.ndarray,
    t_start: float,
    steps: int,
    guidance: float | None,
) -> np.ndarray:
    """The texture steps as one writes them over diffusers: ControlNet, then transformer, at every step.

    Same tiles, batches, texts, noise and blend as ours. What doesn't change between steps is prepared once; the last
    batch is not padded, and padding of texts is not masked (less work than ours).
    """
    device, dtype = peer.transformer.device, peer.transformer.dtype
    glob = texts.glob.to(device, dtype)
    rows, columns = grid.tile_height // 8, grid.tile_width // 8
    image_ids = position_ids(0, rows, columns, device)

    def tokens(canvas_CHW: np.ndarray, tiles: tuple[Tile, ...]) -> torch.Tensor:
        boxes = [tile.latent_box() for tile in tiles]
        crops = np.stack([canvas_CHW[:, top : top + h, left : left + w] for top, left, h, w in boxes])
        return pack(torch.from_numpy(crops).to(device)).to(dtype)

    with torch.inference_mode():
        groups = []
        for tiles in grid.batches(batch):
            local = stack([texts.local[tile.index] for tile in tiles], texts.length).to(device, dtype)
            groups.append((tiles, local, tokens(z_dr_CHW, tiles)))
        z_CHW = renoise(z_dr_CHW, t_start, SEED)
        for t, t_next in pairwise(flow.timesteps(t_start, steps)):
            slots: dict[int, np.ndarray] = {}
            for tiles, local, condition_BLD in groups:
                noisy_BLD, size = tokens(z_CHW, tiles), len(tiles)
                shared = {
                    "hidden_states": noisy_BLD,
                    "timestep": torch.full((size,), t, device=device),
                    "guidance": None if guidance is None else torch.full((size,), guidance, device=device),
                    "img_ids": image_ids,
                    "return_dict": False,
                }
                residuals = peer.controlnet(
                    controlnet_cond=condition_BLD,
                    encoder_hidden_states=local.tokens_BTD,
                    pooled_projections=local.pooled_BD,
                    txt_ids=image_ids.new_zeros(local.tokens_BTD.shape[1], 3),
                    **shared,
                )[0]
                nothing = residuals[0].new_zeros(())
                v_BLD = peer.transformer(
                    encoder_hidden_states=glob.tokens_BTD.expand(size, -1, -1),
                    pooled_projections=glob.pooled_BD.expand(size, -1),
                    txt_ids=image_ids.new_zeros(glob.tokens_BTD.shape[1], 3),
                    controlnet_block_samples=[nothing if f is None else residuals[f] for f in peer.control_map],
                    **shared,
                )[0]
                v_BCHW = unpack(v_BLD, rows, columns).float().cpu().numpy()
                slots.update({tile.index: v for tile, v in zip(tiles, v_BCHW, strict=True)})
            z_CHW = z_CHW + np.float32(t_next - t) * blend(grid, slots)
    return z_CHW
