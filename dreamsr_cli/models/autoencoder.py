"""Latents <-> pixels: one contract for FLUX's AutoencoderKL and for the built-in model's patch transform.

Axes: B batch, C channels, H W latent rows and columns, P Q pixel rows and columns (P = 8 H, Q = 8 W).
Pixels are RGB in [-1, 1]; latents are scaled as the transformer expects them (about unit variance on average).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from dreamsr_cli.counting_pixels import FLUX_HALO, column_spans

STRIDE = 8
"""Output pixels per latent pixel, in FLUX's autoencoder and in ours."""


NONE_SPARE = 0, 0
"""No rows at the top and none at the bottom are there for the others' sake alone."""


class Autoencoder(Protocol):
    """What the engine needs. Sides of pixel arrays are multiples of 8; other sides raise `ValueError`."""

    channels: int
    """C."""
    halo: int
    """Pixels of context around a region that its decoding needs; a multiple of 8."""
    exact: bool
    """Whether decoding a region with that halo equals decoding the whole (no spatial norm, no attention)."""

    def encode(self, rgb_B3PQ: Tensor) -> Tensor:
        """[-1, 1] pixels to z_BCHW, float32."""
        ...

    def decode(self, z_BCHW: Tensor, restored: bool = False, spare: tuple[int, int] = NONE_SPARE) -> Tensor:
        """z_BCHW to pixels (B, 3, 8H, 8W), float32, about [-1, 1], not clamped. `restored`: the latent is stage 1's
        result, to be decoded faithfully, where the autoencoder has learnt to tell. `spare`: pixel rows at the top and
        at the bottom, at most `halo`, that are there for the others' sake and may come out as they like."""
        ...


class Refiner(nn.Module):
    """Residual convolutions over pixels folded 4x4 into channels: mends block edges after the linear decode.

    No norm and no attention, so an output pixel sees `4 * convolutions` pixels around it and nothing else. The last
    convolution starts at zero: an untrained refiner changes nothing.

    With `restored` it has a second manner, for the results of stage 1: a gain and a shift of its own for each channel
    of each convolution, and a last convolution of its own (method.md: what is most faithful and what looks best are
    different pictures).
    """

    FOLD = 4

    def __init__(self, width: int, blocks: int, restored: bool = False) -> None:
        super().__init__()
        folded = 3 * self.FOLD**2
        self.entry = nn.Conv2d(folded, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(blocks)
        )
        self.exit = nn.Conv2d(width, folded, 3, padding=1)
        for parameter in self.exit.parameters():
            nn.init.zeros_(parameter)
        self.restored = RestoredManner(1 + 2 * blocks, width, self.exit) if restored else None
        self.reach = self.FOLD * (2 + 2 * blocks)

    def forward(self, rgb_B3PQ: Tensor, restored: bool = False, spare: tuple[int, int] = NONE_SPARE) -> Tensor:
        """The correction alone, to be added to the picture; same shape and dtype. `restored` asks for the second
        manner, where there is one. `spare`: see `walk`."""
        manner, convolutions = self.restored if restored else None, self.convolutions
        if manner is None:
            return self.walk(rgb_B3PQ, lambda layer, x: convolutions[layer](x), self.exit, spare)
        return self.walk(rgb_B3PQ, lambda layer, x: manner(layer, convolutions[layer], x), manner.exit, spare)

    def walk(
        self,
        rgb_B3PQ: Tensor,
        convolve: Callable[[int, Tensor], Tensor],
        last: nn.Module,
        spare: tuple[int, int] = NONE_SPARE,
    ) -> Tensor:
        """`forward`, with `convolve(layer, x)` in the place of each of `convolutions`, and `last` after them.

        `spare`: pixel rows at the top and at the bottom, multiples of 4, that only serve as surroundings. Their
        correction is 0, and they are left out as soon as no later convolution reaches them.
        """
        rows = spare[0] // self.FOLD, spare[1] // self.FOLD
        # A third faster on a CPU than channels first.
        x = F.pixel_unshuffle(rgb_B3PQ, self.FOLD).contiguous(memory_format=torch.channels_last)
        left = 1 + 2 * len(self.blocks)
        x = _without(convolve(0, x), rows, max(*rows, left + 1), left)
        for number in range(len(self.blocks)):
            inner = _without(convolve(2 * number + 1, F.silu(x)), rows, left, left - 1)
            made = _without(convolve(2 * number + 2, F.silu(inner)), rows, left - 1, left - 2)
            x, left = _without(x, rows, left, left - 2) + made, left - 2
        made = F.pixel_shuffle(_without(last(F.silu(x)), rows, left, left - 1), self.FOLD)
        return F.pad(made, (0, 0, self.FOLD * rows[0], self.FOLD * rows[1])) if any(rows) else made

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        """All but the last, in their order."""
        pairs = (cast(nn.Sequential, pair) for pair in self.blocks)
        return [self.entry, *(cast(nn.Conv2d, conv) for pair in pairs for conv in pair)]

    def restored_kernels(self) -> list[tuple[Tensor, Tensor]]:
        """(kernel, bias) of each of `convolutions` in the manner for stage 1's results, without gradient."""
        found = []
        for layer, conv in enumerate(self.convolutions):
            bias_C = torch.zeros_like(conv.weight[:, 0, 0, 0]) if conv.bias is None else conv.bias
            kernel = conv.weight
            if self.restored is not None:
                kernel, bias_C = self.restored.kernel(layer, conv)
            found.append((kernel.detach(), bias_C.detach()))
        return found

    @property
    def width(self) -> int:
        """Channels."""
        return self.entry.out_channels

    @torch.no_grad()
    def grown(self, width: int, blocks: int, restored: bool = False) -> Refiner:
        """A larger refiner that computes the same as this one: what it has more is fresh and not yet listened to.

        With `restored` it gets the second manner, which at first is the first; one that is there stays.
        `ValueError` where it would be smaller.
        """
        more = Refiner(width, blocks, restored or self.restored is not None).to(self.entry.weight.dtype)
        old = self.width
        if width < old or blocks < len(self.blocks):
            raise ValueError(f"a refiner of {old} x {len(self.blocks)} can't shrink to {width} x {blocks}")
        _lay_into(more.entry, self.entry)
        for pair, known in zip(more.blocks, self.blocks, strict=False):
            for new, conv in zip(cast(nn.Sequential, pair), cast(nn.Sequential, known), strict=True):
                _lay_into(cast(nn.Conv2d, new), cast(nn.Conv2d, conv))
        for pair in more.blocks[len(self.blocks) :]:
            for parameter in cast(nn.Sequential, pair)[1].parameters():
                nn.init.zeros_(parameter)
        _lay_into(more.exit, self.exit)
        if more.restored is not None:
            _lay_into(more.restored.exit, self.exit if self.restored is None else self.restored.exit)
            if self.restored is not None:
                known = self.restored.gain_LC.shape[0]
                more.restored.gain_LC[:known, :old] = self.restored.gain_LC
                more.restored.shift_LC[:known, :old] = self.restored.shift_LC
        return more


