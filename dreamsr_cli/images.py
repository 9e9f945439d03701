"""Photos in: any readable photo becomes float RGB rows; `photo_writer` turns results into files again.

Reading applies the EXIF orientation and turns grey, palette, CMYK, Lab and 16-bit photos into RGB in [0, 1]. RGB of any
profile stays as it is, and so does its profile.

Axes: P Q pixel rows and columns, C channels. `rgb_PQC` is float32 (rows, width, 3) in [0, 1].
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import pyvips

from dreamsr_cli.config import MAX_INPUT_PIXELS
from dreamsr_cli.errors import InputError
from dreamsr_cli.photo_decoding import damaged, field, file_error, number, open_image, read_blocks, to_rgb
from dreamsr_cli.photo_metadata import read_tiff_directory
from dreamsr_cli.photo_pixels import PixelStore, fill_hidden, place

_NAMED = {
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".jpe": "jpeg",
    ".jfif": "jpeg",
    ".png": "png",
    ".webp": "webp",
    ".tif": "tiff",
    ".tiff": "tiff",
    ".gif": "gif",
    ".avif": "avif",
    ".heic": "heic",
    ".heif": "heic",
    ".jxl": "jxl",
}
"""Name endings of photos. HEIC and JPEG XL are among them even where libvips can't read them: better told than passed
over."""
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
    """"jpeg", "png", "webp", "tiff", "gif", "avif", "heic" or "jxl": by content, whatever the name says."""
    icc: bytes | None
    """Colour profile; None for photos whose colours (CMYK, Lab) were turned into sRGB."""
    exif: bytes | None
    """EXIF block from its TIFF header on, as it was found (orientation not yet normalised)."""
    xmp: bytes | None
    """XMP packet."""
    dpi: tuple[float, float] | None
    """Pixels per inch, across and down the upright photo; None where the file does not say."""


@dataclass(frozen=True, eq=False)
class Photo:
    """A decoded photo, upright. Make one with `open_photo`; a context manager, or `close` it."""

    path: Path
    info: PhotoInfo
    sha256: str
    """Hex digest of the file."""
    notes: tuple[str, ...]
    """What a person should know about how it was read (further frames ignored, CMYK converted)."""
    pixels: PixelStore
    """Grey or RGB, then alpha if `info.alpha`."""

    def read_rows(self, top: int, bottom: int) -> np.ndarray:
        """Rows [top, bottom), float32 (rows, width, 3) in [0, 1]; hidden pixels hold the colour beside them."""
        colour_PQC = self._floats(top, bottom, slice(0, 1 if self.info.grey else 3))
        return np.repeat(colour_PQC, 3, axis=2) if self.info.grey else colour_PQC

    def read_alpha(self, top: int, bottom: int) -> np.ndarray | None:
        """Opacity of rows [top, bottom) as float32 (rows, width) in [0, 1], or None for a photo without alpha."""
        return self._floats(top, bottom, slice(-1, None))[..., 0] if self.info.alpha else None

    def close(self) -> None:
        """Free the pixels; they can't be read any more."""
        self.pixels.close()

    def __enter__(self) -> Photo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _floats(self, top: int, bottom: int, channels: slice) -> np.ndarray:
        if not 0 <= top < bottom <= self.info.height:
            raise ValueError(f"rows [{top}, {bottom}) lie outside a photo of {self.info.height} rows")
        levels_PQC = self.pixels.read(top, bottom)[..., channels]
        return levels_PQC.astype(np.float32) / np.float32(np.iinfo(levels_PQC.dtype).max)


def list_formats() -> tuple[str, ...]:
    """Name endings of photos, sorted, with the dot."""
    return tuple(sorted(_NAMED))


def is_photo_name(path: Path) -> bool:
    """Whether the name ends like a photo's, in any case; the file is not looked at."""
    return path.suffix.lower() in _NAMED


def read_info(path: Path) -> PhotoInfo:
    """What the file's header says, of a photo of any size; pixels are not decoded. `InputError` as in `open_photo`."""
    image, format = open_image(path)
    return _info(path, image, format)


def open_photo(path: Path, spill: Path | None = None, max_pixels: int | None = None) -> Photo:
    """Decode the first frame of `path`; `InputError` says why it can't be read.

    `spill`: folder for the decoded pixels of huge photos, in a file that has no name; None: they stay in memory.
    `max_pixels`: larger photos are refused by their header, before decoding (`--max-pixels`); None: the default.
    """
    image, format = open_image(path)
    limit = MAX_INPUT_PIXELS if max_pixels is None else max_pixels
    if image.width * image.height > limit:
        raise InputError(
            f"{path}: {image.width}x{image.height} pixels are more than --max-pixels allows ({limit:,})",
            f"add --max-pixels {image.width * image.height} if you trust the file",
        )
    sha256 = _digest(path)
    info = _info(path, image, format)
    converted, turned_from = to_rgb(image, path)
    notes = [f"its {turned_from} colours were turned into sRGB"] if turned_from else []
    named = _NAMED.get(path.suffix.lower())
    if named not in (None, format):
        notes.append(f"it is a {format.upper()} file, whatever its name says")
    frames = number(image, "n-pages", 1)
    if frames > 1:
        notes.append(f"only the first of its {frames} frames is used")
    dtype = np.dtype(np.uint8 if info.bit_depth == 8 else np.uint16)
    pixels = PixelStore(info.height, info.width, converted.bands, dtype, spill)
    try:
        orientation = number(image, "orientation", 1)
        for top, stored_PQC in read_blocks(converted, path, pixels.block):
            place(pixels, top, stored_PQC, orientation, image.height)
        if info.alpha:
            fill_hidden(pixels)
    except BaseException:
        pixels.close()
        raise
    return Photo(path, info, sha256, tuple(notes), pixels)


def _info(path: Path, image: pyvips.Image, format: str) -> PhotoInfo:
    exif, palette = field(image, "exif-data"), bool(image.get_typeof("palette"))
    if format == "tiff":
        exif, palette = read_tiff_directory(path)
    try:
        converted, turned_from = to_rgb(image, path)
    except pyvips.Error as error:
        raise damaged(path, error) from error
    width, height = image.width, image.height
    dpi = (round(image.xres * 25.4, 2), round(image.yres * 25.4, 2))
    if number(image, "orientation", 1) in (5, 6, 7, 8):
        width, height = height, width
        dpi = (dpi[1], dpi[0])
    return PhotoInfo(
        width=width,
        height=height,
        grey=converted.bands < 3,
        palette=palette and converted.bands >= 3,
        alpha=converted.bands in (2, 4),
        bit_depth=8 if converted.format == "uchar" else 16,
        format=format,
        icc=None if turned_from else field(image, "icc-profile-data"),
        exif=exif.removeprefix(_EXIF_HEADER) if exif else None,
        xmp=field(image, "xmp-data"),
        # 25.4 and 72 are libvips' values for files that say nothing
        dpi=None if {round(d) for d in dpi} <= {25, 72} else dpi,
    )


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise file_error(path, error) from error
