"""Memory of one training step on one card: what each part holds, and what the step keeps for its backward pass.

Trained parts hold live weights in the compute dtype, float32 masters and AdamW's two moments, an average where one is
kept, and gradients (optimisers.py). Frozen parts hold their weights alone. Activations are counted by autograd itself
on the meta device (activations.py), for the largest crops of the recipe.

Three ways to spread them: "whole" (one card, or DDP: every card holds everything), "sharded" (FSDP2: each card holds
its share, and two blocks at a time in full), "offload" (FSDP2 with its share in the host's memory).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from dreamsr_cli.losses import contrast_distance
from dreamsr_cli.models.autoencoder import STRIDE, FluxAutoencoder, PatchAutoencoder
from dreamsr_cli.models.cleaner import FAITHFUL, PLEASING, Cleaner
from dreamsr_cli.models.enlarger import MANNERS
from dreamsr_cli.models.fourfold import FACTOR
from dreamsr_cli.models.grain import MARGIN, Grain
from dreamsr_cli.models.text_encoder import TextEmbedding
from dreamsr_cli.training.activations import saved_bytes
from dreamsr_cli.training.part_configs import MetaNetworks

WAYS = ("whole", "sharded", "offload")
RESERVE = 1_500_000_000
"""Bytes of a GPU for its context, libraries' workspaces and what its allocator can't use."""
SPARE = 1.15
"""Activations times this: gradients of activations and temporary results of one block."""
MASTER = MOMENT = AVERAGE = WIDE_GRADIENT = 4
"""Bytes per parameter in float32."""
EIGHT_BIT_MOMENT = 1.02
"""Bytes per parameter of one 8-bit moment with its block scales."""


@dataclass(frozen=True)
class PartMemory:
    """Bytes of one part, before it is spread."""

    name: str
    parameters: int
    trained: int
    """Parameters among them that learn."""
    weights: int
    masters: int
    average: int
    moments: int
    gradients: int
    """In the compute dtype, during the backward pass; counted where this part learns in the step."""
    wide_gradients: int
    """In float32, during the optimizer's step, when activations are gone."""

    @property
    def resident(self) -> int:
        """What is there between steps."""
        return self.weights + self.masters + self.average + self.moments


@dataclass(frozen=True)
class StepMemory:
    """What one pass of a step keeps, per crop."""

    kind: str
    """Of step."""
    kept: int
    """For the backward pass through the networks."""
    decoder: int
    """For that through decoder and perceptual distance, gone before the former begins."""
    block: int
    """Of one block computed again, with checkpointing; else 0."""

    @property
    def peak(self) -> int:
        """Most at one time."""
        return self.kept + max(self.decoder, self.block)


def part_memory(name: str, parameters: int, trained: int, itemsize: int, eight_bit: bool, ema: bool) -> PartMemory:
    """One part in numbers."""
    return PartMemory(
        name=name,
        parameters=parameters,
        trained=trained,
        weights=parameters * itemsize,
        masters=trained * MASTER,
        average=trained * AVERAGE if ema else 0,
        moments=round(2 * trained * (EIGHT_BIT_MOMENT if eight_bit else MOMENT)),
        gradients=trained * itemsize,
        wide_gradients=trained * WIDE_GRADIENT,
    )


def step_memory(
    networks: MetaNetworks, kind: str, side: int, checkpointing: bool, pixel_terms: bool = True
) -> StepMemory:
    """What a step of `kind` (a key of `Stage.learners`) keeps for one crop of `side` pixels.

    `pixel_terms`: count decoder and perceptual distance (eq. 6 and 7); a texture step needs them for the crops with
    t <= 0.2, which may be all of a small batch.
    """
    if kind in ("judge", "enlarge", "clean", "please", "clean-both", "grain"):
        return StepMemory(kind, _small_network_bytes(networks, kind, side), 0, 0)
    decoder = _decoder_bytes(networks, side, trained=kind == "reconstruct") if pixel_terms else 0
    if kind == "reconstruct":
        return StepMemory(kind, 0, decoder, 0)
    kept = 0
    for part in ("removal", "texture") if kind == "both" else (kind,):
        kept += _pass_bytes(networks, part, side, checkpointing, everything=kind == "both")
    block = _largest_block(networks, kind, side) if checkpointing else 0
    return StepMemory(kind, kept, decoder * (2 if kind == "both" else 1), block)


