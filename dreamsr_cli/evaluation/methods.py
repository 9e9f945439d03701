"""Whose results are scored: this program's, two plain baselines', or a folder of somebody's outputs.

Results made here lie in OUT/sr/METHOD/NAME.png; NAME.json beside each says what it was made from, in how long.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image

from dreamsr_cli import __version__
from dreamsr_cli.config import OutputConfig, UpscaleConfig
from dreamsr_cli.device import choose_device, choose_dtype, dtype_name
from dreamsr_cli.errors import InputError
from dreamsr_cli.evaluation.datasets import Pair, find_result, photos_by_stem
from dreamsr_cli.evaluation.memory_peak import measure_peak
from dreamsr_cli.images import open_photo
from dreamsr_cli.journal import journal_folder
from dreamsr_cli.models.bundle import Bundle
from dreamsr_cli.plain_data import to_dict
from dreamsr_cli.progress import Progress
from dreamsr_cli.resample import resize
from dreamsr_cli.settings import check_settings
from dreamsr_cli.tiling import TileGrid, canvas_size, make_grid
from dreamsr_cli.weights import file_sha256

if TYPE_CHECKING:
    from dreamsr_cli.engine import Engine

BASELINES = {
    "bicubic": "antialiased cubic (MATLAB's imresize), clipped and rounded to 8 bits",
    "lanczos": "Pillow's LANCZOS on 8 bits",
}


@dataclass(frozen=True)
class Made:
    """A result, and what making it took."""

    path: Path
    seconds: float | None
    """None where it wasn't made here, or in several runs after an interruption."""
    peak_bytes: int | None


class Method(Protocol):
    """Something that has or makes a result for each photo."""

    @property
    def name(self) -> str:
        """Name in tables; also of its folder."""
        ...

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """What decides its results, one by one, JSON-able."""
        ...

    def grid(self, width: int, height: int) -> TileGrid | None:
        """The tiles that a result of this size is made in, for the seam score; None where nobody knows."""
        ...

    def opened(self, photos: int) -> AbstractContextManager[None]:
        """Inside, `photos` results are asked for one after the other: what they share stays open meanwhile."""
        ...

    def result(self, pair: Pair, folder: Path, progress: Progress) -> Made:
        """The result for `pair`, made in `folder` if it isn't there. Raises `DreamSRError`."""
        ...


@dataclass(frozen=True, eq=False)
class Baseline:
    """Plain resampling."""

    name: str
    """"bicubic" or "lanczos"."""
    scale: float

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        return {"kind": self.name, "what": BASELINES[self.name], "scale": self.scale}

    def grid(self, width: int, height: int) -> TileGrid | None:
        return None

    def opened(self, photos: int) -> AbstractContextManager[None]:
        return nullcontext()

    def result(self, pair: Pair, folder: Path, progress: Progress) -> Made:
        target = folder / f"{pair.name}.png"
        if (known := _read_record(target, pair)) is not None:
            return known
        began = time.monotonic()
        with measure_peak(torch.device("cpu")) as peak, open_photo(pair.lq) as photo:
            width, height = canvas_size(photo.info.width, photo.info.height, scale=self.scale)
            rgb_PQC = photo.read_rows(0, photo.info.height)
            if self.name == "bicubic":
                enlarged = resize(torch.tensor(rgb_PQC, dtype=torch.float64).permute(2, 0, 1), height, width)
                levels_PQC = to_levels(enlarged.permute(1, 2, 0).numpy())
            else:
                small = Image.fromarray(to_levels(rgb_PQC))
                levels_PQC = np.asarray(small.resize((width, height), Image.Resampling.LANCZOS))
            _save_png(levels_PQC, target)
        return _write_record(target, pair, time.monotonic() - began, peak.bytes)


