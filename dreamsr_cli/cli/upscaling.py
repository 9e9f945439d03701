"""One run of `dreamsr upscale`: which photos, which results, whose prompts; then the engine, photo by photo."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamsr_cli.cli.console import Display, explain
from dreamsr_cli.cli.options import RunConfig, UpscaleOptions
from dreamsr_cli.cli.photo_batch import PhotoBatch
from dreamsr_cli.cli.photo_sharing import Photos, PhotoSetup
from dreamsr_cli.cli.photos import (
    EXTENSIONS,
    Found,
    Job,
    Naming,
    find_photos,
    format_of,
    out_is_file,
    plan_jobs,
    prepare_target,
    refuse_depth,
)
from dreamsr_cli.cli.plan import Planner, plan_table
from dreamsr_cli.cli.prompt_paths import PromptPaths
from dreamsr_cli.config import OutputConfig
from dreamsr_cli.errors import (
    DreamSRError,
    ProcessError,
    UsageError,
)
from dreamsr_cli.progress import Progress, SilentProgress
from dreamsr_cli.weights import BUILTIN, BUILTIN_FOLDER, file_sha256, lock_entry, verify

if TYPE_CHECKING:
    from dreamsr_cli.engine import Engine, Order, UpscaleResult
    from dreamsr_cli.models.bundle import Bundle
    from dreamsr_cli.settings import Settings
    from dreamsr_cli.work_sharing import Crew


class Upscaling(PhotoBatch):
    """One run of the command: finds, plans, sends the photos through one engine, tells and counts."""

    def __init__(
        self, inputs: list[str], options: UpscaleOptions, as_json: bool, display: Display, dry_run: bool = False
    ) -> None:
        super().__init__(options.run.out, as_json, display)
        self.inputs, self.options, self.dry_run = inputs, options, dry_run

    def _writes_nothing(self) -> bool:
        return self.dry_run

    def _text(self, outcome: dict[str, Any]) -> str:
        return plan_table(outcome) if self.dry_run else super()._text(outcome)

    def _run(self) -> None:
        from dreamsr_cli.images import is_photo_name

        found = find_photos(self.inputs, Path(self.out) if self.out else None, is_photo_name)
        is_file = out_is_file(self.out, found, is_photo_name)
        output = self._output(is_file)
        self.total = len(found)
        if all(item.problem for item in found):
            for item in found:
                self._tell(item, item.problem)
            return
        silence_libraries()
        from dreamsr_cli.engine import check_settings

        bundle = open_verified_bundle(self.options.run, check=not self.dry_run, progress=self.display)
        settings = check_settings(self.options.config, bundle)
        if settings.memory is not None:
            self.display.note(settings.memory)
        self.planner = Planner(bundle, self.options.config, output, len(found)) if self.dry_run else None
        self.bundle, self.output = bundle, output
        out = Path(self.out) if self.out else None
        naming = Naming(out, is_file, output.format, output.suffix, self._factor(bundle.config.scale))
        plan = plan_jobs(found, naming)
        refuse_depth(plan, output.bit_depth)
        self.total = len(plan)
        jobs = sum(isinstance(entry, Job) for entry in plan)
        self.prompt_paths = PromptPaths(self.options.run, jobs)
        run = self.options.run
        texts = tuple(Path(os.path.expanduser(named)) for named in (run.prompts, run.prompt_dir) if named)
        if self.planner is None and self.crew is None:
            self._line(plan, jobs)
            return
        setup = PhotoSetup(partial(helping_upscale, self.options))
        with nullcontext() if self.planner else self._opened(jobs):
            for entry, outcome in Photos(plan, self, self.crew, setup, texts).outcomes():
                self._tell(entry, outcome)

    def photo(self, job: Job, crew: Crew | None) -> dict[str, Any] | DreamSRError:
        """Plan or upscale one photo; an error that concerns it alone is returned."""
        return self._plan(job, self.planner) if self.planner else self._upscale(job, crew)

    def _output(self, is_file: bool) -> OutputConfig:
        """The output settings; with `-o FILE` its extension decides the format."""
        output = self.options.output
        if not is_file or self.out is None:
            return output
        if self.options.typed("suffix"):
            raise UsageError("--suffix has no meaning with -o FILE", "leave out --suffix, or name a folder after -o")
        if self.options.typed("format") and output.format not in ("auto", format_of(Path(self.out))):
            hint = f"end the name in {EXTENSIONS[output.format][0]}, or leave out --format"
            raise UsageError(f"--format {output.format} contradicts -o {self.out}", hint)
        return replace(output, format="auto")

    def _factor(self, bundle_scale: int) -> Callable[[Path], float]:
        config = self.options.config

        def factor(photo: Path) -> float:
            if config.long_side is None and config.short_side is None:
                return config.scale or bundle_scale
            sides = header_size(photo)
            if config.long_side is not None:
                return config.long_side / max(sides)
            return (config.short_side or 0) / min(sides)

        return factor

    def _order(self, job: Job, progress: Progress) -> Order | dict[str, Any]:
        """What to ask the engine for; the outcome of a photo that needs no work."""
        from dreamsr_cli.engine import Order

        if not prepare_target(job, self.output.overwrite, self.output.skip_existing):
            return {"input": str(job.source), "output": str(job.target), "skipped": True}
        return Order(job.source, job.target, self._prompts_of(job, progress))

    def _finish(self, result: UpscaleResult, progress: Progress) -> dict[str, Any]:
        return {**result.to_json(), **(self._report(result, self.output, progress) if self.output.report else {})}

    def make_engine(self, photos: int) -> Engine:
        """The engine of a run over so many photos."""
        from dreamsr_cli.engine import Engine

        return Engine(self.bundle, self.options.config, self.output, photos)

    @contextmanager
    def _opened(self, photos: int) -> Generator[Engine]:
        """The engine of this run, whose networks stay open between photos where memory allows."""
        with self.make_engine(photos) as engine:
            if engine.residency.sentence is not None:
                self.display.note(engine.residency.sentence)
            self.engine = engine
            yield engine

    def _upscale(self, job: Job, crew: Crew | None) -> dict[str, Any] | DreamSRError:
        """One photo after another, with other processes."""
        try:
            order = self._order(job, self.display)
            if isinstance(order, dict):
                return order
            with self.engine.read(order, self.display, crew) as opened:
                self.engine.compute(opened, self.display, crew)
                return self._finish(opened.write(), self.display)
        except (UsageError, ProcessError):
            raise  # it would be wrong for every photo
        except Exception as error:
            return explain(error, f"upscaling {job.source}")

    def _line(self, plan: list[Job | Found], photos: int) -> None:
        """One photo after another, reading and writing beside the computing."""
        from dreamsr_cli.cli.photo_line import PhotoLine

        with self._opened(photos) as engine:
            PhotoLine(engine, plan, self._order, self._finish, self.display, self._tell).run()

    def _report(self, result: UpscaleResult, output: OutputConfig, progress: Progress) -> dict[str, Any]:
        """Write the page beside the result; its path and figures."""
        from dreamsr_cli.evaluation.fidelity import fidelity_report
        from dreamsr_cli.evaluation.fidelity_page import write_fidelity_page
        from dreamsr_cli.tiling import make_grid

        size = (result.width, result.height)
        grid = make_grid(result.height, result.width, result.settings.tile, result.settings.overlap)
        found = fidelity_report(result.input, result.output, grid, size, progress, output.max_pixels)
        page = result.output.with_name(result.output.name + ".report.html")
        write_fidelity_page(found, page)
        return {"report": str(page), "fidelity": found.to_json()}

    def _plan(self, job: Job, planner: Planner) -> dict[str, Any] | DreamSRError:
        try:
            return {**planner.plan(job), **self._plan_prompts(job, planner.settle(job)[0])}
        except UsageError:
            raise  # it would be wrong for every photo
        except Exception as error:
            return explain(error, f"planning {job.source}")

    def _prompts_of(self, job: Job, progress: Progress) -> Path | None:
        path = self.prompt_paths.of(job)
        if path is None and self.options.run.prompt_dir:
            progress.note(f"{job.source.name}: no prompts in {self.options.run.prompt_dir}, it is described")
        return path

    def _plan_prompts(self, job: Job, settings: Settings) -> dict[str, Any]:
        """Read and fit the photo's prompts as the run would; which file they come from, and notes."""
        from dreamsr_cli.images import read_info
        from dreamsr_cli.planning import target_size
        from dreamsr_cli.prompts import photo_id
        from dreamsr_cli.prompts_in_use import give_prompts
        from dreamsr_cli.tiling import make_grid

        path, info = self._prompts_of(job, self.display), read_info(job.source)
        width, height = target_size(job.source, info, settings)
        grid = make_grid(height, width, settings.tile, settings.overlap)
        photo = photo_id(job.source, file_sha256(job.source), info)
        given = give_prompts(path, job.source, photo, grid, width, height, settings)
        for note in given.notes:
            self.display.note(f"{job.source.name}: {note}")
        return {"prompts": None if path is None else str(path), "notes": list(given.notes)}