class RestoredManner(nn.Module):
    """What a refiner does otherwise for stage 1's results: `gain_LC` and `shift_LC` of each of L convolutions, and the
    last convolution, which begins as a copy of the other manner's."""

    def __init__(self, convolutions: int, width: int, last: nn.Conv2d) -> None:
        super().__init__()
        self.exit = copy.deepcopy(last)
        self.gain_LC = nn.Parameter(torch.ones(convolutions, width))
        self.shift_LC = nn.Parameter(torch.zeros(convolutions, width))

    def forward(self, layer: int, conv: nn.Conv2d, x_BCPQ: Tensor) -> Tensor:
        """`conv` with its outputs scaled and shifted; done to the kernels, which are smaller than the picture."""
        return F.conv2d(x_BCPQ, *self.kernel(layer, conv), padding=1)

    def kernel(self, layer: int, conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
        """(kernel, bias) of `conv`, scaled and shifted."""
        gain_C = self.gain_LC[layer]
        bias_C = self.shift_LC[layer] if conv.bias is None else conv.bias * gain_C + self.shift_LC[layer]
        return conv.weight * gain_C[:, None, None, None], bias_C


def _without(x_BCPQ: Tensor, spare: tuple[int, int], before: int, after: int) -> Tensor:
    """Rows that `after` more convolutions need, of those that `before` of them needed, `spare` rows being spare."""
    top, bottom = (min(rows, before) - min(rows, after) for rows in spare)
    return x_BCPQ[:, :, top : x_BCPQ.shape[2] - bottom] if top or bottom else x_BCPQ


def _lay_into(wider: nn.Conv2d, conv: nn.Conv2d) -> None:
    """Make the first outputs of `wider` those of `conv`, deaf to the inputs that `conv` doesn't have."""
    outputs, inputs = conv.weight.shape[:2]
    wider.weight[:outputs] = 0
    wider.weight[:outputs, :inputs] = conv.weight
    if wider.bias is not None and conv.bias is not None:
        wider.bias[:outputs] = conv.bias


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """Closed-form patch transform (PCA of 8x8x3 blocks) with a small convolutional refiner after the linear decode.

    Component k of a block is divided by `gain_C[k]`. With `whitening` 0.5 that is the square root of its standard
    deviation: half-way to unit variance, so that coarse colour keeps more signal than noise (full whitening made the
    texture stage paint coloured blocks). The transform stays in float32 whatever dtype the refiner has.
    """

    exact = True

    @register_to_config
    def __init__(
        self,
        channels: int = 32,
        refiner_width: int = 64,
        refiner_blocks: int = 3,
        whitening: float = 0.5,
        refiner_restored: bool = False,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.whitening = whitening
        block = 3 * STRIDE**2
        self.mean_K = nn.Parameter(torch.zeros(block), requires_grad=False)
        self.basis_CK = nn.Parameter(torch.eye(channels, block), requires_grad=False)
        self.gain_C = nn.Parameter(torch.ones(channels), requires_grad=False)
        self.refiner = Refiner(refiner_width, refiner_blocks, refiner_restored)
        self.halo = -(-self.refiner.reach // STRIDE) * STRIDE

    @torch.no_grad()
    def with_refiner(self, width: int, blocks: int, restored: bool = False) -> PatchAutoencoder:
        """The same autoencoder with a larger refiner (`Refiner.grown`)."""
        restored = restored or self.refiner.restored is not None
        larger = PatchAutoencoder(self.channels, width, blocks, self.whitening, restored)
        for name in ("mean_K", "basis_CK", "gain_C"):
            getattr(larger, name).copy_(getattr(self, name))
        larger.refiner = self.refiner.grown(width, blocks, restored)
        return larger

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """Set the transform by PCA over all 8x8 blocks of `batches` (tensors (B, 3, P, Q) in [-1, 1]).

        Returns the share of variance kept and the peak signal-to-noise ratio in dB of the linear round trip (peak = 2).
        """
        block, count = 3 * STRIDE**2, 0
        total = torch.zeros(block, dtype=torch.float64)
        outer = torch.zeros(block, block, dtype=torch.float64)
        for rgb in batches:
            rows_NK = _blocks(rgb.float()).transpose(1, 2).reshape(-1, block).double()
            count += len(rows_NK)
            total = total + rows_NK.sum(0)
            outer = outer + rows_NK.T @ rows_NK
        mean = total / count
        covariance = outer / count - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        kept = vectors[:, : self.channels].T
        # The sign of an eigenvector is arbitrary; fix it, so that the same data give the same transform.
        kept = kept * torch.sign(kept.gather(1, kept.abs().argmax(1, keepdim=True)))
        std = values[: self.channels].sqrt().clamp_min(1e-6)
        gain = std**self.whitening
        gain = gain * ((std / gain).pow(2).mean()).sqrt()
        self.mean_K.copy_(mean.float())
        self.basis_CK.copy_(kept.float())
        self.gain_C.copy_(gain.float())
        lost = values[self.channels :].sum() / block
        return {
            "variance_kept": float(values[: self.channels].sum() / values.sum()),
            "psnr_db": float(10 * torch.log10(4 / lost.clamp_min(1e-12))),
        }

    def encode(self, rgb_B3PQ: Tensor) -> Tensor:
        """Pixels (B, 3, 8H, 8W) in [-1, 1] to z_BCHW float32; one strided convolution."""
        _check_sides(rgb_B3PQ)
        kernel_CK = self.basis_CK.float() / self.gain_C.float()[:, None]
        weight = kernel_CK.view(self.channels, 3, STRIDE, STRIDE)
        return F.conv2d(rgb_B3PQ.float(), weight, -(kernel_CK @ self.mean_K.float()), stride=STRIDE)

    def decode_linear(self, z_BCHW: Tensor) -> Tensor:
        """The transform's inverse alone, float32: (B, 3, 8H, 8W); decode(encode(x)) projects x onto the kept
        components."""
        kernel_CK = self.basis_CK.float() * self.gain_C.float()[:, None]
        pixels = torch.einsum("bchw,ck->bkhw", z_BCHW.float(), kernel_CK) + self.mean_K.float()[None, :, None, None]
        return F.pixel_shuffle(pixels, STRIDE)

    def decode(self, z_BCHW: Tensor, restored: bool = False, spare: tuple[int, int] = NONE_SPARE) -> Tensor:
        """z_BCHW to pixels (B, 3, 8H, 8W) float32: linear decode, then the refiner in its own dtype, in the manner for
        stage 1's results if `restored`. Of `spare` rows the linear decode alone."""
        rgb = self.decode_linear(z_BCHW)
        # Only the correction passes through the refiner's precision; the picture itself stays float32.
        return rgb + self.refiner(rgb.to(self.refiner.entry.weight.dtype), restored, spare).float()


class FluxAutoencoder:
    """FLUX's `AutoencoderKL` behind the same contract: posterior mode, shifted and scaled.

    GroupNorm and attention make a region's decoding depend on the whole, so `exact` is False: callers overlap and
    blend.
    """

    exact = False
    halo = FLUX_HALO

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae
        self.channels = int(vae.config["latent_channels"])
        self._shift = float(vae.config.get("shift_factor") or 0.0)
        self._scale = float(vae.config["scaling_factor"])

    def encode(self, rgb_B3PQ: Tensor) -> Tensor:
        """Pixels (B, 3, 8H, 8W) in [-1, 1] to z_BCHW float32; wide ones span by span, each with its halo."""
        _check_sides(rgb_B3PQ)
        made = []
        for begin, end, first, last in column_spans(rgb_B3PQ.shape[3]):
            z_BCHW = self._encode(rgb_B3PQ[..., first:last])
            made.append(z_BCHW[..., (begin - first) // STRIDE : (end - first) // STRIDE])
        return torch.cat(made, 3)

    def decode(self, z_BCHW: Tensor, restored: bool = False, spare: tuple[int, int] = NONE_SPARE) -> Tensor:
        """z_BCHW to pixels (B, 3, 8H, 8W) float32; wide ones span by span, cross-faded over the halo. FLUX's decoder
        knows nothing of stages, and all its rows come out alike."""
        batch, _, height, width = z_BCHW.shape
        spans = column_spans(STRIDE * width)
        if len(spans) == 1:
            return self._decode(z_BCHW)
        total = z_BCHW.new_zeros(batch, 3, STRIDE * height, STRIDE * width, dtype=torch.float32)
        weights_Q = z_BCHW.new_zeros(STRIDE * width, dtype=torch.float32)
        for begin, end, first, last in spans:
            columns = torch.arange(first, last, device=z_BCHW.device) + 0.5
            left = (columns - first) / (2 * (begin - first)) if begin > first else torch.ones_like(columns)
            right = (last - columns) / (2 * (last - end)) if last > end else torch.ones_like(columns)
            weight_Q = torch.minimum(left, right).clamp(0, 1)
            rgb_B3PQ = self._decode(z_BCHW[..., first // STRIDE : last // STRIDE])
            total[..., first:last] += rgb_B3PQ * weight_Q
            weights_Q[first:last] += weight_Q
        return total / weights_Q

    def _encode(self, rgb_B3PQ: Tensor) -> Tensor:
        posterior = self.vae.encode(rgb_B3PQ.to(self.vae.dtype)).latent_dist
        return (posterior.mode().float() - self._shift) * self._scale

    def _decode(self, z_BCHW: Tensor) -> Tensor:
        z = z_BCHW.float() / self._scale + self._shift
        return self.vae.decode(z.to(self.vae.dtype)).sample.float()


def decode_region(autoencoder: Autoencoder, z_CHW: Tensor, top: int, bottom: int, restored: bool = False) -> Tensor:
    """Pixel rows [8*top, 8*bottom) of the decoded canvas, (3, 8*(bottom-top), 8W), from latent rows [top, bottom) and
    their halo.

    Equal to decoding the whole where `autoencoder.exact`. `z_CHW` is the whole canvas' latent.
    """
    halo = autoencoder.halo // STRIDE
    first, last = max(0, top - halo), min(z_CHW.shape[1], bottom + halo)
    rgb = autoencoder.decode(z_CHW[None, :, first:last], restored)[0]
    return rgb[:, (top - first) * STRIDE : (bottom - first) * STRIDE]


def _blocks(rgb_B3PQ: Tensor) -> Tensor:
    """(B, 3, 8H, 8W) to (B, 192, HW): each block's values in the order of `F.pixel_shuffle` (channel, row, column)."""
    return F.pixel_unshuffle(rgb_B3PQ, STRIDE).flatten(2)


def _check_sides(rgb_B3PQ: Tensor) -> None:
    if rgb_B3PQ.ndim != 4 or rgb_B3PQ.shape[1] != 3 or rgb_B3PQ.shape[2] % STRIDE or rgb_B3PQ.shape[3] % STRIDE:
        raise ValueError(f"expected (B, 3, 8H, 8W), got {tuple(rgb_B3PQ.shape)}")