@dataclass(eq=False)
class Upscaled:
    """This program's own results."""

    name: str
    bundle: Bundle
    config: UpscaleConfig
    _closing: ExitStack = field(default_factory=ExitStack, init=False)
    _photos: int = field(default=1, init=False)
    _engine: Engine | None = field(default=None, init=False)

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        settings = check_settings(self.config, self.bundle)
        device = choose_device(settings.device)
        dtype = dtype_name(choose_dtype(settings.precision, device))
        chosen = dataclasses.replace(settings, device=device.type, precision=dtype)
        versions = {"torch": torch.__version__, "dreamsr": __version__, "threads": torch.get_num_threads()}
        return {"kind": "upscale", "bundle_sha256": self.bundle.sha256, **to_dict(chosen), **versions}

    def grid(self, width: int, height: int) -> TileGrid | None:
        settings = check_settings(self.config, self.bundle)
        return make_grid(height, width, settings.tile, settings.overlap)

    @contextmanager
    def opened(self, photos: int) -> Generator[None]:
        self._photos = photos
        try:
            with ExitStack() as self._closing:
                yield
        finally:
            self._engine = None

    def result(self, pair: Pair, folder: Path, progress: Progress) -> Made:
        from dreamsr_cli.engine import Engine, Order

        target = folder / f"{pair.name}.png"
        if (known := _read_record(target, pair)) is not None:
            return known
        resumed = journal_folder(target).exists()
        output = OutputConfig(format="png", bit_depth="8", overwrite=True)
        with measure_peak(choose_device(self.config.device)) as peak:
            # Opened by the first photo that has no result yet: an evaluation that only scores needs no networks.
            if self._engine is None:
                self._engine = self._closing.enter_context(Engine(self.bundle, self.config, output, self._photos))
            made = self._engine.upscale(Order(pair.lq, target), progress)
        return _write_record(target, pair, None if resumed else made.seconds, peak.bytes)


@dataclass(frozen=True, eq=False)
class Foreign:
    """A folder of results from elsewhere, found by name."""

    name: str
    folder: Path
    names: frozenset[str]
    """Stems of all photos of the set."""

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        return {"kind": "sr-dir", "folder": str(self.folder.resolve())}

    def grid(self, width: int, height: int) -> TileGrid | None:
        return None

    def opened(self, photos: int) -> AbstractContextManager[None]:
        return nullcontext()

    def result(self, pair: Pair, folder: Path, progress: Progress) -> Made:
        found = find_result(photos_by_stem(self.folder), pair.name, self.names)
        if found is None:
            raise InputError(
                f"{self.folder} has no result for {pair.name}", f"name it {pair.name}.png (or {pair.name}_SUFFIX.png)"
            )
        return Made(found, None, None)


def to_levels(rgb_PQC: np.ndarray) -> np.ndarray:
    """[0, 1] as uint8, clipped, rounded half up."""
    return np.floor(np.clip(rgb_PQC, 0, 1) * 255 + 0.5).astype(np.uint8)


def _record_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


def _read_record(target: Path, pair: Pair) -> Made | None:
    """What an earlier run made, if it is whole and of the same photo."""
    try:
        record = json.loads(_record_path(target).read_text(encoding="utf-8"))
        whole = record["lq_sha256"] == file_sha256(pair.lq) and record["sr_sha256"] == file_sha256(target)
        return Made(target, record["seconds"], record["peak_bytes"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_record(target: Path, pair: Pair, seconds: float | None, peak_bytes: int | None) -> Made:
    seconds = None if seconds is None else round(seconds, 3)
    record = {
        "lq_sha256": file_sha256(pair.lq),
        "sr_sha256": file_sha256(target),
        "seconds": seconds,
        "peak_bytes": peak_bytes,
    }
    write_text(_record_path(target), json.dumps(record) + "\n")
    return Made(target, seconds, peak_bytes)


def _save_png(levels_PQC: np.ndarray, target: Path) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".dreamsr-", suffix=".png")
    try:
        with os.fdopen(handle, "wb") as stream:
            Image.fromarray(levels_PQC).save(stream, "PNG")
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path` by `text` at once, or leave it as it was."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
