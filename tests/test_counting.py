"""Counted operations and parameters against torch's own counter on real networks, and against FLUX's known figures."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dreamsr_cli import counting
from dreamsr_cli.bundle_sizes import BundleSizes, read_sizes
from dreamsr_cli.counting import BlockSizes, ContextSizes
from dreamsr_cli.errors import WeightsError
from dreamsr_cli.models.bundle import Bundle, Restorer, open_bundle
from dreamsr_cli.models.text_encoder import TextEmbedding

CPU = torch.device("cpu")
FLUX = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
FLUX_CONTROL = {key: value for key, value in FLUX.items() if key != "num_single_layers"} | {"num_layers": 9}
BATCH, HEIGHT, WIDTH, GLOBAL, LOCAL = 2, 12, 8, 5, 7


@pytest.fixture(params=["tiny_bundle", "tiny_flux_bundle"])
def bundle(request) -> Bundle:
    return open_bundle(str(request.getfixturevalue(request.param)))


@pytest.fixture
def sizes(bundle) -> BundleSizes:
    return read_sizes(bundle.config, bundle.part_folder)


@pytest.fixture
def restorer(bundle) -> Restorer:
    return bundle.open_restorer(CPU, torch.float32, mask_pads=False)


def counted(work: Callable[[], object]) -> int:
    """What torch counts; attention as plain products, which its counter sees on a CPU too."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def text(sizes: BundleSizes, batch: int, tokens: int) -> TextEmbedding:
    transformer = sizes.transformer
    return TextEmbedding(
        torch.randn(batch, tokens, transformer.text_width), torch.randn(batch, transformer.pooled_width), None
    )


