"""LPIPS: each variant is its definition, from pinned files only, and is never left out silently."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dreamsr_cli.errors import UsageError, WeightsError
from dreamsr_cli.models import perceptual
from dreamsr_cli.models.perceptual import BACKBONES, PINS, Lpips, describe, load_perceptual
from dreamsr_cli.weights_lock import load_lock

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "weights"
FILES = {"lpips-vgg": "vgg16/net.pth", "lpips-alex": "alexnet/net.pth", "lpips-squeeze": "squeezenet/net.pth"}


def channels(network: nn.Sequential, taps: tuple[int, ...]) -> list[int]:
    x, found = torch.zeros(1, 3, 64, 64), []
    for index, layer in enumerate(network):
        x = layer(x)
        found += [x.shape[1]] if index in taps else []
    return found


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A weights folder of the documented layout with drawn values, as torchvision saves networks, all pinned."""
    torch.manual_seed(3)
    for kind, file in FILES.items():
        backbone = BACKBONES[kind]
        network = backbone.build()
        state = {f"features.{key}": value for key, value in network.state_dict().items()}
        state["classifier.1.weight"] = torch.zeros(2, 2)
        heads = {
            f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(channels(network, backbone.taps))
        }
        for path, tensors in ((file, state), (backbone.heads, heads)):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            torch.save(tensors, tmp_path / path)
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path / "cache"))
    pin(tmp_path, monkeypatch)
    return tmp_path


