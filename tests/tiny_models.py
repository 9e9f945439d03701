"""Real networks at tiny size with random weights, all of whose parts have an effect: what fixtures and tests build."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from dreamsr_cli.config import BundleConfig, BundleDefaults, ControlConfig, LatentConfig, PartConfig, SamplingConfig
from dreamsr_cli.models.autoencoder import PatchAutoencoder
from dreamsr_cli.models.context_attention import ContextAttention, wake_projections
from dreamsr_cli.models.mm_controlnet import MMControlNet
from dreamsr_cli.models.restoration_lora import RestorationLoRA
from dreamsr_cli.models.text_encoder import TextEmbedding
from dreamsr_cli.plain_data import to_dict
from dreamsr_cli.training.networks import Networks, build
from dreamsr_cli.training.recipe import CropPlan, DataRecipe, LossRecipe, ModelSizes, OptimRecipe, Recipe

CPU = torch.device("cpu")
HEADS, HEAD_DIM, AXES = 2, 16, (4, 6, 6)
T5_WIDTH, CLIP_WIDTH = 24, 20
METHOD_MAP = tuple(block // 2 if block % 2 == 0 and block < 18 else None for block in range(19))
"""method.md: feature l goes after double block 2l; blocks 17 and 18 receive nothing."""

RECIPE = Recipe(
    name="tiny",
    seed=3,
    steps=4,
    save_every=100,
    validate_every=100,
    log_every=1,
    sizes=ModelSizes(
        double_blocks=2,
        single_blocks=2,
        heads=HEADS,
        head_dim=HEAD_DIM,
        rope_axes=AXES,
        text_width=24,
        text_layers=1,
        refiner_width=8,
        refiner_blocks=1,
        refiner_restored=True,
        lora_rank=4,
    ),
    latent=LatentConfig(channels=8),
    control=ControlConfig(map=(0, None)),
    sampling=SamplingConfig(steps=2),
    defaults=BundleDefaults(tile=64, overlap=16),
    data=DataRecipe(crops=(CropPlan(32, 2, 1.0),), hold_out=1, workers=0),
    loss=LossRecipe(perceptual="none"),
    optim=OptimRecipe(lr=1e-3, warmup=2),
)


@torch.no_grad()
def fill(parameter: torch.Tensor, std: float, seed: int) -> None:
    """Overwrite with N(0, std^2)."""
    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * std)


def pictures(batch: int = 4, rows: int = 64, cols: int = 64, seed: int = 0) -> torch.Tensor:
    """Smooth colours with some noise, (B, 3, P, Q) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, rows // 8 + 1, cols // 8 + 1, generator=generator) * 2 - 1
    smooth = nn.functional.interpolate(coarse, (rows, cols), mode="bilinear", align_corners=True)
    return (smooth + 0.1 * torch.randn(smooth.shape, generator=generator)).clamp(-1, 1)


def wake_lora(lora: RestorationLoRA) -> None:
    """Fresh adapters have B = 0 and change nothing; give them an effect."""
    for seed, parameter in enumerate(lora.parameters()):
        fill(parameter, 0.1, seed)


def networks(recipe: Recipe = RECIPE) -> Networks:
    """Networks of the recipe, float32, with every zero-initialised part awake and the transform fitted."""
    made = build(recipe, None)
    assert isinstance(made.autoencoder, PatchAutoencoder)
    assert made.context_attention is not None and made.lora is not None
    fill(made.transformer.proj_out.weight, 0.1, 1)
    fill(made.autoencoder.refiner.exit.weight, 0.02, 2)
    assert made.autoencoder.refiner.restored is not None
    fill(made.autoencoder.refiner.restored.exit.weight, 0.02, 5)
    # Of low contrast: what random networks leave of the noise then stays inside [-1, 1].
    made.autoencoder.fit([0.3 * pictures()])
    wake_projections(made.controlnet, 1.0, 3)
    wake_projections(made.context_attention, 1.0, 4)
    wake_lora(made.lora)
    return made


