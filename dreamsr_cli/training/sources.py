"""What a training set is to the code that cuts crops: items that are read by index, and words for them.

Three kinds of sets are recognised by `open_source`: a folder of photos (photos.py), the folder that `dreamsr degrade`
writes (pair_data.py), and WebDataset shards (shards.py). All are read at random by item, never streamed, so that
sample i of step s is the same whatever the number of processes (docs/decisions.md, Randomness).

Axes: P Q pixel rows and columns, C channels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dreamsr_cli.errors import InputError, TrainingError

MAX_BAD = 0.1
"""Largest share of a set's files that may be unreadable."""
FEWEST_READS = 50
"""Reads before the share of bad ones can stop a run."""
_NAMED = 3


class Item(Protocol):
    """One photo or pair of a set."""

    @property
    def name(self) -> str:
        """For people: a path below the folder, or shard and key."""
        ...

    @property
    def sha256(self) -> str:
        """What every draw about the item is keyed by."""
        ...


@dataclass(frozen=True)
class Pictures:
    """The pixels of one item, upright."""

    hq_PQC: np.ndarray
    """The good picture, uint8."""
    lq_PQC: np.ndarray | None = None
    """Its bad version, uint8, its sides those of the good one divided by one whole number; None: made online."""
    erased_PQC: np.ndarray | None = None
    """The good picture with its texture erased (image-to-image), uint8 of the same size; None: there is none."""

    @property
    def scale(self) -> int:
        """Sides of the good picture over those of the bad one; 1 where the bad one is made online."""
        return 1 if self.lq_PQC is None else self.hq_PQC.shape[0] // self.lq_PQC.shape[0]


@dataclass(frozen=True)
class ItemTexts:
    """Words for one item that its set brings along."""

    global_text: str
    """For the whole photo."""
    tiles: tuple[tuple[tuple[float, float, float, float], str], ...] = ()
    """((left, top, right, bottom), text), as shares of width and height."""

    def local_text(self, box: tuple[float, float, float, float]) -> str | None:
        """Text of the tile that covers most of `box` (shares of width and height), the first of equals; None where
        no tile covers any of it."""
        best, text = 0.0, None
        for tile, words in self.tiles:
            across, down = min(box[2], tile[2]) - max(box[0], tile[0]), min(box[3], tile[3]) - max(box[1], tile[1])
            if across > 0 and down > 0 and across * down > best * (1 + 1e-9):
                best, text = across * down, words
        return text


@dataclass(frozen=True)
class SkippedPhoto:
    """A file that looked like a photo and couldn't be used."""

    name: str
    reason: str
    bad: bool = True
    """It is damaged; False: a copy of another one, or too small."""


class Source(Protocol):
    """A training set; picklable, so that processes get copies of it."""

    kind: str
    """"photos", "pairs" or "shards"."""
    skipped: tuple[SkippedPhoto, ...]
    """What was left out when the set was opened."""
    smallest: int
    """Shortest side an item has at least; items that turn out smaller are passed over."""
    max_bad: float
    """Largest share of unreadable items."""

    @property
    def training(self) -> Sequence[Item]:
        """Items to train on."""
        ...

    @property
    def validation(self) -> Sequence[Item]:
        """Items held out."""
        ...

    @property
    def data_sha256(self) -> str:
        """Fingerprint of the items to train on."""
        ...

    @property
    def longest_short_side(self) -> int | None:
        """Short side of the largest whole photo; 0 for a set of pairs, None where it isn't known before reading."""
        ...

    @property
    def erased(self) -> bool:
        """Whether every item has an erased picture, as texture steps want it."""
        ...

    def read(self, item: Item) -> Pictures:
        """The item's pixels. `InputError` where it is damaged."""
        ...

    def shrunk(self, item: Item, short_side: int) -> np.ndarray:
        """The good picture with its short side at most `short_side` (never enlarged), (P, Q, 3) uint8."""
        ...

    def texts(self, item: Item) -> ItemTexts | None:
        """Words that the set brings along; None: they are the describer's. `InputError` where they are damaged."""
        ...


