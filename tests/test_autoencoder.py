"""Latents and pixels: the closed-form transform, exact decoding of regions, FLUX's autoencoder behind one contract."""

from __future__ import annotations

import pytest
import torch
from tiny_models import CPU, pictures

from dreamsr_cli.models.autoencoder import STRIDE, FluxAutoencoder, PatchAutoencoder, Refiner, decode_region
from dreamsr_cli.models.bundle import open_bundle

LEVEL = 1 / 127.5


def awake(channels: int = 8, width: int = 8, blocks: int = 1, whitening: float = 0.5) -> PatchAutoencoder:
    """Fitted on pictures, with a refiner that brings in even the farthest pixels it can see."""
    torch.manual_seed(0)
    autoencoder = PatchAutoencoder(channels, width, blocks, whitening).eval()
    autoencoder.fit([pictures(8)])
    for parameter in autoencoder.refiner.parameters():
        torch.nn.init.normal_(parameter, 0, 1.5 / width**0.5 / 3)
    return autoencoder


def in_span(rank: int, rows: int = 32, cols: int = 48) -> torch.Tensor:
    """A picture (1, 3, P, Q) whose 8x8 blocks are a mean plus `rank` fixed patterns in any amount."""
    generator = torch.Generator().manual_seed(1)
    patterns_RK = torch.randn(rank, 3 * STRIDE**2, generator=generator) * 0.1
    amounts = torch.randn(1, rank, rows // STRIDE, cols // STRIDE, generator=generator)
    blocks = torch.einsum("brhw,rk->bkhw", amounts, patterns_RK) + 0.2
    return torch.nn.functional.pixel_shuffle(blocks, STRIDE)


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_what_lies_in_the_span_comes_back_exactly(whitening) -> None:
    picture = in_span(rank=5)
    autoencoder = PatchAutoencoder(channels=5, refiner_width=8, refiner_blocks=1, whitening=whitening)
    kept = autoencoder.fit([picture])
    assert kept["variance_kept"] == pytest.approx(1, abs=1e-6)
    assert (autoencoder.decode(autoencoder.encode(picture)) - picture).abs().max() < 1e-5


def test_fit_is_the_best_linear_transform_and_says_how_good_it_is() -> None:
    picture = pictures(8)
    autoencoder = PatchAutoencoder(channels=6, refiner_width=8, refiner_blocks=1)
    kept = autoencoder.fit([picture[:3], picture[3:]])
    blocks_NK = torch.nn.functional.pixel_unshuffle(picture, STRIDE).permute(0, 2, 3, 1).reshape(-1, 192).double()
    centred = blocks_NK - blocks_NK.mean(0)
    # Eckart and Young 1936: the truncated decomposition is the best rank-6 approximation.
    best = torch.linalg.svdvals(centred)[6:].square().sum() / centred.numel()
    with torch.no_grad():
        error = (autoencoder.decode(autoencoder.encode(picture)) - picture).square().mean()
    assert float(error) == pytest.approx(float(best), rel=1e-3)
    assert kept["psnr_db"] == pytest.approx(float(10 * torch.log10(4 / error)), abs=0.05)


@pytest.mark.parametrize(("whitening", "power"), [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)])
def test_latents_have_unit_variance_on_average_and_coarse_ones_keep_more(whitening, power) -> None:
    picture = pictures(8)
    autoencoder = PatchAutoencoder(6, 8, 1, whitening)
    autoencoder.fit([picture])
    std_C = autoencoder.encode(picture).std((0, 2, 3))
    assert float(std_C.square().mean()) == pytest.approx(1, rel=0.02)
    plain = PatchAutoencoder(6, 8, 1, 0.0)
    plain.fit([picture])
    raw_C = plain.encode(picture).std((0, 2, 3))
    assert torch.allclose(std_C / std_C[0], (raw_C / raw_C[0]) ** power, rtol=0.02)


def test_the_same_data_give_the_same_transform() -> None:
    one, other = (PatchAutoencoder(6, 8, 1) for _ in range(2))
    one.fit([pictures(8)])
    other.fit([pictures(8)[:4], pictures(8)[4:]])
    assert torch.allclose(one.basis_CK, other.basis_CK, atol=1e-4)


@pytest.mark.parametrize(("width", "blocks"), [(8, 1), (16, 3), (4, 5)])
def test_halo_is_the_refiners_reach_and_small(width, blocks) -> None:
    autoencoder = awake(width=width, blocks=blocks)
    assert autoencoder.halo <= 48 and autoencoder.halo % STRIDE == 0
    autoencoder = autoencoder.double()
    z = torch.zeros(1, 8, 32, 2, dtype=torch.float64)
    far = z.clone()
    row = autoencoder.halo // STRIDE
    far[:, :, row + 8 :] = 3.0  # the first 8 latent rows must not see it
    near = z.clone()
    near[:, :, row + 7 :] = 3.0
    rows = slice(0, 8 * STRIDE)
    base, moved, touched = (autoencoder.decode(x)[:, :, rows] for x in (z, far, near))
    assert torch.equal(base, moved)
    assert not torch.equal(base, touched)


