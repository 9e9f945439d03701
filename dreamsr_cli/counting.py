"""Floating-point operations and parameters of the transformer networks, counted from their config files alone.

A product of an (m, k) and a (k, n) matrix counts 2mkn operations; attention of N queries over S keys at width D counts
4NSD (its two products); norms, activations and rotary embeddings count nothing: the rules of
`torch.utils.flop_counter`. Axes: B batch, L image tokens, T global and S local text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TIME_CHANNELS = 256
"""Width of FLUX's sinusoidal timestep embedding."""
FEED_FORWARD = 4
"""Hidden width of a block's feed-forward layers, in widths."""
FOLDABLE = 2**25
"""Weights that are held a second time for the LoRA's sake, at most (`folded_weights`): 128 MiB of them."""
CLIP_TOKENS = 77
"""FLUX pads CLIP's input to this length."""


@dataclass(frozen=True)
class BlockSizes:
    """What a FLUX-like transformer's config.json says about its size; a ControlNet is one without single blocks."""

    width: int
    """D."""
    head_dim: int
    double: int
    """MM-DiT blocks."""
    single: int
    in_channels: int
    """Values per image token."""
    out_channels: int
    text_width: int
    """Values per text token."""
    pooled_width: int
    guidance: bool
    """Whether it has the guidance embedding."""
    projections: int = 0
    """Image projections M_img: one per feature in a ControlNet, else 0."""
    mlp: bool = False
    """Projections of two layers."""
    embeds_condition: bool = False
    """A ControlNet of diffusers' kind: it embeds the condition beside the noisy latent."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BlockSizes:
        """From the config of `FluxTransformer2DModel`, `FluxControlNetModel` or `MMControlNet`. Raises `KeyError` for
        one of another class."""
        is_public = config.get("_class_name") == "FluxControlNetModel" or "num_mode" in config
        is_control = is_public or "num_single_layers" not in config
        head_dim, channels = int(config["attention_head_dim"]), int(config["in_channels"])
        return cls(
            width=head_dim * int(config["num_attention_heads"]),
            head_dim=head_dim,
            double=int(config["num_layers"]),
            single=0 if is_control else int(config["num_single_layers"]),
            in_channels=channels,
            out_channels=0 if is_control else int(config.get("out_channels") or channels),
            text_width=int(config["joint_attention_dim"]),
            pooled_width=int(config["pooled_projection_dim"]),
            guidance=bool(config.get("guidance_embeds", False)),
            projections=int(config["num_layers"]) if is_control else 0,
            mlp=bool(config.get("mlp", False)),
            embeds_condition=is_public,
        )


def linear_parameters(n_in: int, n_out: int) -> int:
    """Weight and bias."""
    return (n_in + 1) * n_out


# ---------------------------------------------------------------- transformer and ControlNet


def transformer_flops(
    sizes: BlockSizes, batch: int, image_tokens: int, text_tokens: int, lora_rank: int = 0, modulations: int = 1
) -> int:
    """One forward pass of a batch. `modulations`: rows of the time embedding and of the text projection (1 where all
    tiles share text and time, else B). With `lora_rank`, the adapter's products beside the base weights' are counted.
    """
    d, tokens = sizes.width, image_tokens + text_tokens
    per_token = (sizes.double + sizes.single) * (4 + 2 * FEED_FORWARD) * d * d
    # Rank r adds r (n_in + n_out) to each of attention's four (a single block: three) and the two feed-forward linears.
    double_lora = 4 * 2 + 2 * (1 + FEED_FORWARD)
    single_lora = 3 * 2 + (1 + FEED_FORWARD) + (2 + FEED_FORWARD)
    per_token += lora_rank * d * (sizes.double * double_lora + sizes.single * single_lora)
    flops = 2 * batch * tokens * per_token
    flops += (sizes.double + sizes.single) * 4 * batch * tokens**2 * d
    flops += 2 * batch * image_tokens * d * (sizes.in_channels * (1 + sizes.embeds_condition) + sizes.out_channels)
    layers = sizes.projections * (2 if sizes.mlp else 1)
    flops += 2 * batch * image_tokens * layers * d * d
    return flops + 2 * modulations * (_modulation(sizes) + text_tokens * sizes.text_width * d)


def transformer_parameters(sizes: BlockSizes, lora_rank: int = 0) -> int:
    """All weights and biases, with those of the adapter."""
    d = sizes.width
    double, single = block_parameters(sizes)
    embedders = (1 + sizes.guidance) * (linear_parameters(TIME_CHANNELS, d) + linear_parameters(d, d))
    embedders += linear_parameters(sizes.pooled_width, d) + linear_parameters(d, d)
    embedders += (1 + sizes.embeds_condition) * linear_parameters(sizes.in_channels, d)
    embedders += linear_parameters(sizes.text_width, d)
    head = linear_parameters(d, 2 * d) + linear_parameters(d, sizes.out_channels) if sizes.out_channels else 0
    projections = sizes.projections * (2 if sizes.mlp else 1) * linear_parameters(d, d)
    double_lora, single_lora = lora_parameters(sizes, lora_rank)
    blocks = sizes.double * (double + double_lora) + sizes.single * (single + single_lora)
    return blocks + embedders + head + projections


def block_parameters(sizes: BlockSizes) -> tuple[int, int]:
    """Of one double and of one single block."""
    d, hidden = sizes.width, FEED_FORWARD * sizes.width
    stream = 4 * linear_parameters(d, d) + linear_parameters(d, hidden) + linear_parameters(hidden, d)
    double = 2 * (stream + linear_parameters(d, 6 * d) + 2 * sizes.head_dim)
    single = 3 * linear_parameters(d, d) + linear_parameters(d, hidden) + linear_parameters(d + hidden, d)
    return double, single + linear_parameters(d, 3 * d) + 2 * sizes.head_dim


def lora_parameters(sizes: BlockSizes, rank: int) -> tuple[int, int]:
    """Of the adapter in one double and in one single block."""
    double = 2 * sizes.width * (4 * 2 + 2 * (1 + FEED_FORWARD))
    single = sizes.width * (3 * 2 + (1 + FEED_FORWARD) + (2 + FEED_FORWARD))
    return rank * double, rank * single


def folded_weights(sizes: BlockSizes, lora_rank: int) -> int:
    """Weights that stage 1 holds a second time, with the adapter's change added, where the device and precision allow
    it (`RestorationLoRA.folded`)."""
    squares = sizes.double * 2 * (4 + 2 * FEED_FORWARD) + sizes.single * (3 + 2 * FEED_FORWARD + 1)
    weights = squares * sizes.width**2
    return weights if lora_rank and weights <= FOLDABLE else 0


def _modulation(sizes: BlockSizes) -> int:
    """Multiplications per row of the time embedding: embedders, each block's modulation, and the output's."""
    d = sizes.width
    embedders = (1 + sizes.guidance) * (TIME_CHANNELS + d) * d + (sizes.pooled_width + d) * d
    return embedders + (12 * sizes.double + 3 * sizes.single + (2 if sizes.out_channels else 0)) * d * d


# ---------------------------------------------------------------- context cross-attention


@dataclass(frozen=True)
class ContextSizes:
    """What the config.json of `ContextAttention` says."""

    injections: int
    width: int
    """D."""
    head_dim: int
    mlp: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ContextSizes:
        """Raises `KeyError` for a config of another class."""
        head_dim = int(config["attention_head_dim"])
        width = head_dim * int(config["num_attention_heads"])
        return cls(int(config["injections"]), width, head_dim, bool(config.get("mlp", False)))


def keys_values_flops(sizes: ContextSizes, batch: int, local_tokens: int) -> int:
    """P_K and P_V of the local text, once per ControlNet call."""
    return sizes.injections * 2 * 2 * batch * local_tokens * sizes.width**2


def context_flops(sizes: ContextSizes, batch: int, text_tokens: int, local_tokens: int) -> int:
    """P_Q, attention and M_txt over the global text, in every forward pass of the transformer."""
    layers = 1 + (2 if sizes.mlp else 1)
    each = 2 * text_tokens * layers * sizes.width**2 + 4 * text_tokens * local_tokens * sizes.width
    return sizes.injections * batch * each


def context_parameters(sizes: ContextSizes) -> int:
    """All weights and biases."""
    layers = 3 + (2 if sizes.mlp else 1)
    return sizes.injections * (layers * linear_parameters(sizes.width, sizes.width) + 2 * sizes.head_dim)


# ---------------------------------------------------------------- text encoders


@dataclass(frozen=True)
class TextSizes:
    """What a bundle's text encoder costs per prompt."""

    flops_per_token: int
    flops_per_token_pair: int
    """Of attention: times tokens squared."""
    fixed_flops: int
    """Of a prompt, whatever its length (CLIP)."""
    parameters: int
    width: int
    """Values per token of the embedding."""
    bytes_per_token: int | None
    """UTF-8 bytes in one token of the built-in encoder; None where every prompt is padded to the longest."""
    blocks: int = 0
    """Parameters of T5's blocks, which may be quantized and moved one by one; 0: the built-in encoder."""
    largest_block: int = 0
    """Parameters of one of them."""

    @classmethod
    def from_configs(cls, config: Mapping[str, Any], clip: Mapping[str, Any], t5: Mapping[str, Any]) -> TextSizes:
        """From the config of `ByteTextEncoder`, or where that is empty those of CLIP and T5."""
        return cls._of_bytes(config) if config else cls._of_flux(clip, t5)

    @classmethod
    def _of_bytes(cls, config: Mapping[str, Any]) -> TextSizes:
        w, layers, group = int(config["width"]), int(config["layers"]), int(config["group"])
        per_layer = 4 * linear_parameters(w, w) + linear_parameters(w, 2 * w) + linear_parameters(2 * w, w) + 4 * w
        embeddings = 257 * (w // group) + int(config["max_tokens"]) * w + 2 * w
        return cls(layers * 2 * 8 * w * w, layers * 4 * w, 0, layers * per_layer + embeddings, w, group)

    @classmethod
    def _of_flux(cls, clip: Mapping[str, Any], t5: Mapping[str, Any]) -> TextSizes:
        h, m, n = (int(clip[key]) for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
        length = min(CLIP_TOKENS, int(clip["max_position_embeddings"]))
        clip_weights = n * (4 * h * h + 2 * h * m)
        fixed = 2 * length * clip_weights + n * 4 * length**2 * h
        d, inner, ff = int(t5["d_model"]), int(t5["d_kv"]) * int(t5["num_heads"]), int(t5["d_ff"])
        gated = str(t5.get("feed_forward_proj", "relu")).startswith("gated")
        t5_weights = int(t5["num_layers"]) * (4 * d * inner + (3 if gated else 2) * d * ff)
        parameters = clip_weights + t5_weights + int(t5["vocab_size"]) * d + (int(clip["vocab_size"]) + length) * h
        layers = int(t5["num_layers"])
        return cls(2 * t5_weights, layers * 4 * inner, fixed, parameters, d, None, t5_weights, t5_weights // layers)

    def tokens(self, utf8_bytes: int, longest: int) -> int:
        """Tokens of a prompt of that many bytes; `longest` is the bundle's limit."""
        if self.bytes_per_token is None:
            return longest
        return min(longest, max(1, -(-utf8_bytes // self.bytes_per_token)))

    def flops(self, tokens: int) -> int:
        """One prompt."""
        return self.fixed_flops + self.flops_per_token * tokens + self.flops_per_token_pair * tokens**2