@dataclass
class BadLimit:
    """Counts unreadable items during a run and stops it when they are too many."""

    max_bad: float
    reads: int = 0
    found: dict[str, str] = field(default_factory=dict)
    """Reason by item's name."""
    _bad_reads: int = 0

    def count(self, good: int, bad: Sequence[SkippedPhoto]) -> list[SkippedPhoto]:
        """Take what one batch met; the bad ones that are new. `TrainingError` beyond the limit."""
        new = [photo for photo in {p.name: p for p in bad}.values() if photo.name not in self.found]
        self.found.update((photo.name, photo.reason) for photo in new)
        self.reads += good + len(bad)
        self._bad_reads += len(bad)
        if self._bad_reads > self.max_bad * max(self.reads, FEWEST_READS):
            raise too_many_bad(list(self.found.items()), f"{self._bad_reads} of {self.reads} reads", self.max_bad)
        return new


def too_many_bad(found: Sequence[tuple[str, str]], share: str, max_bad: float) -> TrainingError:
    """The error for a set with too many bad photos, the first of which are named."""
    named = "; ".join(f"{name}: {reason}" for name, reason in found[:_NAMED])
    more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return TrainingError(
        f"{share} failed, more than data.max_bad = {max_bad} allows ({named}{more})",
        "mend or remove these photos, or allow more with --set data.max_bad=0.5",
    )


def check_bad(skipped: Sequence[SkippedPhoto], total: int, max_bad: float) -> None:
    """`TrainingError` if too many of `total` files were damaged when a set was opened."""
    bad = [(photo.name, photo.reason) for photo in skipped if photo.bad]
    if len(bad) > max_bad * total:
        raise too_many_bad(bad, f"{len(bad)} of {total} photos", max_bad)


def decode_rgb(data: bytes, name: str) -> np.ndarray:
    """An encoded picture as upright RGB (P, Q, 3) uint8; `InputError` where it is damaged or no picture."""
    try:
        with Image.open(io.BytesIO(data)) as opened:
            return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"{name}: damaged, or no picture ({error})", "mend or remove it") from error


def paired(name: str, hq_PQC: np.ndarray, other_PQC: np.ndarray | None, erased_PQC: np.ndarray | None) -> Pictures:
    """The three pictures of one item, checked against each other. `InputError` where their sizes don't fit."""
    height, width = hq_PQC.shape[:2]
    if other_PQC is not None:
        rows, cols = other_PQC.shape[:2]
        scale = max(1, height // max(1, rows))
        if (rows * scale, cols * scale) != (height, width):
            raise InputError(f"{name}: {cols}x{rows} is no whole fraction of {width}x{height}", "make the pair anew")
    if erased_PQC is not None and erased_PQC.shape != hq_PQC.shape:
        raise InputError(
            f"{name}: the erased picture is {erased_PQC.shape[1]}x{erased_PQC.shape[0]}, not {width}x{height}",
            "make the pair anew",
        )
    return Pictures(hq_PQC, other_PQC, erased_PQC)


def shrink(rgb_PQC: np.ndarray, short_side: int) -> np.ndarray:
    """The picture with its short side at most `short_side` (Pillow's Lanczos), never enlarged."""
    factor = short_side / min(rgb_PQC.shape[:2])
    if factor >= 1:
        return rgb_PQC
    rows, cols = (round(n * factor) for n in rgb_PQC.shape[:2])
    return np.asarray(Image.fromarray(rgb_PQC).resize((cols, rows), Image.Resampling.LANCZOS))


def hold_out_last(groups: Sequence[str], hold_out: int) -> set[str]:
    """The last `hold_out` different groups in order: what is never trained on."""
    ordered = sorted(set(groups))
    return set(ordered[len(ordered) - hold_out :]) if hold_out else set()


def check_split(where: Path, kind: str, usable: int, skipped: int, groups: int, hold_out: int) -> None:
    """`TrainingError` when nothing would be left to train on."""
    if groups <= hold_out:
        raise TrainingError(
            f"{where}: {usable} usable {kind} of {groups} photos ({skipped} skipped), {hold_out} photos held out",
            "add photos, or hold out fewer: --set data.hold_out=0",
        )