def flux_transformer(
    double: int = 2, single: int = 2, guidance: bool = True, channels: int = 8
) -> FluxTransformer2DModel:
    """Diffusers' own class with FLUX.1-dev's kinds of inputs."""
    torch.manual_seed(double * 100 + single)
    return FluxTransformer2DModel(
        in_channels=4 * channels,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=guidance,
        axes_dims_rope=AXES,
    ).eval()


def text(batch: int = 1, tokens: int = 5, seed: int = 0, words: int | None = None) -> TextEmbedding:
    """Random embeddings for `flux_transformer`; only the first `words` tokens are text where given."""
    generator = torch.Generator().manual_seed(seed)
    mask = None if words is None else torch.arange(tokens).expand(batch, tokens) < words
    return TextEmbedding(
        torch.randn(batch, tokens, T5_WIDTH, generator=generator),
        torch.randn(batch, CLIP_WIDTH, generator=generator),
        mask,
    )


def latent(batch: int = 1, height: int = 6, width: int = 4, seed: int = 0, channels: int = 8) -> torch.Tensor:
    """z_BCHW of unit variance."""
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def control_for(
    transformer: FluxTransformer2DModel, control_map: tuple[int | None, ...], awake: bool = True
) -> tuple[MMControlNet, ContextAttention]:
    """A ControlNet and cross-attentions for this transformer and map, with an effect where `awake`."""
    torch.manual_seed(7)
    controlnet = MMControlNet.from_transformer(transformer, control_map).eval()
    context = ContextAttention(sum(f is not None for f in control_map), HEADS, HEAD_DIM).eval()
    if awake:
        wake_projections(controlnet, 1.0, 5)
        wake_projections(context, 1.0, 6)
    return controlnet, context


def save_flux_bundle(folder: Path) -> Path:
    """A bundle laid out as FLUX.1-dev's parts are: AutoencoderKL, CLIP + T5 with tokenizers, guidance embedding."""
    transformer = flux_transformer()
    controlnet, context = control_for(transformer, (0, None))
    transformer.save_pretrained(folder / "transformer")
    controlnet.save_pretrained(folder / "controlnet")
    context.save_pretrained(folder / "context_attention")
    lora = RestorationLoRA(transformer, 4)
    wake_lora(lora)
    lora.save(folder / "lora")
    _flux_vae().save_pretrained(folder / "vae")
    _save_text_parts(folder / "text_encoder")
    config = BundleConfig(
        format=1,
        name="tiny-flux",
        licence="Apache-2.0",
        parts={p.name: PartConfig(path=p.name) for p in sorted(folder.iterdir())},
        latent=LatentConfig(channels=8),
        sampling=SamplingConfig(steps=2, guidance=3.5),
        control=ControlConfig(map=(0, None)),
        defaults=replace(RECIPE.defaults, max_text_tokens=16),
    )
    (folder / "bundle.json").write_text(json.dumps(to_dict(config)), encoding="utf-8")
    return folder


def _flux_vae() -> AutoencoderKL:
    torch.manual_seed(11)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=True,
    )


def _save_text_parts(folder: Path) -> None:
    torch.manual_seed(12)
    letters = [chr(c) for c in range(33, 127)]
    clip_words: dict[str, int] = {}
    for word in ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{x}</w>" for x in letters)]:
        clip_words[word] = len(clip_words)
    clip_tokenizer: Any = CLIPTokenizer(vocab=clip_words, merges=[], model_max_length=20)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((x, -3.0) for x in letters)]
    t5_tokenizer: Any = T5Tokenizer(vocab=pieces, extra_ids=0)
    clip_tokenizer.save_pretrained(folder / "tokenizer")
    t5_tokenizer.save_pretrained(folder / "tokenizer_2")
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_words),
            hidden_size=CLIP_WIDTH,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=20,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    ).save_pretrained(folder / "text_encoder")
    T5EncoderModel(
        T5Config(vocab_size=len(pieces), d_model=T5_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    ).save_pretrained(folder / "text_encoder_2")
