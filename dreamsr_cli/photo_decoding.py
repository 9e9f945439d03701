"""Files into levels, by libvips: headers without decoding, colours turned into RGB or grey, rows from top to bottom.

Files are handed to libvips by descriptor: names may hold any bytes, and a file rewritten meanwhile is not confused with
one seen before. Axes: P Q pixel rows and columns, C channels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pyvips
from PIL import Image

from dreamsr_cli.errors import InputError

pyvips.cache_set_max(0)  # operations that are remembered hold files and pixels

_LOADERS = {
    "jpegload": "jpeg",
    "pngload": "png",
    "webpload": "webp",
    "tiffload": "tiff",
    "gifload": "gif",
    "heifload": "avif",
    "jxlload": "jxl",
}
_JXL = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
_FORMATS = "JPEG, PNG, WebP, TIFF, GIF or AVIF"


def open_image(path: Path) -> tuple[pyvips.Image, str]:
    """The first frame, to be read from top to bottom once, and its format; nothing is decoded yet.

    `InputError` says why it can't be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise file_error(path, error) from error
    try:
        start = os.pread(descriptor, 32, 0)
        source = pyvips.Source.new_from_descriptor(descriptor)
        if not start:
            raise InputError(f"{path}: the file is empty", "copy or download it again")
        image = pyvips.Image.new_from_source(source, "", access="sequential", fail_on="error")
        if "uhdr" in str(image.get("vips-loader")):  # Ultra HDR: a JPEG, and a gain map that is left aside
            source = pyvips.Source.new_from_descriptor(descriptor)
            image = pyvips.Image.jpegload_source(source, access="sequential", fail_on="error")
    except OSError as error:
        raise file_error(path, error) from error
    except pyvips.Error as error:
        if "bad labq" in str(error) and (lab := _read_lab(path)):
            return lab, "tiff"
        raise _not_opened(path, start, error) from error
    finally:
        os.close(descriptor)  # libvips has its own
    loader = str(image.get("vips-loader")).removesuffix("_source")
    if loader not in _LOADERS:
        raise _unknown(path)
    format = _LOADERS[loader]
    if format == "avif" and image.get("heif-compression") != "av1":
        format = "heic"
    return image, format


def file_error(path: Path, error: OSError) -> InputError:
    """Why a file can't be opened, for people."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path}: no such file", "check the path")
    if isinstance(error, IsADirectoryError):
        return InputError(f"{path}: is a folder, not a photo", "name a photo inside it")
    return InputError(f"{path}: {error.strerror or error}", "check the file and its permissions")


def damaged(path: Path, error: pyvips.Error) -> InputError:
    """A file whose kind is known but whose content can't be decoded."""
    lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
    return InputError(f"{path}: damaged or cut short ({lines[0] if lines else 'no reason given'})", "download it again")


def _unknown(path: Path) -> InputError:
    return InputError(f"{path}: not a photo that can be read", f"give a {_FORMATS} file; convert or download it again")


def _not_opened(path: Path, start: bytes, error: pyvips.Error) -> InputError:
    if start.startswith(_JXL):
        return InputError(f"{path}: JPEG XL files can't be read here", "convert it to PNG, for example with djxl")
    if start[4:8] == b"ftyp" and start[8:12] in _HEIC:
        return InputError(f"{path}: HEIC files can't be read here", "convert it to JPEG or PNG, or export it as JPEG")
    if start.startswith(_TIFF):  # cut TIFFs lack the directory at their end, and libvips does not know them
        return InputError(f"{path}: damaged or cut short (a TIFF without its directory)", "download it again")
    foreign = "not in a known format" in str(error) or "svgload" in str(error)
    return _unknown(path) if foreign else damaged(path, error)


def _read_lab(path: Path) -> pyvips.Image | None:
    """An 8-bit CIELab TIFF, which libvips does not open; None for anything else."""
    try:
        with Image.open(path, formats=("TIFF",)) as photo:
            if photo.mode != "LAB":
                return None
            levels_PQC = np.array(photo)
            # Pillow keeps a* and b* as signed bytes
            lab_PQC = np.concatenate(
                [levels_PQC[..., :1] * np.float32(100 / 255), levels_PQC[..., 1:].view(np.int8).astype(np.float32)], 2
            )
            image = pyvips.Image.new_from_array(lab_PQC).copy(interpretation="lab")
            image.set_type(pyvips.GValue.gint_type, "orientation", photo.getexif().get(0x0112, 1))
            return image
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def to_rgb(image: pyvips.Image, path: Path) -> tuple[pyvips.Image, str | None]:
    """Grey or RGB with optional alpha, 8 or 16 bits, and what other colours were turned into sRGB by their profile."""
    depth = 16 if image.format in ("ushort", "short") else 8
    converted = None
    if image.interpretation == "cmyk":
        # an embedded profile wins over libvips' own
        inks, rest = image.extract_band(0, n=4), image
        image = inks.icc_transform(
            "srgb",
            embedded=True,
            input_profile="cmyk",
            depth=depth,
            intent="relative",
            black_point_compensation=True,
        )
        # the transform would scale 16-bit alpha wrongly
        image = image.bandjoin(rest.extract_band(4)) if rest.bands > 4 and rest.hasalpha() else image
        converted = "CMYK"
    elif image.interpretation in ("lab", "labs", "labq"):
        image = image.colourspace("lab").icc_export(output_profile="srgb", depth=depth, intent="relative")
        converted = "Lab"
    elif image.interpretation in ("lch", "xyz", "hsv", "yxy"):
        converted = str(image.interpretation).upper()
        image = image.colourspace("srgb")
    if image.format not in ("uchar", "ushort"):
        raise InputError(f"{path}: its samples are of type {image.format}", "convert it to 8 or 16 bits per channel")
    colours = 1 if image.bands < 3 else 3
    kept = colours + (1 if image.bands > colours and image.hasalpha() else 0)
    return image.extract_band(0, n=kept), converted


def read_blocks(image: pyvips.Image, path: Path, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """(top, levels_PQC) of `rows` rows at a time; `InputError` where the file is damaged."""
    dtype = np.uint8 if image.format == "uchar" else np.uint16
    width, height, bands = image.width, image.height, image.bands
    try:
        region = pyvips.Region.new(image)
        for top in range(0, height, rows):
            count = min(rows, height - top)
            levels = np.frombuffer(region.fetch(0, top, width, count), dtype)
            yield top, levels.reshape(count, width, bands)
    except pyvips.Error as error:
        raise damaged(path, error) from error


def field(image: pyvips.Image, name: str) -> bytes | None:
    """A block of metadata, None if the file has none."""
    return cast(bytes, image.get(name)) if image.get_typeof(name) else None


def number(image: pyvips.Image, name: str, default: int) -> int:
    """A number of the header."""
    return cast(int, image.get(name)) if image.get_typeof(name) else default
