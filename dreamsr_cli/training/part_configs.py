"""Configs of all networks of a run, from a bundle's config files or from the recipe, and the networks on the meta
device: their shapes without their weights, so that FLUX's 12 billion parameters cost no memory to count."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import nn

from dreamsr_cli.counting import TextSizes
from dreamsr_cli.errors import WeightsError
from dreamsr_cli.models.autoencoder import PatchAutoencoder
from dreamsr_cli.models.bundle import CONFIG_FILE, Bundle, open_bundle, read_config
from dreamsr_cli.models.cleaner import Cleaner
from dreamsr_cli.models.cleanliness import Cleanliness
from dreamsr_cli.models.conditioned_dit import ConditionedDiT
from dreamsr_cli.models.context_attention import ContextAttention
from dreamsr_cli.models.discriminator import Discriminator
from dreamsr_cli.models.enlarger import Enlarger
from dreamsr_cli.models.feature_discriminator import FeatureDiscriminator
from dreamsr_cli.models.grain import Grain
from dreamsr_cli.models.mm_controlnet import MMControlNet
from dreamsr_cli.models.perceptual import BACKBONES, Lpips
from dreamsr_cli.models.restoration_lora import RestorationLoRA
from dreamsr_cli.models.text_encoder import ByteTextEncoder
from dreamsr_cli.training.recipe import Recipe
from dreamsr_cli.training.stages import Stage
from dreamsr_cli.weights import BUILTIN_FOLDER

FLUX_DEV = "flux.1-dev"
FLUX_TRANSFORMER: dict[str, Any] = {"guidance_embeds": True}
"""FLUX.1-dev's transformer/config.json, where it differs from the defaults of diffusers' class."""
FLUX_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
}
_T5 = {
    "d_model": 4096,
    "d_kv": 64,
    "num_heads": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}


@dataclass(frozen=True)
class PartConfigs:
    """What decides the sizes of all networks."""

    name: str
    """The bundle's, for people."""
    transformer: Mapping[str, Any]
    """Of `FluxTransformer2DModel`."""
    vae: Mapping[str, Any]
    """Of `PatchAutoencoder` or `AutoencoderKL`."""
    text_encoder: Mapping[str, Any] | None
    """Of `ByteTextEncoder`; None: FLUX's CLIP and T5."""
    control_map: tuple[int | None, ...]
    mlp: bool
    text_branch: bool
    """Whether there is a context cross-attention."""
    lora_rank: int
    text_tokens: int
    """Longest prompt."""
    cleanliness: bool = False
    """Whether there is a judge of photos."""
    enlarger: Mapping[str, Any] | None = None
    """Of `Enlarger`; None where there is none."""
    grain: Mapping[str, Any] | None = None
    """Of `Grain`; None where there is none."""
    cleaner: Mapping[str, Any] | None = None
    """Of `Cleaner`; None where there is none."""


def configs_for(recipe: Recipe, stage: Stage, model: str | None = None) -> PartConfigs:
    """Configs of the networks that `stage` works with: the recipe's own sizes in stages without a prior, else those of
    the bundle `model` (default: the recipe's, or mini).

    A bundle whose FLUX.1-dev weights are not on this machine counts by their published configs. `WeightsError` where
    another part is missing.
    """
    if not stage.prior:
        return of_recipe(recipe)
    bundle = _open(model or recipe.model or "mini")
    control = bundle.config.control
    lora = bundle.config.parts.get("lora")
    own_rank = lora is not None and lora.lock is None
    return PartConfigs(
        name=bundle.config.name,
        transformer=_config(bundle, "transformer", FLUX_TRANSFORMER),
        vae=_config(bundle, "vae", FLUX_VAE),
        text_encoder=_text_config(bundle),
        control_map=tuple(control.map),
        mlp=control.mlp,
        text_branch=control.text and recipe.ablation != "no-text-branch",
        lora_rank=_lora_rank(recipe, stage, bundle) if own_rank else recipe.sizes.lora_rank,
        text_tokens=bundle.config.defaults.max_text_tokens,
        cleanliness=stage.judges or "cleanliness" in bundle.config.parts,
        enlarger=_enlarger_config(recipe, stage, bundle),
        grain=_grain_config(recipe, stage, bundle),
        cleaner=_cleaner_config(recipe, stage, bundle),
    )