def parameters(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize(
    ("image", "known", "without_projections"), [(1024, 25.3, 25.29), (4096, 86.5, 86.52), (14400, 403.6, 403.68)]
)
def test_a_tile_and_step_of_flux_take_what_the_issue_says(image, known, without_projections):
    """The issue's figures leave out the ControlNet's nine image projections M_img (0.7 % of a 512 px tile)."""
    transformer, controlnet = BlockSizes.from_config(FLUX), BlockSizes.from_config(FLUX_CONTROL)
    context = ContextSizes(injections=9, width=3072, head_dim=128, mlp=False)
    flops = counting.transformer_flops(transformer, 1, image, 512) + counting.transformer_flops(
        controlnet, 1, image, 512
    )
    flops += counting.context_flops(context, 1, 512, 512) + counting.keys_values_flops(context, 1, 512)
    projections = counting.transformer_flops(controlnet, 1, image, 512)
    projections -= counting.transformer_flops(replace(controlnet, projections=0), 1, image, 512)
    assert flops / 1e12 == pytest.approx(known, rel=0.01)
    assert (flops - projections) / 1e12 == pytest.approx(without_projections, abs=0.01)
    assert (flops - projections) / 1e12 == pytest.approx(known, rel=0.001)


class Moved:
    """Values that the products of real networks read and write: linears over tokens, and attention."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *modules: torch.nn.Module) -> None:
        self.activations = 0
        for module in modules:
            for child in module.modules():
                if isinstance(child, torch.nn.Linear):
                    child.register_forward_hook(self._linear)
        attend = torch.nn.functional.scaled_dot_product_attention

        def counted(query, key, value, *args, **kwargs):
            made = attend(query, key, value, *args, **kwargs)
            self.activations += sum(t.numel() for t in (query, key, value, made))
            return made

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)

    def _linear(self, module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if inputs[0].ndim == 3:  # the others are single rows: modulation and time
            self.activations += inputs[0].numel() + output.numel()


def test_bytes_are_what_the_networks_products_move(sizes, restorer, monkeypatch):
    z = torch.randn(BATCH, sizes.autoencoder.channels, HEIGHT, WIDTH)
    tokens, item = HEIGHT * WIDTH // 4, 2
    glob, local = text(sizes, 1, GLOBAL), text(sizes, BATCH, LOCAL)
    guidance = 3.5 if sizes.transformer.guidance else None
    moved = Moved(monkeypatch, restorer.dit, restorer.controlnet)
    context = [block for block in restorer.dit.context_attention.blocks]
    of_local = parameters(*(m for block in context for m in (block.to_k, block.to_v)))
    norms = parameters(*(m for block in context for m in (block.norm_q, block.norm_k)))
    with torch.no_grad():
        features = restorer.controlnet(z, torch.zeros(BATCH), local, False, guidance)
        ready = restorer.dit.prepare(features)
        control, moved.activations = moved.activations, 0
        for lora in (False, True):
            with restorer.lora.on() if lora else nullcontext():
                restorer.dit(z, torch.full((1,), 0.5), glob, ready, guidance)
            seen, moved.activations = moved.activations, 0
            adapter = sum(p.numel() for p in restorer.lora.parameters())
            weights = parameters(restorer.dit) - of_local - norms - (0 if lora else adapter)
            made = sizes.transformer_bytes(BATCH, tokens, GLOBAL, LOCAL, item, lora=lora)
            assert made == pytest.approx((seen + weights) * item, rel=0.01), lora
    weights = parameters(restorer.controlnet) + of_local
    assert sizes.control_bytes(BATCH, tokens, LOCAL, item) == pytest.approx((control + weights) * item, rel=0.01)
    quantized = sizes.transformer_bytes(BATCH, tokens, GLOBAL, LOCAL, item, 1.0)
    assert quantized < sizes.transformer_bytes(BATCH, tokens, GLOBAL, LOCAL, item)


def test_bytes_of_an_autoencoder_are_what_its_layers_read_and_write(bundle, sizes):
    autoencoder, moved = bundle.open_autoencoder(CPU, torch.float32), []
    network = getattr(autoencoder, "vae", autoencoder)
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda _, inputs, output: moved.append(inputs[0].numel() + output.numel()))
    autoencoder.decode(torch.zeros(1, autoencoder.channels, 8, 6))
    coder = sizes.autoencoder
    transform = coder.moved_values(64, 48, encode=True) if coder.exact else 0
    # Attention of FLUX's VAE is no convolution.
    assert (0.999 if coder.exact else 0.85) < (sum(moved) + transform) / coder.moved_values(64, 48) <= 1.001


@pytest.mark.parametrize(("image", "words", "step", "control"), [(1024, 128, 15.8, 2.7), (4096, 512, 74.4, 12.5)])
def test_flux_takes_what_is_known(image, words, step, control):
    transformer, controlnet = BlockSizes.from_config(FLUX), BlockSizes.from_config(FLUX_CONTROL)
    assert counting.transformer_flops(transformer, 1, image, words) / 1e12 == pytest.approx(step, abs=0.05)
    assert counting.transformer_flops(controlnet, 1, image, words) / 1e12 == pytest.approx(control, abs=0.05)


def test_flux_has_the_parameters_that_are_known():
    transformer, controlnet = BlockSizes.from_config(FLUX), BlockSizes.from_config(FLUX_CONTROL)
    base = counting.transformer_parameters(transformer)
    assert base == 11_901_408_320
    assert counting.transformer_parameters(transformer, 256) - base == pytest.approx(1046e6, rel=1e-3)
    assert counting.transformer_parameters(controlnet) == pytest.approx(3.19e9, rel=1e-3)
    context = ContextSizes(injections=9, width=3072, head_dim=128, mlp=False)
    assert counting.context_parameters(context) == pytest.approx(0.34e9, rel=1e-3)


def test_both_networks_take_what_torch_counts(sizes, restorer):
    z = torch.randn(BATCH, sizes.autoencoder.channels, HEIGHT, WIDTH)
    tokens = HEIGHT * WIDTH // 4
    glob, local = text(sizes, 1, GLOBAL), text(sizes, BATCH, LOCAL)
    guidance = 3.5 if sizes.transformer.guidance else None
    time = torch.full((1,), 0.5)

    def control():
        features = restorer.controlnet(z, time.expand(BATCH), local, False, guidance)
        return restorer.dit.prepare(features)

    def transform():
        return restorer.dit(z, time, glob, injections, guidance)

    with torch.no_grad():
        injections = control()
    assert sizes.feature_values(BATCH, tokens, LOCAL) * 4 == injections.size
    assert sizes.control_flops(BATCH, tokens, LOCAL) == pytest.approx(counted(control), rel=0.03)
    assert sizes.transformer_flops(BATCH, tokens, GLOBAL, LOCAL) == pytest.approx(counted(transform), rel=0.03)
    assert restorer.lora is not None
    with restorer.lora.on():
        seen = counted(transform)
    assert sizes.transformer_flops(BATCH, tokens, GLOBAL, LOCAL, lora=True) == pytest.approx(seen, rel=0.03)
    assert seen > 1.1 * sizes.transformer_flops(BATCH, tokens, GLOBAL, LOCAL)
    with torch.no_grad(), restorer.lora.folded():
        assert sizes.transformer_flops(BATCH, tokens, GLOBAL, LOCAL) == pytest.approx(counted(transform), rel=0.03)
    layers = [module for module in restorer.dit.modules() if isinstance(module, BaseTunerLayer)]
    held = sum(layer.get_base_layer().weight.numel() for layer in layers)
    assert counting.folded_weights(sizes.transformer, sizes.lora_rank) == held
    assert counting.folded_weights(sizes.transformer, 0) == 0


def test_parameters_of_the_restorer_are_exact(sizes, restorer):
    assert sizes.restorer_parameters() == parameters(restorer.dit, restorer.controlnet)


@pytest.mark.parametrize("rows", [32, 64])
def test_autoencoders_take_what_torch_counts(bundle, sizes, rows):
    autoencoder = bundle.open_autoencoder(CPU, torch.float32)
    rgb, z = torch.zeros(1, 3, rows, 48), torch.zeros(1, autoencoder.channels, rows // 8, 6)
    coder = sizes.autoencoder
    assert (coder.exact, coder.halo, coder.channels) == (autoencoder.exact, autoencoder.halo, autoencoder.channels)
    assert coder.encode_flops(rows, 48) == pytest.approx(counted(lambda: autoencoder.encode(rgb)), rel=0.03)
    assert coder.decode_flops(rows, 48) == pytest.approx(counted(lambda: autoencoder.decode(z)), rel=0.03)
    seen = counted(lambda: autoencoder.decode(z, spare=(8, 16)))
    assert coder.decode_flops(rows, 48, (8, 16)) == pytest.approx(seen, rel=0.03)
    network = getattr(autoencoder, "vae", autoencoder)
    assert coder.parameters() == pytest.approx(parameters(network), rel=0.1)  # norms and biases weigh more when tiny


def test_text_encoders_take_what_torch_counts(bundle, sizes):
    encoder = bundle.open_text_encoder(CPU, torch.float32)
    words = "a cat on a mat"
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused layer is one operation that torch doesn't count
    try:
        seen = counted(lambda: encoder.encode([words, words], 16))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    tokens = sizes.text.tokens(len(words), 16)
    assert tokens == encoder.encode([words], 16)[0][0].tokens_BTD.shape[1]
    assert sizes.text.flops(tokens) == pytest.approx(seen, rel=0.03)


def test_a_config_of_another_kind_is_told(bundle, tmp_path):
    def elsewhere(name: str) -> Path:
        return tmp_path if name == "controlnet" else bundle.part_folder(name)

    with pytest.raises(WeightsError, match="can't be read"):
        read_sizes(bundle.config, elsewhere)
    (tmp_path / "config.json").write_text('{"layers": 3}')
    with pytest.raises(WeightsError, match="doesn't fit"):
        read_sizes(bundle.config, elsewhere)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match="not a table"):
        read_sizes(bundle.config, elsewhere)
