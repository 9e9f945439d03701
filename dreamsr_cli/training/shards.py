"""WebDataset shards: .tar files whose members are KEY.EXT, for sets that don't fit a folder of decoded photos.

Read with the standard library: one pass over a shard's headers makes an index (kept in the cache), after which any
sample is one `pread`. The `webdataset` package streams shards through shuffle buffers, so its order depends on
processes and workers; here sample i of step s has to be the same for any number of them, which needs random access.

A sample: KEY.jpg (or png, webp) or KEY.hq.png, the good picture; optionally KEY.lq.png, its bad version;
KEY.erased.png, its i2i version; KEY.json, a prompts object or one with `caption`; KEY.txt, a caption. Nothing is
decoded at the start, so bad samples are met on the way.

Axes: P Q pixel rows and columns, C channels.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dreamsr_cli.errors import InputError, TrainingError
from dreamsr_cli.progress import Progress, SilentProgress
from dreamsr_cli.training.captions import of_data
from dreamsr_cli.training.sources import (
    Item,
    ItemTexts,
    Pictures,
    SkippedPhoto,
    check_split,
    decode_rgb,
    hold_out_last,
    paired,
    shrink,
)

PICTURES = ("png", "jpg", "jpeg", "webp")
GOOD, BAD, ERASED = "hq", "lq", "erased"
_INDEX_FORMAT = 1

Span = tuple[int, int]
"""(offset, size) of a member's bytes in its shard."""


@dataclass(frozen=True)
class ShardSample:
    """One sample of a shard."""

    shard: int
    """Index into `ShardSource.shards`."""
    name: str
    """Shard and key."""
    sha256: str
    """Of the name."""
    members: dict[str, Span]
    """Where "hq", "lq", "erased", "json" and "txt" lie."""


class ShardSource:
    """The samples of all shards in `folder` (or of the one shard it names), in the order of shards and keys.

    The last `hold_out` samples by the sha256 of their names are `.validation`. TrainingError when there is nothing to
    train on, or a shard is compressed, damaged or changed.
    """

    kind = "shards"
    longest_short_side = None

    def __init__(
        self,
        folder: Path,
        cache: Path,
        hold_out: int,
        smallest: int = 256,
        max_bad: float = 1.0,
        progress: Progress | None = None,
    ) -> None:
        self.smallest, self.max_bad = smallest, max_bad
        self.shards = list_shards(folder)
        samples: list[ShardSample] = []
        skipped: list[SkippedPhoto] = []
        self._stamps = []
        progress = progress or SilentProgress()
        progress.phase("read shards", len(self.shards))
        for number, path in enumerate(self.shards):
            self._stamps.append(_stamp(path))
            for key, members in _index(path, cache).items():
                name = f"{path.name}:{key}"
                if GOOD not in members:
                    skipped.append(SkippedPhoto(name, "it has no picture", bad=False))
                    continue
                digest = hashlib.sha256(name.encode()).hexdigest()
                samples.append(ShardSample(number, name, digest, {k: (o, s) for k, (o, s) in members.items()}))
            progress.advance()
        self.skipped: tuple[SkippedPhoto, ...] = tuple(skipped)
        check_split(folder, "samples", len(samples), len(skipped), len(samples), hold_out)
        held = hold_out_last([sample.sha256 for sample in samples], hold_out)
        self.training: Sequence[ShardSample] = tuple(s for s in samples if s.sha256 not in held)
        self.validation: Sequence[ShardSample] = tuple(s for s in samples if s.sha256 in held)
        self.erased = all(ERASED in sample.members for sample in samples)

    @property
    def data_sha256(self) -> str:
        """sha256 over names and sizes of all members: reading every byte of such a set would take hours."""
        digest = hashlib.sha256()
        for sample in self.training:
            sizes = {kind: size for kind, (_, size) in sorted(sample.members.items())}
            digest.update(f"{sample.name} {json.dumps(sizes)}\n".encode())
        return digest.hexdigest()

    def read(self, item: Item) -> Pictures:
        """The sample's pictures. `InputError` where one is damaged."""
        sample = _own(item)
        made = {
            kind: decode_rgb(self._bytes(sample, kind), f"{sample.name}.{kind}")
            for kind in (GOOD, BAD, ERASED)
            if kind in sample.members
        }
        return paired(sample.name, made[GOOD], made.get(BAD), made.get(ERASED))

    def shrunk(self, item: Item, short_side: int) -> np.ndarray:
        """The good picture with its short side at most `short_side`."""
        sample = _own(item)
        return shrink(decode_rgb(self._bytes(sample, GOOD), sample.name), short_side)

    def texts(self, item: Item) -> ItemTexts | None:
        """Texts of KEY.json, else KEY.txt. `InputError` where they are damaged."""
        sample = _own(item)
        try:
            if "json" in sample.members:
                data = json.loads(self._bytes(sample, "json"))
                if (found := of_data(data, f"{sample.name}.json")) is not None:
                    return found
            if "txt" in sample.members:
                return ItemTexts(" ".join(self._bytes(sample, "txt").decode("utf-8").split()))
        except ValueError as error:
            raise InputError(f"{sample.name}: its text can't be read ({error})", "write it anew as UTF-8") from error
        return None

    def _bytes(self, sample: ShardSample, kind: str) -> bytes:
        path, (offset, size) = self.shards[sample.shard], sample.members[kind]
        try:
            if _stamp(path) != self._stamps[sample.shard]:
                raise TrainingError(f"{path} changed while it was trained on", "start the run again with --resume")
            handle = os.open(path, os.O_RDONLY)
            try:
                data = os.pread(handle, size, offset)
            finally:
                os.close(handle)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}", "check the disk") from error
        if len(data) != size:
            raise InputError(f"{sample.name}: cut short", "copy the shard anew")
        return data