@torch.no_grad()
@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("spare", [(0, 0), (16, 16), (32, 8), (0, 32), (24, 0)])
def test_spare_rows_change_nothing_in_the_others(spare, restored) -> None:
    autoencoder = awake(blocks=3).with_refiner(8, 3, True)
    z = torch.randn(1, 8, 12, 3, generator=torch.Generator().manual_seed(3))
    whole, decoded = autoencoder.decode(z, restored), autoencoder.decode(z, restored, spare)
    assert decoded.shape == whole.shape
    inner = slice(spare[0], 96 - spare[1])
    assert torch.allclose(decoded[:, :, inner], whole[:, :, inner], atol=1e-4)
    linear = autoencoder.decode_linear(z)
    assert (whole - linear).abs().amax(3).min() > 0.1
    assert torch.equal(decoded[:, :, : spare[0]], linear[:, :, : spare[0]])


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, LEVEL)])
def test_decoding_a_region_equals_decoding_the_whole(dtype, allowed, blocks) -> None:
    autoencoder = awake(blocks=blocks)
    z_CHW = torch.randn(8, 24, 5, generator=torch.Generator().manual_seed(2))
    autoencoder.refiner.to(dtype)
    with torch.no_grad():
        whole = autoencoder.decode(z_CHW[None])[0]
        linear = autoencoder.decode_linear(z_CHW[None])[0]
        assert (whole - linear).abs().mean() > 2 * LEVEL
        for top, bottom in [(0, 24), (0, 3), (21, 24), (10, 11), (9, 15), (0, 1), (4, 20)]:
            region = decode_region(autoencoder, z_CHW, top, bottom)
            assert region.shape == (3, 8 * (bottom - top), 40)
            assert (region - whole[:, 8 * top : 8 * bottom]).abs().max() <= allowed, (top, bottom)


def test_low_precision_touches_the_correction_only() -> None:
    autoencoder = awake()
    z = autoencoder.encode(pictures(1))
    for parameter in autoencoder.refiner.exit.parameters():
        torch.nn.init.zeros_(parameter)
    autoencoder.refiner.to(torch.bfloat16)
    assert torch.equal(autoencoder.decode(z), autoencoder.decode_linear(z))


def test_an_untrained_refiner_changes_nothing() -> None:
    autoencoder = PatchAutoencoder(8, 8, 2)
    autoencoder.fit([pictures()])
    z = autoencoder.encode(pictures(1))
    assert torch.equal(autoencoder.decode(z), autoencoder.decode_linear(z))
    assert all(p.requires_grad for p in Refiner(8, 1).parameters())
    assert not any(p.requires_grad for n, p in autoencoder.named_parameters() if not n.startswith("refiner."))


