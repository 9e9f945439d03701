"""FLUX.1-dev's published index and shards, written down from its architecture, against the library's full-size models
on the meta device: what the hub holds is what this code opens. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from dreamsr_cli import counting
from dreamsr_cli.bundle_sizes import PUBLISHED, read_sizes
from dreamsr_cli.counting import BlockSizes
from dreamsr_cli.models.bundle import open_bundle
from dreamsr_cli.models.flux_control import FluxControl
from dreamsr_cli.weights_lock import load_lock

META = torch.device("meta")
WIDTH, HEAD, TEXT, POOLED, TIME, TOKEN, DOUBLE, SINGLE = 3072, 128, 4096, 768, 256, 64, 19, 38
Shapes = dict[str, tuple[int, ...]]


def linear(name: str, n_in: int, n_out: int) -> Shapes:
    return {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}


def transformer_tensors() -> Shapes:
    """Names and shapes in FLUX.1-dev's transformer/, in the order in which they were saved."""
    made: Shapes = {}
    for embedder, n_in in (("timestep_embedder", TIME), ("guidance_embedder", TIME), ("text_embedder", POOLED)):
        made |= linear(f"time_text_embed.{embedder}.linear_1", n_in, WIDTH)
        made |= linear(f"time_text_embed.{embedder}.linear_2", WIDTH, WIDTH)
    made |= linear("context_embedder", TEXT, WIDTH) | linear("x_embedder", TOKEN, WIDTH)
    for number in range(DOUBLE):
        block = f"transformer_blocks.{number}"
        made |= linear(f"{block}.norm1.linear", WIDTH, 6 * WIDTH)
        made |= linear(f"{block}.norm1_context.linear", WIDTH, 6 * WIDTH)
        made |= {f"{block}.attn.norm_q.weight": (HEAD,), f"{block}.attn.norm_k.weight": (HEAD,)}
        for name in ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "add_q_proj", "to_out.0", "to_add_out"):
            made |= linear(f"{block}.attn.{name}", WIDTH, WIDTH)
        made |= {f"{block}.attn.norm_added_q.weight": (HEAD,), f"{block}.attn.norm_added_k.weight": (HEAD,)}
        for name in ("ff", "ff_context"):
            made |= linear(f"{block}.{name}.net.0.proj", WIDTH, 4 * WIDTH)
            made |= linear(f"{block}.{name}.net.2", 4 * WIDTH, WIDTH)
    for number in range(SINGLE):
        block = f"single_transformer_blocks.{number}"
        made |= linear(f"{block}.norm.linear", WIDTH, 3 * WIDTH)
        made |= linear(f"{block}.proj_mlp", WIDTH, 4 * WIDTH) | linear(f"{block}.proj_out", 5 * WIDTH, WIDTH)
        made |= {f"{block}.attn.norm_q.weight": (HEAD,), f"{block}.attn.norm_k.weight": (HEAD,)}
        for name in ("to_q", "to_k", "to_v"):
            made |= linear(f"{block}.attn.{name}", WIDTH, WIDTH)
    return made | linear("norm_out.linear", WIDTH, 2 * WIDTH) | linear("proj_out", WIDTH, TOKEN)


def sharded(tensors: Shapes, limit: int) -> list[Shapes]:
    """Filled up one after the other, 2 bytes a value."""
    shards: list[Shapes] = [{}]
    size = 0
    for name, shape in tensors.items():
        count = 2 * math.prod(shape)
        if size + count > limit:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += count
    return shards


def index(shards: list[Shapes], stem: str) -> bytes:
    """The index file that lists them."""
    files = {
        name: f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i, names in enumerate(shards, 1) for name in names
    }
    total = sum(2 * math.prod(shape) for names in shards for shape in names.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=2, sort_keys=True)
    return f"{text}\n".encode()


