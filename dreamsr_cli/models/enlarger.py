"""The enlarger: an undamaged photo four times as large, as sharp as its own pixels allow.

Where nothing but its size is wrong with a photo there is no damage to remove, and a small network that knows only
shrinking guesses its edges better than a large one that has to be ready for everything (docs/mini.md, row 22). A fair
JPEG is a damage so small and so uniform that the same holds for it, in a manner of its own (row 32). Ours is
the built-in autoencoder's refiner once more: it sees the photo enlarged by the antialiased cubic instead of a decoded
latent, and its kernels are changed by low-rank products, as a LoRA's are (Hu et al. 2021). So it begins with what the
refiner knows of photos, and weighs next to nothing.

Axes: B batch, P Q pixel rows and columns of the enlarged photo.
"""

from __future__ import annotations

import hashlib
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from dreamsr_cli.config import LOOKS
from dreamsr_cli.models.autoencoder import Refiner
from dreamsr_cli.models.fourfold import FACTOR, FourfoldRows

assert FACTOR == Refiner.FOLD, "the refiner folds as many pixels into channels as a photo's pixel becomes"
MANNERS = LOOKS[:2]
"""Looks of photos that it is for: clean and compressed."""


class Enlarger(ModelMixin, ConfigMixin):
    """For each convolution of a refiner but the last a change of its kernel of rank `rank`: `down`, and what each
    manner makes of it. Fits that one refiner alone (`refiner`: its `fingerprint`)."""

    @register_to_config
    def __init__(self, width: int = 96, blocks: int = 5, rank: int = 24, refiner: str = "") -> None:
        """`width` and `blocks` are the refiner's."""
        super().__init__()
        folded, inner = 3 * FACTOR**2, 1 + 2 * blocks
        inputs = [folded] + [width] * (inner - 1)
        self.down = nn.ParameterList(torch.randn(rank, 9 * n) / (9 * n) ** 0.5 for n in inputs)
        for looks in MANNERS:
            self.add_module(looks, EnlargerManner(inner, width, rank, folded))

    @classmethod
    @torch.no_grad()
    def of(cls, refiner: Refiner, rank: int) -> Enlarger:
        """An untrained one, which does what the refiner does to stage 1's results."""
        made = cls(refiner.width, len(refiner.blocks), rank, fingerprint(refiner))
        last = refiner.exit if refiner.restored is None else refiner.restored.exit
        for manner in map(made.manner, MANNERS):
            for own, (_, bias_C) in zip(manner.bias, refiner.restored_kernels(), strict=True):
                own.copy_(bias_C)
            manner.exit.load_state_dict(last.state_dict())
        return made

    @torch.no_grad()
    def refitted(self, old: Refiner, new: Refiner) -> Enlarger:
        """One for `new` whose kernels are as close to what this one makes of `old`, the refiner that it fits, as its
        rank allows: a truncated SVD of the changes of all manners at once. ValueError for refiners of two sizes."""
        if (old.width, len(old.blocks)) != (new.width, len(new.blocks)):
            raise ValueError(f"refiners of {old.width} x {len(old.blocks)} and {new.width} x {len(new.blocks)}")
        rank = int(self.config["rank"])
        made = Enlarger(new.width, len(new.blocks), rank, fingerprint(new))
        wanted = [self._kernels(old, looks) for looks in MANNERS]
        for layer, (kernel, _) in enumerate(new.restored_kernels()):
            changes = torch.cat([(kernels[layer][0] - kernel).flatten(1) for kernels in wanted])
            left, strength, right = torch.linalg.svd(changes.float(), full_matrices=False)
            made.down[layer].copy_(right[:rank])
            for looks, up in zip(MANNERS, (left * strength)[:, :rank].chunk(len(MANNERS)), strict=True):
                made.manner(looks).up[layer].copy_(up)
        for looks in MANNERS:
            made.manner(looks).bias.load_state_dict(self.manner(looks).bias.state_dict())
            made.manner(looks).exit.load_state_dict(self.manner(looks).exit.state_dict())
        return made

    def manner(self, looks: str) -> EnlargerManner:
        """What is its own for photos of these looks, one of `MANNERS`."""
        return cast(EnlargerManner, self.get_submodule(looks))

    def forward(self, refiner: Refiner, cubic_B3PQ: Tensor, looks: str) -> Tensor:
        """Photos of one of `MANNERS` enlarged by the antialiased cubic, in [0, 1], P and Q multiples of 4, to enlarged
        photos, float32, about [0, 1], not clamped. Gradients reach the enlarger's weights alone."""
        kernels, last = self._kernels(refiner, looks), self.manner(looks).exit

        def convolve(layer: int, x: Tensor) -> Tensor:
            return F.conv2d(x, *kernels[layer], padding=1)

        rgb_B3PQ = (cubic_B3PQ * 2 - 1).to(last.weight.dtype)
        return cubic_B3PQ.float() + refiner.walk(rgb_B3PQ, convolve, last).float() / 2

    @torch.no_grad()
    def merged(self, refiner: Refiner, looks: str) -> Refiner:
        """A refiner of these kernels: on [-1, 1], what it corrects of the cubic of photos of one of `MANNERS`
        (`EnlargedRows`)."""
        made = Refiner(refiner.width, len(refiner.blocks))
        for conv, (kernel, bias_C) in zip(made.convolutions, self._kernels(refiner, looks), strict=True):
            conv.weight.copy_(kernel)
            cast(Tensor, conv.bias).copy_(bias_C)
        made.exit.load_state_dict(self.manner(looks).exit.state_dict())
        return made.eval()

    def _kernels(self, refiner: Refiner, looks: str) -> list[tuple[Tensor, Tensor]]:
        manner = self.manner(looks)
        own = zip(refiner.restored_kernels(), self.down, manner.up, manner.bias, strict=True)
        return [(kernel + (up @ down).view_as(kernel), bias_C) for (kernel, _), down, up, bias_C in own]


