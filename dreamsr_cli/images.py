"""Photos in and out: any readable photo becomes float RGB rows, and results become files of the photo's own kind.

Reading applies the EXIF orientation and turns grey, palette, CMYK and 16-bit photos into RGB in [0, 1]; writing gives
grey back as grey, palette as palette where the format allows, alpha as alpha, with EXIF, ICC profile, XMP and DPI.

Axes: P Q pixel rows and columns, C channels. `rgb_PQC` is float32 (rows, width, 3) in [0, 1].
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import numpy as np
import pyvips
import tifffile
from PIL import Image, PngImagePlugin, TiffImagePlugin

from dreamsr_cli.errors import InputError, OutputError, UsageError

_LOADERS = {
    "jpegload": "jpeg",
    "pngload": "png",
    "webpload": "webp",
    "tiffload": "tiff",
    "gifload": "gif",
    "heifload": "avif",
}
_READABLE = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".gif", ".avif"})
_WRITABLE = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp", ".tif": "tiff", ".tiff": "tiff"}
_SIDE_LIMITS = {"jpg": 65535, "webp": 16383}
_EXIF_HEADER = b"Exif\0\0"
_EXIF_IFD, _GPS_IFD = 0x8769, 0x8825
# Entries of a TIFF that describe the photo and not the layout of its pixels: ImageDescription, Make, Model, Software,
# DateTime, Artist, Copyright.
_TEXT_TAGS = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298)
_SUB_DIRECTORIES = (_EXIF_IFD, _GPS_IFD)
_LUMA = np.float32(0.299), np.float32(0.587), np.float32(0.114)  # Rec. 601, as JPEG; any weights do where R = G = B


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


# ---------------------------------------------------------------- reading


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
        exif, palette = _read_tiff_directory(path)
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


# ---------------------------------------------------------------- EXIF and XMP

_BROKEN_EXIF = (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error)  # what Pillow raises on bad blocks


def _read_tiff_directory(path: Path) -> tuple[bytes | None, bool]:
    """EXIF block made of a TIFF's descriptive entries, which libvips leaves out, and whether it is a palette photo."""
    directory, exif = Image.Exif(), Image.Exif()
    try:
        with path.open("rb") as file:
            directory.load_from_fp(file)
            for tag in _TEXT_TAGS + _SUB_DIRECTORIES:
                if tag in directory:
                    exif[tag] = directory.get_ifd(tag) if tag in _SUB_DIRECTORIES else directory[tag]
            return (exif.tobytes() if len(exif) else None), directory.get(0x0106) == 3
    except _BROKEN_EXIF:  # BigTIFF ends here too: Pillow's parser of bare directories knows the classic layout only
        return None, False


def _normalise_exif(block: bytes, width: int, height: int) -> Image.Exif | None:
    """The block for an upright photo of width x height; None if it is damaged. Its thumbnail is dropped."""
    exif = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of entries it skips
            exif.load(block)
            if not len(exif):
                return None
            exif[0x0112] = 1
            exif.get_ifd(_EXIF_IFD).update({0xA002: width, 0xA003: height})
            exif.tobytes()
    except _BROKEN_EXIF:
        return None
    return exif


def _normalise_xmp(packet: bytes) -> bytes:
    """The packet with `tiff:Orientation` 1, be it an attribute or an element."""
    return re.sub(rb"(tiff:Orientation(?:\s*=\s*[\"']|>\s*))[2-8]", rb"\g<1>1", packet)


# ---------------------------------------------------------------- writing


