"""Photos in: any readable photo becomes float RGB rows; `photo_writer` turns results into files again.

Reading applies the EXIF orientation and turns grey, palette, CMYK and 16-bit photos into RGB in [0, 1].

Axes: P Q pixel rows and columns, C channels. `rgb_PQC` is float32 (rows, width, 3) in [0, 1].
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pyvips

from dreamsr_cli.errors import InputError
from dreamsr_cli.photo_metadata import read_tiff_directory

_LOADERS = {
    "jpegload": "jpeg",
    "pngload": "png",
    "webpload": "webp",
    "tiffload": "tiff",
    "gifload": "gif",
    "heifload": "avif",
}
_READABLE = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".gif", ".avif"})
_EXIF_HEADER = b"Exif\0\0"


@dataclass(frozen=True)
class PhotoInfo:
    """What a photo is, apart from its pixels."""

    width: int
    """Upright pixels."""
    height: int
    """Upright pixels."""
    grey: bool
    """One colour channel."""
    palette: bool
    """Pixels are indices into a table of colours."""
    alpha: bool
    """It has transparency, by a channel or by a palette entry."""
    bit_depth: int
    """8 or 16 bits per channel, as decoded."""
    format: str
    """"jpeg", "png", "webp", "tiff", "gif" or "avif": by content, whatever the name says."""
    icc: bytes | None
    """Colour profile; None for CMYK photos, which are turned into sRGB."""
    exif: bytes | None
    """EXIF block from its TIFF header on, as it was found (orientation not yet normalised)."""
    xmp: bytes | None
    """XMP packet."""
    dpi: tuple[float, float] | None
    """Pixels per inch, across and down the stored pixels; None where the file does not say."""


@dataclass(frozen=True, eq=False)
class Photo:
    """A decoded photo, upright. Make one with `open_photo`."""

    path: Path
    info: PhotoInfo
    sha256: str
    """Hex digest of the file."""
    notes: tuple[str, ...]
    """What a person should know about how it was read (further frames ignored, CMYK converted)."""
    pixels_PQC: np.ndarray
    """uint8 or uint16 (height, width, 1 to 4): grey or RGB, then alpha if `info.alpha`."""

    def read_rows(self, top: int, bottom: int) -> np.ndarray:
        """Rows [top, bottom), float32 (rows, width, 3) in [0, 1]; hidden pixels hold the colour beside them."""
        colour_PQC = self._floats(top, bottom, slice(0, 1 if self.info.grey else 3))
        return np.repeat(colour_PQC, 3, axis=2) if self.info.grey else colour_PQC

    def read_alpha(self, top: int, bottom: int) -> np.ndarray | None:
        """Opacity of rows [top, bottom) as float32 (rows, width) in [0, 1], or None for a photo without alpha."""
        return self._floats(top, bottom, slice(-1, None))[..., 0] if self.info.alpha else None

    def _floats(self, top: int, bottom: int, channels: slice) -> np.ndarray:
        if not 0 <= top < bottom <= self.info.height:
            raise ValueError(f"rows [{top}, {bottom}) lie outside a photo of {self.info.height} rows")
        levels = self.pixels_PQC[top:bottom, :, channels]
        return levels.astype(np.float32) / np.float32(np.iinfo(levels.dtype).max)


def list_formats() -> tuple[str, ...]:
    """Name endings of photos that can be read, sorted, with the dot."""
    return tuple(sorted(_READABLE))


def is_photo_name(path: Path) -> bool:
    """Whether the name ends like a photo's, in any case; the file is not looked at."""
    return path.suffix.lower() in _READABLE