def list_shards(path: Path) -> list[Path]:
    """The shard itself, or the .tar files directly in a folder, by name. `TrainingError` for compressed ones."""
    if path.is_file():
        return [path]
    packed = sorted(p.name for p in path.iterdir() if p.name.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2")))
    if packed:
        raise TrainingError(
            f"{path}: {packed[0]} is compressed, and a sample can't be read from its middle",
            "unpack the shards to plain .tar: pictures in them are compressed already",
        )
    return sorted(p for p in path.iterdir() if p.suffix == ".tar" and p.is_file())


def has_shards(path: Path) -> bool:
    """Whether `open_source` should read shards there."""
    names = [path.name] if path.is_file() else [p.name for p in path.iterdir()] if path.is_dir() else []
    return any(name.endswith((".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.bz2")) for name in names)


def _own(item: Item) -> ShardSample:
    assert isinstance(item, ShardSample), "an item of another set"
    return item


def _stamp(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def _index(path: Path, cache: Path) -> dict[str, dict[str, Span]]:
    """Members by key, from the cache where the shard has not changed since."""
    stamp = list(_stamp(path))
    store = cache / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.shard.json"
    with suppress(OSError, ValueError):
        known = json.loads(store.read_text(encoding="utf-8"))
        if isinstance(known, dict) and known.get("stamp") == [_INDEX_FORMAT, *stamp]:
            return known["members"]
    members = _scan(path)
    # An index that can't be kept costs the next run a scan, nothing else.
    with suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        part = store.with_name(f"{store.name}.{os.getpid()}.part")
        part.write_text(json.dumps({"stamp": [_INDEX_FORMAT, *stamp], "members": members}), encoding="utf-8")
        os.replace(part, store)
    return members


def _scan(path: Path) -> dict[str, dict[str, Span]]:
    found: dict[str, dict[str, Span]] = {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                kind = _kind(member.name) if member.isreg() else None
                if kind is not None:
                    found.setdefault(kind[0], {})[kind[1]] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise TrainingError(f"{path}: not a plain .tar file, or damaged ({error})", "copy the shard anew") from error
    return found


def _kind(name: str) -> tuple[str, str] | None:
    """(key, what it is) of a member: the key ends at the first dot of the file name, as WebDataset has it."""
    folder, _, file = name.removeprefix("./").rpartition("/")
    stem, _, ending = file.partition(".")
    key, ending = (f"{folder}/{stem}" if folder else stem), ending.lower()
    if not stem:
        return None
    if ending in ("json", "txt"):
        return key, ending
    for kind in (GOOD, BAD, ERASED):
        if ending in tuple(f"{kind}.{picture}" for picture in PICTURES):
            return key, kind
    return (key, GOOD) if ending in PICTURES else None
