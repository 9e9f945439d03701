"""Values that the transformer networks' products read and write, counted from their config files alone.

A product of an (m, k) and a (k, n) matrix moves mk + mn values of activations, attention of N queries over S keys at
width D moves 2ND + 2SD (it keeps its scores to itself); weights are counted by `counting`, once per call. What lies
between products (norms, activations, rotary embeddings, additions) counts nothing: a kernel can do it on the way. Axes:
B batch, L image tokens, T global and S local text tokens, D width.
"""

from __future__ import annotations

from dreamsr_cli.counting import FEED_FORWARD, BlockSizes, ContextSizes

_DOUBLE_LINEARS = (4 * 2 + 2 * (1 + FEED_FORWARD), 6)
"""Of one stream's token in a double block: values in and out of its linears, in widths, and their number."""
_SINGLE_LINEARS = (3 * 2 + (1 + FEED_FORWARD) + (1 + FEED_FORWARD + 1), 5)
"""Of one token in a single block."""
_ATTENTION = 4


def transformer_values(
    sizes: BlockSizes, batch: int, image_tokens: int, text_tokens: int, lora_rank: int = 0, modulations: int = 1
) -> int:
    """Activations of one forward pass of a batch, as `counting.transformer_flops` takes them."""
    d, tokens = sizes.width, image_tokens + text_tokens
    values = 0
    for count, (widths, linears) in ((sizes.double, _DOUBLE_LINEARS), (sizes.single, _SINGLE_LINEARS)):
        per_token = (widths + _ATTENTION) * d
        if lora_rank:
            per_token += widths * d + linears * 2 * lora_rank
        values += count * batch * tokens * per_token
    values += batch * image_tokens * (sizes.in_channels + d) * (1 + sizes.embeds_condition)
    if sizes.out_channels:
        values += batch * image_tokens * (d + sizes.out_channels)
    values += sizes.projections * (2 if sizes.mlp else 1) * batch * image_tokens * 2 * d
    return values + modulations * text_tokens * (sizes.text_width + d)


def keys_values_values(sizes: ContextSizes, batch: int, local_tokens: int) -> int:
    """P_K and P_V of the local text, once per ControlNet call."""
    return sizes.injections * 2 * batch * local_tokens * 2 * sizes.width


def context_values(sizes: ContextSizes, batch: int, text_tokens: int, local_tokens: int) -> int:
    """P_Q, attention and M_txt over the global text, in every forward pass of the transformer."""
    layers = 1 + (2 if sizes.mlp else 1)
    attention = 2 * text_tokens + 2 * local_tokens
    return sizes.injections * batch * (layers * 2 * text_tokens + attention) * sizes.width