def resolve_format(output_format: str, out_path: Path | None, info: PhotoInfo) -> str:
    """The format to write, "png", "jpg", "webp" or "tiff": the one asked for;
    with "auto" that of the output name, else of the photo, else PNG.

    `UsageError` if the output's name says another format than the one asked for, or one that can't be written.
    """
    suffix = out_path.suffix.lower() if out_path else ""
    named = _WRITABLE.get(suffix)
    if named is None and suffix in _READABLE | {".bmp", ".heic", ".jxl"}:
        raise UsageError(f"{out_path}: {suffix} files can't be written", "end the name in .png, .jpg, .webp or .tiff")
    if output_format != "auto":
        if output_format not in _WRITABLE.values():
            raise UsageError(f"--format {output_format} is unknown", "use auto, png, jpg, webp or tiff")
        if named not in (None, output_format):
            raise UsageError(f"--format {output_format} but the output is called {out_path}", "make the two agree")
        return output_format
    own = {"jpeg": "jpg", "png": "png", "webp": "webp", "tiff": "tiff"}.get(info.format, "png")
    return named or own


class PhotoWriter:
    """Writes one result, strip by strip from the top, in the kind of the photo it was made from.

    A context manager: strips go to a raw file in a temporary folder beside `path`; a clean exit encodes it there and
    moves the file to `path` (`os.replace`: an existing file is replaced at once or not at all); an exception leaves
    nothing. `OutputError` if the format can't hold the size or the file can't be written. `notes`: what was not kept.
    """

    def __init__(self, path: Path, info: PhotoInfo, width: int, height: int, format: str, quality: int) -> None:
        limit = _SIDE_LIMITS.get(format)
        if limit and max(width, height) > limit:
            raise OutputError(
                f"{path}: {width}x{height} is more than {format.upper()} can hold ({limit} per side)",
                "choose --format png or --format tiff, or a smaller size",
            )
        self.path, self.info, self.width, self.height = path, info, width, height
        self.format, self.quality = format, quality
        self.notes: list[str] = []
        self._alpha = info.alpha and format != "jpg"
        self._bands = (1 if info.grey else 3) + self._alpha
        self._palette = info.palette and (format == "png" or (format == "tiff" and not self._alpha))
        self._rows = 0
        if info.alpha and not self._alpha:
            self.notes.append("JPEG has no transparency: it was laid over white")
        if info.palette and not self._palette:
            self.notes.append(f"written in full colour: no palette in {format.upper()} like this photo's")
        if info.bit_depth == 16:
            self.notes.append("written with 8 bits per channel")

    def __enter__(self) -> PhotoWriter:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix=f".{self.path.name[:64]}.", dir=self.path.parent))
            self._raw: BinaryIO = (self._folder / "pixels.raw").open("wb")
        except OSError as error:
            raise self._failure(error) from error
        return self

    def write_strip(self, rgb_PQC: np.ndarray, alpha_PQ: np.ndarray | None = None) -> None:
        """The next rows: float32 (rows, width, 3), and (rows, width) exactly if the photo has alpha; clipped to [0, 1].

        ValueError for another shape or too many rows; `OutputError` for values that are not finite.
        """
        rows = len(rgb_PQC)
        if rgb_PQC.shape != (rows, self.width, 3) or self._rows + rows > self.height:
            raise ValueError(f"strip {rgb_PQC.shape} after {self._rows} rows of a {self.width}x{self.height} photo")
        if (alpha_PQ is not None) != self.info.alpha or (alpha_PQ is not None and alpha_PQ.shape != (rows, self.width)):
            raise ValueError(
                f"alpha {None if alpha_PQ is None else alpha_PQ.shape}, photo has alpha: {self.info.alpha}"
            )
        if not np.isfinite(rgb_PQC).all():
            raise OutputError(f"{self.path}: the result has values that are not numbers", "try --precision fp32")
        colour_PQC = np.clip(rgb_PQC, 0, 1)
        if self.info.grey:
            # plane by plane: a matrix product's last bits depend on the height of the strip
            red, green, blue = (colour_PQC[..., c : c + 1] * weight for c, weight in enumerate(_LUMA))
            colour_PQC = red + green + blue
        if alpha_PQ is not None:
            alpha_PQC = np.clip(alpha_PQ, 0, 1)[..., None]
            if self._alpha:
                colour_PQC = np.concatenate([colour_PQC, alpha_PQC], axis=2)
            else:
                colour_PQC = colour_PQC * alpha_PQC + (1 - alpha_PQC)
        try:
            self._raw.write(np.rint(colour_PQC * 255).astype(np.uint8).tobytes())
        except OSError as error:
            raise self._failure(error) from error
        self._rows += rows

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._raw.close()
            if kind is None:
                if self._rows != self.height:
                    raise ValueError(f"{self._rows} of {self.height} rows were written")
                os.replace(self._encode(), self.path)
        except (OSError, pyvips.Error) as failure:
            if kind is None:  # else the exception on its way says more
                raise self._failure(failure) from failure
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _failure(self, error: Exception) -> OutputError:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        return OutputError(
            f"{self.path}: can't be written ({reason})", "check the folder, its permissions and free space"
        )

    def _encode(self) -> Path:
        """The finished file, still in the temporary folder."""
        target, raw = self._folder / f"result.{self.format}", self._folder / "pixels.raw"
        kept = self._metadata()
        if self.format != "tiff" and not self._palette:
            image = pyvips.Image.rawload(str(raw), self.width, self.height, self._bands, access="sequential")
            _save_vips(target, image, self.format, self.quality, kept)
            return target
        levels_PQC = np.memmap(raw, np.uint8, "r", shape=(self.height, self.width, self._bands))
        if self.format == "tiff":
            _save_tiff(target, levels_PQC, self._palette, kept)
        else:
            _save_palette_png(target, levels_PQC, kept)
        return target

    def _metadata(self) -> _Metadata:
        icc, exif = self.info.icc, self.info.exif
        if icc is not None and icc[16:20] != (b"GRAY" if self.info.grey and self.format != "webp" else b"RGB "):
            icc = None
            self.notes.append("its colour profile does not fit the result's channels and was left out")
        normal = _normalise_exif(exif, self.width, self.height) if exif else None
        if exif and normal is None:
            self.notes.append("its EXIF block is damaged and was left out")
        return _Metadata(icc, normal, _normalise_xmp(self.info.xmp) if self.info.xmp else None, self.info.dpi)


