"""The networks of a training run, and their float32 master weights.

The forward and backward pass run on weights of the compute dtype (bfloat16 on this project's machines: elementwise
work halves); the optimizer updates float32 masters, whose running average is what a bundle ships.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn

from dreamsr_cli.config import BundleConfig
from dreamsr_cli.models.autoencoder import PatchAutoencoder
from dreamsr_cli.models.bundle import Bundle, save_bundle
from dreamsr_cli.models.conditioned_dit import ConditionedDiT
from dreamsr_cli.models.context_attention import ContextAttention, wake_projections
from dreamsr_cli.models.mm_controlnet import MMControlNet
from dreamsr_cli.models.restoration_lora import RestorationLoRA
from dreamsr_cli.models.text_encoder import ByteTextEncoder
from dreamsr_cli.training.recipe import Recipe

MODULES = ("transformer", "controlnet", "context_attention", "text_encoder", "refiner")
"""Names that a stage's `trains` may use, beside "lora"."""


@dataclass
class Networks:
    """All networks of a bundle of our own kind, ready to be trained."""

    transformer: FluxTransformer2DModel
    controlnet: MMControlNet
    context_attention: ContextAttention
    text_encoder: ByteTextEncoder
    autoencoder: PatchAutoencoder
    lora: RestorationLoRA
    dit: ConditionedDiT
    config: BundleConfig

    def module(self, name: str) -> nn.Module:
        """The module called `name` in `MODULES`."""
        return self.autoencoder.refiner if name == "refiner" else getattr(self, name)

    def named(self, trains: Iterable[str]) -> dict[str, nn.Parameter]:
        """The parameters of the parts `trains`, by full name; LoRA weights belong to "lora" alone."""
        found: dict[str, nn.Parameter] = {}
        for part in trains:
            source = self.transformer if part == "lora" else self.module(part)
            for name, parameter in source.named_parameters():
                if ("lora_" in name) == (part == "lora"):
                    found[f"{'transformer' if part == 'lora' else part}.{name}"] = parameter
        return found

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move all networks; the autoencoder's transform stays in float32."""
        for module in (self.transformer, self.controlnet, self.context_attention, self.text_encoder):
            # nn.Module's own: diffusers' `to` warns about float32 modules even where there are none.
            nn.Module.to(module, device, dtype)
        self.autoencoder.to(device)
        self.autoencoder.refiner.to(dtype)

    def compile_blocks(self) -> None:
        """Compile every transformer block for the shapes it meets: minutes at first, then less than half the time
        per step on a CPU."""
        # The LoRA on and off, and each crop size, make a variant of their own.
        torch._dynamo.config.cache_size_limit = 64
        transformer = self.transformer
        for block in [
            *transformer.transformer_blocks,
            *transformer.single_transformer_blocks,
            *self.controlnet.transformer_blocks,
        ]:
            block.compile(dynamic=False)


def build(recipe: Recipe, start: Bundle | None) -> Networks:
    """Fresh networks of the recipe's sizes, float32, or those of the bundle `start` (whose sizes then count)."""
    torch.manual_seed(recipe.seed)
    if start is not None:
        return _from_bundle(start)
    s = recipe.sizes
    transformer = FluxTransformer2DModel(
        in_channels=4 * recipe.latent.channels,
        num_layers=s.double_blocks,
        num_single_layers=s.single_blocks,
        attention_head_dim=s.head_dim,
        num_attention_heads=s.heads,
        joint_attention_dim=s.text_width,
        pooled_projection_dim=s.text_width,
        axes_dims_rope=s.rope_axes,
    )
    _start_as_plain_transformer(transformer)
    control_map = recipe.control.map
    controlnet = MMControlNet.from_transformer(transformer, control_map, recipe.control.mlp)
    injections = sum(feature is not None for feature in control_map)
    context = ContextAttention(injections, s.heads, s.head_dim, recipe.control.mlp)
    wake_projections(controlnet, recipe.control_std, recipe.seed)
    wake_projections(context, recipe.control_std, recipe.seed + 1)
    networks = Networks(
        transformer,
        controlnet,
        context,
        ByteTextEncoder(s.text_width, s.text_layers, max_tokens=recipe.defaults.max_text_tokens),
        PatchAutoencoder(recipe.latent.channels, s.refiner_width, s.refiner_blocks, s.whitening),
        RestorationLoRA(transformer, s.lora_rank),
        ConditionedDiT(transformer, context, control_map, mask_pads=True),
        recipe.bundle_config(),
    )
    return networks


