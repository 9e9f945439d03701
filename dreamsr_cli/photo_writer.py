"""Photos out: results become files of the photo's own kind, in one piece or not at all.

Grey comes back as grey, palette as palette where the format allows, alpha as alpha, with EXIF, ICC profile, XMP, DPI.

Axes: P Q pixel rows and columns, C channels. `rgb_PQC` is float32 (rows, width, 3) in [0, 1].
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import pyvips

from dreamsr_cli.errors import OutputError, UsageError
from dreamsr_cli.images import PhotoInfo, list_formats
from dreamsr_cli.photo_encoders import save_palette_png, save_tiff, save_vips
from dreamsr_cli.photo_metadata import Metadata, fit_metadata

_WRITABLE = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp", ".tif": "tiff", ".tiff": "tiff"}
SIDE_LIMITS = {"jpg": 65535, "webp": 16383}
"""Most pixels per side that a format can hold; formats that aren't here hold any canvas."""
_LUMA = np.float32(0.299), np.float32(0.587), np.float32(0.114)  # Rec. 601, as JPEG; any weights do where R = G = B


def resolve_format(output_format: str, out_path: Path | None, info: PhotoInfo) -> str:
    """The format to write, "png", "jpg", "webp" or "tiff": the one asked for;
    with "auto" that of the output name, else of the photo, else PNG.

    `UsageError` if the output's name says another format than the one asked for, or one that can't be written.
    """
    suffix = out_path.suffix.lower() if out_path else ""
    named = _WRITABLE.get(suffix)
    if named is None and suffix in (*list_formats(), ".bmp", ".heic", ".jxl"):
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
        limit = SIDE_LIMITS.get(format)
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
            save_vips(target, image, self.format, self.quality, kept)
            return target
        levels_PQC = np.memmap(raw, np.uint8, "r", shape=(self.height, self.width, self._bands))
        if self.format == "tiff":
            save_tiff(target, levels_PQC, self._palette, kept)
        else:
            save_palette_png(target, levels_PQC, kept)
        return target

    def _metadata(self) -> Metadata:
        """The photo's metadata for this result; what doesn't fit goes into `notes`."""
        info = self.info
        kept, left_out = fit_metadata(
            info.icc,
            info.exif,
            info.xmp,
            info.dpi,
            width=self.width,
            height=self.height,
            grey=info.grey and self.format != "webp",  # WebP stores RGB only
        )
        self.notes += left_out
        return kept
