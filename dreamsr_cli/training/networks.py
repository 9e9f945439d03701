"""The networks of a training run: built from nothing, from a bundle, or on a frozen pretrained transformer."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn

from dreamsr_cli.config import BundleConfig, ControlConfig
from dreamsr_cli.errors import ConfigError, UsageError
from dreamsr_cli.models.autoencoder import Autoencoder, PatchAutoencoder
from dreamsr_cli.models.bundle import Bundle, open_bundle
from dreamsr_cli.models.cleaner import Cleaner
from dreamsr_cli.models.cleanliness import Cleanliness
from dreamsr_cli.models.conditioned_dit import ConditionedDiT
from dreamsr_cli.models.context_attention import ContextAttention, wake_projections
from dreamsr_cli.models.enlarger import Enlarger
from dreamsr_cli.models.grain import Grain
from dreamsr_cli.models.mm_controlnet import MMControlNet
from dreamsr_cli.models.restoration_lora import RestorationLoRA
from dreamsr_cli.models.text_encoder import ByteTextEncoder, TextEncoder
from dreamsr_cli.training.distributed import whole
from dreamsr_cli.training.latent_cache import LatentCache
from dreamsr_cli.training.lazy_encoder import LazyTextEncoder
from dreamsr_cli.training.parts_beside import parts_beside
from dreamsr_cli.training.recipe import Recipe
from dreamsr_cli.training.stages import CONTROL, Stage

MODULES = (
    "transformer",
    "controlnet",
    "context_attention",
    "text_encoder",
    "refiner",
    "cleanliness",
    "enlarger",
    "grain",
    "cleaner",
)
"""Names that a stage's `trains` may use, beside "lora"."""
TRAINING_GUIDANCE = 1.0
"""FLUX's guidance embedding in training (method.md)."""
TRANSFORM = ("mean_K", "basis_CK", "gain_C")
"""The closed-form part of the built-in autoencoder."""