def shard_bytes(tensors: Shapes) -> int:
    """Size of the safetensors file: 8 bytes, a JSON header padded to 8, the values."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        begin, end = end, end + 2 * math.prod(tensors[name])
        header[name] = {"dtype": "BF16", "shape": list(tensors[name]), "data_offsets": [begin, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + end


def rows(prefix: str) -> dict[str, tuple[int | None, str | None]]:
    """(size, sha256) by path in weights.lock."""
    entry = load_lock()["flux.1-dev"]
    return {row.path.removeprefix(prefix): (row.size, row.sha256) for row in entry.files if row.path.startswith(prefix)}


def size_of(path: str) -> int:
    """Bytes that weights.lock gives for the file."""
    size = rows("")[path][0]
    assert size is not None
    return size


def model_of(cls: Any, name: str) -> Any:
    """The full-size network without weights."""
    with META:
        return cls.from_config(published(name))


def published(name: str) -> dict:
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))[name]


def test_the_index_written_down_is_the_published_one_to_the_byte() -> None:
    tensors = transformer_tensors()
    assert sum(map(math.prod, tensors.values())) == 11_901_408_320
    made = index(sharded(tensors, 10**10), "diffusion_pytorch_model")
    listed = rows("transformer/")
    assert (len(made), hashlib.sha256(made).hexdigest()) == listed["diffusion_pytorch_model.safetensors.index.json"]


def test_the_shards_have_the_published_sizes() -> None:
    listed = rows("transformer/")
    for number, shard in enumerate(sharded(transformer_tensors(), 10**10), 1):
        size, _ = listed[f"diffusion_pytorch_model-{number:05d}-of-00003.safetensors"]
        assert shard_bytes(shard) == size


def test_the_full_size_transformer_takes_every_tensor() -> None:
    config = published("flux.1-dev/transformer")
    model = model_of(FluxTransformer2DModel, "flux.1-dev/transformer")
    given = {
        name: torch.empty(shape, device=META, dtype=torch.bfloat16) for name, shape in transformer_tensors().items()
    }
    model.load_state_dict(given, strict=True, assign=True)
    assert counting.transformer_parameters(BlockSizes.from_config(config)) == sum(p.numel() for p in model.parameters())
    renamed = {name.replace("transformer_blocks.0.attn.to_q", "x"): tensor for name, tensor in given.items()}
    with pytest.raises(RuntimeError, match="to_q"):
        model.load_state_dict(renamed, strict=True, assign=True)


def t5_tensors() -> Shapes:
    """T5 v1.1 XXL's encoder, in the order in which it was saved."""
    made: Shapes = {"shared.weight": (32128, 4096)}
    for number in range(24):
        first, second = (f"encoder.block.{number}.layer.{layer}" for layer in (0, 1))
        for name in "qkvo":
            made[f"{first}.SelfAttention.{name}.weight"] = (4096, 4096)
        if number == 0:
            made[f"{first}.SelfAttention.relative_attention_bias.weight"] = (32, 64)
        made[f"{first}.layer_norm.weight"] = (4096,)
        made[f"{second}.DenseReluDense.wi_0.weight"] = made[f"{second}.DenseReluDense.wi_1.weight"] = (10240, 4096)
        made[f"{second}.DenseReluDense.wo.weight"] = (4096, 10240)
        made[f"{second}.layer_norm.weight"] = (4096,)
    return made | {"encoder.final_layer_norm.weight": (4096,)}


def test_the_text_encoders_of_that_size_exist() -> None:
    tensors, listed = t5_tensors(), rows("text_encoder_2/")
    shards = sharded(tensors, 5 * 10**9)
    made = index(shards, "model")
    assert (len(made), hashlib.sha256(made).hexdigest()) == listed["model.safetensors.index.json"]
    for number, shard in enumerate(shards, 1):
        assert shard_bytes(shard) == listed[f"model-{number:05d}-of-00002.safetensors"][0]
    with META:
        t5 = T5EncoderModel(T5Config(**published("flux.1-dev/text_encoder_2")))
        clip = CLIPTextModel(CLIPTextConfig(**published("flux.1-dev/text_encoder")))
    own = {name: tuple(p.shape) for name, p in t5.named_parameters(remove_duplicate=True)}
    assert own == {name: shape for name, shape in tensors.items()}
    # 2 bytes a value, and a header.
    count = sum(p.numel() for p in clip.parameters())
    assert 0 < size_of("text_encoder/model.safetensors") - 2 * count < 40_000


def test_the_autoencoder_of_that_size_exists() -> None:
    config = published("flux.1-dev/vae")
    with META:
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **config
        )
    count = sum(p.numel() for p in vae.parameters())
    assert 0 < size_of("vae/diffusion_pytorch_model.safetensors") - 2 * count < 40_000


def test_the_upscalers_controlnet_of_that_size_exists() -> None:
    config = published("flux-upscaler-controlnet")
    model = model_of(FluxControlNetModel, "flux-upscaler-controlnet")
    count = sum(p.numel() for p in model.parameters())
    assert 2 * count == 3_583_210_496
    assert counting.transformer_parameters(BlockSizes.from_config(config)) == count
    assert len(FluxControl(model).transformer_blocks) == 5


@pytest.mark.parametrize("name", ["flux", "flux-upscaler"])
def test_plans_count_what_the_meta_device_holds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DREAMSR_WEIGHTS_DIR", str(tmp_path))
    bundle = open_bundle(name)
    sizes = read_sizes(bundle.config, bundle.part_folder)
    with META:
        t5 = T5EncoderModel(T5Config(**published("flux.1-dev/text_encoder_2")))
        clip = CLIPTextModel(CLIPTextConfig(**published("flux.1-dev/text_encoder")))
    text = sum(p.numel() for module in (t5, clip) for p in module.parameters())
    assert sizes.text.parameters == pytest.approx(text, rel=2e-3)
    inside = sum(p.numel() for p in t5.encoder.block.parameters())
    assert sizes.text.blocks == pytest.approx(inside, rel=2e-3)