# ---------------------------------------------------------------- encoders


@dataclass(frozen=True)
class _Metadata:
    """What goes into a result beside its pixels, normalised."""

    icc: bytes | None
    exif: Image.Exif | None
    xmp: bytes | None
    dpi: tuple[float, float] | None

    @property
    def density(self) -> tuple[float, float]:
        """Pixels per inch where a format insists on saying some."""
        return self.dpi or (72.0, 72.0)


def _save_vips(target: Path, image: pyvips.Image, format: str, quality: int, kept: _Metadata) -> None:
    xres, yres = (dots / 25.4 for dots in kept.density)
    image = image.copy(interpretation="b-w" if image.bands < 3 else "srgb", xres=xres, yres=yres)
    keep = 0
    # Bits of VipsForeignKeep; given leave to keep EXIF, libvips makes up a block where there is none.
    exif = kept.exif.tobytes() if kept.exif else None
    for bit, name, blob in ((1, "exif-data", exif), (2, "xmp-data", kept.xmp), (8, "icc-profile-data", kept.icc)):
        if blob is not None:
            image.set_type(pyvips.GValue.blob_type, name, cast(Any, blob))
            keep |= bit
    if format == "png":
        image.pngsave(str(target), compression=6, keep=keep)
    elif format == "jpg":
        image.jpegsave(str(target), Q=quality, keep=keep)
    else:
        image.webpsave(str(target), Q=quality, keep=keep)