@dataclass
class Networks:
    """All networks of a bundle, ready to be trained."""

    transformer: FluxTransformer2DModel
    controlnet: MMControlNet
    context_attention: ContextAttention | None
    text_encoder: TextEncoder
    autoencoder: Autoencoder
    lora: RestorationLoRA | None
    dit: ConditionedDiT
    config: BundleConfig
    cleanliness: Cleanliness | None = None
    enlarger: Enlarger | None = None
    grain: Grain | None = None
    cleaner: Cleaner | None = None
    """These four: None where neither the bundle nor the stage has it, or needs it."""
    latent_cache: LatentCache | None = None
    """Keeps the latents of crops that come back."""
    device: torch.device = torch.device("cpu")
    """Where crops and texts go."""

    @property
    def guidance(self) -> float | None:
        """What the guidance input is told; None for a transformer without one."""
        return TRAINING_GUIDANCE if self.transformer.config["guidance_embeds"] else None

    @property
    def patches(self) -> PatchAutoencoder:
        """The built-in kind of autoencoder. Raises `UsageError` for FLUX's, which stays as it is."""
        if not isinstance(self.autoencoder, PatchAutoencoder):
            raise UsageError("FLUX's autoencoder isn't trained", "use --stage controlnet, restoration or joint")
        return self.autoencoder

    @torch.no_grad()
    def encode(self, rgb_B3PQ: Tensor) -> Tensor:
        """Pixels on [-1, 1] to z_BCHW, without gradient, from the cache where there is one."""
        if self.latent_cache is not None:
            return self.latent_cache.encode(self.autoencoder, rgb_B3PQ)
        return self.autoencoder.encode(rgb_B3PQ)

    def module(self, name: str) -> nn.Module | None:
        """The module called `name` in `MODULES`, or inside one ("cleaner.down"); None where this bundle has no such
        network."""
        first, *rest = name.split(".")
        found = getattr(self.autoencoder if first == "refiner" else self, first, None)
        for inner in rest:
            found = getattr(found, inner, None)
        return found if isinstance(found, nn.Module) else None

    def named(self, trains: Iterable[str]) -> dict[str, nn.Parameter]:
        """The parameters of the parts `trains`, by full name; LoRA weights belong to "lora" alone."""
        found: dict[str, nn.Parameter] = {}
        for part in trains:
            source = self.transformer if part == "lora" else self.module(part)
            for name, parameter in source.named_parameters() if source is not None else ():
                if ("lora_" in name) == (part == "lora"):
                    found[f"{'transformer' if part == 'lora' else part}.{name}"] = parameter
        return found

    def modules(self) -> dict[str, nn.Module]:
        """What is wrapped for several processes: networks with trained parameters, and the transformer."""
        found: dict[str, nn.Module] = {"dit": self.dit, "controlnet": self.controlnet}
        others = {
            "text_encoder": self.text_encoder,
            "autoencoder": self.autoencoder,
            "cleanliness": self.cleanliness,
            "enlarger": self.enlarger,
            "grain": self.grain,
            "cleaner": self.cleaner,
        }
        for name, module in others.items():
            if isinstance(module, nn.Module) and any(p.requires_grad for p in module.parameters()):
                found[name] = module
        return found

    def train_only(self, trains: Iterable[str]) -> dict[str, nn.Parameter]:
        """Let the parts `trains` require gradients and nothing else; returns them as `named` does."""
        for module in (self.dit, self.controlnet, *self._text_modules(), *self._pixel_modules()):
            module.requires_grad_(False)
        named = self.named(trains)
        for parameter in named.values():
            parameter.requires_grad_(True)
        return named

    @contextmanager
    def held(self, parts: Iterable[str]) -> Generator[None]:
        """Inside, nothing that is computed leads a gradient into `parts`."""
        learning = [parameter for parameter in self.named(parts).values() if parameter.requires_grad]
        for parameter in learning:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)

    def to(self, device: torch.device, dtype: torch.dtype, large: bool = True) -> None:
        """Move all networks; the built-in autoencoder's transform stays in float32. Without `large`, transformer and
        ControlNet stay on the CPU, to be spread from there."""
        self.device = device
        for module in (self.transformer, self.controlnet, self.context_attention):
            if module is not None:
                # nn.Module's own: diffusers' `to` warns about float32 modules even where there are none.
                nn.Module.to(module, device if large else None, dtype)
        for module in self._text_modules():
            nn.Module.to(module, device, dtype)
        for module in self._pixel_modules():
            module.to(device)
        fastest: Any = self.cleaner
        if fastest is not None:
            fastest.to(memory_format=torch.channels_last)
        if isinstance(self.autoencoder, PatchAutoencoder):
            self.autoencoder.refiner.to(dtype)

    def checkpoint_blocks(self) -> None:
        """Compute activations again in the backward pass."""
        self.dit.checkpoint_blocks = self.controlnet.checkpoint_blocks = True
        if self.lora is not None:
            self.dit.adapters_as_now = self.lora.as_now

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

    def frozen_sha256(self) -> str:
        """Hash of all weights that don't require gradients: the same before and after a run."""
        digest = hashlib.sha256()
        for name, parameter in [*self.dit.named_parameters(), *self.controlnet.named_parameters()]:
            if not parameter.requires_grad:
                values = whole(parameter.detach()).contiguous().cpu()
                digest.update(f"{name} {tuple(values.shape)}".encode())
                digest.update(values.view(torch.uint8).numpy())
        return digest.hexdigest()

    def _text_modules(self) -> list[nn.Module]:
        encoder = self.text_encoder
        found = [encoder, *(getattr(encoder, name, None) for name in ("clip", "t5"))]
        return [module for module in found if isinstance(module, nn.Module)]

    def _pixel_modules(self) -> list[nn.Module]:
        autoencoder = self.autoencoder
        beside = [self.cleanliness, self.enlarger, self.grain, self.cleaner]
        found = [autoencoder, getattr(autoencoder, "vae", None), *beside]
        return [module for module in found if isinstance(module, nn.Module)]