def _pass_bytes(networks: MetaNetworks, kind: str, side: int, checkpointing: bool, everything: bool) -> int:
    """Bytes kept by one pass of ControlNet and transformer for one crop."""
    _choose_learners(networks, kind, everything)
    networks.dit.checkpoint_blocks = networks.controlnet.checkpoint_blocks = checkpointing
    for part in (networks.controlnet, networks.transformer):
        part.train()

    def forward() -> Tensor:
        z_BCHW, t_B, text = _inputs(networks, side)
        guidance = 1.0 if networks.transformer.config["guidance_embeds"] else None
        with torch.set_grad_enabled(kind == "texture" or everything):
            features = networks.controlnet(z_BCHW, t_B, text, mask_pads=False, guidance=guidance)
            ready = networks.dit.prepare(features)
        if kind == "removal" and networks.lora is not None:
            with networks.lora.on():
                return networks.dit(z_BCHW, t_B, text, ready, guidance)
        return networks.dit(z_BCHW, t_B, text, ready, guidance)

    modules = [networks.transformer, networks.controlnet, networks.context_attention]
    return saved_bytes(forward, [m for m in modules if m is not None])


def _largest_block(networks: MetaNetworks, kind: str, side: int) -> int:
    """Bytes that one block of the transformer keeps while it is computed again: the larger of a double and a single."""
    _choose_learners(networks, "texture" if kind == "texture" else "removal", kind == "both")
    config, transformer = networks.transformer.config, networks.transformer
    width, dtype = transformer.inner_dim, transformer.dtype
    tokens, words = (side // STRIDE // 2) ** 2, networks.configs.text_tokens

    def stream(length: int) -> Tensor:
        return torch.empty(1, length, width, device="meta", dtype=dtype, requires_grad=True)

    temb = torch.empty(1, width, device="meta", dtype=dtype)
    head_dim = int(config["attention_head_dim"])
    rope = (torch.empty(tokens + words, head_dim, device="meta"), torch.empty(tokens + words, head_dim, device="meta"))
    found = [0]
    for block in (*transformer.transformer_blocks[:1], *transformer.single_transformer_blocks[:1]):

        def forward(block: nn.Module = block) -> object:
            inputs = {"hidden_states": stream(tokens), "encoder_hidden_states": stream(words), "temb": temb}
            if kind == "texture" or networks.lora is None:
                return block(**inputs, image_rotary_emb=rope)
            with networks.lora.on():
                return block(**inputs, image_rotary_emb=rope)

        found.append(saved_bytes(forward, [transformer]))
    return max(found)


def _decoder_bytes(networks: MetaNetworks, side: int, trained: bool) -> int:
    """Bytes kept by decoding one crop and comparing it."""
    autoencoder = networks.autoencoder
    for parameter in autoencoder.parameters():
        parameter.requires_grad_(False)
    if trained and isinstance(autoencoder, PatchAutoencoder):
        autoencoder.refiner.requires_grad_(True)
    channels = int(networks.configs.vae.get("channels") or networks.configs.vae.get("latent_channels") or 0)

    def forward() -> Tensor:
        z_BCHW = torch.empty(1, channels, side // STRIDE, side // STRIDE, device="meta", requires_grad=not trained)
        if isinstance(autoencoder, AutoencoderKL):
            rgb_BCPQ = FluxAutoencoder(autoencoder).decode(z_BCHW)
        else:
            rgb_BCPQ = autoencoder.decode(z_BCHW)
        if networks.perceptual is None:
            return rgb_BCPQ.float().square().mean()
        return networks.perceptual(rgb_BCPQ.float()).sum()

    modules: list[nn.Module] = [autoencoder]
    if networks.perceptual is not None:
        modules.append(networks.perceptual)
    return saved_bytes(forward, modules)


def _small_network_bytes(networks: MetaNetworks, kind: str, side: int) -> int:
    """Bytes kept by judging one bad crop at its own size, by enlarging or cleaning one, or by adding grain to
    a finished one."""
    enlarger, autoencoder = networks.enlarger, networks.autoencoder
    if kind == "enlarge":
        if enlarger is None or not isinstance(autoencoder, PatchAutoencoder):
            return 0
        cubic = torch.empty(1, 3, side, side, device="meta")
        return saved_bytes(lambda: enlarger(autoencoder.refiner, cubic, MANNERS[0]).sum(), [enlarger])
    if kind == "grain":
        return 0 if networks.grain is None else _grain_bytes(networks.grain, networks.perceptual, side)
    if kind in ("clean", "please", "clean-both"):
        return 0 if networks.cleaner is None else _cleaner_bytes(networks.cleaner, kind, networks.perceptual, side)
    network = networks.cleanliness
    if network is None:
        return 0
    small = torch.empty(1, 3, side // 4, side // 4, device="meta")
    return saved_bytes(lambda: network(small).sum(), [network])


def _cleaner_bytes(cleaner: Cleaner, kind: str, perceptual: nn.Module | None, side: int) -> int:
    small = torch.empty(1, 3, side // FACTOR, side // FACTOR, device="meta")

    def forward() -> Tensor:
        if kind == "clean-both":
            faithful, made = cleaner.both(small, 1.0)
            distance = faithful.square().mean() + made.square().mean()
        else:
            made = cleaner(small, FAITHFUL if kind == "clean" else PLEASING)
            distance = made.square().mean()
        return distance if perceptual is None else distance + perceptual(made).sum()

    return saved_bytes(forward, [cleaner] if perceptual is None else [cleaner, perceptual])


def _grain_bytes(grain: Grain, perceptual: nn.Module | None, side: int) -> int:
    picture = torch.empty(1, 3, side, side, device="meta")
    noise = torch.empty(1, 1, side + 2 * MARGIN, side + 2 * MARGIN, device="meta")

    def forward() -> Tensor:
        made = picture + grain(picture, picture, noise)
        distance = contrast_distance(made, picture)
        return distance if perceptual is None else distance + perceptual(made).sum()

    return saved_bytes(forward, [grain] if perceptual is None else [grain, perceptual])


def _choose_learners(networks: MetaNetworks, kind: str, everything: bool) -> None:
    for name, parameter in networks.transformer.named_parameters():
        is_lora = "lora_" in name
        parameter.requires_grad_((is_lora and kind == "removal") or (everything and not is_lora))
    for part in (networks.controlnet, networks.context_attention):
        if part is not None:
            part.requires_grad_(kind == "texture" or everything)


def _inputs(networks: MetaNetworks, side: int) -> tuple[Tensor, Tensor, TextEmbedding]:
    config, configs = networks.transformer.config, networks.configs
    dtype = networks.transformer.dtype
    z_BCHW = torch.empty(1, int(config["in_channels"]) // 4, side // STRIDE, side // STRIDE, device="meta", dtype=dtype)
    text = TextEmbedding(
        torch.empty(1, configs.text_tokens, int(config["joint_attention_dim"]), device="meta", dtype=dtype),
        torch.empty(1, int(config["pooled_projection_dim"]), device="meta", dtype=dtype),
        None,
    )
    return z_BCHW, torch.empty(1, device="meta"), text


def largest_block_bytes(networks: MetaNetworks, itemsize: int) -> int:
    """Weights of the largest block, which sharding gathers in full."""
    blocks = [
        *networks.transformer.transformer_blocks,
        *networks.transformer.single_transformer_blocks,
        *networks.controlnet.transformer_blocks,
    ]
    return max(sum(p.numel() for p in block.parameters()) for block in blocks) * itemsize