@pytest.mark.parametrize("kind", ["own", "flux"])
@pytest.mark.parametrize("shape", [(1, 3, 60, 64), (1, 3, 64, 12), (1, 4, 64, 64), (3, 64, 64)])
def test_other_sides_than_multiples_of_8_are_refused(request, kind, shape) -> None:
    folder = request.getfixturevalue("tiny_bundle" if kind == "own" else "tiny_flux_bundle")
    autoencoder = open_bundle(str(folder)).open_autoencoder(CPU, torch.float32)
    with pytest.raises(ValueError, match="8H, 8W"):
        autoencoder.encode(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flux_autoencoder_keeps_the_contract(tiny_flux_bundle, dtype) -> None:
    autoencoder = open_bundle(str(tiny_flux_bundle)).open_autoencoder(CPU, dtype)
    assert isinstance(autoencoder, FluxAutoencoder)
    assert autoencoder.channels == 8 and not autoencoder.exact and autoencoder.halo % STRIDE == 0
    with torch.no_grad():
        z = autoencoder.encode(pictures(2, 32, 48))
        rgb = autoencoder.decode(z)
        assert z.shape == (2, 8, 4, 6) and rgb.shape == (2, 3, 32, 48)
        assert z.dtype == rgb.dtype == torch.float32
        assert torch.equal(z, autoencoder.encode(pictures(2, 32, 48)))  # the mode: no draw
        assert decode_region(autoencoder, z[0], 1, 3).shape == (3, 16, 48)


def test_flux_latents_are_shifted_and_scaled_as_diffusers_pipeline_does(tiny_flux_bundle) -> None:
    autoencoder = open_bundle(str(tiny_flux_bundle)).open_autoencoder(CPU, torch.float32)
    assert isinstance(autoencoder, FluxAutoencoder)
    vae, picture = autoencoder.vae, pictures(1, 32, 32)
    with torch.no_grad():
        mode = vae.encode(picture).latent_dist.mode()  # type: ignore[union-attr]
        z = autoencoder.encode(picture)
        assert torch.allclose(z, (mode - 0.1159) * 0.3611, atol=1e-6)
        assert torch.allclose(autoencoder.decode(z), vae.decode(mode).sample, atol=1e-4)  # type: ignore[union-attr]


@pytest.mark.parametrize(("width", "blocks"), [(8, 1), (8, 2), (12, 1), (24, 5)])
def test_a_grown_refiner_starts_as_the_one_it_grew_from_and_can_learn_with_all_it_has(width, blocks) -> None:
    old = awake(width=8, blocks=1)
    grown = old.with_refiner(width, blocks)
    z = old.encode(pictures(1, 32, 48))
    # Wider kernels are added up in another order.
    assert torch.allclose(grown.decode(z), old.decode(z), atol=1e-5)
    assert (grown.config["refiner_width"], grown.config["refiner_blocks"]) == (width, blocks)
    assert grown.refiner.reach == 4 * (2 + 2 * blocks)
    optimizer = torch.optim.SGD(grown.refiner.parameters(), lr=1e-2)
    for _ in range(3):  # what is not listened to at first has no gradient yet
        optimizer.zero_grad()
        grown.decode(z).square().mean().backward()
        optimizer.step()
    assert all(bool(p.grad.any()) for p in grown.refiner.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in grown.refiner.parameters())


def with_two_manners(width: int = 8, blocks: int = 2) -> PatchAutoencoder:
    """`awake`, with a second manner that differs in all it has."""
    made = awake(width=width, blocks=blocks).with_refiner(width, blocks, restored=True)
    manner = made.refiner.restored
    assert manner is not None and made.config["refiner_restored"]
    with torch.no_grad():
        for parameter in manner.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    return made


def test_the_second_manner_starts_as_the_first_and_learns_beside_it() -> None:
    old = awake()
    made = old.with_refiner(8, 1, restored=True)
    z = old.encode(pictures(1, 32, 48))
    assert torch.equal(old.decode(z), old.decode(z, restored=True)), "without one there is no difference"
    for restored in (False, True):
        assert torch.allclose(made.decode(z, restored), old.decode(z), atol=1e-6)
    made.decode(z, restored=True).square().mean().backward()
    grads = {name: p.grad for name, p in made.refiner.named_parameters()}
    reached = {name for name, grad in grads.items() if grad is not None and bool(grad.any())}
    assert reached == grads.keys() - {"exit.weight", "exit.bias"}


def test_the_second_manner_is_a_gain_and_a_shift_after_each_convolution() -> None:
    made = with_two_manners()
    refiner, manner = made.refiner, made.refiner.restored
    assert manner is not None
    gain_LC, shift_LC = manner.gain_LC, manner.shift_LC
    x = torch.nn.functional.pixel_unshuffle(pictures(1, 32, 48), 4)

    def conv(layer: int, module: torch.nn.Module, inside: torch.Tensor) -> torch.Tensor:
        return module(inside) * gain_LC[layer][:, None, None] + shift_LC[layer][:, None, None]

    with torch.no_grad():
        x = conv(0, refiner.entry, x)
        for number, pair in enumerate(refiner.blocks):
            first, second = pair.children()
            silu = torch.nn.functional.silu
            x = x + conv(2 * number + 2, second, silu(conv(2 * number + 1, first, silu(x))))
        expected = torch.nn.functional.pixel_shuffle(manner.exit(torch.nn.functional.silu(x)), 4)
        seen = refiner(pictures(1, 32, 48), restored=True)
        assert torch.allclose(seen, expected, atol=1e-4)
        assert not torch.allclose(seen, refiner(pictures(1, 32, 48)), atol=1e-2)


def test_the_second_manner_survives_growth_and_is_exact_by_regions() -> None:
    old = with_two_manners(blocks=1)
    grown = old.with_refiner(12, 2)
    z = old.encode(pictures(1, 96, 48))
    with torch.no_grad():
        assert torch.allclose(grown.decode(z, restored=True), old.decode(z, restored=True), atol=1e-4)
        whole = old.decode(z, restored=True)[0]
        region = decode_region(old, z[0], 4, 8, restored=True)
        assert torch.allclose(region, whole[:, 32:64], atol=1e-5)


def test_a_refiner_does_not_shrink() -> None:
    with pytest.raises(ValueError, match="8 x 1 can't shrink to 4 x 1"):
        Refiner(8, 1).grown(4, 1)
