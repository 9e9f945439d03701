"""LPIPS (Zhang et al. 2018): distance of two pictures in the features of a frozen network, for eq. 6 and 7.

The backbones are re-declared here (no torchvision); their weights come from a folder of the user's, pinned by
sha256, and none ship with the package. With the SqueezeNet of this project the figure is called `lpips-squeeze*`:
it isn't comparable with published LPIPS.

Axes: B batch, C channels, P Q pixel rows and columns.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
import torch.nn.functional as F
from torch import nn

from dreamsr_cli.errors import UsageError, WeightsError
from dreamsr_cli.weights import file_sha256, weights_folder

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
    mean: tuple[float, ...]
    """Subtracted from the 0-255 channels, in the order the network reads them."""
    bgr: bool
    """Whether the network reads blue first."""
    spread: tuple[float, ...] = (1.0, 1.0, 1.0)
    """Divides what is left."""
    made_of: str = ""
    """For people: network and heads."""


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


def alexnet() -> nn.Sequential:
    """Feature layers of AlexNet (Krizhevsky 2014), with the state dict keys everybody uses."""
    layers: list[nn.Module] = []
    channels = 3
    for stage, (width, kernel, stride, padding) in enumerate(
        ((64, 11, 4, 2), (192, 5, 1, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))
    ):
        if stage in (1, 2):
            layers.append(nn.MaxPool2d(kernel_size=3, stride=2))
        layers += [nn.Conv2d(channels, width, kernel, stride, padding), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers)


def vgg16() -> nn.Sequential:
    """Feature layers of VGG16 (Simonyan and Zisserman 2014) up to the last activation, with the usual keys."""
    layers: list[nn.Module] = []
    channels = 3
    for stage, (width, convolutions) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        if stage:
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers)


_RGB_MEAN = tuple(127.5 + 127.5 * shift for shift in (-0.030, -0.088, -0.188))
_RGB_SPREAD = tuple(127.5 * scale for scale in (0.458, 0.448, 0.450))
"""LPIPS' own normalisation, (x - shift) / scale of pictures on [-1, 1], written for 0-255."""

BACKBONES = {
    "lpips-vgg": Backbone(
        build=vgg16,
        taps=(3, 8, 15, 22, 29),
        weights="vgg16/*.pth",
        heads="lpips/v0.1/vgg.pth",
        mean=_RGB_MEAN,
        bgr=False,
        spread=_RGB_SPREAD,
        made_of="VGG16 of torchvision (IMAGENET1K_V1), heads v0.1",
    ),
    "lpips-alex": Backbone(
        build=alexnet,
        taps=(1, 4, 7, 9, 11),
        weights="alexnet/*.pth",
        heads="lpips/v0.1/alex.pth",
        mean=_RGB_MEAN,
        bgr=False,
        spread=_RGB_SPREAD,
        made_of="AlexNet of torchvision (IMAGENET1K_V1), heads v0.1",
    ),
    "lpips-squeeze": Backbone(
        build=squeezenet,
        taps=(1, 4, 7, 9, 10, 11, 12),
        weights="squeezenet/*.pth",
        heads="lpips/v0.1/squeeze.pth",
        mean=(103.939, 116.779, 123.68),
        bgr=True,
        made_of="lpips-squeeze*: SqueezeNet 1.1 of keras-squeezenet, heads v0.1; not comparable with published LPIPS",
    ),
}
"""Known distances by name."""
PINS = {
    "alexnet/alexnet-owt-7be5be79.pth": "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
    "lpips/v0.1/alex.pth": "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
    "lpips/v0.1/squeeze.pth": "4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76",
    "lpips/v0.1/vgg.pth": "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    "squeezenet/squeezenet1_1_features_from_keras.pth": (
        "a56d8e1ea91ff855cde5928c4e1cc0179c5f5c5795266de1284aee9d9be17a86"
    ),
    "vgg16/vgg16-397923af.pth": "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
}
"""sha256 of the files that are opened, by path below the weights folder; each has two independent sources, or (all of
lpips/ and squeezenet/) was hashed by this project."""
LOCK_ENTRY = "lpips"
"""Folder of fetched weights that is looked into where none is named."""