def helping_upscale(options: UpscaleOptions, display: Display) -> Upscaling:
    """The same run in another process, which is sent its photos one by one."""
    run = Upscaling([], options, False, display)
    run.bundle = open_verified_bundle(options.run, progress=display)
    run.output, run.planner = options.output, None
    run.engine = run.make_engine(2)  # lives as long as this process
    run.prompt_paths = PromptPaths(options.run, 2)  # whole photos are shared out only where there are several
    return run


def header_size(photo: Path) -> tuple[int, int]:
    """Width and height, without decoding the pixels. Raises `InputError`."""
    from dreamsr_cli.images import read_info

    info = read_info(photo)
    return info.width, info.height


def open_verified_bundle(run: RunConfig, check: bool = True, progress: Progress | None = None) -> Bundle:
    """The bundle that `--model` and `--weights` name; a repository is fetched, and the built-in one is checked against
    weights.lock first, unless its weights are not to be read at all."""
    from dreamsr_cli.bundle_state import refuse_lacking
    from dreamsr_cli.models.bundle import open_bundle
    from dreamsr_cli.run_weights import local_run

    fetching = (progress or SilentProgress()) if check else None
    weights = None if run.weights is None else str(local_run(run.weights, fetching))
    # A run's bundle names its base.
    bundle = open_bundle(run.model or (None if weights else BUILTIN), weights)
    own = bundle.folder == BUILTIN_FOLDER or any(part.bundle == BUILTIN for part in bundle.config.parts.values())
    if check:
        refuse_lacking(bundle.config)
    if own and check:
        verify(BUILTIN_FOLDER, lock_entry(BUILTIN))
    return bundle


def silence_libraries() -> None:
    """Keep diffusers' and transformers' import-time remarks off stderr; what the user has set stays."""
    for variable in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # torchao, where it is installed, and torch about torchao.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
