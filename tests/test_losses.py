"""Losses against values computed by hand, and the sign of eq. 5 against where sampling goes."""

from __future__ import annotations

import math

import pytest
import torch

from dreamsr_cli import flow, losses


def full(value: float, *shape: int) -> torch.Tensor:
    return torch.full(shape, value)


def gap(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A perceptual distance simple enough to compute by hand: the mean absolute difference."""
    return (x - target).abs().mean((1, 2, 3))


def test_velocity_loss_by_hand() -> None:
    v, z0, z1 = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[0.5, 1.0]]]]), torch.tensor([[[[0.0, 4.0]]]])
    assert losses.velocity_loss(v, z0, z1).item() == pytest.approx(((1.0 + 0.5) ** 2 + (2.0 - 3.0) ** 2) / 2)
    assert losses.velocity_loss(z1 - z0, z0, z1).item() == 0


def test_pixel_loss_by_hand() -> None:
    x, y = torch.tensor([0.5, -0.5]).reshape(2, 1, 1, 1).expand(2, 3, 4, 4), full(0.1, 2, 3, 4, 4)
    assert losses.pixel_loss(x, y, None).item() == pytest.approx((0.16 + 0.36) / 2)
    assert losses.pixel_loss(x, y, gap, 2.0).item() == pytest.approx(0.26 + 2 * 0.5)
    rounded = sum(math.sqrt(d * d + 1e-6) - 1e-3 for d in (0.4, 0.6)) / 2
    assert losses.pixel_loss(x, y, gap, 0.5, kind="charbonnier").item() == pytest.approx(rounded + 0.25, rel=1e-5)
    with pytest.raises(ValueError, match="huber"):
        losses.pixel_loss(x, y, None, kind="huber")


def test_removal_loss_by_hand() -> None:
    z_dr, z0 = full(0.5, 2, 4, 3, 3), full(0.2, 2, 4, 3, 3)
    x, y = full(0.4, 2, 3, 8, 8), full(0.0, 2, 3, 8, 8)
    loss, terms = losses.removal_loss(z_dr, z0, x, y, gap)
    assert loss.item() == pytest.approx(0.09 + 0.16 + 2 * 0.4)
    found = {name: value.item() for name, value in terms.items()}
    assert found == pytest.approx({"removal_latent": 0.09, "removal_pixel": 0.16, "removal_perceptual": 0.4})
    loss, _ = losses.removal_loss(
        z_dr, z0, x, y, gap, latent_weight=0.5, pixel_weight=3.0, perceptual_weight=0.0, kind="mse"
    )
    assert loss.item() == pytest.approx(0.5 * 0.09 + 3 * 0.16)
    loss, terms = losses.removal_loss(z_dr, z0, x, y, None)
    assert loss.item() == pytest.approx(0.25) and "removal_perceptual" not in terms


def test_the_gan_term_of_the_removal_loss_by_hand() -> None:
    z, x = full(0.0, 1, 4, 2, 2), full(0.0, 1, 3, 16, 16)
    logits = torch.tensor([[[[1.0, -3.0]]]])
    loss, terms = losses.removal_loss(z, z, x, x, None, fake_logits=logits)
    assert terms["removal_gan"].item() == 1.0 and loss.item() == pytest.approx(0.5 * 1.0)
    loss, _ = losses.removal_loss(z, z, x, x, None, fake_logits=logits, gan_weight=2.0)
    assert loss.item() == pytest.approx(2.0)
    assert "removal_gan" not in losses.removal_loss(z, z, x, x, None, fake_logits=logits, gan_weight=0.0)[1]


def test_hinge_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.25])
    assert losses.hinge_discriminator(real, fake).item() == pytest.approx((0 + 0.5) / 2 + (0 + 1.25) / 2)
    assert losses.hinge_generator(fake).item() == pytest.approx(0.875)
    assert losses.hinge_discriminator(torch.zeros(3), torch.zeros(3)).item() == 2


def test_the_weight_of_small_times_by_hand() -> None:
    """Below t_floor a sample weighs (t / t_floor)^2."""
    v, z0, z1 = full(1.0, 2, 1, 1, 1), full(0.0, 2, 1, 1, 1), full(3.0, 2, 1, 1, 1)
    t = torch.tensor([0.1, 0.8])
    assert losses.velocity_loss(v, z0, z1, t, 0.2).item() == pytest.approx((4 * 0.25 + 4) / 2)


def test_eq_5_points_the_way_that_sampling_goes() -> None:
    """The network that eq. 5 asks for, integrated from noise to t = 0 as sampling does, arrives at the good picture;
    one trained towards the opposite sign goes away from it."""
    torch.manual_seed(0)
    z0, z1 = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    learned = torch.zeros_like(z0, requires_grad=True)
    optimizer = torch.optim.SGD([learned], lr=learned.numel() / 4)
    for _ in range(60):
        optimizer.zero_grad()
        losses.velocity_loss(learned, z0, z1).backward()
        optimizer.step()
    v = learned.detach()
    t = 0.8
    arrived = flow.euler(flow.mix(z0, z1, t), lambda z, _: v, flow.timesteps(t, 16))
    assert (arrived - z0).abs().max() < 1e-4
    away = flow.euler(flow.mix(z0, z1, t), lambda z, _: -v, flow.timesteps(t, 16))
    assert (away - z0).abs().max() > 1
    assert (flow.predict_clean(flow.mix(z0, z1, t), v, t) - z0).abs().max() < 1e-4  # eq. 6's prediction too


def test_a_pattern_that_repeats_is_told_from_texture() -> None:
    texture = torch.randn(4, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 0.1
    weave = torch.zeros(4, 3, 128, 128)
    weave[..., ::4, :] = 0.01
    tint = torch.full((4, 3, 128, 128), 0.5)
    assert float(losses.lattice_strength(tint)) < 1e-3
    assert float(losses.lattice_strength(texture)) < 2 * 0.1 / 16 * 1.1  # the mean of 256 draws, twice
    # A line in every fourth row; the five rows around a row hold one line or two.
    by_hand = math.sqrt(sum(x * x for x in (0.01 - 0.002, -0.002, -0.004, -0.002)) / 4)
    by_hand += math.sqrt(sum(x * x for x in (0.0075, -0.0025, -0.0025, -0.0025)) / 4)
    assert losses.lattice_strength(weave).item() == pytest.approx(by_hand, rel=0.05)
    both = losses.lattice_strength(texture + weave).item()
    assert both > 0.9 * by_hand
    # A mosaic: tokens whose middle is lighter than their border, too smooth for their surroundings to tell.
    ramp = torch.cos(torch.arange(128) * (2 * math.pi / 16)) * 0.01
    mosaic = (ramp[:, None] + ramp).expand(4, 3, 128, 128)
    assert losses.lattice_strength(mosaic).item() > 0.01
    weave.requires_grad_(True)
    losses.lattice_strength(weave).backward()
    assert (
        weave.grad is not None and bool(torch.isfinite(weave.grad).all()) and float(weave.grad[..., ::4, :].mean()) > 0
    )
    flat = torch.zeros(1, 3, 32, 32, requires_grad=True)
    losses.lattice_strength(flat).backward()
    assert flat.grad is not None and float(flat.grad.abs().max()) == 0