class EnlargerManner(nn.Module):
    """What an enlarger does for photos of one kind of looks: for each convolution but the last `up`, which makes a
    change of its kernel of the shared `down`, and a bias; and a last convolution."""

    def __init__(self, convolutions: int, width: int, rank: int, outputs: int) -> None:
        super().__init__()
        self.up = nn.ParameterList(torch.zeros(width, rank) for _ in range(convolutions))
        self.bias = nn.ParameterList(torch.zeros(width) for _ in range(convolutions))
        self.exit = nn.Conv2d(width, outputs, 3, padding=1)


@torch.no_grad()
def fingerprint(refiner: Refiner) -> str:
    """Of a refiner's weights in bfloat16, as bundles ship them."""
    digest = hashlib.sha256()
    for name, value in sorted(refiner.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class EnlargedRows(FourfoldRows[Refiner]):
    """Rows of a photo enlarged by `network` (`Enlarger.merged`)."""

    def _strip(self, strip: int) -> np.ndarray:
        first, last = strip * self.STRIP, min((strip + 1) * self.STRIP, self._height)
        reach = self._network.reach // FACTOR
        begin, end = max(0, first - reach), min(self._height, last + reach)
        cubic_PQC = self._cubic(begin, end)
        cubic_PQC += self._correction(cubic_PQC, (FACTOR * (first - begin), FACTOR * (end - last)))
        self._on_strip()
        return np.clip(cubic_PQC[FACTOR * (first - begin) : FACTOR * (last - begin)], 0, 1)

    @torch.inference_mode()
    def _correction(self, cubic_PQC: np.ndarray, spare: tuple[int, int]) -> np.ndarray:
        """What rows of the enlarged photo, on their own, get added; `spare` ones, at the top and at the bottom, get
        nothing."""
        rgb_BCPQ = torch.from_numpy(np.ascontiguousarray(cubic_PQC.transpose(2, 0, 1)))[None].to(self._device) * 2 - 1
        made_CPQ = self._network(rgb_BCPQ.to(self._network.entry.weight.dtype), spare=spare)[0].float() / 2
        return made_CPQ.permute(1, 2, 0).cpu().numpy()
