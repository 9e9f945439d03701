"""One photo on its way through the engine, in three turns: read (decode, plan, describe), compute, write (encode).

Only computing needs the networks' device, so the others may run beside the computing of other photos.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dreamsr_cli import __version__
from dreamsr_cli.canvas import EnlargedPhoto
from dreamsr_cli.captioning import Captioner
from dreamsr_cli.config import OutputConfig
from dreamsr_cli.images import Photo, open_photo
from dreamsr_cli.journal import Journal, journal_folder
from dreamsr_cli.models.autoencoder import STRIDE
from dreamsr_cli.models.bundle import Bundle
from dreamsr_cli.photo_writer import PhotoWriter, check_canvas
from dreamsr_cli.plain_data import to_dict
from dreamsr_cli.planning import Plan, record_efficiency
from dreamsr_cli.progress import Progress
from dreamsr_cli.prompts import PromptPlan, photo_id
from dreamsr_cli.prompts_file import write_prompts
from dreamsr_cli.prompts_in_use import GivenPrompts, give_prompts, make_prompts, place_to_save
from dreamsr_cli.resample import KeptStrips
from dreamsr_cli.sampler import PIXELS
from dreamsr_cli.settings import Settings
from dreamsr_cli.work_sharing import Crew

CAPTIONS_FILE = "captions.jsonl"
"""In the journal: what the captioner has said so far."""


@dataclass(frozen=True)
class Order:
    """What is asked for one photo."""

    photo: Path
    out: Path
    prompts: Path | None = None
    """A file with this photo's prompts, which the captioner then doesn't make."""


UNSEEN = ("memory", "tile_auto", "fit_batch")
"""Settings that say how others were chosen, and decide no byte themselves."""


@dataclass(frozen=True)
class UpscaleResult:
    """What was made, and everything needed to make it again."""

    input: Path
    output: Path
    source_width: int
    source_height: int
    width: int
    height: int
    tiles: int
    settings: Settings
    model: str
    bundle_sha256: str
    global_prompt: str
    prompts: Path | None
    saved_prompts: Path | None
    notes: tuple[str, ...]
    seconds: float
    """Of this photo's own turns."""

    def to_json(self) -> dict[str, Any]:
        """One flat JSON object; sizes in pixels, `scale` the factor reached."""
        plain = to_dict(self)
        settings = plain.pop("settings")
        for name in ("long_side", "short_side", "prompt", "fit_batch"):
            settings.pop(name)
        settings["scale"] = round(self.width / self.source_width, 4)
        plain["seconds"] = round(self.seconds, 3)
        return {**plain, **settings, "version": __version__}


