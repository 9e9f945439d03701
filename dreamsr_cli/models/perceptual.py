"""LPIPS (Zhang et al. 2018): distance of two pictures in the features of a frozen network, for eq. 6 and 7.

The backbone is re-declared here (no torchvision) and its weights come from a folder of the user's; none ship with the
package. With the SqueezeNet of this project the figure is called `lpips-squeeze*`: it isn't comparable with published
LPIPS.

Axes: B batch, C channels, P Q pixel rows and columns.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from dreamsr_cli.errors import UsageError, WeightsError

Perceptual = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(B, 3, P, Q) twice, on [-1, 1] -> (B,) distances; gradients flow to the first argument only."""

SMALLEST_SIDE = 32
"""Below this the last features of a backbone would be empty."""


@dataclass(frozen=True)
class Backbone:
    """A feature network LPIPS has heads for, and where its files lie under the weights folder."""

    build: Callable[[], nn.Sequential]
    """Makes the network whose state dict the file holds under `features.`."""
    taps: tuple[int, ...]
    """Layers whose output is compared, one head each."""
    weights: str
    """Pattern of the network's file."""
    heads: str
    """File of the linear heads."""
    mean: tuple[float, float, float]
    """Subtracted from the 0-255 channels, in the order the network reads them."""
    bgr: bool
    """Whether the network reads blue first."""


class Fire(nn.Module):
    """SqueezeNet's block: down to `narrow` channels, then up to 2 * `wide` by 1x1 and 3x3 convolutions side by side."""

    def __init__(self, channels: int, narrow: int, wide: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, narrow, 1)
        self.expand1x1 = nn.Conv2d(narrow, wide, 1)
        self.expand3x3 = nn.Conv2d(narrow, wide, 3, padding=1)

    def forward(self, x_BCPQ: torch.Tensor) -> torch.Tensor:
        x_BCPQ = F.relu(self.squeeze(x_BCPQ))
        return F.relu(torch.cat([self.expand1x1(x_BCPQ), self.expand3x3(x_BCPQ)], dim=1))


def squeezenet() -> nn.Sequential:
    """Feature layers of SqueezeNet 1.1 (Iandola et al. 2016), with the state dict keys everybody uses."""

    def pool() -> nn.MaxPool2d:
        return nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)

    return nn.Sequential(
        nn.Conv2d(3, 64, kernel_size=3, stride=2),
        nn.ReLU(),
        pool(),
        Fire(64, 16, 64),
        Fire(128, 16, 64),
        pool(),
        Fire(128, 32, 128),
        Fire(256, 32, 128),
        pool(),
        Fire(256, 48, 192),
        Fire(384, 48, 192),
        Fire(384, 64, 256),
        Fire(512, 64, 256),
    )


BACKBONES = {
    "lpips-squeeze": Backbone(
        build=squeezenet,
        taps=(1, 4, 7, 9, 10, 11, 12),
        weights="squeezenet/*.pth",
        heads="lpips/v0.1/squeeze.pth",
        mean=(103.939, 116.779, 123.68),
        bgr=True,
    ),
}
"""Known distances by name."""


class Lpips(nn.Module):
    """The distance itself, with frozen weights."""

    mean: torch.Tensor

    def __init__(self, backbone: Backbone, network: nn.Sequential, heads: list[torch.Tensor]) -> None:
        super().__init__()
        self.backbone = backbone
        self.network = network.eval().requires_grad_(False)
        for index, head in enumerate(heads):
            self.register_buffer(f"head_{index}", head.reshape(1, -1, 1, 1).float(), persistent=False)
        self.register_buffer("mean", torch.tensor(backbone.mean).reshape(1, 3, 1, 1), persistent=False)

    def features(self, x_BCPQ: torch.Tensor) -> list[torch.Tensor]:
        """Unit-length features at each tap of (B, 3, P, Q) pictures on [-1, 1]."""
        x_BCPQ = (x_BCPQ.flip(1) if self.backbone.bgr else x_BCPQ) * 127.5 + 127.5 - self.mean
        found = []
        for index, layer in enumerate(self.network):
            x_BCPQ = layer(x_BCPQ)
            if index in self.backbone.taps:
                # the small term inside the root keeps the gradient finite where every channel is zero
                found.append(x_BCPQ / (x_BCPQ.square().sum(1, keepdim=True) + 1e-20).sqrt())
        return found

    def forward(self, x_BCPQ: torch.Tensor, target_BCPQ: torch.Tensor) -> torch.Tensor:
        """(B,) distances, 0 for equal pictures; ValueError for unequal shapes or sides below `SMALLEST_SIDE`."""
        if x_BCPQ.shape != target_BCPQ.shape or min(x_BCPQ.shape[2:]) < SMALLEST_SIDE:
            raise ValueError(f"LPIPS of {tuple(x_BCPQ.shape)} and {tuple(target_BCPQ.shape)}")
        with torch.no_grad():
            wanted = self.features(target_BCPQ)
        distance_B = x_BCPQ.new_zeros(x_BCPQ.shape[0])
        for index, (mine, other) in enumerate(zip(self.features(x_BCPQ), wanted, strict=True)):
            head = self.get_buffer(f"head_{index}")
            distance_B = distance_B + ((mine - other).square() * head).sum(1).mean((1, 2))
        return distance_B


def load_perceptual(kind: str, folder: Path | None) -> Perceptual | None:
    """The distance named `kind`: a key of `BACKBONES`, or None for "none", which needs no folder.

    `folder` holds `squeezenet/*.pth` and `lpips/v0.1/squeeze.pth`. UsageError for an unknown kind or no folder;
    WeightsError for files that are missing, hold anything but tensors, or don't fit the network.
    """
    if kind == "none":
        return None
    if kind not in BACKBONES:
        raise UsageError(f"unknown perceptual distance {kind!r}", f"choose one of: none, {', '.join(BACKBONES)}")
    if folder is None:
        raise UsageError(f"{kind} needs its weights", "give their folder: --perceptual-weights DIR")
    backbone = BACKBONES[kind]
    network = backbone.build()
    state = _tensors(folder, backbone.weights)
    heads = list(_tensors(folder, backbone.heads).values())
    try:
        network.load_state_dict({key.removeprefix("features."): value for key, value in state.items()})
    except RuntimeError as error:
        raise WeightsError(
            f"{folder}: {backbone.weights} does not hold the network of {kind}", "check --perceptual-weights"
        ) from error
    if len(heads) != len(backbone.taps):
        raise WeightsError(
            f"{folder}: {backbone.heads} has {len(heads)} heads instead of {len(backbone.taps)}",
            "check --perceptual-weights",
        )
    return Lpips(backbone, network, heads)


def _tensors(folder: Path, pattern: str) -> dict[str, torch.Tensor]:
    found = sorted(folder.glob(pattern))
    if not found:
        raise WeightsError(f"{folder}: no {pattern}", "check --perceptual-weights, or train without a perceptual loss")
    try:
        return torch.load(found[0], map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{found[0]}: not a file of tensors", "fetch it again") from error