class Lpips(nn.Module):
    """The distance itself, with frozen weights."""

    mean: torch.Tensor
    spread: torch.Tensor

    def __init__(self, backbone: Backbone, network: nn.Sequential, heads: list[torch.Tensor]) -> None:
        super().__init__()
        self.backbone = backbone
        self.network = network.eval().requires_grad_(False)
        for index, head in enumerate(heads):
            self.register_buffer(f"head_{index}", head.reshape(1, -1, 1, 1).float(), persistent=False)
        self.register_buffer("mean", torch.tensor(backbone.mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("spread", torch.tensor(backbone.spread).reshape(1, 3, 1, 1), persistent=False)

    def features(self, x_BCPQ: torch.Tensor) -> list[torch.Tensor]:
        """Unit-length features at each tap of (B, 3, P, Q) pictures on [-1, 1]."""
        x_BCPQ = (x_BCPQ.flip(1) if self.backbone.bgr else x_BCPQ) * 127.5 + 127.5
        # A CPU takes 0.6 of the time for channels last [measured].
        x_BCPQ = ((x_BCPQ - self.mean) / self.spread).contiguous(memory_format=torch.channels_last)
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


def on_window(perceptual: Perceptual, shift: int, top: int, left: int) -> Perceptual:
    """The distance of windows of two pictures: `shift` pixels smaller than these, `top` and `left` pixels inside, both
    at most `shift`."""

    def distance(x_BCPQ: torch.Tensor, target_BCPQ: torch.Tensor) -> torch.Tensor:
        return perceptual(*(window(pictures, shift, top, left) for pictures in (x_BCPQ, target_BCPQ)))

    return distance


def window(rgb_BCPQ: torch.Tensor, shift: int, top: int, left: int) -> torch.Tensor:
    """Windows of pictures (B, C, P, Q): (B, C, P - shift, Q - shift), `top` and `left` pixels inside, both at most
    `shift`. A view."""
    rows, columns = (side - shift for side in rgb_BCPQ.shape[2:])
    return rgb_BCPQ[..., top : top + rows, left : left + columns]


def load_perceptual(kind: str, folder: Path | None) -> Perceptual | None:
    """The distance named `kind`: a key of `BACKBONES`, or None for "none", which needs no weights.

    `folder` holds the network's and the heads' files (`Backbone.weights`, `.heads`); None: the entry "lpips" in the
    folder of fetched weights. Files are opened only if their sha256 is in `PINS`, and as tensors only.
    UsageError for an unknown kind or no folder; WeightsError for files that are missing, unknown, altered, or don't
    fit the network: a distance that was asked for is never left out.
    """
    if kind == "none":
        return None
    backbone = _backbone(kind)
    where = weights_folder(LOCK_ENTRY) if folder is None else folder
    if not where.is_dir():
        what = f"there is no folder {where}" if folder else f"{kind} needs its weights, and {where} isn't there"
        raise UsageError(what, f"{_how_to_get(backbone)} and type --perceptual-weights DIR, or --perceptual none")
    state = _tensors(where, backbone.weights, backbone)
    heads = list(_tensors(where, backbone.heads, backbone).values())
    network = backbone.build()
    features = {k.removeprefix("features."): v for k, v in state.items() if not k.startswith("classifier.")}
    try:
        network.load_state_dict(features)
    except RuntimeError as error:
        raise WeightsError(
            f"{where}: {backbone.weights} does not hold the network of {kind}", "check --perceptual-weights"
        ) from error
    if len(heads) != len(backbone.taps):
        raise WeightsError(
            f"{where}: {backbone.heads} has {len(heads)} heads instead of {len(backbone.taps)}",
            "check --perceptual-weights",
        )
    return Lpips(backbone, network, heads)


def describe(kind: str) -> str:
    """What a model card says about the distance a run was trained with. UsageError for an unknown kind."""
    if kind == "none":
        return "no perceptual loss"
    backbone = _backbone(kind)
    sums = ", ".join(f"{PurePosixPath(path).name} sha256 {PINS[path][:12]}…" for path in _files_of(backbone))
    return f"LPIPS ({kind}): {backbone.made_of} ({sums})"


def _backbone(kind: str) -> Backbone:
    if kind not in BACKBONES:
        raise UsageError(f"unknown perceptual distance {kind!r}", f"choose one of: none, {', '.join(BACKBONES)}")
    return BACKBONES[kind]


def _files_of(backbone: Backbone) -> list[str]:
    """The pinned paths of network and heads."""
    return [
        path for path in PINS for pattern in (backbone.weights, backbone.heads) if PurePosixPath(path).match(pattern)
    ]


def _how_to_get(backbone: Backbone) -> str:
    files = " and ".join(_files_of(backbone))
    if backbone is not BACKBONES["lpips-squeeze"]:  # its network was made from another library's file
        return f"dreamsr fetch-weights {LOCK_ENTRY}; or put {files} into a folder DIR"
    return f"put {files} into a folder DIR (docs/training.md says where to get them)"


def _tensors(folder: Path, pattern: str, backbone: Backbone) -> dict[str, torch.Tensor]:
    found = sorted(folder.glob(pattern))
    if not found:
        raise WeightsError(f"{folder}: no {pattern}", f"{_how_to_get(backbone)}, or train with --perceptual none")
    known = {sha256 for path, sha256 in PINS.items() if PurePosixPath(path).match(pattern)}
    path = next((path for path in found if file_sha256(path) in known), None)
    if path is None:
        raise WeightsError(
            f"{found[0]}: not a file that is known: sha256 {file_sha256(found[0])[:12]}…",
            f"{_how_to_get(backbone)}, or train with --perceptual none",
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, LookupError, RuntimeError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{path}: not a file of tensors", "fetch it again") from error
