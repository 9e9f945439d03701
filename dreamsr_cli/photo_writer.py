"""Photos out: results become files of the photo's own kind, in one piece or not at all.

Grey comes back as grey, palette as palette where the format allows, alpha as alpha, with EXIF, ICC profile, XMP, DPI.

Axes: P Q pixel rows and columns, C channels. `rgb_PQC` is float32 (rows, width, 3) in [0, 1].
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyvips

from dreamsr_cli.config import MAX_OUTPUT_PIXELS
from dreamsr_cli.errors import OutputError, UsageError
from dreamsr_cli.images import PhotoInfo, list_formats
from dreamsr_cli.journal_files import flush
from dreamsr_cli.photo_encoders import RawPhoto, save_palette_png, save_tiff, save_vips
from dreamsr_cli.photo_metadata import Metadata, add_record, fit_jpeg, fit_metadata

FORMATS = ("png", "jpg", "webp", "tiff", "avif")
"""Formats that can be written."""
_WRITABLE = {
    ".png": "png",
    ".jpg": "jpg",
    ".jpeg": "jpg",
    ".webp": "webp",
    ".tif": "tiff",
    ".tiff": "tiff",
    ".avif": "avif",
}
SIDE_LIMITS = {"jpg": 65535, "webp": 16383, "avif": 16384}
"""Most pixels per side that a format can hold; formats that aren't here hold any canvas."""
DEEP_FORMATS = ("png", "tiff")
"""Formats that are written with 16 bits per channel."""
PALETTE_PIXELS = 32 * 2**20
"""Larger results have no palette: to choose one needs the whole photo in memory."""
_LUMA = np.float32(0.299), np.float32(0.587), np.float32(0.114)  # Rec. 601, as JPEG; any weights do where R = G = B


def resolve_format(output_format: str, out_path: Path | None, info: PhotoInfo) -> str:
    """The format to write, one of `FORMATS`: the one asked for;
    with "auto" that of the output name, else of the photo, else PNG.

    `UsageError` if the output's name says another format than the one asked for, or one that can't be written.
    """
    suffix = out_path.suffix.lower() if out_path else ""
    named = _WRITABLE.get(suffix)
    if named is None and suffix in (*list_formats(), ".bmp"):
        hint = "end the name in .png, .jpg, .webp, .tiff or .avif"
        raise UsageError(f"{out_path}: {suffix} files can't be written", hint)
    if output_format != "auto":
        if output_format not in FORMATS:
            raise UsageError(f"--format {output_format} is unknown", f"use auto, {', '.join(FORMATS[:-1])} or avif")
        if named not in (None, output_format):
            raise UsageError(f"--format {output_format} but the output is called {out_path}", "make the two agree")
        return output_format
    own = "jpg" if info.format == "jpeg" else info.format
    return named or (own if own in FORMATS else "png")


def resolve_bit_depth(asked: str, format: str, info: PhotoInfo) -> int:
    """Bits per channel to write, 8 or 16, for `asked` "auto", "8" or "16".

    `UsageError` for another value, or 16 with a format that is written with 8.
    """
    if asked not in ("auto", "8", "16"):
        raise UsageError(f"--bit-depth {asked} is unknown", "use auto, 8 or 16")
    deep = format in DEEP_FORMATS
    if asked == "16" and not deep:
        raise UsageError(
            f"--bit-depth 16: {format.upper()} is written with 8 bits per channel",
            "add --format png or --format tiff, or leave out --bit-depth",
        )
    return 16 if asked == "16" or (asked == "auto" and deep and info.bit_depth == 16) else 8


def check_canvas(path: Path, width: int, height: int, format: str, max_pixels: int | None) -> None:
    """`OutputError` for a result that `format` can't hold, or of more pixels than `--max-pixels` (None: the default)
    allows."""
    side = SIDE_LIMITS.get(format)
    if side and max(width, height) > side:
        raise OutputError(
            f"{path}: {width}x{height} is more than {format.upper()} can hold ({side} per side)",
            "choose --format png or --format tiff, or a smaller size",
        )
    limit = MAX_OUTPUT_PIXELS if max_pixels is None else max_pixels
    if width * height > limit:
        raise OutputError(
            f"{path}: {width}x{height} pixels are more than --max-pixels allows ({limit:,})",
            f"add --max-pixels {width * height}, or choose a smaller size",
        )


