"""Training pairs as `dreamsr degrade` writes them: OUT/hq/NAME.png, OUT/lq/NAME.png, params.jsonl, captions.jsonl.

Pairs of kind texture have erased pictures of the good one's size in lq/; their bad version is made online, as joint
training wants it. A folder with hq/ and lq/ alone (anybody's pairs) is read too: pictures of equal size
count as erased.

Axes: P Q pixel rows and columns, C channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from dreamsr_cli.degradations.pair_records import PairRecord, read_records
from dreamsr_cli.errors import InputError, TrainingError
from dreamsr_cli.images import is_photo_name
from dreamsr_cli.progress import Progress, SilentProgress
from dreamsr_cli.training.captions import read_captions
from dreamsr_cli.training.sources import (
    Item,
    ItemTexts,
    Pictures,
    SkippedPhoto,
    check_bad,
    check_split,
    decode_rgb,
    hold_out_last,
    paired,
    shrink,
)

PARAMS, CAPTIONS, UNFINISHED = "params.jsonl", "captions.jsonl", "params.jsonl.part"
HQ, LQ = "hq", "lq"


@dataclass(frozen=True)
class TrainingPair:
    """One pair on disk."""

    name: str
    sha256: str
    """Of the good picture's file, or of its name where no record says it."""
    group: str
    """The photo it was cut from: pairs of one photo are held out together."""
    hq: Path
    lq: Path
    texture: bool
    """`lq` holds an erased picture instead of a bad one."""
    hq_sha256: str = ""
    """As recorded; "" where there is no record."""
    lq_sha256: str = ""
    words: ItemTexts | None = None


class PairSource:
    """The pairs of `folder`; the pairs of the last `hold_out` photos by sha256 are `.validation`.

    Pairs with a missing or damaged half, or a side below `smallest`, are left out and listed in `.skipped`. Files that
    no longer have their recorded sha256 are found when they are read. TrainingError when nothing is left to train on,
    too many pairs are bad (`max_bad`), the set is unfinished, or only some pairs are of kind texture.
    """

    kind = "pairs"
    longest_short_side = 0

    def __init__(
        self,
        folder: Path,
        hold_out: int,
        smallest: int = 256,
        max_bad: float = 1.0,
        progress: Progress | None = None,
    ) -> None:
        self.smallest, self.max_bad = smallest, max_bad
        listed = _listed(folder)
        usable, skipped = [], []
        progress = progress or SilentProgress()
        progress.phase("read pairs", len(listed))
        for pair in listed:
            try:
                height, width, texture = _sizes(pair)
            except InputError as error:
                skipped.append(SkippedPhoto(pair.name, error.message))
                continue
            finally:
                progress.advance()
            if min(height, width) < smallest:
                reason = f"{width}x{height}: a side is below {smallest}"
                skipped.append(SkippedPhoto(pair.name, reason, bad=False))
            else:
                usable.append(replace(pair, texture=texture))
        self.skipped: tuple[SkippedPhoto, ...] = tuple(skipped)
        check_bad(skipped, len(listed), max_bad)
        groups = [pair.group for pair in usable]
        check_split(folder, "pairs", len(usable), len(skipped), len(set(groups)), hold_out)
        if len({pair.texture for pair in usable}) > 1:
            raise TrainingError(
                f"{folder}: some pairs are of kind texture and some of kind pixel", "keep each kind in its own folder"
            )
        held = hold_out_last(groups, hold_out)
        usable.sort(key=lambda pair: (pair.sha256, pair.name))
        self.training: Sequence[TrainingPair] = tuple(pair for pair in usable if pair.group not in held)
        self.validation: Sequence[TrainingPair] = tuple(pair for pair in usable if pair.group in held)
        self.erased = usable[0].texture

    @property
    def data_sha256(self) -> str:
        """sha256 over the sorted hashes of the training pairs' files."""
        lines = (f"{pair.sha256} {pair.lq_sha256}" for pair in self.training)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def read(self, item: Item) -> Pictures:
        """Both pictures. `InputError` where one is damaged, altered or of another size."""
        assert isinstance(item, TrainingPair), "an item of another set"
        hq_PQC, other_PQC = _read(item.hq, item.hq_sha256), _read(item.lq, item.lq_sha256)
        if item.texture:
            return paired(item.name, hq_PQC, None, other_PQC)
        return paired(item.name, hq_PQC, other_PQC, None)

    def shrunk(self, item: Item, short_side: int) -> np.ndarray:
        """The good picture with its short side at most `short_side`."""
        return shrink(self.read(item).hq_PQC, short_side)

    def texts(self, item: Item) -> ItemTexts | None:
        """The pair's texts of captions.jsonl."""
        assert isinstance(item, TrainingPair), "an item of another set"
        return item.words


def is_pair_folder(folder: Path) -> bool:
    """Whether the folder is laid out as `dreamsr degrade` does."""
    return (
        (folder / PARAMS).is_file()
        or (folder / UNFINISHED).is_file()
        or (folder / HQ).is_dir()
        and (folder / LQ).is_dir()
    )


def _listed(folder: Path) -> list[TrainingPair]:
    words = read_captions(folder / CAPTIONS)
    if (folder / PARAMS).is_file():
        return [_recorded(folder, record, words) for record in read_records(folder / PARAMS)]
    if (folder / UNFINISHED).is_file():
        raise TrainingError(f"{folder}: its pairs are not finished", "run the same dreamsr degrade command again")
    found = []
    others = {path.stem: path for path in sorted((folder / LQ).iterdir()) if is_photo_name(path)}
    for path in sorted(p for p in (folder / HQ).iterdir() if p.is_file() and is_photo_name(p)):
        key = hashlib.sha256(path.name.encode()).hexdigest()
        lq = others.get(path.stem, folder / LQ / path.name)
        found.append(TrainingPair(path.stem, key, key, path, lq, False, words=words.get(path.stem)))
    return found


def _recorded(folder: Path, record: PairRecord, words: dict[str, ItemTexts]) -> TrainingPair:
    return TrainingPair(
        name=record.pair,
        sha256=record.hq_sha256 or hashlib.sha256(record.pair.encode()).hexdigest(),
        group=record.source.sha256,
        hq=folder / HQ / f"{record.pair}.png",
        lq=folder / LQ / f"{record.pair}.png",
        texture=record.settings.kind == "texture",
        hq_sha256=record.hq_sha256,
        lq_sha256=record.lq_sha256,
        words=words.get(record.pair),
    )


def _sizes(pair: TrainingPair) -> tuple[int, int, bool]:
    """(height, width, whether lq is an erased picture) from both headers. `InputError` where a half is missing."""
    sizes = []
    for path in (pair.hq, pair.lq):
        try:
            with Image.open(path) as opened:
                sizes.append(opened.size)
        except FileNotFoundError as error:
            raise InputError(f"{path} is missing", "make the pair anew") from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{path}: damaged, or no picture", "make the pair anew") from error
    (width, height), other = sizes
    if pair.hq_sha256:
        return height, width, pair.texture
    return height, width, other == (width, height)


def _read(path: Path, sha256: str) -> np.ndarray:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}", "make the pair anew") from error
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        raise InputError(f"{path}: not the file that was recorded (sha256)", "make the pair anew")
    return decode_rgb(data, str(path))
