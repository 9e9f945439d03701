"""One run of `dreamsr caption`: which photos, which files; then the captioner, photo by photo."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamsr_cli.cli.caption_options import CaptionRun
from dreamsr_cli.cli.console import Display, explain
from dreamsr_cli.cli.options import RunConfig
from dreamsr_cli.cli.photo_batch import PhotoBatch
from dreamsr_cli.cli.photo_sharing import Photos, PhotoSetup
from dreamsr_cli.cli.photos import Found, Job, Naming, find_photos, plan_jobs, prepare_target
from dreamsr_cli.cli.upscaling import open_verified_bundle, silence_libraries
from dreamsr_cli.config import CaptionConfig
from dreamsr_cli.errors import (
    DreamSRError,
    ProcessError,
    UsageError,
)

if TYPE_CHECKING:
    from dreamsr_cli.captioning import Captioner
    from dreamsr_cli.settings import Settings
    from dreamsr_cli.work_sharing import Crew

_LONGEST_NAME = 255


@dataclass(frozen=True)
class PromptsNaming(Naming):
    """Names of prompts files: `-o FILE.json`, or the photo's name with .prompts.json after it."""

    def target(self, item: Found) -> Path:
        from dreamsr_cli.prompts_file import prompts_name

        if self.out is not None and self.is_file:
            return self.out
        name = prompts_name(item.source)
        return item.source.with_name(name) if self.out is None else self.out / item.tree / name


class CaptioningRun(PhotoBatch):
    """Finds, plans, captions photo by photo with one open captioner, tells and counts."""

    def __init__(
        self, inputs: list[str], config: CaptionConfig, run: CaptionRun, as_json: bool, display: Display
    ) -> None:
        super().__init__(run.out, as_json, display)
        self.inputs, self.config, self.options = inputs, config, run

    def _how_to_go_on(self) -> str:
        return super()._how_to_go_on() + (", with --skip-existing" if self.done else "")

    def _run(self) -> None:
        from dreamsr_cli.images import is_photo_name

        found = find_photos(self.inputs, Path(self.out) if self.out else None, is_photo_name)
        is_file = json_is_file(self.out, found)
        self.total = len(found)
        if all(item.problem for item in found):
            for item in found:
                self._tell(item, item.problem)
            return
        silence_libraries()
        naming = PromptsNaming(Path(self.out) if self.out else None, is_file, "json", "", lambda _: 1.0)
        plan = plan_jobs(found, naming)
        self.total = len(plan)
        self.open()
        with self.captioner:
            setup = PhotoSetup(partial(helping_caption, self.config, self.options))
            for entry, outcome in Photos(plan, self, self.crew, setup).outcomes():
                self._tell(entry, outcome)

    def open(self) -> None:
        """What every photo needs: settings and captioner."""
        from dreamsr_cli.captioning import Captioner
        from dreamsr_cli.device import choose_device

        self.settings = self._settings()
        self.captioner = Captioner(self.settings.captioner, self.config, choose_device(self.settings.device))

    def _settings(self) -> Settings:
        """Size, tiles and captioner, with what the bundle decides filled in as for `upscale`."""
        from dreamsr_cli.config import UpscaleConfig
        from dreamsr_cli.settings import check_settings

        run = self.options
        asked = UpscaleConfig(
            scale=run.scale,
            long_side=run.long_side,
            short_side=run.short_side,
            tile=run.tile,
            overlap=run.overlap,
            captioner=run.captioner,
            prompt=run.prompt,
            device=run.device,
        )
        return check_settings(asked, open_verified_bundle(RunConfig(model=run.model), check=False))

    def photo(self, job: Job, crew: Crew | None) -> dict[str, Any] | DreamSRError:
        """Caption one photo; an error that concerns it alone is returned."""
        try:
            if not prepare_target(job, self.options.overwrite, self.options.skip_existing):
                return {"input": str(job.source), "output": str(job.target), "skipped": True}
            return self._write(job, self.settings, self.captioner, crew)
        except ProcessError:
            raise
        except UsageError as error:
            if self.options.long_side is None and self.options.short_side is None:
                raise  # it would be wrong for every photo
            return error
        except Exception as error:
            return explain(error, f"captioning {job.source}")

    def _write(self, job: Job, settings: Settings, captioner: Captioner, crew: Crew | None) -> dict[str, Any]:
        from dreamsr_cli.images import open_photo
        from dreamsr_cli.photo_writer import check_canvas
        from dreamsr_cli.prompts_file import write_prompts
        from dreamsr_cli.tiling import canvas_size, make_grid

        began = time.monotonic()
        part = part_file(job.target)
        with open_photo(job.source, job.target.parent, self.options.max_pixels) as photo:
            size = photo.info.width, photo.info.height
            width, height = canvas_size(*size, settings.scale, settings.long_side, settings.short_side)
            check_canvas(job.source, width, height, "png", self.options.max_pixels)  # PNG: no limit of a format
            grid = make_grid(height, width, settings.tile, settings.overlap)
            plan = captioner.plan(photo, grid, width, height, settings.prompt, part, self.display, crew)
            for note in photo.notes:
                self.display.note(f"{job.source.name}: {note}")
        write_prompts(job.target, plan)
        part.unlink(missing_ok=True)
        return {
            "input": str(job.source),
            "output": str(job.target),
            "width": width,
            "height": height,
            "tiles": len(plan.tiles),
            "shared": sum(tile.shared_with is not None for tile in plan.tiles),
            "captioner": plan.captioner.name,
            "global_prompt": plan.global_text,
            "seconds": round(time.monotonic() - began, 3),
        }


def helping_caption(config: CaptionConfig, options: CaptionRun, display: Display) -> CaptioningRun:
    """The same run in another process, which is sent its photos one by one."""
    run = CaptioningRun([], config, options, False, display)
    run.open()
    return run


def json_is_file(out: str | None, found: list[Found]) -> bool:
    """Whether `-o` names the one prompts file itself. Raises `UsageError` if it does, but can't."""
    if out is None or out.endswith(("/", os.sep)) or Path(out).is_dir():
        return False
    if Path(out).suffix.lower() != ".json":
        if os.path.lexists(out):
            raise UsageError(f"-o {out} is a file, not a folder", "name a folder, or end it in .json")
        return False
    if len(found) != 1 or not found[0].typed:
        raise UsageError(f"-o {out} names one file, but the input may be several photos", "name a folder after -o")
    return True


def part_file(target: Path) -> Path:
    """Where finished captions lie until all of them are there."""
    name = f"{target.name}.part.jsonl"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = f"{hashlib.sha256(os.fsencode(target.name)).hexdigest()}.part.jsonl"
    return target.with_name(name)
