"""Networks of FLUX.1-dev's sizes with random weights, made on their device: nothing is downloaded, and RAM holds none
of them. And linears in 8 bits for cards that multiply them.

Axes: M rows of tokens, K and N a linear's width in and out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn

from dreamsr_cli.models.conditioned_dit import ConditionedDiT
from dreamsr_cli.models.context_attention import ContextAttention
from dreamsr_cli.models.mm_controlnet import MMControlNet
from dreamsr_cli.models.restoration_lora import RestorationLoRA
from dreamsr_cli.models.restorer import Restorer

LARGEST_FLOAT8 = 448.0
"""Of float8_e4m3fn."""
FLOAT8_LAYERS = ("to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FLOAT8_LAYERS += ("ff", "ff_context", "proj_mlp", "proj_out")
"""Linears of a block that see every token; modulation, embedders and the LoRA stay as they are."""


@dataclass(frozen=True)
class FluxSize:
    """How large the networks are."""

    double: int
    single: int
    heads: int
    head_dim: int
    rope: tuple[int, int, int]
    channels: int
    """C of the latent."""
    text_width: int
    pooled_width: int
    lora_rank: int
    control_map: tuple[int | None, ...]
    """For each double block the feature it receives (method.md)."""

    @property
    def transformer(self) -> dict[str, Any]:
        """Arguments of `FluxTransformer2DModel`."""
        return {**self._shared, "num_layers": self.double, "num_single_layers": self.single}

    @property
    def control(self) -> dict[str, Any]:
        """Arguments of `MMControlNet`."""
        return {**self._shared, "num_layers": self.features}

    @property
    def features(self) -> int:
        """Blocks of the ControlNet."""
        return len({feature for feature in self.control_map if feature is not None})

    @property
    def _shared(self) -> dict[str, Any]:
        return {
            "in_channels": 4 * self.channels,
            "attention_head_dim": self.head_dim,
            "num_attention_heads": self.heads,
            "joint_attention_dim": self.text_width,
            "pooled_projection_dim": self.pooled_width,
            "guidance_embeds": True,
            "axes_dims_rope": self.rope,
        }


METHOD_MAP = tuple(block // 2 if block % 2 == 0 and block < 18 else None for block in range(19))
FULL = FluxSize(19, 38, 24, 128, (16, 56, 56), 16, 4096, 768, 256, METHOD_MAP)
REDUCED = FluxSize(4, 4, 4, 32, (8, 12, 12), 16, 64, 32, 8, (0, None, 1, None))


@torch.no_grad()
def on_device(module: nn.Module, device: torch.device, dtype: torch.dtype, seed: int) -> nn.Module:
    """A module built on "meta", with memory of its own on `device` and weights from N(0, 1/K)."""
    nn.Module.to(module, dtype)
    module.to_empty(device=device)
    if names := [name for name, _ in module.named_buffers()]:
        raise RuntimeError(f"buffers without values: {names}")
    fill(module, seed)
    return module.eval().requires_grad_(False)


@torch.no_grad()
def fill(module: nn.Module, seed: int, only: str = "") -> None:
    """Weights from N(0, 1/K), scales of norms 1, biases 0; of parameters whose name holds `only`."""
    for number, (name, parameter) in enumerate(module.named_parameters()):
        if only not in name:
            continue
        if parameter.ndim > 1:
            generator = torch.Generator(parameter.device).manual_seed(seed + number)
            parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
        else:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


def make_transformer(size: FluxSize, device: torch.device, dtype: torch.dtype) -> FluxTransformer2DModel:
    """Diffusers' own class."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**size.transformer)
    on_device(transformer, device, dtype, 1)
    return transformer


def make_peer_control(size: FluxSize, device: torch.device, dtype: torch.dtype) -> FluxControlNetModel:
    """Diffusers' ControlNet with as many double blocks as ours, no single ones."""
    with torch.device("meta"):
        controlnet = FluxControlNetModel(**size.control, num_single_layers=0)
    on_device(controlnet, device, dtype, 2)
    return controlnet


def make_restorer(
    transformer: FluxTransformer2DModel, size: FluxSize, device: torch.device, dtype: torch.dtype
) -> Restorer:
    """Our networks around `transformer`: MM-ControlNet, context cross-attention, and the LoRA, which is added to it."""
    with torch.device("meta"):
        controlnet = MMControlNet(**size.control)
        context = ContextAttention(size.features, size.heads, size.head_dim)
    on_device(controlnet, device, dtype, 3)
    on_device(context, device, dtype, 4)
    with torch.device(device):
        lora = RestorationLoRA(transformer, size.lora_rank)
    for parameter in lora.parameters():
        parameter.data = parameter.data.to(device, dtype)
    fill(transformer, 5, only="lora_")
    transformer.requires_grad_(False)
    dit = ConditionedDiT(transformer, context, size.control_map, mask_pads=False)
    return Restorer(dit, controlnet, lora, device)


# ---------------------------------------------------------------- 8 bits


class Float8Linear(nn.Module):
    """A linear whose weight (a scale for each output) and input (a scale for each token) are float8_e4m3fn, multiplied
    by the card's 8-bit matrix units; the result is bfloat16 before it takes the input's dtype."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale_N1 = _scale(linear.weight)
        self.register_buffer("weight", (linear.weight / scale_N1).to(torch.float8_e4m3fn))
        self.register_buffer("scale", scale_N1.t().contiguous())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., N)."""
        x_MK = x.reshape(-1, x.shape[-1])
        scale_M1 = _scale(x_MK)
        y_MN = torch._scaled_mm(
            (x_MK / scale_M1).to(torch.float8_e4m3fn),
            self.weight.t(),
            scale_a=scale_M1,
            scale_b=self.scale,
            out_dtype=torch.bfloat16,
            use_fast_accum=x.is_cuda,
        ).to(x.dtype)
        return (y_MN if self.bias is None else y_MN + self.bias).unflatten(0, x.shape[:-1])


def _scale(rows: Tensor) -> Tensor:
    """For each row what makes its largest value float8's largest, float32 (rows, 1)."""
    return rows.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / LARGEST_FLOAT8


@torch.no_grad()
def to_float8(module: nn.Module) -> int:
    """Replace the large linears of all blocks in `module`, in place; how many."""
    found = list(_large_linears(module))
    for parent, name, linear in found:
        setattr(parent, name, Float8Linear(linear))
    return len(found)


def _large_linears(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for path, parent in module.named_modules():
        if "transformer_blocks." not in path or "lora_" in path:
            continue
        inside = path.split("transformer_blocks.")[-1].split(".")
        for name, child in parent.named_children():
            if type(child) is nn.Linear and "norm" not in path and set(FLOAT8_LAYERS) & {*inside, name}:
                yield parent, name, child