def of_recipe(recipe: Recipe) -> PartConfigs:
    """Configs of networks made from nothing."""
    s = recipe.sizes
    return PartConfigs(
        name=recipe.name,
        transformer={
            "in_channels": 4 * recipe.latent.channels,
            "num_layers": s.double_blocks,
            "num_single_layers": s.single_blocks,
            "attention_head_dim": s.head_dim,
            "num_attention_heads": s.heads,
            "joint_attention_dim": s.text_width,
            "pooled_projection_dim": s.text_width,
            "axes_dims_rope": tuple(s.rope_axes),
        },
        vae={
            "channels": recipe.latent.channels,
            "refiner_width": s.refiner_width,
            "refiner_blocks": s.refiner_blocks,
            "whitening": s.whitening,
            "refiner_restored": s.refiner_restored,
        },
        text_encoder={
            "width": s.text_width,
            "layers": s.text_layers,
            "max_tokens": recipe.defaults.max_text_tokens,
        },
        control_map=tuple(recipe.control.map),
        mlp=recipe.control.mlp,
        text_branch=recipe.control.text,
        lora_rank=s.lora_rank,
        text_tokens=recipe.defaults.max_text_tokens,
    )


@dataclass
class MetaNetworks:
    """All networks on the meta device, in one dtype."""

    configs: PartConfigs
    transformer: FluxTransformer2DModel
    controlnet: MMControlNet
    context_attention: ContextAttention | None
    dit: ConditionedDiT
    lora: RestorationLoRA | None
    autoencoder: PatchAutoencoder | AutoencoderKL
    text_encoder: ByteTextEncoder | None
    """None: FLUX's, which only count."""
    discriminator: Discriminator | FeatureDiscriminator
    perceptual: nn.Module | None
    cleanliness: Cleanliness | None = None
    enlarger: Enlarger | None = None
    grain: Grain | None = None
    cleaner: Cleaner | None = None
    """These four: None where neither the bundle nor the stage has it."""

    def parameters(self) -> dict[str, int]:
        """Parameters by part."""
        made = {
            "transformer": sum(p.numel() for n, p in self.transformer.named_parameters() if "lora_" not in n),
            "controlnet": _count(self.controlnet),
            "context_attention": _count(self.context_attention),
            "lora": 0 if self.lora is None else sum(p.numel() for p in self.lora.parameters()),
            "vae": _count(self.autoencoder),
            "text_encoder": _count(self.text_encoder)
            if self.text_encoder is not None
            else TextSizes.from_configs({}, _CLIP, _T5).parameters,
            "discriminator": _count(self.discriminator),
            "perceptual": _count(self.perceptual),
            "cleanliness": _count(self.cleanliness),
            "enlarger": _count(self.enlarger),
            "grain": _count(self.grain),
            "cleaner": _count(self.cleaner),
        }
        return {name: number for name, number in made.items() if number}

    def inside(self, part: str, name: str) -> int:
        """Parameters of the module `name` of a part."""
        module = getattr(self, part)
        return 0 if module is None else _count(module.get_submodule(name))

    @property
    def lora_modules(self) -> int:
        """Linear layers that carry an adapter."""
        return sum(name.endswith("lora_A.removal.weight") for name, _ in self.transformer.named_parameters())

    def refiner_parameters(self) -> int:
        """Of the built-in autoencoder's refiner, its only part that learns; 0 for FLUX's."""
        return _count(self.autoencoder.refiner) if isinstance(self.autoencoder, PatchAutoencoder) else 0