class PhotoWriter:
    """Writes one result, strip by strip from the top, in the kind of the photo it was made from.

    A context manager: strips go to a raw file; a clean exit encodes it into another file and moves that to `path`
    (`os.replace`: an existing file is replaced at once or not at all); an exception leaves nothing at `path`.
    `OutputError` if the format can't hold the size or the file can't be written, `UsageError` as in
    `resolve_bit_depth`. `notes`: what was not kept.

    `bit_depth`: "auto", "8" or "16". `strip_metadata`: write the colour profile and nothing else beside the pixels.
    `made_by`: JSON-able record of how the photo was made; for the same bytes it must hold no time and no path.
    `raw`: the raw file to use and to leave behind whatever happens; without it one lies in a temporary folder beside
    `path`. `rows_done`: rows of it that are there already; the next strip comes after them.
    """

    def __init__(
        self,
        path: Path,
        info: PhotoInfo,
        width: int,
        height: int,
        format: str,
        quality: int,
        *,
        bit_depth: str = "auto",
        strip_metadata: bool = False,
        made_by: dict[str, Any] | None = None,
        raw: Path | None = None,
        rows_done: int = 0,
    ) -> None:
        check_canvas(path, width, height, format, width * height)
        self.path, self.info, self.width, self.height = path, info, width, height
        self.format, self.quality = format, quality
        self.bit_depth = resolve_bit_depth(bit_depth, format, info)
        self.notes: list[str] = []
        self._made_by = None if strip_metadata else made_by
        self._strip_metadata, self._raw_path, self._rows = strip_metadata, raw, rows_done
        self._alpha = info.alpha and format != "jpg"
        self._bands = (1 if info.grey else 3) + self._alpha
        has_palette = format == "png" or (format == "tiff" and not self._alpha)
        fits = width * height <= PALETTE_PIXELS
        self._palette = info.palette and has_palette and fits and self.bit_depth == 8
        if info.alpha and not self._alpha:
            self.notes.append("JPEG has no transparency: it was laid over white")
        if info.palette and has_palette and not fits:
            self.notes.append("written in full colour: too large for a palette")
        elif info.palette and not self._palette:
            kind = f"{format.upper()} of {self.bit_depth} bits"
            self.notes.append(f"written in full colour: no palette like this photo's in {kind}")
        if info.bit_depth > self.bit_depth:
            self.notes.append("written with 8 bits per channel")
        self._metadata = self._fit_metadata()

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the raw file."""
        return self.width * self._bands * (self.bit_depth // 8)

    def __enter__(self) -> PhotoWriter:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._raw_path is None:
                # a name of its own: the result's may be as long as names can be
                self._folder = Path(tempfile.mkdtemp(prefix=".dreamsr-", dir=self.path.parent))
                self._raw = FileIO(self._folder / "pixels.raw", "w")
            else:
                self._folder = self._raw_path.parent
                self._raw = FileIO(os.open(self._raw_path, os.O_RDWR | os.O_CREAT, 0o644), "r+")
        except OSError as error:
            raise self._failure(error) from error
        there = self._raw.seek(0, os.SEEK_END) // self.row_bytes
        if there < self._rows:
            self._raw.close()
            raise OutputError(
                f"{self._raw_path}: holds {there} rows where {self._rows} were finished", "run it again with --restart"
            )
        self._raw.seek(self._rows * self.row_bytes)
        self._raw.truncate()
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
        levels_PQC = np.rint(colour_PQC * (2**self.bit_depth - 1)).astype(self._dtype)
        data = np.ascontiguousarray(levels_PQC).data.cast("B")
        try:
            while data:
                data = data[self._raw.write(data) :]  # unbuffered: what was written survives a kill
        except OSError as error:
            raise self._failure(error) from error
        self._rows += rows

    def sync(self) -> None:
        """Flush the raw file to the disk."""
        flush(self._raw.fileno())

    def encode(self) -> None:
        """Make the file at `path` from the raw file, whose rows must all be there. Can be repeated."""
        if self._rows != self.height:
            raise ValueError(f"{self._rows} of {self.height} rows were written")
        part = self._folder / "OUT.part"
        raw = RawPhoto(self._folder / "pixels.raw", self.height, self.width, self._bands, self._dtype)
        if self._raw_path is not None:
            raw = RawPhoto(self._raw_path, self.height, self.width, self._bands, self._dtype)
        try:
            if self.format == "tiff":
                save_tiff(part, raw, self._palette, self._metadata)
            elif self._palette:
                save_palette_png(part, raw.read(0, self.height), self._metadata)
            else:
                save_vips(part, raw, self.format, self.quality, self._metadata)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(part, self.path)
        except (OSError, pyvips.Error) as error:
            raise self._failure(error) from error
        finally:
            part.unlink(missing_ok=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._raw.close()
            if kind is None:
                self.encode()
        finally:
            if self._raw_path is None:
                shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.bit_depth == 8 else "<u2")

    def _failure(self, error: Exception) -> OutputError:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            return OutputError(
                f"{self.path}: the name is too long", "give a shorter one with -o, or a shorter --suffix"
            )
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return OutputError(
                f"{self.path}: the disk is full", "free some space and run the same command again: it goes on"
            )
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        return OutputError(
            f"{self.path}: can't be written ({reason})", "check the folder, its permissions and free space"
        )

    def _fit_metadata(self) -> Metadata:
        """The photo's metadata for this result; what doesn't fit goes into `notes`."""
        info = self.info
        kept, notes = fit_metadata(
            info.icc,
            None if self._strip_metadata else info.exif,
            None if self._strip_metadata else info.xmp,
            None if self._strip_metadata else info.dpi,
            width=self.width,
            height=self.height,
            grey=info.grey and self.format not in ("webp", "avif"),  # they store RGB only
        )
        self.notes += notes
        if self._made_by is not None:
            kept, notes = add_record(kept, self._made_by)
            self.notes += notes
        if self.format == "jpg":
            kept, notes = fit_jpeg(kept, self._made_by)
            self.notes += notes
        return kept
