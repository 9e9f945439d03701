"""One task of a pair set: some crops are cut, degraded, described and written.

Axes: B batch, C channels, P Q pixel rows and columns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from dreamsr_cli.degradations import pixel
from dreamsr_cli.degradations.erasure_params import draw_erasure
from dreamsr_cli.degradations.pair_folder import SIDES, FinishedPair, write_picture
from dreamsr_cli.degradations.pair_records import PairRecord, PairSettings, Source, Versions, crop_box
from dreamsr_cli.errors import InputError, OutputError
from dreamsr_cli.images import Photo, open_photo
from dreamsr_cli.models.captioner import CellMeans, Describer
from dreamsr_cli.progress import Progress
from dreamsr_cli.prompts import CaptionerId, PhotoId, PromptPlan, TilePrompt
from dreamsr_cli.worker_pool import stop_asked

if TYPE_CHECKING:
    from dreamsr_cli.degradations.texture_erasure import Eraser

_STRIP_ROWS = 256


@dataclass(frozen=True)
class PairPlan:
    """One pair to make, or to keep."""

    name: str
    source: Source
    index: int
    """Crop index."""
    settings: PairSettings
    recorded: PairRecord | None = None
    """With `--replay`: the record to follow."""
    earlier: FinishedPair | None = None
    """What an earlier run left."""


@dataclass(frozen=True)
class MadePair:
    """One finished pair."""

    name: str
    finished: FinishedPair
    new: bool
    """False: files of an earlier run were found to be right."""
    differs: bool = False
    """A replayed pair whose bytes are not the recorded ones."""


@dataclass(frozen=True)
class TaskResult:
    """What became of a task: one entry per plan in their order, fewer only if the work is no longer wanted."""

    outcomes: tuple[tuple[PairPlan, MadePair | tuple[str, str]], ...]
    """A pair, or message and hint of why the photo gives none."""
    fatal: tuple[str, str] | None = None
    """Message and hint of what every photo would meet, such as a full disk."""


class PairMaker:
    """Makes pairs below `out`, in any process. `eraser`: for kind texture; `progress` hears what it does."""

    def __init__(self, out: Path, eraser: Eraser | None = None, progress: Progress | None = None) -> None:
        self.out, self.eraser, self.progress = out, eraser, progress
        self.versions = Versions()

    def make(self, plans: Sequence[PairPlan]) -> TaskResult:
        """All pairs of a task: crops of any photos, those of one photo side by side."""
        done: list[tuple[PairPlan, MadePair | tuple[str, str]]] = []
        together = 1 if self.eraser is None else len(plans)
        try:
            for first in range(0, len(plans), together):
                if stop_asked():
                    break
                done += self._make_together(plans[first : first + together])
        except OutputError as error:
            return TaskResult(tuple(done), (error.message, error.hint))
        return TaskResult(tuple(done))

    def _make_together(self, plans: Sequence[PairPlan]) -> list[tuple[PairPlan, MadePair | tuple[str, str]]]:
        outcomes: dict[str, MadePair | tuple[str, str]] = {}
        cut: list[tuple[PairPlan, PairRecord, np.ndarray, str | None]] = []
        for plan in plans:
            try:
                record = self._record(plan)
                if plan.earlier is not None and self._is_right(plan, plan.earlier, record):
                    outcomes[plan.name] = MadePair(plan.name, plan.earlier, new=False)
                    continue
                photo = _opened(plan.source)
                hq_PQC = photo.crop(record)
                cut.append((plan, _with_prompt(record, hq_PQC), hq_PQC, photo.text(record.settings.captioner)))
            except InputError as error:
                outcomes[plan.name] = (error.message, error.hint)
        lq = self._degrade([hq_PQC for _, _, hq_PQC, _ in cut], [record for _, record, _, _ in cut])
        for (plan, record, hq_PQC, text), lq_PQC in zip(cut, lq, strict=True):
            outcomes[plan.name] = self._write(plan, record, hq_PQC, lq_PQC, text)
        return [(plan, outcomes[plan.name]) for plan in plans]

    def _record(self, plan: PairPlan) -> PairRecord:
        """The record before anything is made: no hashes, and no prompt unless it is replayed."""
        if plan.recorded is not None:
            return replace(plan.recorded, lq_sha256="", hq_sha256="", versions=self.versions)
        settings, source = plan.settings, plan.source.id
        drawn = erasure = None
        if settings.preset is None:
            erasure = draw_erasure(settings.seed, source.sha256, plan.index)
        else:
            drawn = pixel.draw(
                settings.preset, settings.seed, source.sha256, plan.index, settings.scale, settings.sharpen
            )
        box = crop_box(source, settings, plan.index)
        return PairRecord(plan.name, source, plan.index, box, settings, drawn, erasure, None, self.versions)

    def _is_right(self, plan: PairPlan, earlier: FinishedPair, record: PairRecord) -> bool:
        """Whether an earlier run made this very pair, and its files are unharmed."""
        if (earlier.caption is None) != (record.settings.captioner == "none"):
            return False
        found, wanted = json.loads(earlier.line), json.loads(record.to_line())
        sums = found.get("lq_sha256"), found.get("hq_sha256")
        later = ["lq_sha256", "hq_sha256", "versions"] + (["prompt"] if record.prompt is None else [])
        if any(found.get(key) != value for key, value in wanted.items() if key not in later):
            return False
        if plan.recorded is not None and sums != (plan.recorded.lq_sha256, plan.recorded.hq_sha256):
            return False
        files = [self.out / side / f"{plan.name}.png" for side in SIDES]
        return all(_file_sha256(file) == sha256 for file, sha256 in zip(files, sums, strict=True))

    def _degrade(self, good: Sequence[np.ndarray], records: Sequence[PairRecord]) -> list[np.ndarray]:
        """Bad pictures (P, Q, 3) uint8 for good ones."""
        hq = [torch.from_numpy(hq_PQC.transpose(2, 0, 1).astype(np.float32) / 255) for hq_PQC in good]
        lq: dict[int, torch.Tensor] = {}
        for index, record in enumerate(records):
            if record.pixel is not None:
                lq[index] = pixel.degrade(hq[index], record.pixel)
        erased = [index for index, record in enumerate(records) if record.texture is not None]
        for shape in sorted({tuple(hq[index].shape) for index in erased}):
            group = [index for index in erased if tuple(hq[index].shape) == shape]
            assert self.eraser is not None, "kind texture without networks"
            out_BCPQ = self.eraser.erase(
                torch.stack([hq[index] for index in group]),
                [params for index in group if (params := records[index].texture) is not None],
                [records[index].prompt or "" for index in group],
                self.progress,
            )
            lq.update(zip(group, out_BCPQ, strict=True))
        return [np.ascontiguousarray(_levels(lq[index]).numpy().transpose(1, 2, 0)) for index in range(len(records))]

    def _write(
        self, plan: PairPlan, record: PairRecord, hq_PQC: np.ndarray, lq_PQC: np.ndarray, text: str | None
    ) -> MadePair:
        """Both files, and what is remembered of them. `text`: for the whole photo, where there is a captioner."""
        lq_sha256, hq_sha256 = (
            hashlib.sha256(write_picture(self.out / side / f"{plan.name}.png", Image.fromarray(x_PQC))).hexdigest()
            for side, x_PQC in zip(SIDES, (lq_PQC, hq_PQC), strict=True)
        )
        record = replace(record, lq_sha256=lq_sha256, hq_sha256=hq_sha256)
        old = plan.recorded
        differs = old is not None and (old.lq_sha256, old.hq_sha256) != (lq_sha256, hq_sha256)
        caption = None if text is None else _caption(record, hq_PQC, text)
        return MadePair(plan.name, FinishedPair(record.to_line(), caption), True, differs)


class _OpenPhoto:
    """A decoded photo, and the words for it."""

    def __init__(self, photo: Photo) -> None:
        self.photo = photo
        self._text: str | None = None

    def crop(self, record: PairRecord) -> np.ndarray:
        """The good crop (P, Q, 3) uint8, sharpened where the settings say so."""
        left, top, right, bottom = record.box
        info = self.photo.info
        if not (0 <= left < right <= info.width and 0 <= top < bottom <= info.height):
            raise InputError(f"{record.pair}: its box {record.box} lies outside the photo", "correct params.jsonl")
        rgb_PQC = np.ascontiguousarray(self.photo.read_rows(top, bottom)[:, left:right])
        hq_CPQ = torch.from_numpy(rgb_PQC).permute(2, 0, 1).contiguous()
        if record.settings.sharpen:
            # from 8 bits, as training's own crops are
            hq_CPQ = pixel.sharpen(_levels(hq_CPQ).float() / 255)
        return np.ascontiguousarray(_levels(hq_CPQ).numpy().transpose(1, 2, 0))

    def text(self, captioner: str) -> str | None:
        """Words for the whole photo; None without a captioner."""
        if captioner == "none":
            return None
        if self._text is None:
            info = self.photo.info
            cells = CellMeans(info.height, info.width)
            for top in range(0, info.height, _STRIP_ROWS):
                cells.add(self.photo.read_rows(top, min(top + _STRIP_ROWS, info.height)))
            self._text = Describer().look_at_cells(cells.mean_PQC).sentence()
        return self._text


@lru_cache(maxsize=1)
def _opened(source: Source) -> _OpenPhoto:
    """The photo; tasks of one photo follow one another, so one is remembered."""
    photo = open_photo(source.path)
    if photo.sha256 != source.id.sha256:
        raise InputError(f"{source.path}: changed while pairs were made", "run the same command again")
    return _OpenPhoto(photo)


def _with_prompt(record: PairRecord, hq_PQC: np.ndarray) -> PairRecord:
    """P_img of kind texture: the captioner's words for the crop."""
    if record.settings.kind == "pixel" or record.prompt is not None:
        return record
    return replace(record, prompt="" if record.settings.captioner == "none" else _describe(hq_PQC))


def _caption(record: PairRecord, hq_PQC: np.ndarray, global_text: str) -> str:
    """The pair's line of captions.jsonl: the good crop is the photo, and one tile covers it."""
    height, width = hq_PQC.shape[:2]
    plan = PromptPlan(
        photo=PhotoId(f"{record.pair}.png", record.hq_sha256, width, height),
        canvas=(width, height),
        tile=max(width, height),
        overlap=0,
        global_text=global_text,
        global_source=record.settings.captioner,
        tiles=(TilePrompt((0, 0, width, height), _describe(hq_PQC)),),
        captioner=CaptionerId(Describer.name, Describer.revision),
    )
    return json.dumps(plan.to_json())


def _describe(hq_PQC: np.ndarray) -> str:
    return Describer().describe(hq_PQC.astype(np.float32) / 255)


def _levels(x_CPQ: torch.Tensor) -> torch.Tensor:
    return (x_CPQ.clamp(0, 1) * 255).round().to(torch.uint8)


def _file_sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