def build_meta(
    configs: PartConfigs, dtype: torch.dtype, perceptual: str = "none", gan_sees: str = "pixels"
) -> MetaNetworks:
    """The networks of `configs` on the meta device."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**configs.transformer)
        controlnet = MMControlNet.from_transformer(transformer, configs.control_map, configs.mlp)
        heads, head_dim = (int(transformer.config[k]) for k in ("num_attention_heads", "attention_head_dim"))
        injections = sum(feature is not None for feature in configs.control_map)
        context = ContextAttention(injections, heads, head_dim, configs.mlp) if configs.text_branch else None
        lora = RestorationLoRA(transformer, configs.lora_rank) if configs.lora_rank else None
        own = "refiner_width" in configs.vae
        autoencoder = PatchAutoencoder(**_known(PatchAutoencoder, configs.vae)) if own else AutoencoderKL(**configs.vae)
        text = None if configs.text_encoder is None else ByteTextEncoder(**configs.text_encoder)
        judge = Cleanliness() if configs.cleanliness else None
        enlarger = None if configs.enlarger is None else Enlarger(**_known(Enlarger, configs.enlarger))
        grain = None if configs.grain is None else Grain(**_known(Grain, configs.grain))
        cleaner = None if configs.cleaner is None else Cleaner(**_known(Cleaner, configs.cleaner))
        distance = None if perceptual == "none" else BACKBONES[perceptual].build().requires_grad_(False)
        if distance is not None and gan_sees == "features":
            discriminator = FeatureDiscriminator(Lpips(BACKBONES[perceptual], distance, []))
        else:
            discriminator = Discriminator()
    for module in (transformer, controlnet, context, autoencoder):
        if module is not None:
            # nn.Module's own: diffusers' `to` warns about float32 modules even where there are none.
            nn.Module.to(module, dtype=dtype)
    dit = ConditionedDiT(transformer, context, configs.control_map, mask_pads=own)
    return MetaNetworks(
        configs,
        transformer,
        controlnet,
        context,
        dit,
        lora,
        autoencoder,
        text,
        discriminator,
        distance,
        judge,
        enlarger,
        grain,
        cleaner,
    )


def _open(model: str) -> Bundle:
    """The bundle with its bundle.json alone: one of the package's is not asked for weights that are not here yet."""
    packed = BUILTIN_FOLDER.parent / model
    if "/" not in model and (packed / CONFIG_FILE).is_file():
        return Bundle(packed, read_config(packed))
    return open_bundle(model)


def _config(bundle: Bundle, part: str, published: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part's config.json without what the library adds; the published one where FLUX's files are not here."""
    named = bundle.config.parts.get(part)
    if named is not None and named.lock == FLUX_DEV:
        return published
    return {k: v for k, v in _read(bundle, part).items() if not k.startswith("_") and k != "dreamsr"}


def _enlarger_config(recipe: Recipe, stage: Stage, bundle: Bundle) -> Mapping[str, Any] | None:
    if "enlarger" in bundle.config.parts and not (stage.enlarges and recipe.fresh):
        return _read(bundle, "enlarger")
    vae = _config(bundle, "vae", FLUX_VAE)
    if not stage.enlarges or "refiner_width" not in vae:
        return None
    return {"width": vae["refiner_width"], "blocks": vae["refiner_blocks"], "rank": recipe.sizes.enlarger_rank}


def _grain_config(recipe: Recipe, stage: Stage, bundle: Bundle) -> Mapping[str, Any] | None:
    if "grain" in bundle.config.parts and not (stage.grains and recipe.fresh):
        return _read(bundle, "grain")
    return {} if stage.grains else None


def _cleaner_config(recipe: Recipe, stage: Stage, bundle: Bundle) -> Mapping[str, Any] | None:
    sizes = recipe.sizes
    known = "cleaner" in bundle.config.parts and (stage.pleases or not (stage.cleans and recipe.fresh))
    if not stage.cleans:
        return _read(bundle, "cleaner") if known else None
    fresh: dict[str, Any] = {"widths": sizes.cleaner_widths, "blocks": sizes.cleaner_blocks}
    config = _read(bundle, "cleaner") if known else fresh
    config["blocks"] = tuple(map(max, config["blocks"], sizes.cleaner_deepen))
    config["views"] = sizes.cleaner_views or config.get("views", 1)
    return {**config, **({"pleases": True} if stage.pleases else {})}


def _lora_rank(recipe: Recipe, stage: Stage, bundle: Bundle) -> int:
    rank, cut = int(_read(bundle, "lora", "adapter_config.json")["r"]), recipe.sizes.lora_cut
    return min(rank, cut) if cut and "lora" in stage.trains else rank


def _text_config(bundle: Bundle) -> Mapping[str, Any] | None:
    named = bundle.config.parts.get("text_encoder")
    if named is not None and named.lock is not None:
        return None
    folder = bundle.part_folder("text_encoder")
    if not (folder / "config.json").is_file():
        return None
    return _known(ByteTextEncoder, _read(bundle, "text_encoder"))


def _read(bundle: Bundle, part: str, name: str = "config.json") -> dict[str, Any]:
    path = bundle.part_folder(part) / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: can't be read: {error}", "fetch or train the bundle again") from error


def _known(cls: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a saved config that the class takes."""
    import inspect

    return {k: v for k, v in config.items() if k in inspect.signature(cls.__init__).parameters}


def _count(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())
