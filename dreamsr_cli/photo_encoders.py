"""Raw pixels and metadata into files: PNG, JPEG, WebP and AVIF by libvips, palette PNG by Pillow, TIFF by tifffile.

Axes: P Q pixel rows and columns, C channels, N pixels in a row. `levels_PQC` is uint8 or uint16 (height, width, bands):
grey or RGB, then alpha.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyvips
import tifffile
from PIL import Image, PngImagePlugin, TiffImagePlugin

from dreamsr_cli.photo_metadata import SUB_DIRECTORIES, TEXT_TAGS, Metadata

_STRIP_ROWS = 64
_CLASSIC_LIMIT = 2**32 - 2**25
"""Bytes of pixels that a TIFF with 32-bit offsets is trusted with."""


@dataclass(frozen=True)
class RawPhoto:
    """A finished result as a file of bare levels, (height, width, bands) in row-major order."""

    path: Path
    height: int
    width: int
    bands: int
    dtype: np.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.width * self.bands * self.dtype.itemsize

    def read(self, top: int, bottom: int) -> np.ndarray:
        """Rows [top, bottom); read, not mapped."""
        count = (bottom - top) * self.width * self.bands
        levels = np.fromfile(self.path, self.dtype, count, offset=top * self.row_bytes)
        return levels.reshape(bottom - top, self.width, self.bands)


def save_vips(target: Path, raw: RawPhoto, format: str, quality: int, kept: Metadata) -> None:
    """`format` "png", "jpg", "webp" or "avif"; `quality` 1 to 100 for the latter three. Raises `pyvips.Error`.

    PNG and JPEG are written row by row; WebP and AVIF encoders hold the whole photo.
    """
    deep = raw.dtype.itemsize == 2
    kinds = ("grey16", "rgb16") if deep else ("b-w", "srgb")
    xres, yres = (dots / 25.4 for dots in kept.density)
    # bytes, because a path need not be text
    image = pyvips.Image.rawload(
        cast(Any, os.fsencode(raw.path)),
        raw.width,
        raw.height,
        raw.bands,
        format="ushort" if deep else "uchar",
        access="sequential",
    )
    image = image.copy(interpretation=kinds[raw.bands >= 3], xres=xres, yres=yres)
    keep = 0
    # Bits of VipsForeignKeep; given leave to keep EXIF, libvips makes up a block where there is none.
    exif = kept.exif.tobytes() if kept.exif else None
    for bit, name, blob in ((1, "exif-data", exif), (2, "xmp-data", kept.xmp), (8, "icc-profile-data", kept.icc)):
        if blob is not None:
            image.set_type(pyvips.GValue.blob_type, name, cast(Any, blob))
            keep |= bit
    name = cast(Any, os.fsencode(target))
    if format == "png":
        image.pngsave(name, compression=6, keep=keep)
    elif format == "jpg":
        image.jpegsave(name, Q=quality, keep=keep)
    elif format == "webp":
        image.webpsave(name, Q=quality, keep=keep)
    else:
        image = image.colourspace("srgb") if raw.bands < 3 else image
        image.heifsave(name, Q=quality, compression="av1", bitdepth=8, keep=keep)


def save_palette_png(target: Path, levels_PQC: np.ndarray, kept: Metadata) -> None:
    """RGB or RGBA levels as a PNG of at most 256 colours, transparency in its table. Raises `OSError`."""
    indices_PQ, table = _quantise(levels_PQC)
    image = Image.fromarray(indices_PQ, "P")
    opaque = levels_PQC.shape[2] == 3
    image.putpalette(table[:, :3].tobytes() if opaque else table.tobytes(), "RGB" if opaque else "RGBA")
    texts = PngImagePlugin.PngInfo()
    if kept.xmp is not None:
        texts.add_itxt("XML:com.adobe.xmp", kept.xmp.decode("utf-8", "replace"))
    options: dict[str, Any] = {"icc_profile": kept.icc, "exif": kept.exif, "dpi": kept.dpi}
    options = {name: value for name, value in options.items() if value is not None}
    image.save(target, "PNG", pnginfo=texts, **options)


def save_tiff(target: Path, raw: RawPhoto, palette: bool, kept: Metadata) -> None:
    """Deflate, one strip per 64 rows, BigTIFF from 4 GB on; EXIF and GPS directories are appended and pointed to.

    `palette` wants RGB levels of 8 bits without alpha, and holds the whole photo. Raises `OSError`.
    """
    bands = raw.bands
    big = raw.height * raw.row_bytes > _CLASSIC_LIMIT
    tags: list[tuple[int, int, int, Any, bool]] = []
    exif = kept.exif or Image.Exif()
    for tag in TEXT_TAGS:
        if isinstance(value := exif.get(tag), str):
            text = value.encode() + b"\0"
            tags.append((tag, 2, len(text), text, True))
    directories = {tag: exif.get_ifd(tag) for tag in SUB_DIRECTORIES if tag in exif}
    tags += [(tag - 1, 16 if big else 4, 1, 0, True) for tag in directories]  # tifffile refuses their own numbers
    if kept.xmp is not None:
        tags.append((700, 1, len(kept.xmp), kept.xmp, True))
    options: dict[str, Any] = {"photometric": "rgb" if bands >= 3 else "minisblack"}
    shape: tuple[int, ...] = (raw.height, raw.width, bands) if bands > 1 else (raw.height, raw.width)
    strips = _tiff_strips(raw)
    if palette:
        indices_PQ, table = _quantise(raw.read(0, raw.height))
        colours = np.zeros((3, 256), np.uint16)
        colours[:, : len(table)] = table[:, :3].T.astype(np.uint16) * 257
        options = {"photometric": "palette", "colormap": colours}
        shape = indices_PQ.shape
        strips = (
            zlib.compress(indices_PQ[top : top + _STRIP_ROWS].tobytes()) for top in range(0, raw.height, _STRIP_ROWS)
        )
    elif bands in (2, 4):
        options |= {"extrasamples": ["unassalpha"], "planarconfig": "contig"}
    tifffile.imwrite(
        target,
        strips,
        shape=shape,
        dtype=raw.dtype,
        bigtiff=big,
        byteorder="<",
        compression="zlib",
        predictor=not palette,
        rowsperstrip=_STRIP_ROWS,
        resolution=kept.density,
        resolutionunit="INCH",
        iccprofile=kept.icc,
        software=False,
        metadata=None,
        extratags=tags,
        maxworkers=1,
        **options,
    )
    _append_directories(target, directories, big)


def _tiff_strips(raw: RawPhoto) -> Iterator[bytes]:
    """Strips with horizontal differences (TIFF 6.0, section 14), compressed."""
    for top in range(0, raw.height, _STRIP_ROWS):
        levels_PQC = raw.read(top, min(top + _STRIP_ROWS, raw.height))
        levels_PQC[:, 1:] -= levels_PQC[:, :-1].copy()
        yield zlib.compress(levels_PQC.data)


def _append_directories(target: Path, directories: dict[int, dict[int, Any]], big: bool) -> None:
    """Put EXIF sub-directories at the end of a little-endian TIFF and make `tag - 1` entries point to them."""
    with tifffile.TiffFile(target) as tiff:
        places = {tag: tiff.pages.first.tags[tag - 1].offset for tag in directories}
    header = b"II+\0\x08\0\0\0" + struct.pack("<Q", 16) if big else b"II*\0\x08\0\0\0"
    with target.open("r+b") as file:
        for tag, values in directories.items():
            directory = TiffImagePlugin.ImageFileDirectory_v2(header, group=tag)
            for key, value in values.items():
                directory[key] = value
            offset = file.seek(0, os.SEEK_END)
            offset += file.write(b"\0" * (-offset % 8))
            file.write(directory.tobytes(offset))
            file.seek(places[tag])
            file.write(struct.pack("<HHQQ", tag, 16, 1, offset) if big else struct.pack("<HHII", tag, 4, 1, offset))


def _quantise(levels_PQC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices uint8 (P, Q) and a table uint8 (up to 256, 4) of RGBA for RGB or RGBA levels, uint8 (P, Q, 3 or 4).

    Up to 256 colours are kept exactly. Else alpha 0 and 255 stay exact, values between are off by 16 levels at most.
    """
    rgb_PQC = np.ascontiguousarray(levels_PQC[..., :3])
    alpha_PQ = levels_PQC[..., 3] if levels_PQC.shape[2] == 4 else np.full(rgb_PQC.shape[:2], 255, np.uint8)
    rgba_PQC = np.concatenate([rgb_PQC, alpha_PQ[..., None]], axis=2)
    if Image.fromarray(rgba_PQC).getcolors(256):
        packed_PQ = rgba_PQC.view(np.uint32)[..., 0]
        table = np.unique(packed_PQ)
        indices = [np.searchsorted(table, packed_N).astype(np.uint8) for packed_N in packed_PQ]
        return np.stack(indices), table[:, None].view(np.uint8)

    opaque_PQ, empty_PQ = alpha_PQ == 255, alpha_PQ == 0
    soft_PQ = ~(opaque_PQ | empty_PQ)
    indices_PQ = np.zeros(alpha_PQ.shape, np.uint8)
    table = np.zeros((int(empty_PQ.any()), 4), np.uint8)  # "nothing" is entry 0
    if soft_PQ.any():
        steps = np.arange(17, 255, 17)  # 14 degrees of opacity for each of the colours
        count = (84 if opaque_PQ.any() else 255) // len(steps)
        chosen = _choose_colours(rgb_PQC[soft_PQ], count)
        colours = _table_of(chosen)
        step = np.clip(np.rint(alpha_PQ[soft_PQ] / 17), 1, len(steps)).astype(int) - 1
        found = Image.fromarray(rgb_PQC).quantize(palette=chosen, dither=Image.Dither.NONE)
        indices_PQ[soft_PQ] = len(table) + step * len(colours) + np.asarray(found)[soft_PQ]
        grid = np.column_stack([np.tile(colours, (len(steps), 1)), np.repeat(steps, len(colours))])
        table = np.concatenate([table, grid.astype(np.uint8)])
    if opaque_PQ.any():
        chosen = _choose_colours(rgb_PQC[opaque_PQ], 256 - len(table))
        # error diffusion keeps smooth tones; areas that hit a colour of the table exactly stay plain
        found = Image.fromarray(rgb_PQC).quantize(palette=chosen, dither=Image.Dither.FLOYDSTEINBERG)
        indices_PQ[opaque_PQ] = len(table) + np.asarray(found)[opaque_PQ]
        table = np.concatenate([table, np.pad(_table_of(chosen), ((0, 0), (0, 1)), constant_values=255)])
    return indices_PQ, table


def _choose_colours(rgb_NC: np.ndarray, count: int) -> Image.Image:
    """A palette image of `count` colours that suit the pixels; k-means is slow, so an even sample is looked at."""
    sample_NC = rgb_NC[:: max(1, len(rgb_NC) // 2**15)]
    return Image.fromarray(sample_NC[None]).quantize(count, Image.Quantize.MEDIANCUT, kmeans=1)


def _table_of(image: Image.Image) -> np.ndarray:
    """The RGB table of a palette image, uint8 (colours, 3)."""
    return np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
