"""The whole method as one function: figure 2 of the paper, from a photo on disk to a larger photo on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

import torch

from dreamsr_cli.backoff import smaller_tile
from dreamsr_cli.bundle_sizes import read_sizes
from dreamsr_cli.canvas import STRIP
from dreamsr_cli.captioning import WEIGHTLESS, Captioner
from dreamsr_cli.config import AUTO, CaptionConfig, OutputConfig, UpscaleConfig
from dreamsr_cli.device import choose_device, choose_dtype, dtype_name
from dreamsr_cli.errors import DeviceError
from dreamsr_cli.images import Photo, PhotoInfo, read_info
from dreamsr_cli.looks import settle_looks
from dreamsr_cli.machine import describe_machine
from dreamsr_cli.models.bundle import Bundle
from dreamsr_cli.models.open_parts import TEXT_ENCODER, OpenParts
from dreamsr_cli.models.quantization import MemoryMode
from dreamsr_cli.photo_compute import restore, write_pixels
from dreamsr_cli.photo_job import Order, PhotoJob, UpscaleResult, read_photo
from dreamsr_cli.planning import Plan, target_size
from dreamsr_cli.planning import plan as plan_work
from dreamsr_cli.progress import Progress, SilentProgress
from dreamsr_cli.residency import decide_residency, fits_beside
from dreamsr_cli.settings import Settings, check_settings
from dreamsr_cli.texts_ahead import TEXT_BYTES, TextsAhead, texts_of
from dreamsr_cli.tile_choice import settle_tile
from dreamsr_cli.tile_work import Texts
from dreamsr_cli.work_sharing import Crew
from dreamsr_cli.workload import Limits

__all__ = ["Engine", "Order", "Settings", "UpscaleResult", "check_settings", "upscale"]


def upscale(
    photo_path: Path,
    out_path: Path,
    bundle: Bundle,
    config: UpscaleConfig,
    output: OutputConfig,
    progress: Progress,
    prompts: Path | None = None,
    crew: Crew | None = None,
) -> UpscaleResult:
    """Restore `photo_path` at a larger size and write `out_path`, whole or not at all.

    Work lies in a journal beside the output: the same call goes on where a killed one stopped. `prompts` is a file with
    this photo's prompts, which the captioner then doesn't make; `crew` are other processes that share in the work.
    Raises `UsageError` for settings that make no sense with this bundle, `InputError`, `OutputError`, `JournalError`,
    `WeightsError`, `DeviceError`, `ProcessError`.
    """
    with Engine(bundle, config, output) as engine:
        return engine.upscale(Order(photo_path, out_path, prompts), progress, crew)


class Engine:
    """One bundle and one set of settings for one photo after another; a context manager.

    Networks stay open between photos where memory allows (`residency`); that changes no byte of a result.
    """

    def __init__(
        self, bundle: Bundle, config: UpscaleConfig, output: OutputConfig, photos: int = 1, memory: str | None = None
    ) -> None:
        """`photos`: about how many will come; `memory`: bytes to stay within ("24GB") where the settings name none.

        Raises `UsageError` for settings that make no sense with this bundle, `DeviceError`, `WeightsError`.
        """
        settings = check_settings(config, bundle)
        self.device = choose_device(settings.device)
        dtype = choose_dtype(settings.precision, self.device)
        self.settings = dataclasses.replace(settings, device=str(self.device), precision=dtype_name(dtype))
        self.bundle, self.output = bundle, output
        self._sizes = read_sizes(bundle.config, bundle.part_folder)
        # Opened here: photos are read in another thread, and diffusers opens networks in one thread at a time only (it
        # makes every module that is built meanwhile one without weights).
        self._judge = bundle.open_cleanliness() if settings.looks == AUTO else None
        self._threads = torch.get_num_threads()
        self._limits = Limits(STRIP)
        machine = describe_machine(self.device, self.settings.precision, measure=False)
        self._free_before, self._memory = machine.memory, config.memory
        mode = MemoryMode(settings.quantize, settings.offload)
        self.residency = decide_residency(
            self._sizes,
            mode,
            machine,
            settings.largest_tile,
            settings.tile_batch,
            self._limits,
            photos,
            config.memory or memory,
        )
        self.parts = OpenParts(bundle, self.device, dtype, mode, self.residency.keep)
        self.ahead = TextsAhead()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.parts.close()

    def upscale(self, order: Order, progress: Progress, crew: Crew | None = None) -> UpscaleResult:
        """One photo, whole or not at all: see the function `upscale`."""
        with self.read(order, progress, crew) as job:
            self.compute(job, progress, crew)
            return job.write()

    # ---------------------------------------------------------------- one photo in three turns

    def read(self, order: Order, progress: Progress, crew: Crew | None = None) -> PhotoJob:
        """Decode, plan and describe a photo; the job is the caller's to compute and write, or to leave.

        Raises `InputError`, `OutputError`, `JournalError`, `UsageError`; for captioners `WeightsError`, `DeviceError`.
        """
        ready = self.ahead.plans.get(order.out)
        if ready is None and self._captions:
            self.parts.close()  # the captioner needs their room
        job = self._open(order, progress)
        with ExitStack() as guard:
            guard.push(job)
            progress.phase("describe", 1)
            job.describe(self.device, progress, None, ready, crew)
            progress.advance()
            guard.pop_all()
        return job

    def read_ahead(self, order: Order, present: Plan, progress: Progress) -> PhotoJob | None:
        """`read` while another photo, planned as `present`, is computed; None where this one has to wait for its
        turn. For another thread."""
        if self._captions and order.out not in self.ahead.plans:
            return None
        info = read_info(order.photo)
        if not fits_beside(present, self._plan(order, info)[0], info, self._free_before):
            return None
        return self.read(order, progress)

    def compute(self, job: PhotoJob, progress: Progress, crew: Crew | None = None) -> None:
        """All work of the networks, up to the last row of the result; `crew` are other processes that share in it.
        Raises `WeightsError`, `DeviceError`, `OutputError`, `ProcessError`."""
        with job.timed():
            try:
                self._compute(job, progress, crew)
            except torch.OutOfMemoryError as error:
                if not self.parts.make_room():
                    raise self._too_small(job) from error
            else:
                return
            progress.note(f"out of memory on {self.device}: from now on networks are opened one after the other")
            try:
                self._compute(job, progress, crew)
            except torch.OutOfMemoryError as error:
                raise self._too_small(job) from error

    def _compute(self, job: PhotoJob, progress: Progress, crew: Crew | None) -> None:
        z_0 = restore(job, self.parts, self._texts, progress, crew)
        self.parts.release()
        write_pixels(job, self.parts, z_0, progress, crew)
        self.parts.release()
        job.cleaned = None
        job.photo.close()
        for note in job.late_notes:
            progress.note(f"{job.order.photo.name}: {note}")

    # ---------------------------------------------------------------- texts of many photos

    @property
    def wants_preparing(self) -> bool:
        """Whether the texts of several photos should be made together, before the first of them is computed."""
        return self._captions or TEXT_ENCODER not in self.residency.keep

    def prepare(self, orders: Sequence[Order], progress: Progress) -> int:
        """Describe and embed the texts of the next photos, until `TEXT_BYTES`; how many orders were looked at.

        What is wrong with a photo is left to its own turn. Captions are kept in the photos' journals.
        """
        self.parts.close()
        self.ahead.clear()
        looked_at, most = 0, self._lengths[0]
        progress.phase("describe", len(orders))
        with Captioner(self.settings.captioner, CaptionConfig(), self.device) as captioner:
            for order in orders:
                looked_at += 1
                with suppress(Exception), self._open(order, SilentProgress()) as job:
                    job.describe(self.device, progress, captioner, None)
                    self.ahead.plans[order.out] = job.plan
                progress.advance()
                width, itemsize = self._sizes.text.width, self.parts.dtype.itemsize
                if self.ahead.waiting() * most * width * itemsize > TEXT_BYTES:
                    break
        if self.ahead.plans and TEXT_ENCODER not in self.residency.keep:
            self.ahead.embed(self.parts.text_encoder(), *self._lengths)
            self.parts.release()
        return looked_at

    def _texts(self, job: PhotoJob, progress: Progress) -> tuple[Texts, bool]:
        """Embeddings of the global and of every local prompt, and whether padding is masked. What was cut is noted."""
        plan, (most, buckets) = job.plan, self._lengths
        found, mask_pads = self.ahead.find(texts_of(plan)), self.ahead.masks_pads
        if found is None:
            if TEXT_ENCODER not in self.parts.keep:
                self.parts.close()
            encoder = self.parts.text_encoder()
            found, mask_pads = encoder.encode(texts_of(plan), most, buckets), not encoder.pads_are_seen
            del encoder
            self.parts.release()
        embeddings, cut = found
        for index in cut:
            box = list(plan.tiles[index - 1].box) if index else None
            which = f"the prompt of tile {index - 1}, {box}," if index else "the global prompt"
            job.notes.append(f"{which} is longer than {most} tokens and was cut")
            progress.note(job.notes[-1])
        local_to_both = self.settings.prompt_mode == "local"
        return Texts(embeddings[0], embeddings[1:], local_to_both, most, buckets), mask_pads

    @property
    def _lengths(self) -> tuple[int, tuple[int, ...]]:
        """Tokens at which prompts are cut, and lengths they may be padded to."""
        return self._sizes.text_lengths(self.settings.text_bucket)

    @property
    def _captions(self) -> bool:
        """Whether a network writes the captions."""
        return self.settings.captioner not in WEIGHTLESS

    def _open(self, order: Order, progress: Progress) -> PhotoJob:
        return read_photo(
            order,
            lambda photo: self._plan(order, photo.info, self._looks(order, photo, progress)),
            self.bundle,
            self.output,
            self._threads,
            progress,
        )

    def _looks(self, order: Order, photo: Photo, progress: Progress) -> Settings:
        """The settings with what the photo's looks decide."""
        width, _ = target_size(order.photo, photo.info, self.settings)
        settings, sentence = settle_looks(photo, width, self.settings, self._judge)
        if sentence is not None:
            progress.note(f"{order.photo.name}: {sentence}")
        return settings

    def _plan(self, order: Order, info: PhotoInfo, settings: Settings | None = None) -> tuple[Plan, Settings]:
        """The photo's plan, and the settings with what only a photo decides."""
        machine = describe_machine(self.device, self.settings.precision, measure=False)
        about = (order.photo, info, order.out)
        known = (self._sizes, machine, self._limits)
        settings, _ = settle_tile(settings or self.settings, self._memory, *about, self.output, *known)
        work = plan_work(*about, settings, self.output, *known)
        return work, dataclasses.replace(settings, tile_batch=work.tile_batch) if settings.fit_batch else settings

    def _too_small(self, job: PhotoJob) -> DeviceError:
        hint = f"use --tile-batch 1, or --tile {smaller_tile(job.grid.tile_width)} with --restart"
        return DeviceError(f"{job.order.photo}: out of memory on {self.device}", hint)
