"""The texture steps as one writes them over diffusers alone, and a race between them and our sampler.

Axes: B batch, C channels, H W latent rows and columns, L image tokens, T text tokens, D width.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

from dreamsr_cli import flow
from dreamsr_cli.engine import Settings
from dreamsr_cli.images import open_photo
from dreamsr_cli.journal import Journal
from dreamsr_cli.models.bundle import Bundle
from dreamsr_cli.models.text_encoder import stack
from dreamsr_cli.models.tokens import pack, position_ids, unpack
from dreamsr_cli.multidiffusion import blend
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.prompts import make_plan
from dreamsr_cli.sampler import REMOVE, Sampler, Texts, renoise
from dreamsr_cli.tiling import Tile, TileGrid, make_grid

SEED = 42


@dataclass(frozen=True)
class SamplerRuns:
    """Part B: seconds of each pair of runs, and forward passes per run."""

    tiles: int
    text_tokens: int
    ours: list[float]
    theirs: list[float]
    our_calls: dict[str, int]
    their_calls: dict[str, int]

    @property
    def ratio(self) -> float:
        """Median of ours / theirs over the pairs."""
        return statistics.median(a / b for a, b in zip(self.ours, self.theirs, strict=True))


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


def measure_sampler(
    bundle: Bundle, photo: Path, side: int, settings: Settings, device: torch.device, dtype: torch.dtype, repeat: int
) -> SamplerRuns:
    """Part B: `repeat` pairs of runs in turn, after one step of each to warm up."""
    grid = make_grid(side, side, settings.tile, settings.overlap)
    plan = make_plan(open_photo(photo), grid, side, side, settings.captioner)
    encoder = bundle.open_text_encoder(device, dtype)
    words = [plan.global_text, *(tile.text for tile in plan.tiles)]
    (glob, *local), _ = encoder.encode(words, bundle.config.defaults.max_text_tokens)
    texts = Texts(glob, local)
    restorer = bundle.open_restorer(device, dtype, mask_pads=not encoder.pads_are_seen)
    peer = Peer.of(bundle, device, dtype)
    shape = (bundle.config.latent.channels, grid.canvas_height // 8, grid.canvas_width // 8)
    z_dr_CHW = np.random.default_rng(SEED).standard_normal(shape, dtype=np.float32)
    guidance = settings.guidance if restorer.dit.transformer.config["guidance_embeds"] else None

    def run_ours(steps: int) -> None:
        sampling, control = bundle.config.sampling, bundle.config.control
        with TemporaryDirectory() as folder, Journal(Path(folder) / "race.dreamsr", {}, 0) as journal:
            z_dr = journal.piece("z_dr", REMOVE, shape)
            z_dr.append(z_dr_CHW)
            sampler = Sampler(restorer, grid, texts, sampling, control, settings.tile_batch, journal, SilentProgress())
            sampler.texture(z_dr.finish(), settings.strength, steps, SEED, guidance)

    def run_theirs(steps: int) -> None:
        plain_texture(peer, grid, texts, settings.tile_batch, z_dr_CHW, settings.strength, steps, guidance)

    run_ours(1)
    run_theirs(1)
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    counts: Counter[str] = Counter()
    networks = {
        "ours dit": restorer.dit,
        "ours controlnet": restorer.controlnet,
        "theirs dit": peer.transformer,
        "theirs controlnet": peer.controlnet,
    }
    for name, network in networks.items():
        network.register_forward_hook(lambda *_, n=name: counts.update([n]))
    for _ in range(repeat):
        for name, run in (("ours", run_ours), ("theirs", run_theirs)):
            began = time.perf_counter()
            run(settings.steps)
            seconds[name].append(time.perf_counter() - began)
    return SamplerRuns(
        tiles=len(grid.tiles),
        text_tokens=texts.length,
        ours=seconds["ours"],
        theirs=seconds["theirs"],
        our_calls={part: counts[f"ours {part}"] // repeat for part in ("dit", "controlnet")},
        their_calls={part: counts[f"theirs {part}"] // repeat for part in ("dit", "controlnet")},
    )
