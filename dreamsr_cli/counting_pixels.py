"""Operations, parameters and working memory of the autoencoders, counted from their config files alone.

The rules are those of `counting`: a convolution counts 2 x kernel area x channels in x channels out for each value it
writes. Rows and columns are output pixels, multiples of 8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from dreamsr_cli.counting import linear_parameters

STRIDE = 8
FOLD = 4
"""Side of the pixel blocks that the built-in refiner works on."""
FLUX_HALO = 64
"""Pixels decoded around a strip with an autoencoder that has no bounded receptive field."""
FLUX_COLUMNS = 1024
"""Pixel columns of a strip that such an autoencoder handles at once, without the halo."""


def column_spans(columns: int) -> list[tuple[int, int, int, int]]:
    """(begin, end, first, last) in pixels: a strip's spans of equal width up to `FLUX_COLUMNS`, and what is computed
    for each, which is the halo more on both sides."""
    count = max(1, -(-columns // FLUX_COLUMNS))
    edges = [columns // STRIDE * i // count * STRIDE for i in range(count)] + [columns]
    return [(begin, end, max(0, begin - FLUX_HALO), min(columns, end + FLUX_HALO)) for begin, end in pairwise(edges)]


@dataclass(frozen=True)
class AutoencoderSizes:
    """One autoencoder, by its config.json."""

    config: Mapping[str, Any]

    @property
    def exact(self) -> bool:
        """The built-in `PatchAutoencoder`; False: `AutoencoderKL`."""
        return "refiner_width" in self.config

    @property
    def halo(self) -> int:
        """Pixels around a strip that are decoded with it."""
        if not self.exact:
            return FLUX_HALO
        reach = FOLD * (2 + 2 * int(self.config["refiner_blocks"]))
        return -(-reach // STRIDE) * STRIDE

    @property
    def channels(self) -> int:
        """C, of the latent."""
        return int(self.config["channels" if self.exact else "latent_channels"])

    def encode_flops(self, rows: int, columns: int) -> int:
        """Pixels to latent."""
        if self.exact:
            return rows * columns * 2 * 3 * self.channels
        spans = column_spans(columns)
        return sum(n.flops for *_, first, last in spans for n in _encoder(self.config, rows, last - first))

    def decode_flops(self, rows: int, columns: int, spare: tuple[int, int] = (0, 0)) -> int:
        """Latent to pixels; of `spare` rows the built-in refiner computes only what the others need."""
        if not self.exact:
            spans = column_spans(columns)
            return sum(n.flops for *_, first, last in spans for n in _decoder(self.config, rows, last - first))
        return rows * columns * 2 * 3 * self.channels + 2 * sum(
            weights * columns // FOLD * n
            for weights, n in zip(self._kernels(), self._refined_rows(rows, spare), strict=True)
        )

    def _refined_rows(self, rows: int, spare: tuple[int, int]) -> list[int]:
        """Rows of folded pixels that each of the refiner's convolutions writes (`Refiner.walk`)."""
        count, least = len(self._kernels()), (rows - sum(spare)) // FOLD
        return [least + sum(min(n // FOLD, count - layer) for n in spare) for layer in range(count)]

    def moved_values(self, rows: int, columns: int, encode: bool = False) -> int:
        """Activations that decoding (or encoding) that many pixels reads and writes, layer by layer."""
        if self.exact:
            # The patch transform, then the refiner's convolutions on folded pixels.
            transform = rows * columns * 3 + rows * columns // STRIDE**2 * self.channels
            if encode:
                return transform
            width, blocks, folded = int(self.config["refiner_width"]), int(self.config["refiner_blocks"]), 3 * FOLD**2
            return transform + rows * columns // FOLD**2 * (2 * (folded + width) + 2 * blocks * 2 * width)
        layers = _encoder if encode else _decoder
        return sum(
            layer.values
            for *_, first, last in column_spans(columns)
            for layer in layers(self.config, rows, last - first)
        )

    def parameters(self) -> int:
        """All weights; norms are left out."""
        if self.exact:
            block = 3 * STRIDE**2
            return block * (1 + self.channels) + self.channels + self._refiner_weights() + self._second_manner()
        whole = [*_encoder(self.config, STRIDE, STRIDE), *_decoder(self.config, STRIDE, STRIDE)]
        return sum(layer.parameters for layer in whole)

    def working_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        """About what decoding that many pixels at once needs for activations of `itemsize` bytes."""
        if self.exact:
            pixels = rows * columns
            return pixels // FOLD**2 * int(self.config["refiner_width"]) * itemsize * 4 + pixels * 3 * 4 * 3
        pixels = rows * max(last - first for *_, first, last in column_spans(columns))
        wide = max(int(c) for c in self.config["block_out_channels"][:2])
        return pixels * wide * itemsize * 4

    def _second_manner(self) -> int:
        """Parameters of the refiner's manner for stage 1's results."""
        if not self.config.get("refiner_restored"):
            return 0
        width, blocks, folded = int(self.config["refiner_width"]), int(self.config["refiner_blocks"]), 3 * FOLD**2
        return 2 * (1 + 2 * blocks) * width + 9 * folded * width

    def _refiner_weights(self) -> int:
        return sum(self._kernels())

    def _kernels(self) -> list[int]:
        """Weights of each of the refiner's convolutions."""
        width, blocks, folded = int(self.config["refiner_width"]), int(self.config["refiner_blocks"]), 3 * FOLD**2
        return [9 * folded * width, *[9 * width * width] * (2 * blocks), 9 * width * folded]


@dataclass(frozen=True)
class GrainSizes:
    """What says how strong grain is to be (`models/grain.py`), by its config.json."""

    config: Mapping[str, Any]

    STRIP = 128
    """Rows of a strip (`grained.GrainedRows.STRIP`)."""
    BANDS, KERNEL = 4, 9**2
    """Filters of the noise and their pixels (`models.grain.BANDS`, `MARGIN`)."""

    def flops(self, rows: int, columns: int) -> int:
        """Grain for that many pixels, strip by strip with what surrounds each."""
        folded = sum(-(-n // FOLD) for n in self._extents(rows)) * -(-columns // FOLD)
        return 2 * folded * self._weights() + 2 * rows * columns * self.BANDS * self.KERNEL

    def moved_values(self, rows: int, columns: int) -> int:
        """Activations read and written, layer by layer, and weights once a strip."""
        width, blocks = int(self.config["width"]), int(self.config["blocks"])
        strips = self._extents(rows)
        layers = 2 * 3 * FOLD**2 + width + 2 * blocks * 2 * width + width + self.BANDS * FOLD**2
        return (
            sum(strips) * columns // FOLD**2 * layers
            + rows * columns * (2 * self.BANDS + 3)
            + len(strips) * self._weights()
        )

    def _extents(self, rows: int) -> list[int]:
        reach = FOLD * (2 + 2 * int(self.config["blocks"]))
        return [min(rows, top + self.STRIP + reach) - max(0, top - reach) for top in range(0, rows, self.STRIP)]

    def _weights(self) -> int:
        width, blocks = int(self.config["width"]), int(self.config["blocks"])
        return 9 * width * (2 * 3 * FOLD**2 + 2 * blocks * width + self.BANDS * FOLD**2)


CLEANED_KEPT = 64 * 2**20
"""Bytes of RAM, at most, for a cleaned photo between the phases that read it; a larger one is cleaned again."""


def kept_cleaned(rows: int, columns: int) -> int:
    """Bytes that a cleaned photo of `rows` by `columns` pixels, RGB in float32, is kept in; 0 where that is more than
    `CLEANED_KEPT`."""
    cleaned = rows * columns * 3 * 4
    return cleaned if cleaned <= CLEANED_KEPT else 0


@dataclass(frozen=True)
class CleanerSizes:
    """What cleans damaged photos (`models/cleaner.py`), by its config.json. Rows and columns are the photo's."""

    config: Mapping[str, Any]

    STRIP, COLUMNS = 128, 512
    """Rows of a strip, and columns at a time (`cleaner.CleanedRows`)."""

    def working(self, rows: int, columns: int, itemsize: int) -> int:
        """Bytes of weights and of what is held while a piece of a strip is cleaned in one of its views: five features
        of the photo's size, and the pixels twice, as they come and in order; with other views, what these gave too."""
        reach = self._reach
        pixels = min(rows, self.STRIP + 2 * reach) * min(columns, self.COLUMNS + 2 * reach)
        pictures = 2 if self._views == 1 else 3
        held = pixels * (5 * int(self.config["widths"][0]) * itemsize + pictures * 3 * FOLD**2 * 4)
        return held + sum(weights for _, weights, _ in self._layers()) * itemsize

    def flops(self, rows: int, columns: int) -> int:
        """Cleaning a photo once in all its views, strip by strip with what surrounds each."""
        return self._views * round(
            2 * sum(self._extents(rows)) * columns * sum(share * n for share, n, _ in self._layers())
        )

    def moved_values(self, rows: int, columns: int) -> int:
        """Activations read and written, layer by layer, and weights once a strip."""
        strips, layers = self._extents(rows), self._layers()
        values = sum(strips) * columns * sum(share * channels for share, _, channels in layers)
        return self._views * (round(values) + len(strips) * sum(weights for _, weights, _ in layers))

    def _extents(self, rows: int) -> list[int]:
        reach = self._reach
        return [min(rows, top + self.STRIP + reach) - max(0, top - reach) for top in range(0, rows, self.STRIP)]

    @property
    def _reach(self) -> int:
        full, half, quarter = self.config["blocks"]
        return -(-(6 + 4 * full + 8 * half + 8 * quarter) // 4) * 4

    @property
    def _views(self) -> int:
        return int(self.config.get("views", 1))

    def _layers(self) -> list[tuple[float, int, int]]:
        """(cells per pixel of the photo, weights per cell, channels read and written) of each convolution in turn."""
        (full, half, quarter), blocks = self.config["widths"], self.config["blocks"]
        sizes = ((1.0, full, 2 * blocks[0]), (1 / 4, half, 2 * blocks[1]), (1 / 16, quarter, blocks[2]))
        within = [(share, 9 * w * w, 2 * w) for share, w, count in sizes for _ in range(2 * count)]
        ends = [(1.0, 9 * 3 * full, 3 + full), (1.0, 9 * full * 3 * FOLD**2, full + 3 * FOLD**2)]
        # A kernel of 2 x 2 reads or writes four cells for one at the smaller size.
        between = [(1 / 4, 4 * full * half, 4 * full + half), (1 / 16, 4 * half * quarter, 4 * half + quarter)]
        return [*within, *ends, *between, *between]


# ---------------------------------------------------------------- AutoencoderKL by layer


class Layer(NamedTuple):
    """One layer's costs."""

    flops: int
    parameters: int
    values: int
    """Activations read and written."""


def _convolution(n_in: int, n_out: int, pixels: int, side: int = 3, stride: int = 1) -> Layer:
    """`pixels` are those written."""
    values = (n_in * stride**2 + n_out) * pixels
    return Layer(2 * side**2 * n_in * n_out * pixels, (side**2 * n_in + 1) * n_out, values)


def _residual(n_in: int, n_out: int, pixels: int) -> Iterator[Layer]:
    yield _convolution(n_in, n_out, pixels)
    yield _convolution(n_out, n_out, pixels)
    if n_in != n_out:
        yield _convolution(n_in, n_out, pixels, side=1)


def _middle(config: Mapping[str, Any], width: int, pixels: int) -> Iterator[Layer]:
    yield from _residual(width, width, pixels)
    yield from _residual(width, width, pixels)
    if config.get("mid_block_add_attention", True):
        flops = 4 * 2 * width**2 * pixels + 4 * pixels**2 * width
        yield Layer(flops, 4 * linear_parameters(width, width), (4 * 2 + 4) * width * pixels)


def _encoder(config: Mapping[str, Any], rows: int, columns: int) -> Iterator[Layer]:
    widths = [int(c) for c in config["block_out_channels"]]
    pixels, channels = rows * columns, int(config["latent_channels"])
    yield _convolution(3, widths[0], pixels)
    before = widths[0]
    for number, width in enumerate(widths):
        for layer in range(int(config["layers_per_block"])):
            yield from _residual(width if layer else before, width, pixels)
        before = width
        if number < len(widths) - 1:
            pixels //= 4
            yield _convolution(width, width, pixels, stride=2)
    yield from _middle(config, before, pixels)
    yield _convolution(before, 2 * channels, pixels)
    if config.get("use_quant_conv", True):
        yield _convolution(2 * channels, 2 * channels, pixels, side=1)


def _decoder(config: Mapping[str, Any], rows: int, columns: int) -> Iterator[Layer]:
    widths = [int(c) for c in reversed(config["block_out_channels"])]
    pixels, channels = rows * columns // 4 ** (len(widths) - 1), int(config["latent_channels"])
    if config.get("use_post_quant_conv", True):
        yield _convolution(channels, channels, pixels, side=1)
    yield _convolution(channels, widths[0], pixels)
    yield from _middle(config, widths[0], pixels)
    before = widths[0]
    for number, width in enumerate(widths):
        for layer in range(int(config["layers_per_block"]) + 1):
            yield from _residual(width if layer else before, width, pixels)
        before = width
        if number < len(widths) - 1:
            pixels *= 4
            yield _convolution(width, width, pixels)
    yield _convolution(before, 3, pixels)
