"""Losses against values computed by hand, and LPIPS against its definition."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dreamsr_cli import losses
from dreamsr_cli.errors import UsageError, WeightsError
from dreamsr_cli.models.perceptual import BACKBONES, Lpips, load_perceptual, squeezenet

CHANNELS = (64, 128, 256, 384, 384, 512, 512)


def full(value: float, *shape: int) -> torch.Tensor:
    return torch.full(shape, value)


def gap(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A perceptual distance simple enough to compute by hand: the mean absolute difference."""
    return (x - target).abs().mean((1, 2, 3))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A weights folder of the documented layout, with drawn values."""
    torch.manual_seed(3)
    (tmp_path / "squeezenet").mkdir()
    (tmp_path / "lpips" / "v0.1").mkdir(parents=True)
    state = {f"features.{key}": value for key, value in squeezenet().state_dict().items()}
    torch.save(state, tmp_path / "squeezenet" / "net.pth")
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(CHANNELS)}
    torch.save(heads, tmp_path / "lpips" / "v0.1" / "squeeze.pth")
    return tmp_path


def loaded(folder: Path) -> Lpips:
    perceptual = load_perceptual("lpips-squeeze", folder)
    assert isinstance(perceptual, Lpips)
    return perceptual


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
    assert terms == pytest.approx({"removal_latent": 0.09, "removal_pixel": 0.16, "removal_perceptual": 0.4})
    loss, _ = losses.removal_loss(
        z_dr, z0, x, y, gap, latent_weight=0.5, pixel_weight=3.0, perceptual_weight=0.0, kind="mse"
    )
    assert loss.item() == pytest.approx(0.5 * 0.09 + 3 * 0.16)
    loss, terms = losses.removal_loss(z_dr, z0, x, y, None)
    assert loss.item() == pytest.approx(0.25) and "removal_perceptual" not in terms


def test_lpips_is_its_definition(weights: Path) -> None:
    """One picture at a time, functionally, from the files: unit-length features, squared gaps, heads, spatial mean."""
    state = torch.load(weights / "squeezenet" / "net.pth", weights_only=True)
    heads = list(torch.load(weights / "lpips" / "v0.1" / "squeeze.pth", weights_only=True).values())

    def conv(x: torch.Tensor, name: str, **options: int) -> torch.Tensor:
        return F.relu(F.conv2d(x, state[f"features.{name}.weight"], state[f"features.{name}.bias"], **options))

    def features(rgb01: torch.Tensor) -> list[torch.Tensor]:
        blue_first = torch.stack([rgb01[2] * 255 - 103.939, rgb01[1] * 255 - 116.779, rgb01[0] * 255 - 123.68])[None]
        x = conv(blue_first, "0", stride=2)
        found = [x]
        for layer in range(3, 13):
            if layer in (3, 6, 9):
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
            if layer in (5, 8):
                continue
            x = conv(x, f"{layer}.squeeze")
            x = torch.cat([conv(x, f"{layer}.expand1x1"), conv(x, f"{layer}.expand3x3", padding=1)], 1)
            if layer in (4, 7, 9, 10, 11, 12):
                found.append(x)
        return [f / f.norm(dim=1, keepdim=True) for f in found]

    torch.manual_seed(0)
    a, b = torch.rand(2, 3, 50, 64), torch.rand(2, 3, 50, 64)
    expected = []
    for one, other in zip(a, b, strict=True):
        layers = zip(features(one), features(other), heads, strict=True)
        expected.append(sum(float(((x - y).square() * h).sum(1).mean()) for x, y, h in layers))
    perceptual = loaded(weights)
    assert perceptual(a * 2 - 1, b * 2 - 1).tolist() == pytest.approx(expected, rel=1e-4)
    assert perceptual(a, a.clone()).tolist() == [0, 0]


def test_lpips_gradient_reaches_the_first_picture_only(weights: Path) -> None:
    perceptual = loaded(weights)
    x, y = torch.zeros(1, 3, 32, 32, requires_grad=True), torch.rand(1, 3, 32, 32, requires_grad=True)
    perceptual(x, y).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and x.grad.abs().max() > 0
    assert y.grad is None
    assert not any(p.requires_grad for p in perceptual.parameters())
    with pytest.raises(ValueError, match="LPIPS"):
        perceptual(torch.zeros(1, 3, 16, 64), torch.zeros(1, 3, 16, 64))


def test_perceptual_weights_that_cannot_be_used(weights: Path, tmp_path: Path) -> None:
    assert load_perceptual("none", None) is None
    with pytest.raises(UsageError, match="--perceptual-weights"):
        load_perceptual("lpips-squeeze", None)
    with pytest.raises(UsageError, match="lpips-mystery"):
        load_perceptual("lpips-mystery", weights)
    heads = weights / BACKBONES["lpips-squeeze"].heads
    torch.save({"lin0": torch.rand(1, 64, 1, 1)}, heads)
    with pytest.raises(WeightsError, match="1 heads"):
        load_perceptual("lpips-squeeze", weights)
    heads.write_bytes(b"not a file of tensors")
    with pytest.raises(WeightsError, match="not a file of tensors"):
        load_perceptual("lpips-squeeze", weights)
    heads.unlink()
    with pytest.raises(WeightsError, match="no lpips/v0.1/squeeze.pth"):
        load_perceptual("lpips-squeeze", weights)
    torch.save({"features.0.weight": torch.zeros(1)}, weights / "squeezenet" / "net.pth")
    torch.save({}, heads)
    with pytest.raises(WeightsError, match="does not hold the network"):
        load_perceptual("lpips-squeeze", weights)
