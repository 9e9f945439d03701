"""Repositories shaped like the public ones at tiny size: FLUX.1-dev's folder layout, a ControlNet for upscaling, and a
weights.lock that lists them under the names that the shipped bundles use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import tiny_models
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from tiny_models import AXES, CLIP_WIDTH, HEAD_DIM, HEADS, METHOD_MAP, T5_WIDTH, wake_lora

from dreamsr_cli.config import PartConfig
from dreamsr_cli.models.bundle import open_bundle
from dreamsr_cli.models.restoration_lora import RestorationLoRA
from dreamsr_cli.plain_data import to_dict
from dreamsr_cli.weights import lock_rows
from dreamsr_cli.weights_lock import LockEntry, write_entry

CHANNELS, DOUBLE, SINGLE = 16, 19, 2
"""The bundles' map has 19 entries and their latent 16 channels; single blocks don't matter to it."""
COMMITS = {"flux.1-dev": "1" * 40, "flux-upscaler-controlnet": "2" * 40}
NAMES = {"flux.1-dev": "black-forest-labs/FLUX.1-dev", "flux-upscaler-controlnet": "jasperai/Upscaler"}


def transformer() -> FluxTransformer2DModel:
    """FLUX.1-dev's kind of transformer with all of its double blocks, thin."""
    made = tiny_models.flux_transformer(DOUBLE, SINGLE, channels=CHANNELS)
    tiny_models.fill(made.proj_out.weight, 0.05, 1)
    return made


def save_flux_dev(folder: Path) -> Path:
    """FLUX.1-dev's layout: sharded transformer and T5 with their indexes, two tokenizers, VAE, scheduler."""
    tiny = tiny_models.save_flux_bundle(folder.with_name(folder.name + "-parts"))
    for name in ("text_encoder", "tokenizer", "tokenizer_2"):
        shutil.copytree(tiny / "text_encoder" / name, folder / name)
    from transformers import T5EncoderModel

    t5 = T5EncoderModel.from_pretrained(tiny / "text_encoder" / "text_encoder_2")
    t5.save_pretrained(folder / "text_encoder_2", max_shard_size="8KB")
    transformer().save_pretrained(folder / "transformer", max_shard_size="400KB")
    torch.manual_seed(11)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).save_pretrained(folder / "vae")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    return folder


def save_upscaler(folder: Path) -> Path:
    """A ControlNet of diffusers' kind with five double blocks, as jasperai's; its outputs awake."""
    torch.manual_seed(21)
    made = FluxControlNetModel(
        in_channels=4 * CHANNELS,
        num_layers=5,
        num_single_layers=0,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=AXES,
    )
    for seed, parameter in enumerate([*made.controlnet_blocks.parameters(), *made.controlnet_x_embedder.parameters()]):
        tiny_models.fill(parameter, 0.1, seed)
    made.save_pretrained(folder)
    return folder


def save_run(folder: Path) -> Path:
    """What `dreamsr train` leaves for FLUX: its ControlNet, cross-attention and LoRA; the rest is named by "lock"."""
    base = transformer()
    controlnet, context = tiny_models.control_for(base, METHOD_MAP)
    bundle = folder / "bundle"
    controlnet.save_pretrained(bundle / "controlnet")
    context.save_pretrained(bundle / "context_attention")
    lora = RestorationLoRA(base, 4)
    wake_lora(lora)
    lora.save(bundle / "lora")
    config = to_dict(open_bundle("flux").config)
    for name in ("controlnet", "context_attention", "lora"):
        config["parts"][name] = to_dict(PartConfig(path=name))
    config["defaults"]["captioner"] = "describe"
    (bundle / "bundle.json").write_text(json.dumps(config), encoding="utf-8")
    (bundle / "README.md").write_text("# a run\n", encoding="utf-8")
    return folder


def write_lock(path: Path, folders: dict[str, Path]) -> None:
    """A weights.lock with these entries and the one that says that DreamSR's own weights aren't published."""
    path.write_text("format = 1\n", encoding="utf-8")
    for name, folder in folders.items():
        rows = lock_rows(folder, "test")
        write_entry(path, LockEntry(name, rows, repository=NAMES[name], revision=COMMITS[name], licence="test"))
    write_entry(path, LockEntry("dreamsr", (), licence="not published", note="train them"))