def build(recipe: Recipe, start: Bundle | None) -> Networks:
    """Fresh networks of the recipe's sizes, float32, or those of the bundle `start`, whose sizes then count;
    only its refiner grows where the recipe's is larger."""
    torch.manual_seed(recipe.seed)
    if start is not None:
        return _from_bundle(recipe, start)
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
    context = ContextAttention(injections, s.heads, s.head_dim, recipe.control.mlp) if recipe.control.text else None
    wake_projections(controlnet, recipe.control_std, recipe.seed)
    if context is not None:
        wake_projections(context, recipe.control_std, recipe.seed + 1)
    return Networks(
        transformer,
        controlnet,
        context,
        ByteTextEncoder(s.text_width, s.text_layers, max_tokens=recipe.defaults.max_text_tokens),
        PatchAutoencoder(recipe.latent.channels, s.refiner_width, s.refiner_blocks, s.whitening, s.refiner_restored),
        RestorationLoRA(transformer, s.lora_rank),
        ConditionedDiT(transformer, context, control_map, mask_pads=True),
        recipe.bundle_config(),
    )


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


def _from_bundle(recipe: Recipe, start: Bundle) -> Networks:
    device = torch.device("cpu")
    restorer = start.open_restorer(device, torch.float32, mask_pads=True)
    autoencoder = start.open_autoencoder(device, torch.float32)
    text_encoder = start.open_text_encoder(device, torch.float32)
    if not isinstance(autoencoder, PatchAutoencoder) or not isinstance(text_encoder, ByteTextEncoder):
        raise UsageError(
            f"stages autoencoder and backbone train bundles of our own kind, {start.config.name} has FLUX's parts",
            "use --stage controlnet, restoration or joint",
        )
    width, blocks = recipe.sizes.refiner_width, recipe.sizes.refiner_blocks
    had, restored = (autoencoder.refiner.width, len(autoencoder.refiner.blocks)), recipe.sizes.refiner_restored
    larger = (width, blocks) != had and width >= had[0] and blocks >= had[1]
    if larger or (restored and autoencoder.refiner.restored is None):
        autoencoder = autoencoder.with_refiner(*((width, blocks) if larger else had), restored)
    if restorer.lora is None or not isinstance(restorer.controlnet, MMControlNet):
        raise UsageError(
            f"{start.config.name} has no LoRA, or a ControlNet of another kind",
            "start from a complete bundle of our own",
        )
    _keep_single_blocks(restorer.dit.transformer, recipe.sizes.single_cut)
    return Networks(
        restorer.dit.transformer,
        restorer.controlnet,
        restorer.dit.context_attention,
        text_encoder,
        autoencoder,
        restorer.lora,
        restorer.dit,
        replace(recipe.bundle_config(), control=start.config.control),
        start.open_cleanliness(),
        cleaner=start.open_cleaner(),
    )


def _keep_single_blocks(transformer: FluxTransformer2DModel, count: int) -> None:
    """The first `count` of its single blocks, with what the LoRA changes in them; all of them for 0."""
    blocks = transformer.single_transformer_blocks
    if 0 < count < len(blocks):
        transformer.single_transformer_blocks = blocks[:count]
        transformer.register_to_config(num_single_layers=count)