def open_photo(path: Path) -> Photo:
    """Decode the first frame of `path`; `InputError` says why it can't be read."""
    sha256 = _digest(path)
    try:
        # sequential: one pass, and the decoder's errors surface below
        image = pyvips.Image.new_from_file(str(path), revalidate=True, fail_on="error", access="sequential")
        loader = str(image.get("vips-loader")).removesuffix("_source")
        if loader not in _LOADERS:
            raise _unknown(path)
        fields = set(image.get_fields())
        cmyk = image.interpretation == "cmyk"
        pixels_PQC = _decode(image, path)
    except pyvips.Error as error:
        if "not a known file format" in str(error):
            raise _unknown(path) from error
        reason = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), "it can't be decoded")
        raise InputError(f"{path}: damaged or cut short ({reason})", "copy or download it again") from error

    def blob(name: str) -> bytes | None:
        return cast(bytes, image.get(name)) if name in fields else None

    format = _LOADERS[loader]
    exif, palette = blob("exif-data"), "palette" in fields
    if format == "tiff":
        exif, palette = read_tiff_directory(path)
    orientation = cast(int, image.get("orientation")) if "orientation" in fields else 1
    pixels_PQC = _turn_upright(pixels_PQC, orientation)
    alpha = pixels_PQC.shape[2] in (2, 4)
    notes = ["its CMYK colours were turned into sRGB"] if cmyk else []
    if "n-pages" in fields and cast(int, image.get("n-pages")) > 1:
        notes.append(f"only the first of its {image.get('n-pages')} frames is used")
    dpi = (round(image.xres * 25.4, 2), round(image.yres * 25.4, 2))
    info = PhotoInfo(
        width=pixels_PQC.shape[1],
        height=pixels_PQC.shape[0],
        grey=pixels_PQC.shape[2] < 3,
        palette=palette and pixels_PQC.shape[2] >= 3,
        alpha=alpha,
        bit_depth=8 * pixels_PQC.itemsize,
        format=format,
        icc=None if cmyk else blob("icc-profile-data"),
        exif=exif.removeprefix(_EXIF_HEADER) if exif else None,
        xmp=blob("xmp-data"),
        # 25.4 and 72 are libvips' values for files that say nothing
        dpi=None if {round(d) for d in dpi} <= {25, 72} else dpi,
    )
    return Photo(path, info, sha256, tuple(notes), _fill_transparent(pixels_PQC) if alpha else pixels_PQC)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise InputError(f"{path}: the file is empty", "copy or download it again")
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file", "check the path") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a folder, not a photo", "name a photo inside it") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}", "check the file and its permissions") from error


def _unknown(path: Path) -> InputError:
    known = "JPEG, PNG, WebP, TIFF, GIF or AVIF"
    return InputError(f"{path}: not a photo that can be read", f"give a {known} file; convert or download it again")


def _decode(image: pyvips.Image, path: Path) -> np.ndarray:
    """Grey or RGB with optional alpha, uint8 or uint16 (stored rows, stored columns, 1 to 4)."""
    if image.interpretation == "cmyk":
        image = image.icc_transform("srgb", embedded=True, input_profile="cmyk", depth=8)
    elif image.interpretation in ("lab", "labs", "labq", "lch", "xyz", "hsv", "yxy"):
        image = image.colourspace("srgb")
    if image.format not in ("uchar", "ushort"):
        raise InputError(f"{path}: its samples are of type {image.format}", "convert it to 8 or 16 bits per channel")
    colours = 1 if image.bands < 3 else 3
    kept = colours + (1 if image.bands > colours and image.hasalpha() else 0)
    dtype = np.uint8 if image.format == "uchar" else np.uint16
    levels = np.frombuffer(image.extract_band(0, n=kept).write_to_memory(), dtype)
    return levels.reshape(image.height, image.width, kept)


def _turn_upright(stored_PQC: np.ndarray, orientation: int) -> np.ndarray:
    """Apply EXIF orientation 1 to 8 (EXIF 2.3, tag 0x0112); other values change nothing."""
    turned = stored_PQC.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else stored_PQC
    turned = turned[::-1] if orientation in (3, 4, 7, 8) else turned
    return turned[:, ::-1] if orientation in (2, 3, 6, 7) else turned


def _fill_transparent(pixels_PQC: np.ndarray) -> np.ndarray:
    """A copy whose fully transparent pixels hold the colour of the nearest visible ones; alpha stays.

    What lies there is arbitrary (often black) and would bleed into visible edges when the photo is resized.
    """
    alpha_PQ = pixels_PQC[..., -1].astype(np.float32)
    if alpha_PQ.min() > 0 or alpha_PQ.max() == 0:
        return pixels_PQC
    colour_PQC = _spread(pixels_PQC[..., :-1] * alpha_PQ[..., None], alpha_PQ)
    filled_PQC = pixels_PQC.copy()
    hidden_PQ = alpha_PQ == 0
    filled_PQC[hidden_PQ, :-1] = np.rint(colour_PQC[hidden_PQ])
    return filled_PQC


def _spread(premultiplied_PQC: np.ndarray, weight_PQ: np.ndarray) -> np.ndarray:
    """Colours where there is weight, elsewhere those of a premultiplied blur just wide enough to reach some."""
    known_PQ = weight_PQ > 0
    colour_PQC = premultiplied_PQC / np.where(known_PQ, weight_PQ, 1)[..., None]
    if known_PQ.all():
        return colour_PQC
    height, width = weight_PQ.shape
    pad = ((0, height % 2), (0, width % 2))

    def halve(x: np.ndarray) -> np.ndarray:
        x = np.pad(x, pad + ((0, 0),) * (x.ndim - 2))
        return (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4

    coarse_PQC = _spread(halve(premultiplied_PQC), halve(weight_PQ))
    grown_PQC = coarse_PQC.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
    return np.where(known_PQ[..., None], colour_PQC, grown_PQC)