def pin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept the files as they are now."""
    sums = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*.pth")
    }
    monkeypatch.setattr(perceptual, "PINS", sums)


def loaded(kind: str, folder: Path) -> Lpips:
    found = load_perceptual(kind, folder)
    assert isinstance(found, Lpips)
    return found


@pytest.mark.parametrize(
    ("kind", "taps", "mean", "scale"),
    [
        ("lpips-vgg", (3, 8, 15, 22, 29), (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)),
        ("lpips-alex", (1, 4, 7, 9, 11), (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)),
    ],
)
def test_lpips_is_its_definition(
    kind: str, taps: tuple[int, ...], mean: tuple[float, ...], scale: tuple[float, ...], weights: Path
) -> None:
    """Functionally, layer by layer, from the files: (x - shift) / scale, unit features, squared gaps, heads."""
    state = torch.load(weights / FILES[kind], weights_only=True)
    heads = list(torch.load(weights / BACKBONES[kind].heads, weights_only=True).values())
    first = {"lpips-alex": (2, 4)}.get(kind, (1, 1))

    def features(x: torch.Tensor) -> list[torch.Tensor]:
        x = (x - torch.tensor(mean).reshape(1, 3, 1, 1)) / torch.tensor(scale).reshape(1, 3, 1, 1)
        found, index = [], 0
        while index <= taps[-1]:
            weight = state.get(f"features.{index}.weight")
            if weight is None:
                x = F.max_pool2d(x, 3 if kind == "lpips-alex" else 2, 2)
                index += 1
                continue
            padding, stride = first if index == 0 else (weight.shape[-1] // 2, 1)
            x = F.relu(F.conv2d(x, weight, state[f"features.{index}.bias"], padding=padding, stride=stride))
            found += [x] if index + 1 in taps else []
            index += 2
        return [f / f.norm(dim=1, keepdim=True).clamp(min=1e-10) for f in found]

    a, b = torch.rand(2, 3, 64, 80) * 2 - 1, torch.rand(2, 3, 64, 80) * 2 - 1
    with torch.no_grad():
        gaps = zip(features(a), features(b), heads, strict=True)
        expected = sum(((x - y).square() * h).sum(1).mean((1, 2)) for x, y, h in gaps)
    network = loaded(kind, weights)
    assert torch.allclose(network(a, b), torch.as_tensor(expected), rtol=1e-4)
    assert network(a, a.clone()).tolist() == [0, 0]


def test_squeeze_reads_blue_first_without_its_mean(weights: Path) -> None:
    state = torch.load(weights / FILES["lpips-squeeze"], weights_only=True)
    x = torch.rand(1, 3, 40, 40)
    bgr = torch.stack([x[0, 2] * 255 - 103.939, x[0, 1] * 255 - 116.779, x[0, 0] * 255 - 123.68])[None]
    first = F.relu(F.conv2d(bgr, state["features.0.weight"], state["features.0.bias"], stride=2))
    expected = first / first.norm(dim=1, keepdim=True).clamp(min=1e-10)
    assert torch.allclose(loaded("lpips-squeeze", weights).features(x * 2 - 1)[0], expected, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(BACKBONES))
def test_gradient_reaches_the_first_picture_only(kind: str, weights: Path) -> None:
    network = loaded(kind, weights)
    x, y = torch.zeros(1, 3, 64, 64, requires_grad=True), torch.rand(1, 3, 64, 64, requires_grad=True)
    network(x, y).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and x.grad.abs().max() > 0
    assert y.grad is None and not any(p.requires_grad for p in network.parameters())
    with pytest.raises(ValueError, match="LPIPS"):
        network(torch.zeros(1, 3, 16, 64), torch.zeros(1, 3, 16, 64))


def test_only_known_files_are_opened(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = weights / FILES["lpips-vgg"]
    good = net.read_bytes()
    net.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(WeightsError, match="not a file that is known"):
        load_perceptual("lpips-vgg", weights)
    net.write_bytes(b"tensors, surely")
    pin(weights, monkeypatch)
    with pytest.raises(WeightsError, match="not a file of tensors"):
        load_perceptual("lpips-vgg", weights)
    torch.save({"features.0.weight": torch.zeros(1)}, net)
    pin(weights, monkeypatch)
    with pytest.raises(WeightsError, match="does not hold the network"):
        load_perceptual("lpips-vgg", weights)
    heads = weights / BACKBONES["lpips-alex"].heads
    torch.save({"lin0": torch.rand(1, 64, 1, 1)}, heads)
    pin(weights, monkeypatch)
    with pytest.raises(WeightsError, match="1 heads"):
        load_perceptual("lpips-alex", weights)


def test_missing_weights_say_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DREAMSR_WEIGHTS_DIR", str(tmp_path / "none"))
    assert load_perceptual("none", None) is None
    with pytest.raises(UsageError, match="lpips-vgg needs its weights") as found:
        load_perceptual("lpips-vgg", None)
    assert "vgg16/vgg16-397923af.pth" in found.value.hint and "--perceptual-weights" in found.value.hint
    with pytest.raises(WeightsError, match=r"no vgg16/\*\.pth") as missing:
        load_perceptual("lpips-vgg", tmp_path)
    assert "--perceptual none" in missing.value.hint
    with pytest.raises(UsageError, match="lpips-mystery"):
        load_perceptual("lpips-mystery", tmp_path)


def test_the_model_card_names_network_and_files() -> None:
    assert "VGG16" in describe("lpips-vgg") and PINS["vgg16/vgg16-397923af.pth"][:12] in describe("lpips-vgg")
    assert "AlexNet" in describe("lpips-alex")
    assert "not comparable" in describe("lpips-squeeze") and describe("none") == "no perceptual loss"


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no perceptual weights at {SHARED}")
def test_the_real_squeeze_grows_with_blur_and_noise() -> None:
    network = loaded("lpips-squeeze", SHARED)
    torch.manual_seed(0)
    x = F.interpolate(torch.rand(1, 3, 12, 12), (96, 96), mode="bicubic").clamp(0, 1) * 2 - 1
    noise = torch.randn(x.shape)
    distances = [float(network(x + s * noise, x)) for s in (0.0, 0.05, 0.2)]
    assert distances[0] == 0 and distances[0] < distances[1] < distances[2]


def test_pins_are_those_of_weights_lock() -> None:
    locked = {row.path: row.sha256 for row in load_lock()["lpips"].files}
    pinned = {path: sha256 for path, sha256 in PINS.items() if not path.startswith("squeezenet/")}
    assert pinned and pinned == {path: locked.get(path) for path in pinned}