def build_on(
    recipe: Recipe, stage: Stage, base: Bundle, start: Bundle | None, target: torch.device, dtype: torch.dtype
) -> Networks:
    """The paper's stages: the transformer, autoencoder and text encoder of `base`, frozen.

    ControlNet, cross-attention and LoRA are those of `start` (`--init-from`), else of `base`; judge, enlarger, cleaner
    and grain take nothing else from `start`. Where neither has one, and with `recipe.fresh` where the stage trains it,
    it begins as the paper's does: the ControlNet as a trimmed copy of the transformer, injections and LoRA without
    effect. All are on the CPU; `target` is where text will be encoded. Raises `ConfigError` for a control map that
    doesn't fit.
    """
    torch.manual_seed(recipe.seed)
    device, source = torch.device("cpu"), base if stage.stands_alone else start or base
    transformer = base.open_part("transformer", FluxTransformer2DModel, dtype)
    autoencoder = base.open_autoencoder(device, dtype)
    if "transformer" in stage.trains and not isinstance(autoencoder, PatchAutoencoder):
        raise UsageError(
            f"stage {stage.name} trains bundles of our own kind, {base.config.name} has FLUX's parts",
            "use --stage controlnet, restoration or joint",
        )
    # FLUX's encoders are larger than what trains: they are opened only for prompts that are new.
    small = (base.part_folder("text_encoder") / "config.json").is_file()
    text_encoder = base.open_text_encoder(device, dtype) if small else LazyTextEncoder(base, target, dtype)

    def taken(part: str) -> bool:
        return part in source.config.parts and not (recipe.fresh and part in stage.trains)

    # A ControlNet of another kind (Jasper's adds the condition to the noisy latent) can't be trained further here.
    if taken(CONTROL[0]) and source.config.control.input == "condition":
        control = source.config.control
        controlnet = source.open_part(CONTROL[0], MMControlNet, dtype)
    else:
        control = _fresh_control(recipe, base, len(transformer.transformer_blocks))
        controlnet = MMControlNet.from_transformer(transformer, control.map, control.mlp)
    if not recipe.control.text:
        control = replace(control, text=False)
    context = None
    if control.text and taken(CONTROL[1]) and taken(CONTROL[0]):
        context = source.open_part(CONTROL[1], ContextAttention, dtype)
    elif control.text:
        sizes = transformer.config
        count = sum(feature is not None for feature in control.map)
        context = ContextAttention(count, sizes["num_attention_heads"], sizes["attention_head_dim"], control.mlp)
    lora = None
    if recipe.ablation != "no-lora":
        if taken("lora"):
            cut = recipe.sizes.lora_cut if "lora" in stage.trains else 0
            lora = RestorationLoRA.load(transformer, source.part_folder("lora"), cut)
        else:
            lora = RestorationLoRA(transformer, recipe.sizes.lora_rank)
    dit = ConditionedDiT(transformer, context, control.map, mask_pads=not text_encoder.pads_are_seen)
    made = len(controlnet.transformer_blocks)
    if dit.features_needed != made:
        raise ConfigError(
            f"control.map uses {dit.features_needed} features, the ControlNet makes {made}",
            "leave out --init-from, or correct control.map",
        )
    sampling = source.config.sampling
    if recipe.ablation == "no-lora":
        sampling = replace(sampling, t_start=1.0, steps=20)
    config = replace(base.config, name=recipe.name, control=control, sampling=sampling)
    beside = parts_beside(recipe, stage, base, start, autoencoder)
    networks = Networks(transformer, controlnet, context, text_encoder, autoencoder, lora, dit, config, *beside)
    networks.to(device, dtype)
    return networks


def _fresh_control(recipe: Recipe, base: Bundle, blocks: int) -> ControlConfig:
    control = recipe.control if recipe.control.map else base.config.control
    if not any(feature is not None for feature in control.map) or len(control.map) > blocks:
        raise ConfigError(
            f"control.map {list(control.map)} doesn't fit the {blocks} double blocks of {base.config.name}",
            "give each block at most one of the features 0, 1, ... (-1: nothing) in control.map",
        )
    return control


def base_bundle(recipe: Recipe, model: str | None, start: Bundle | None) -> Bundle:
    """What a stage with a prior trains on: `--model`, else that of `--init-from`, else the recipe's, else mini."""
    if model is None and start is not None:
        return start
    return open_bundle(model or recipe.model or "mini")