@torch.no_grad()
def _start_as_plain_transformer(transformer: FluxTransformer2DModel) -> None:
    """Modulation starts without effect (shift and scale 0, gates 1) and the output at zero: a plain pre-norm
    transformer learns fastest."""
    width = transformer.inner_dim
    nn.init.zeros_(transformer.proj_out.weight)
    gates = {6: (2, 5), 3: (2,), 2: ()}
    for name, module in transformer.named_modules():
        if not name.endswith((".norm1", ".norm1_context", ".norm", "norm_out")) or not hasattr(module, "linear"):
            continue
        linear = module.linear
        linear.weight.mul_(0.1)
        linear.bias.zero_()
        for gate in gates[linear.out_features // width]:
            linear.bias[gate * width : (gate + 1) * width] = 1.0


def _from_bundle(start: Bundle) -> Networks:
    device = torch.device("cpu")
    restorer = start.open_restorer(device, torch.float32, mask_pads=True)
    autoencoder = start.open_autoencoder(device, torch.float32)
    text_encoder = start.open_text_encoder(device, torch.float32)
    if not isinstance(autoencoder, PatchAutoencoder) or not isinstance(text_encoder, ByteTextEncoder):
        raise TypeError("stages autoencoder and backbone train bundles of our own kind only")
    assert restorer.lora is not None and restorer.dit.context_attention is not None
    return Networks(
        restorer.dit.transformer,
        restorer.controlnet,
        restorer.dit.context_attention,
        text_encoder,
        autoencoder,
        restorer.lora,
        restorer.dit,
        start.config,
    )


class Masters:
    """Float32 copies of the trained parameters with an averaged twin; the networks hold the compute dtype."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.names = list(parameters)
        self._live = list(parameters.values())
        self.master = [nn.Parameter(p.detach().float().clone()) for p in self._live]
        self.average = [m.detach().clone() for m in self.master]
        self.decay = decay

    @torch.no_grad()
    def take_gradients(self, largest_norm: float) -> float:
        """Move gradients to the masters in float32, clip their global norm, and return the norm before."""
        for live, master in zip(self._live, self.master, strict=True):
            master.grad = None if live.grad is None else live.grad.float()
            live.grad = None
        return float(nn.utils.clip_grad_norm_([m for m in self.master if m.grad is not None], largest_norm))

    @torch.no_grad()
    def publish(self, step: int) -> None:
        """After an optimizer step: update the average and copy the masters into the networks."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, [m.detach() for m in self.master], weight)
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """The networks hold the masters' values."""
        torch._foreach_copy_([p.detach() for p in self._live], [m.detach() for m in self.master])

    @torch.no_grad()
    def show_average(self) -> None:
        """The networks hold the averaged values, for validation and export; `restore` ends that."""
        torch._foreach_copy_([p.detach() for p in self._live], self.average)

    def averages(self) -> dict[str, Tensor]:
        """Averaged weights by full name."""
        return dict(zip(self.names, self.average, strict=True))


def export(networks: Networks, masters: Masters | None, folder: Path, config: BundleConfig) -> None:
    """Write the bundle, with averaged weights in full precision where a part was trained."""
    averages = masters.averages() if masters else {}

    def state(name: str, module: nn.Module) -> dict[str, Tensor]:
        part = "transformer" if name == "lora" else name
        tensors = dict(module.state_dict())
        for key in tensors:
            full = f"refiner.{key.removeprefix('refiner.')}" if part == "vae" else f"{part}.{key}"
            if full in averages:
                tensors[key] = averages[full]
        return tensors

    save_bundle(
        folder,
        config,
        transformer=networks.transformer,
        autoencoder=networks.autoencoder,
        text_encoder=networks.text_encoder,
        controlnet=networks.controlnet,
        context_attention=networks.context_attention,
        lora=networks.lora,
        state=state,
    )
