"""Photos of a training folder, decoded once and then read in crops.

Every readable photo becomes one uint8 `.npy` file named by the photo's sha256, so later runs and other processes map it
instead of decoding it again. A set too large to be kept so goes into shards (shards.py).

Axes: P Q pixel rows and columns, C channels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from dreamsr_cli.errors import InputError, OutputError, TrainingError
from dreamsr_cli.images import is_photo_name, open_photo
from dreamsr_cli.models.captioner import Describer
from dreamsr_cli.progress import Progress, SilentProgress
from dreamsr_cli.training import captions
from dreamsr_cli.training.sources import Item, ItemTexts, Pictures, SkippedPhoto, check_bad, check_split, shrink

STRIP = 256
DESCRIBED_SHRINK = 4
"""Global texts describe photos shrunk by this factor: as an upscaler sees them, and quicker."""


@dataclass(frozen=True)
class TrainingPhoto:
    """One photo in the cache."""

    name: str
    """Path below the folder."""
    sha256: str
    """Hash of the photo's file."""
    height: int
    width: int
    pixels: Path
    """uint8 (height, width, 3) as `.npy`."""
    words: ItemTexts | None = None
    """Of the prompts file beside it."""

    def read(self) -> np.ndarray:
        """All pixels as a read-only memory map (P, Q, 3) uint8."""
        return _mapped(self.pixels)


class PhotoSource:
    """The photos of `folder` (searched to its depth), decoded into `cache`; picklable, so workers get a copy.

    The last `hold_out` photos by sha256 are `.validation` and never in `.training`; both are in order of sha256, so
    file names and the order of a folder don't matter. Files that can't be read, copies of another one and photos with a
    side below `smallest` are left out and listed in `.skipped`. A prompts file beside a photo brings its texts.
    TrainingError when nothing is left to train on, or more than the share `max_bad` of the photos can't be read;
    OutputError when the cache can't be written.
    """

    kind = "photos"
    erased = False

    def __init__(
        self,
        folder: Path,
        cache: Path,
        hold_out: int,
        smallest: int = 256,
        max_bad: float = 1.0,
        progress: Progress | None = None,
    ) -> None:
        self.cache = cache
        self.smallest = smallest
        self.max_bad = max_bad
        self.skipped: tuple[SkippedPhoto, ...] = ()
        self._texts: dict[tuple[str, int], str] = {}
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{cache}: {error.strerror}", "choose another folder for decoded photos") from error
        if not folder.is_dir():
            raise TrainingError(f"{folder}: no such folder", "give a folder of photos to train on")
        photos = self._decode_all(folder, progress or SilentProgress())
        check_split(folder, "photos", len(photos), len(self.skipped), len(photos), hold_out)
        split = len(photos) - hold_out
        self.training: Sequence[TrainingPhoto] = tuple(photos[:split])
        self.validation: Sequence[TrainingPhoto] = tuple(photos[split:])

    @property
    def data_sha256(self) -> str:
        """sha256 over the sorted sha256 of the training photos: what a bundle records."""
        return hashlib.sha256("\n".join(photo.sha256 for photo in self.training).encode()).hexdigest()

    @property
    def longest_short_side(self) -> int:
        """Short side of the largest photo to train on."""
        return max(min(photo.height, photo.width) for photo in self.training)

    def read(self, item: Item) -> Pictures:
        """The photo's pixels, mapped. `InputError` if it left the cache."""
        try:
            return Pictures(_own(item).read())
        except (OSError, ValueError) as error:
            raise InputError(f"{item.name}: its decoded copy is gone", "start the run again") from error

    def shrunk(self, item: Item, short_side: int) -> np.ndarray:
        """The photo with its short side at most `short_side` (Pillow's Lanczos), (P, Q, 3) uint8, cached too."""
        photo = _own(item)
        if short_side >= min(photo.height, photo.width):
            return photo.read()
        path = self.cache / f"{photo.sha256}.short{short_side}.npy"
        if not path.exists():
            _save(path, shrink(photo.read(), short_side))
        return _mapped(path)

    def texts(self, item: Item) -> ItemTexts | None:
        """Texts of the prompts file beside the photo."""
        return _own(item).words

    def global_text(self, photo: TrainingPhoto, turn: int, describer: Describer) -> str:
        """The describer's words for the whole photo under `turn` (see `turned`), computed once per photo and turn."""
        key = (photo.sha256, turn)
        if key not in self._texts:
            self._texts[key] = describe_whole(photo.read(), turn, describer)
        return self._texts[key]

    def _decode_all(self, folder: Path, progress: Progress) -> list[TrainingPhoto]:
        photos: dict[str, TrainingPhoto] = {}
        skipped = []
        paths = sorted(p for p in folder.rglob("*") if p.is_file() and is_photo_name(p))
        progress.phase("read photos", len(paths))
        for path in paths:
            name = path.relative_to(folder).as_posix()
            try:
                photo = _decode(path, name, self.cache)
            except InputError as error:
                skipped.append(SkippedPhoto(name, error.message))
                continue
            finally:
                progress.advance()
            if photo.sha256 in photos:
                skipped.append(SkippedPhoto(name, f"a copy of {photos[photo.sha256].name}", bad=False))
            elif min(photo.height, photo.width) < self.smallest:
                reason = f"{photo.width}x{photo.height}: a side is below {self.smallest}"
                skipped.append(SkippedPhoto(name, reason, bad=False))
            else:
                photos[photo.sha256] = photo
        self.skipped = tuple(skipped)
        check_bad(skipped, len(paths), self.max_bad)
        return [photos[sha256] for sha256 in sorted(photos)]


def describe_whole(rgb_PQC: np.ndarray, turn: int, describer: Describer) -> str:
    """The describer's words for a whole photo under `turn`."""
    small_PQC = np.asarray(Image.fromarray(rgb_PQC).reduce(DESCRIBED_SHRINK), np.float32) / 255
    return describer.describe(np.ascontiguousarray(turned(small_PQC, turn)))


def turned(rgb_PQC: np.ndarray, turn: int) -> np.ndarray:
    """One of the eight flips and quarter turns, `turn` from 0 (as it is) to 7; a view."""
    rgb_PQC = np.rot90(rgb_PQC, turn % 4)
    return rgb_PQC[:, ::-1] if turn >= 4 else rgb_PQC


def _own(item: Item) -> TrainingPhoto:
    assert isinstance(item, TrainingPhoto), "an item of another set"
    return item


def _decode(path: Path, name: str, cache: Path) -> TrainingPhoto:
    photo = open_photo(path)
    words = captions.beside(photo)
    height, width = photo.info.height, photo.info.width
    target = cache / f"{photo.sha256}.npy"
    if not target.exists():
        rgb_PQC = np.empty((height, width, 3), np.uint8)
        for top in range(0, height, STRIP):
            bottom = min(top + STRIP, height)
            rgb_PQC[top:bottom] = np.rint(photo.read_rows(top, bottom).clip(0, 1) * 255)
        _save(target, rgb_PQC)
    return TrainingPhoto(name, photo.sha256, height, width, target, words)


def _save(path: Path, array: np.ndarray) -> None:
    """Write `path` in one piece: processes that make the same file at once don't see halves of it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            np.save(stream, array)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError(f"{path}: {error.strerror or error}", "make room, or choose another cache folder") from error


@lru_cache(maxsize=1024)
def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")