def _quantise(levels_PQC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices uint8 (P, Q) and a table uint8 (up to 256, 4) of RGBA for RGB or RGBA levels, uint8 (P, Q, 3 or 4).

    Up to 256 colours are kept exactly. Else alpha 0 and 255 stay exact, values between are off by 16 levels at most.
    """
    rgb_PQC = np.ascontiguousarray(levels_PQC[..., :3])
    alpha_PQ = levels_PQC[..., 3] if levels_PQC.shape[2] == 4 else np.full(rgb_PQC.shape[:2], 255, np.uint8)
    rgba_PQC = np.concatenate([rgb_PQC, alpha_PQ[..., None]], axis=2)
    if Image.fromarray(rgba_PQC).getcolors(256):
        packed, found = np.unique(rgba_PQC.view(np.uint32)[..., 0], return_inverse=True)
        return found.reshape(alpha_PQ.shape).astype(np.uint8), packed[:, None].view(np.uint8)

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


def _save_palette_png(target: Path, levels_PQC: np.ndarray, kept: _Metadata) -> None:
    indices_PQ, table = _quantise(levels_PQC)
    image = Image.fromarray(indices_PQ, "P")
    opaque = levels_PQC.shape[2] == 3
    image.putpalette(table[:, :3].tobytes() if opaque else table.tobytes(), "RGB" if opaque else "RGBA")
    texts = PngImagePlugin.PngInfo()
    if kept.xmp is not None:
        texts.add_itxt("XML:com.adobe.xmp", kept.xmp.decode("utf-8", "replace"))
    options: dict[str, Any] = {"icc_profile": kept.icc, "exif": kept.exif, "dpi": kept.dpi}
    image.save(target, pnginfo=texts, **{name: value for name, value in options.items() if value is not None})


def _save_tiff(target: Path, levels_PQC: np.ndarray, palette: bool, kept: _Metadata) -> None:
    """Deflate, one strip per 64 rows; EXIF and GPS directories are appended and pointed to from the first one."""
    bands = levels_PQC.shape[2]
    big = levels_PQC.size > 2**32 - 2**25
    tags: list[tuple[int, int, int, Any, bool]] = []
    exif = kept.exif or Image.Exif()
    for tag in _TEXT_TAGS:
        if isinstance(value := exif.get(tag), str):
            text = value.encode() + b"\0"
            tags.append((tag, 2, len(text), text, True))
    # Pillow lays sub-directories out for classic TIFF only
    directories = {} if big else {tag: exif.get_ifd(tag) for tag in _SUB_DIRECTORIES if tag in exif}
    tags += [(tag - 1, 4, 1, 0, True) for tag in directories]  # tifffile refuses their own numbers
    if kept.xmp is not None:
        tags.append((700, 1, len(kept.xmp), kept.xmp, True))
    options: dict[str, Any] = {"photometric": "rgb" if bands >= 3 else "minisblack"}
    data = levels_PQC
    if palette:
        data, table = _quantise(levels_PQC)
        colours = np.zeros((3, 256), np.uint16)
        colours[:, : len(table)] = table[:, :3].T.astype(np.uint16) * 257
        options = {"photometric": "palette", "colormap": colours}
    elif bands in (2, 4):
        options |= {"extrasamples": ["unassalpha"], "planarconfig": "contig"}
    elif bands == 1:
        data = levels_PQC[..., 0]
    tifffile.imwrite(
        target,
        data,
        bigtiff=big,
        byteorder="<",
        compression="zlib",
        predictor=not palette,
        rowsperstrip=64,
        resolution=kept.density,
        resolutionunit="INCH",
        iccprofile=kept.icc,
        software=False,
        metadata=None,
        extratags=tags,
        maxworkers=1,
        **options,
    )
    _append_directories(target, directories)


def _append_directories(target: Path, directories: dict[int, dict[int, Any]]) -> None:
    """Put EXIF sub-directories at the end of a little-endian classic TIFF and make `tag - 1` entries point to them."""
    with tifffile.TiffFile(target) as tiff:
        places = {tag: tiff.pages.first.tags[tag - 1].offset for tag in directories}
    with target.open("r+b") as file:
        for tag, values in directories.items():
            directory = TiffImagePlugin.ImageFileDirectory_v2(b"II*\0\x08\0\0\0", group=tag)
            for key, value in values.items():
                directory[key] = value
            offset = file.seek(0, os.SEEK_END)
            offset += file.write(b"\0" * (offset % 2))
            file.write(directory.tobytes(offset))
            file.seek(places[tag])
            file.write(struct.pack("<HHII", tag, 4, 1, offset))