class PhotoJob:
    """An open photo with its plan, its texts and its journal; a context manager.

    `write` ends it well; left otherwise it keeps its journal, if work is in it, and the same order goes on there.
    """

    def __init__(
        self,
        order: Order,
        photo: Photo,
        work: Plan,
        given: GivenPrompts,
        settings: Settings,
        bundle: Bundle,
        output: OutputConfig,
        journal: Journal,
        saved: Path | None,
        files: ExitStack,
    ) -> None:
        self.order, self.photo, self.work, self.given = order, photo, work, given
        self.settings, self.bundle, self.output, self.journal = settings, bundle, output, journal
        self.grid = work.grid
        self.enlarged = EnlargedPhoto(photo, work.width, work.height)
        self.notes = [*photo.notes, *given.notes]
        self.late_notes = [*photo.notes]
        """Told once the photo is computed."""
        self.seconds = 0.0
        self.cleaned: KeptStrips | None = None
        """What the cleaner made of the photo, where it is small enough to be kept until it is read again."""
        self._writer: PhotoWriter | None = None
        self.plan: PromptPlan
        self._saved, self._files = saved, files
        files.push(self._save_prompts)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the canvas' latent."""
        return (
            self.bundle.config.latent.channels,
            self.grid.canvas_height // STRIDE,
            self.grid.canvas_width // STRIDE,
        )

    @contextmanager
    def timed(self) -> Generator[None]:
        """What runs inside counts as this photo's time."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - began

    def describe(
        self,
        device: torch.device,
        progress: Progress,
        captioner: Captioner | None,
        ready: PromptPlan | None,
        crew: Crew | None = None,
    ) -> None:
        """Settle the photo's texts: the journal's; else `ready`, made earlier; else what was given and the captioner's
        (None: one is opened and freed here), in which `crew` share."""
        captions = self.journal.folder / CAPTIONS_FILE
        work, journal = self.work, self.journal
        make = partial(
            make_prompts, self.photo, work.grid, work.width, work.height, self.given, self.settings, device, captions
        )
        try:
            found = journal.text(lambda: (ready or make(progress, captioner, crew)).to_json())
        finally:
            # Captions made before an error are worth keeping.
            if captions.exists():
                journal.worked()
        self.plan = PromptPlan.from_json(found)

    def open_writer(self) -> PhotoWriter:
        """Where finished rows go, the same one each time; its file is encoded by `write`."""
        if self._writer is not None:
            return self._writer
        batch = self.journal.tile_batch(self.settings.tile_batch)
        self.settings = dataclasses.replace(self.settings, tile_batch=batch)
        writer = PhotoWriter(
            self.order.out,
            self.photo.info,
            self.work.width,
            self.work.height,
            self.work.format,
            self.output.quality,
            bit_depth=self.output.bit_depth,
            strip_metadata=self.output.strip_metadata,
            raw=self.journal.pixels,
            rows_done=self.rows_written,
            made_by=_made_by(self.settings, self.bundle, self.plan),
        )
        self.notes += writer.notes
        self.late_notes += writer.notes
        self._writer = self._files.enter_context(writer)
        return self._writer

    @property
    def is_enlarged_only(self) -> bool:
        """Whether cleaner or enlarger alone make the result: no texture is asked for, or none of it kept."""
        settings = self.settings
        return bool(settings.enlarger or settings.cleaner) and not (settings.strength and settings.texture)

    @property
    def keeps_to_enlarger(self) -> bool:
        """Whether consistency is with what the enlarger made of the photo: for a compressed one."""
        settings = self.settings
        return bool(settings.enlarger and settings.consistency) and settings.looks == "compressed"

    @property
    def rows_written(self) -> int:
        """Rows of the result that are in the journal."""
        return self.journal.progress(PIXELS)

    def write(self) -> UpscaleResult:
        """Encode the result, move it into place, drop the journal. Raises `OutputError`; the journal then stays."""
        with self.timed():
            self._files.close()
        if not self.journal.resumed:
            record_efficiency(self.work, self.seconds)
        info = self.photo.info
        return UpscaleResult(
            input=self.order.photo,
            output=self.order.out,
            source_width=info.width,
            source_height=info.height,
            width=self.work.width,
            height=self.work.height,
            tiles=len(self.grid.tiles),
            settings=self.settings,
            model=self.bundle.config.name,
            bundle_sha256=self.bundle.sha256,
            global_prompt=self.plan.global_text,
            prompts=self.order.prompts,
            saved_prompts=self._saved,
            notes=tuple(self.notes),
            seconds=self.seconds,
        )

    def leave(self) -> None:
        """Put the job aside, as an interruption would: its journal stays if work is in it."""
        self._files.__exit__(InterruptedError, InterruptedError("put aside"), None)

    def handed_on(self) -> PhotoJob:
        """The same job for another owner; leaving this one then does nothing."""
        other = copy.copy(self)
        other._files = self._files.pop_all()
        return other

    def __enter__(self) -> PhotoJob:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.leave()
        else:
            self._files.__exit__(kind, error, traceback)

    def _save_prompts(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._saved is not None:
            write_prompts(self._saved, self.plan)


def read_photo(
    order: Order,
    plan_for: Callable[[Photo], tuple[Plan, Settings]],
    bundle: Bundle,
    output: OutputConfig,
    threads: int,
    progress: Progress,
) -> PhotoJob:
    """Decode the photo, plan it, and open its journal, all of which the job then owns.

    Raises `InputError`, `OutputError`, `JournalError`, `UsageError`.
    """
    began = time.monotonic()
    with ExitStack() as files:
        photo = files.enter_context(open_photo(order.photo, order.out.parent, output.max_pixels))
        work, settings = plan_for(photo)
        check_canvas(order.photo, work.width, work.height, max_pixels=output.max_pixels, format=work.format)
        identity = photo_id(order.photo, photo.sha256, photo.info)
        given = give_prompts(order.prompts, order.photo, identity, work.grid, work.width, work.height, settings)
        for note in given.notes:
            progress.note(f"{order.photo.name}: {note}")
        fingerprint = _fingerprint(photo, settings, bundle, output, work.format, threads)
        saved = place_to_save(order.photo, order.out, output)
        journal = files.enter_context(
            Journal(
                journal_folder(order.out),
                {**fingerprint, "prompts": given.sha256},
                work.disk["total"],
                restart=output.restart,
                keep=output.resume,
            )
        )
        if journal.resumed:
            progress.note(f"{order.out.name}: going on where the last run stopped")
        job = PhotoJob(order, photo, work, given, settings, bundle, output, journal, saved, files.pop_all())
        job.seconds = time.monotonic() - began
        return job


def _fingerprint(
    photo: Photo, settings: Settings, bundle: Bundle, output: OutputConfig, format: str, threads: int
) -> dict[str, Any]:
    """What decides the result's bytes, one by one (docs/decisions.md, Sameness)."""
    return {
        "input_sha256": photo.sha256,
        **{name: value for name, value in to_dict(settings).items() if name not in UNSEEN},
        "device": torch.device(settings.device).type,
        "threads": threads,
        "bundle_sha256": bundle.sha256,
        "format": format,
        "quality": output.quality,
        "bit_depth": output.bit_depth,
        "strip_metadata": output.strip_metadata,
        "torch": torch.__version__,
        "dreamsr": __version__,
    }


def _made_by(settings: Settings, bundle: Bundle, plan: PromptPlan) -> dict[str, Any]:
    """What is recorded in the result: settings, model and version, and no path of the user's."""
    chosen = {k: v for k, v in to_dict(settings).items() if v not in (None, []) and k != "fit_batch"}
    chosen["captioner"] = Path(settings.captioner).name  # it may be a folder
    return {
        "dreamsr": __version__,
        "model": bundle.config.name,
        "bundle_sha256": bundle.sha256,
        "global_prompt": plan.global_text,
        **chosen,
    }
